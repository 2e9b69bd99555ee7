"""`unitok train CONFIG [key.sub=value ...]`: check the config, open the folder, run the stage."""

import argparse
import importlib

from open_unitok.errors import UserError, did_you_mean

from . import config as configs
from .options import RunConfig
from .runfolder import RunFolder

# stage -> (module and class of its config, module of its loop); the loop's module is imported only to train
STAGES = {
    "tokenizer": ("tokenizer_config", "TokenizerRun", "tokenizer_stage"),
    "mllm": ("mllm_config", "MLLMRun", "mllm_stage"),
}


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
    config = load(args.config, args.overrides)
    folder = RunFolder.open(config)
    if folder.finished:
        print(f"{config.out} is finished: {folder.model}")
        return
    stage = importlib.import_module(f"{__package__}.{STAGES[config.stage][2]}")
    try:
        stage.main(config, folder)
    except UserError:
        folder.abandon()
        raise
    from .engine import finish

    finish()


def load(path: str, overrides: list[str]) -> RunConfig:
    """The checked config of a run.

    Raises:
        UserError: anything wrong with it.
    """
    raw = configs.read(path, overrides)
    stage = raw.get("stage")
    if stage not in STAGES:
        hint = did_you_mean(str(stage), STAGES)
        raise UserError(f"{path}: stage is {stage!r}.{hint}")
    module, name, _ = STAGES[stage]
    cls = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return configs.build(cls, raw)
