"""`unitok train CONFIG [key.sub=value ...]`: train a stage from a YAML config."""

import argparse
import contextlib
import importlib

from open_unitok.core.errors import STORAGE_ERRORS, StorageError, UserError
from open_unitok.training.core.options import RunConfig
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
    with contextlib.closing(RunDir.open(config)) as run_dir:
        if run_dir.finished:
            print(f"{config.out} is finished: {run_dir.model}")
            return
        train(config, run_dir)
    # loads torch and deepspeed
    from open_unitok.training.core.deepspeed_engine import exit_process

    exit_process()


def train(config: RunConfig, run_dir: RunDir) -> None:
    """Run the loop of the config's stage."""
    # only the stage of this config is imported
    stage = importlib.import_module(f"open_unitok.training.{TRAINING_STAGES[config.stage][2]}")
    try:
        stage.main(config, run_dir)
    except UserError:
        # invalid config or data: remove a new run directory, which would block the corrected run
        run_dir.discard()
        raise
    except OSError as error:  # metrics and TensorBoard; checkpoints have a message of their own
        if error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(
            f"Cannot write into {config.out} ({error.strerror}): make room and run the same command again to "
            "resume from the last checkpoint."
        ) from error
