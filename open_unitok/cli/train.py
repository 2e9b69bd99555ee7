"""`unitok train CONFIG [key.sub=value ...]`: train a stage from a YAML."""

import argparse
import importlib

from open_unitok.core.errors import UserError
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.run import STAGES, load_run_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The config and what to change in it."""
    parser.add_argument(
        "config", help="a YAML file, or one shipped with the package (configs/demo/tokenizer.yaml)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change single keys; values are YAML"
    )


def run(args: argparse.Namespace) -> None:
    """Train, or go on, or say that the run is finished."""
    config = load_run_config(args.config, args.overrides)
    folder = RunDir.open(config)
    if folder.finished:
        print(f"{config.out} is finished: {folder.model}")
        return
    stage = importlib.import_module(f"open_unitok.training.{STAGES[config.stage][2]}")
    try:
        stage.main(config, folder)
    except UserError:
        folder.discard()
        raise
    from open_unitok.training.core.deepspeed_engine import exit_process

    exit_process()
