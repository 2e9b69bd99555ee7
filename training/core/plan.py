"""What the plans of all stages share: memory of a rank under ZeRO, the speed of a CPU, the report."""

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .options import EngineOptions

REDUCE_BUCKET_SIZE = 500_000_000  # DeepSpeed's default, where `engine.deepspeed` does not set it
MEASURED_SIZE = 1024  # rows and columns of the matrices that measure a CPU


class Memory(NamedTuple):
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float  # DeepSpeed's: the bucket in which gradients are reduced, gathered weights
    activations: float

    @property
    def states(self) -> float:
        """Bytes that stay allocated between steps."""
        return self.parameters + self.gradients + self.optimizer


def engine_memory(
    engine: EngineOptions, stage: int, ranks: int, trained: float, frozen: float, activations: float
) -> Memory:
    """Bytes on one rank under a ZeRO stage, before ZeRO 3 shards the weights.

    Args:
        trained, frozen: bytes of the weights; those that are trained are fp32.
    """
    zero = engine.deepspeed.get("zero_optimization", {})
    shards = ranks if stage else 1
    gradients = trained / shards
    # ZeRO 1 shards gradients only once the last micro-batch has been added
    if stage == 1 and engine.accumulation > 1:
        gradients = trained
    # two moments, and from ZeRO 1 on a sharded fp32 copy of the weights
    optimizer = (3 if stage else 2) * trained / shards
    bucket, buffers = float(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)), 0.0
    if stage == 3:
        buffers = 4.0 * bucket
    elif stage == 2 or (stage == 1 and ranks > 1):
        buffers = 4.0 * min(bucket, max(trained / 4, 1.0))
    return Memory(trained + frozen, gradients, optimizer, buffers, activations)


def cpu_tflops(dtype: str) -> float:
    """TFLOP/s of matrix products on this machine's CPU, measured for half a second."""
    kind = getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(dtype, "float32"))
    left = right = torch.ones(MEASURED_SIZE, MEASURED_SIZE, dtype=kind)
    torch.matmul(left, right)  # the first one allocates
    count, start = 0, time.monotonic()
    while (seconds := time.monotonic() - start) < 0.5 or not count:
        torch.matmul(left, right)
        count += 1
    return 2 * MEASURED_SIZE**3 * count / seconds / 1e12


def describe_parameters(parameters: Mapping[str, tuple[int, int]]) -> list[str]:
    """Lines on part -> (all, trained) parameters."""
    total, trained = (sum(sizes) for sizes in zip(*parameters.values()))
    lines = [f"parameters {total / 1e6:,.1f} M, of which {trained / 1e6:,.1f} M are trained"]
    width = max(map(len, parameters))
    for name, (count, count_trained) in parameters.items():
        lines.append(f"  {name:<{width}} {count / 1e6:10,.1f} M {count_trained / 1e6:10,.1f} M trained")
    return lines


def describe_memory(memory: Mapping[int, Memory], engine: EngineOptions, ranks: int) -> list[str]:
    """Lines on ZeRO stage -> memory of one rank; the stage of the run is marked."""
    host = {
        "none": "",
        "optimizer": "; optimizer and gradients are on the host",
        "parameters": "; only buffers and activations are on the GPU",
    }
    largest = max(sum(found) for found in memory.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    lines = ["", f"{name} per rank on {ranks}{host[engine.offload]}"]
    lines.append("  ZeRO " + "".join(f"{field:>13}" for field in [*Memory._fields, "total"]))
    for stage, found in memory.items():
        mark = "*" if stage == engine.zero_stage else " "
        values = "".join(f"{value / unit:13,.2f}" for value in [*found, sum(found)])
        lines.append(f"{mark} {stage:>4} {values}")
    return lines


def describe_hours(hours: float, unit: str = "h") -> str:
    """Hours in words."""
    return f"{hours:,.1f} {unit}" if hours >= 1 else f"{hours:.2g} {unit}"
