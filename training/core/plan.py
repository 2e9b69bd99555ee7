"""What the plans of all stages share: memory of a rank under ZeRO, the speed of a CPU, the report."""

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from open_unitok.core.errors import UserError

from .communication import Network, Sizes, StepTime, Transfer, overlaps, step_time
from .options import REDUCE_BUCKET_SIZE, EngineOptions, RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)
MEASURED_SIZE = 1024  # rows and columns of the matrices that measure a CPU


class Memory(NamedTuple):
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float  # DeepSpeed's: buckets in which gradients are reduced, gathered weights
    activations: float
    casts: float = 0.0  # bf16 copies of the weights, which autocast keeps until the end of the forward pass

    @property
    def states(self) -> float:
        """Bytes that stay allocated between steps."""
        return self.parameters + self.gradients + self.optimizer


def engine_memory(
    engine: EngineOptions, stage: int, ranks: int, sizes: Sizes, frozen: float, activations: float
) -> Memory:
    """Bytes on one rank under a ZeRO stage, before ZeRO 3 shards the weights.

    Args:
        sizes: the parameters under that stage; those that are trained are fp32.
        frozen: bytes of the weights that are not trained.
    """
    trained, shards = 4.0 * sizes.trained, ranks if stage else 1
    gradients = trained / shards
    # ZeRO 1 shards gradients only once the last micro-batch has been added
    if stage == 1 and engine.accumulation > 1:
        gradients = trained
    # two moments, and from ZeRO 1 on a sharded fp32 copy of the weights
    optimizer = (3 if stage else 2) * trained / shards
    # a bucket for each dtype in which gradients are sent: ZeRO 3 fills them in that dtype, 1 and 2 in fp32
    zero = engine.deepspeed.get("zero_optimization", {})
    bucket = float(zero.get("reduce_bucket_size", min(REDUCE_BUCKET_SIZE, max(sizes.trained, 1))))
    buffers = 0.0
    low, high = float(sizes.reduced_bf16 > 0), float(sizes.reduced_fp32 > 0)
    if stage == 3:
        buffers = bucket * (2 * low + 4 * high)
    elif stage == 2 or (stage == 1 and ranks > 1):
        buffers = 4 * bucket * (low + high) * (2 if overlaps(engine, stage) else 1)
    # ZeRO 3 gathers weights into views, which autocast does not keep
    casts = 2.0 * sizes.cast if stage < 3 else 0.0
    return Memory(trained + frozen, gradients, optimizer, buffers, activations, casts)


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


def describe_fit(found: Memory, gpu_memory: float) -> str:
    """A line on whether the memory of a rank fits a GPU of `gpu_memory` GiB."""
    total = sum(found) / 2**30
    # CUDA itself and the gaps of its allocator take some
    if total > gpu_memory:
        verdict = "does not fit"
    else:
        verdict = "fits" if total <= 0.92 * gpu_memory else "fits on paper, without room for gaps,"
    return f"{verdict} --gpu-memory: {total:,.1f} of {gpu_memory:g} GiB"


def describe_hours(hours: float, unit: str = "h") -> str:
    """Hours in words."""
    return f"{hours:,.1f} {unit}" if hours >= 1 else f"{hours:.2g} {unit}"


class Estimate(NamedTuple):
    """A run on one number of ranks."""

    ranks: int
    accumulation: int
    micro_batch: int  # samples of a rank
    memory: float  # bytes of a rank at the run's ZeRO stage
    flops: float  # of a step
    work: float  # tokens or images of a step
    time: StepTime
    transfers: list[Transfer]

    def mfu(self, tflops: float) -> float:
        """Share of the peak `tflops` of all ranks that is reached, communication included."""
        return self.flops / (self.time.total * 1e12 * tflops * self.ranks)


def estimate_run(plan: Any, config: RunConfig, network: Network, tflops: float, mfu: float) -> Estimate:
    """The time of a run that computes at the share `mfu` of each rank's `tflops`.

    Args:
        plan: a stage's, on `network.ranks` ranks.
    """
    compute = plan.flops / (mfu * 1e12 * tflops * network.ranks)
    return Estimate(
        network.ranks,
        config.engine.accumulation,
        config.micro_batch(network.ranks),
        sum(plan.memory[config.engine.zero_stage]),
        plan.flops,
        plan.work[0],
        step_time(compute, plan.transfers, network, config.engine),
        plan.transfers,
    )


def fit_to_ranks(config: ConfigT, ranks: int) -> ConfigT:
    """The config with the largest `engine.accumulation`, up to its own, that splits batch_size over `ranks`.

    Raises:
        UserError: batch_size does not split over so many ranks.
    """
    for accumulation in range(config.engine.accumulation, 0, -1):
        if config.batch_size % (ranks * accumulation) == 0:
            engine = dataclasses.replace(config.engine, accumulation=accumulation)
            return dataclasses.replace(config, engine=engine)
    raise UserError(
        f"batch_size {config.batch_size} is not divisible by {ranks} ranks: use a multiple of it."
    )


def check_hpz(engine: EngineOptions, ranks: int) -> None:
    """
    Raises:
        UserError: the ranks cannot be divided into groups of `engine.hpz`.
    """
    if ranks % engine.hpz:
        raise UserError(f"engine.hpz is {engine.hpz}, but {ranks} ranks are not a multiple of it.")


def describe_transfers(estimate: Estimate, network: Network) -> list[str]:
    """Lines on what a rank sends in a step."""
    if not estimate.transfers:
        return []
    speed = f"{network.between:g} GB/s between nodes, {network.node:g} GB/s within one of {network.per_node}"
    lines = ["", f"communication of a step at {speed}"]
    lines.append(f"  {'':<18}{'':<16}{'GB bf16':>9}{'GB fp32':>9}{'times':>7}{'seconds':>9}  beside")
    for found in estimate.transfers:
        seconds = found.times * found.seconds(network)
        where = "" if found.ranks == estimate.ranks else f" of {found.ranks}"
        lines.append(
            f"  {found.what:<18}{found.operation + where:<16}{found.bf16 / 1e9:9.2f}{found.fp32 / 1e9:9.2f}"
            f"{found.times:7}{seconds:9.3f}  {found.beside}"
        )
    return lines


def describe_time(
    estimate: Estimate, unit: str, config: RunConfig, tflops: float, args: argparse.Namespace
) -> str:
    """A line on the time of a step and of the run; `tflops` is the peak of one device."""
    found, on_cpu = estimate.time, args.device == "cpu"
    device = f"this CPU with {torch.get_num_threads()} thread(s), measured" if on_cpu else args.gpu
    compute = (
        f"compute at {100 * args.mfu:.0f} % of the {tflops:,.4g} TFLOP/s of {device}: {found.compute:.3g} s"
    )
    if estimate.transfers:
        compute += f", communication {found.communication:.3g} s, of which {found.exposed:.3g} s are exposed"
    hours = found.total * config.steps / 3600
    total = "" if on_cpu else f", {describe_hours(hours * estimate.ranks, 'GPU-hours')}"
    return (
        f"{compute}; {found.total:.3g} s per step, {estimate.work / found.total:,.0f} {unit}/s, MFU "
        f"{estimate.mfu(tflops):.1%}; {config.steps:,} steps take {describe_hours(hours)}{total}"
    )


def describe_estimates(
    estimates: Sequence[Estimate], unit: str, config: RunConfig, tflops: float, gpu_memory: float
) -> list[str]:
    """A table with one line per number of ranks; memory above `gpu_memory` GiB is marked."""
    parts = "compute, communication, exposed communication (beside no compute), all"
    lines = ["", f"ZeRO {config.engine.zero_stage}; GiB per GPU; seconds per step: {parts}"]
    lines.append(
        f"{'GPUs':>6} {'accumulation':>13} {'per GPU':>8} {'GiB':>8} {'compute':>8} {'comm.':>8} "
        f"{'exposed':>8} {'step':>8} {unit + '/s':>12} {'MFU':>6} {'days':>7}"
    )
    for found in estimates:
        time = found.time
        days = time.total * config.steps / 86400
        memory = f"{found.memory / 2**30:.1f}{' !'[found.memory / 2**30 > gpu_memory]}"
        lines.append(
            f"{found.ranks:6} {found.accumulation:13} {found.micro_batch:8} {memory:>8} "
            f"{time.compute:8.3f} {time.communication:8.3f} {time.exposed:8.3f} {time.total:8.3f} "
            f"{found.work / time.total:12,.0f} {found.mfu(tflops):6.1%} {days:7.2f}"
        )
    if any(found.memory / 2**30 > gpu_memory for found in estimates):
        lines.append(f"! does not fit --gpu-memory {gpu_memory:g}")
    return lines
