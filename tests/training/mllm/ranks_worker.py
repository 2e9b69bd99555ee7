"""Launched by torchrun in the tests: runs the MLLM runs of a JSON file one after the other.

[{"config", "overrides": [...], "memory": null or a file for the bytes of live tensors in step 2}, ...]
"""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from open_unitok.training import run
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.mllm import train


def live_bytes() -> int:
    """Summed sizes of the storages of all live tensors."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measured(path: str | None, before: int) -> Callable[[Any], Any]:
    """`optimizer_step` that also writes live bytes beyond `before` to a file when step 2 has gradients."""
    calls = []

    def step(trained: Any) -> Any:
        calls.append(None)
        if path and len(calls) == 2:
            Path(f"{path}.{torch.distributed.get_rank()}").write_text(str(live_bytes() - before))
        return original(trained)

    return step


original = deepspeed_engine.optimizer_step


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = run.load_run_config(job["config"], job["overrides"])
        deepspeed_engine.optimizer_step = measured(job.get("memory"), live_bytes())
        train.main(config, RunDir.open(config))
        gc.collect()
    deepspeed_engine.exit_process()


if __name__ == "__main__":
    main()
