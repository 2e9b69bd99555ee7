"""`unitok train CONFIG [key.sub=value ...]`: train a stage from a YAML config."""

import argparse
import importlib

from open_unitok.core.errors import UserError
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.run import TRAINING_STAGES, load_run_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key.sub=value ...]."""
    parser.add_argument("config", help="YAML file, or a shipped one, e.g. configs/demo/tokenizer.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="override single keys; values are YAML"
    )


def run(args: argparse.Namespace) -> None:
    """Train from the start or from the last checkpoint, unless the run is finished."""
    config = load_run_config(args.config, args.overrides)
    run_dir = RunDir.open(config)
    if run_dir.finished:
        print(f"{config.out} is finished: {run_dir.model}")
        return
    # only the stage of this config is imported
    stage = importlib.import_module(f"open_unitok.training.{TRAINING_STAGES[config.stage][2]}")
    try:
        stage.main(config, run_dir)
    except UserError:
        # invalid config or data: remove a new run directory, which would block the corrected run
        run_dir.discard()
        raise
    # loads torch and deepspeed
    from open_unitok.training.core.deepspeed_engine import exit_process

    exit_process()
