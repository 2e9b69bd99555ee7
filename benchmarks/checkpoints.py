"""How long a checkpoint stops training: written in the step, or in the background from a copy on the host.

    python benchmarks/checkpoints.py                       # 4 M parameters: 64 MB in all

One process, AdamW, ZeRO 0 and 2, on the disk of --folder. Both ways alternate; the median of --repeats is
reported. "stall": seconds until the next step can begin; "whole": until the checkpoint is complete on disk.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, load_average, processor_name, result_file, write_results
from safetensors.torch import save_file
from torch import nn

from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.checkpoint import Checkpoints
from open_unitok.training.core.options import CheckpointOptions, EngineOptions, Optimizer
from open_unitok.training.core.saving.background import to_host


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=4, help="of parameters (default: 4)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed_engine.init_distributed(EngineOptions(threads=1), 0)
    results: dict[str, Any] = {}
    for stage in (0, 2):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            results[f"zero {stage}"] = measure(Path(folder), stage, args.millions, args.repeats)
    write_results(result_file("checkpoints", processor_name(), args.out), results)
    print(f"load average {load_average()}")
    for name, row in results.items():
        print(name, row)
    deepspeed_engine.exit_process()


def measure(folder: Path, stage: int, millions: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both ways, and the ratio of their stalls."""
    engine = build_engine(stage, millions)
    ways = {
        name: Checkpoints(folder / name, CheckpointOptions(background=name == "background", keep=1))
        for name in ("in the step", "background")
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for step in range(1, repeats + 1):
        for name, checkpoints in ways.items():
            start = time.perf_counter()
            checkpoints.save(
                step, partial(write, engine), {"model": engine}, {}, False, partial(snapshot, engine)
            )
            stall = time.perf_counter() - start
            checkpoints.wait()
            seconds[name].append((stall, time.perf_counter() - start))
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in engine.module.parameters())}
    for name, found in seconds.items():
        stall, whole = (statistics.median(values) for values in zip(*found))
        row[name] = {"stall": round(stall, 3), "whole": round(whole, 3)}
    return row | {"ratio": round(row["in the step"]["stall"] / row["background"]["stall"], 1)}


def build_engine(stage: int, millions: int) -> Any:
    """A DeepSpeed engine around linear layers of 4 M parameters, after one step."""
    module = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(max(1, millions // 4))))
    optimizer, options = Optimizer(), EngineOptions(zero_stage=stage)  # pyright: ignore
    groups = deepspeed_engine.parameter_groups(module, 0.1)
    engine = deepspeed_engine.build_engine(module, groups, optimizer, options, 1)
    engine.backward(engine(torch.ones(1, 2048)).square().mean())
    deepspeed_engine.optimizer_step(engine)
    return engine


def write(engine: Any, folder: Path) -> None:
    save_file(engine.module.state_dict(), folder / "model.safetensors")


def snapshot(engine: Any, folder: Path) -> Any:
    return partial(save_file, to_host(engine.module.state_dict()), folder / "model.safetensors")


if __name__ == "__main__":
    main()
