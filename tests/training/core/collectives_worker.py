"""Launched by torchrun in the tests: runs the jobs of a JSON file and records every collective operation.

[{"config", "overrides": [...], "record": file}, ...]; the file of each rank gets one JSON line per operation.
"""

import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.training import run
from open_unitok.training.core import deepspeed_engine, stop_signal
from open_unitok.training.core.metric_logger import MetricLogger
from open_unitok.training.core.run_dir import RunDir


class Collectives(TorchDispatchMode):
    """Records operation, dtype, elements, the module that asked for it, and the step it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 1, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in str(func):
            tensors = [t for a in args[:2] for t in (a if isinstance(a, list) else [a])]
            # of an all-gather or reduce-scatter the longer one, which has the data of all ranks
            most = max((t for t in tensors if isinstance(t, torch.Tensor)), key=torch.Tensor.numel)
            self.found.append(
                {
                    "step": self.step,
                    "operation": func.__name__.split(".")[0],
                    "dtype": str(most.dtype).removeprefix("torch."),
                    "elements": most.numel(),
                    "by": asking_module(),
                }
            )
        return func(*args, **(kwargs or {}))


def asking_module() -> str:
    """The innermost module of DeepSpeed or of ours on the stack, without the helpers of `distributed`."""
    frame = sys._getframe(1)
    while frame:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("deepspeed.runtime", "open_unitok.")) and not name.endswith("core.distributed"):
            return name
        frame = frame.f_back
    return "?"


def main() -> None:
    stop_signal.ASK_SECONDS = 1e9  # however slow a step is here, ranks then ask after 1, 3, 7, ... steps
    add = MetricLogger.add
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = run.load_run_config(job["config"], job["overrides"])
        stage = importlib.import_module(f"open_unitok.training.{config.stage}.train")
        with Collectives() as recorded:

            def next_step(self: MetricLogger, step: int, values: Any) -> None:
                add(self, step, values)
                recorded.step = step + 1

            MetricLogger.add = next_step
            stage.main(config, RunDir.open(config))
        lines = "".join(json.dumps(found) + "\n" for found in recorded.found)
        Path(f"{job['record']}.{torch.distributed.get_rank()}").write_text(lines)
        gc.collect()
    deepspeed_engine.exit_process()


if __name__ == "__main__":
    main()
