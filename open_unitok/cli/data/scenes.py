"""`unitok data scenes`: render captioned scenes of coloured shapes: training shards and a test split."""

import argparse
from dataclasses import fields
from typing import Any

from open_unitok.training.scenes.config import SceneConfig, parse_shares, with_values
from open_unitok.training.scenes.dataset import load_config, write_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out DIR and one option per field of `SceneConfig`."""
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--config", help="YAML of settings; options override it")
    parser.add_argument("--overwrite", action="store_true", help="replace scenes of another config")
    # no argparse defaults: options that are not given must not override --config
    for field in fields(SceneConfig):
        default, what = getattr(SceneConfig(), field.name), field.metadata["help"]
        if isinstance(default, dict):
            shown = " ".join(f"{kind}={share:g}" for kind, share in default.items())
            what, shares = f"{what} (default: {shown})", "KIND=SHARE"
            parser.add_argument(_option(field.name), nargs="+", metavar=shares, help=what)
        elif isinstance(default, tuple):
            # the element type cannot be derived from an empty default
            kind: Any = str if field.name in ("size_names", "textures") else float
            shown = " ".join(f"{d:g}" if kind is float else d for d in default) or "none"
            parser.add_argument(_option(field.name), nargs="+", type=kind, help=f"{what} (default: {shown})")
        elif isinstance(default, bool):
            on_off, what = argparse.BooleanOptionalAction, f"{what} (default: {'yes' if default else 'no'})"
            parser.add_argument(_option(field.name), action=on_off, default=None, help=what)
        else:
            parser.add_argument(_option(field.name), type=type(default), help=f"{what} (default: {default})")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(args: argparse.Namespace) -> None:
    """Render the scenes that DIR does not have yet."""
    config = load_config(args.config)
    # None = not given: the config file's value stays
    given = {f.name: getattr(args, f.name) for f in fields(SceneConfig) if getattr(args, f.name) is not None}
    if "question_shares" in given:
        given["question_shares"] = parse_shares(given["question_shares"])
    config = with_values(config, given)
    done = write_scenes(config, args.out, overwrite=args.overwrite)
    counts = f"{config.train:,} training and {config.test:,} test scenes"
    print(f"{args.out}: {counts}{'' if done else ', already exist'}")
