"""Launched by torchrun in the tests: runs the tokenizer runs of a JSON file one after the other.

[{"config", "overrides": [...]}, ...]
"""

import gc
import json
import sys
from pathlib import Path

from open_unitok.training import run
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.tokenizer import train


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = run.load_run_config(job["config"], job["overrides"])
        train.main(config, RunDir.open(config))
        gc.collect()
    deepspeed_engine.exit_process()


if __name__ == "__main__":
    main()
