"""What ranks send each other in an optimiser step under each ZeRO stage, and how long it takes.

All operations are taken as rings: of n ranks each sends (n - 1) / n of the data for a reduce-scatter or an
all-gather, and twice that for an all-reduce. Which tensors are sent, how often and in which dtype is what
DeepSpeed 0.19 does: read in its code, and measured on two ranks (tests/training/core/test_communication.py).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from .options import EngineOptions

Operation = Literal["all-reduce", "reduce", "reduce-scatter", "all-gather"]
# The pass that a transfer runs beside; "none": the GPU waits for it.
Beside = Literal["forward", "backward", "none"]
# DeepSpeed's rule: weights of exactly these classes, not of their subclasses, are sent in bf16
BF16_CLASSES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True)
class Network:
    """Speed of the wires as a rank sees it: GB/s in one direction, what nccl-tests print as busbw.

    Attributes:
        node: between the GPUs of a node; between: between nodes.
    """

    ranks: int
    per_node: int = 8
    node: float = 300.0
    between: float = 50.0

    def seconds(self, operation: Operation, size: float, ranks: int) -> float:
        """Time of one operation on `size` bytes over `ranks` ranks."""
        bandwidth = self.node if ranks <= self.per_node else self.between
        passes = 2 if operation == "all-reduce" else 1
        return passes * (ranks - 1) / ranks * size / (1e9 * bandwidth)


class Transfer(NamedTuple):
    """One kind of operation in an optimiser step."""

    what: str
    operation: Operation
    bf16: float  # bytes of all ranks' data together, in bf16; a ring sends nearly all of it per rank
    fp32: float  # bytes in fp32
    micro_batches: range  # of a step, in which it takes place
    ranks: int  # that take part
    beside: Beside

    @property
    def size(self) -> float:
        """Bytes of one operation."""
        return self.bf16 + self.fp32

    @property
    def times(self) -> int:
        """Operations per optimiser step."""
        return len(self.micro_batches)

    def seconds(self, network: Network) -> float:
        """Time of one operation."""
        return network.seconds(self.operation, self.size, self.ranks)


class Sizes(NamedTuple):
    """Parameters of a model by the way they are sent; numbers of elements."""

    reduced_bf16: int  # gradients
    reduced_fp32: int
    gathered_bf16: int  # weights that ZeRO 3 gathers, frozen ones too
    gathered_fp32: int
    gathered_other: int  # bytes of frozen weights in another dtype
    cast: int  # fp32 weights that autocast copies to bf16

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return self.reduced_bf16 + self.reduced_fp32


def persistence_threshold(engine: EngineOptions) -> int:
    """The number of elements up to which ZeRO 3 does not shard a parameter."""
    return engine.deepspeed.get("zero_optimization", {}).get("stage3_param_persistence_threshold", 100_000)


def parameter_sizes(model: nn.Module, engine: EngineOptions, stage: int) -> Sizes:
    """Count the parameters of a model by the dtypes in which they are sent under a ZeRO stage."""
    marked, cast = set(), set()
    bf16 = engine.dtype != "fp32"  # every GPU in `gpus.py` has bf16 units
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if bf16 and type(module) in BF16_CLASSES:
                marked.add(parameter)
            if bf16 and isinstance(module, BF16_CLASSES):
                cast.add(parameter)
    counts = dict.fromkeys(Sizes._fields, 0)
    for parameter in model.parameters():
        count, size = parameter.numel(), parameter.element_size()
        if parameter.requires_grad:
            # ZeRO 0 does not look at classes
            by_class = stage > 0 and parameter in marked
            in_bf16 = by_class if engine.reduce_dtype == "auto" else engine.reduce_dtype == "bf16"
            counts["reduced_bf16" if in_bf16 else "reduced_fp32"] += count
        # torch keeps copies for the whole forward pass of trained weights only
        if parameter in cast and parameter.requires_grad and size == 4:
            counts["cast"] += count
        if count > persistence_threshold(engine):
            if size != 4:
                counts["gathered_other"] += count * size
            else:
                counts["gathered_bf16" if parameter in marked else "gathered_fp32"] += count
    return Sizes(**counts)


def overlaps(engine: EngineOptions, stage: int) -> bool:
    """Whether gradients are reduced beside the backward pass."""
    overlap = engine.deepspeed.get("zero_optimization", {}).get("overlap_comm", engine.overlap_comm)
    return stage == 3 if overlap is None else bool(overlap) and stage > 0


def transfers(sizes: Sizes, engine: EngineOptions, stage: int, ranks: int) -> list[Transfer]:
    """The operations of one optimiser step under a ZeRO stage; `sizes` must be those of that stage."""
    if ranks == 1:
        return []
    zero = engine.deepspeed.get("zero_optimization", {})
    low, high = 2.0 * sizes.reduced_bf16, 4.0 * sizes.reduced_fp32
    every, last = range(engine.accumulation), range(engine.accumulation)[-1:]
    if stage == 0:
        return [Transfer("gradients", "all-reduce", low, high, last, ranks, "none")]
    forward, backward = ("forward", "backward") if overlaps(engine, stage) else ("none", "none")
    if stage < 3:
        # DeepSpeed reduces to every rank and keeps this rank's part, unless told to reduce to the owner
        all_ranks = zero.get("use_multi_rank_bucket_allreduce", True)
        operation: Operation = "all-reduce" if all_ranks else "reduce"
        when = every if stage == 2 else last
        return [
            Transfer("gradients", operation, low, high, when, ranks, backward),
            Transfer("weights", "all-gather", 0.0, 4.0 * sizes.trained, last, ranks, "none"),
        ]
    weights = (2.0 * sizes.gathered_bf16 + sizes.gathered_other, 4.0 * sizes.gathered_fp32)
    hpz = int(zero.get("zero_hpz_partition_size", engine.hpz))
    # with hpZ only the first pass after an update needs the partitions of all ranks
    found = [
        Transfer("gradients", "reduce-scatter", low, high, every, ranks, backward),
        Transfer("weights", "all-gather", *weights, every if hpz == 1 else every[:1], ranks, forward),
        Transfer("weights again", "all-gather", *weights, every, ranks if hpz == 1 else hpz, backward),
    ]
    if hpz > 1 and every[1:]:
        found.append(Transfer("weights in the node", "all-gather", *weights, every[1:], hpz, forward))
    return found


class StepTime(NamedTuple):
    """Seconds of one optimiser step."""

    compute: float
    communication: float  # all transfers
    exposed: float  # the part of it that no computation overlaps

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.exposed


def step_time(compute: float, found: Sequence[Transfer], network: Network, engine: EngineOptions) -> StepTime:
    """Time of a step whose computation takes `compute` seconds.

    A transfer hides behind the pass of its micro-batch that it runs beside, as far as that is long enough.
    """
    # a backward pass takes twice as long as a forward pass; with checkpointing it repeats it
    share = 1 / 4 if engine.gradient_checkpointing else 1 / 3
    passes = {
        "forward": compute * share / engine.accumulation,
        "backward": compute * (1 - share) / engine.accumulation,
    }
    communication = sum(transfer.times * transfer.seconds(network) for transfer in found)
    exposed = sum(
        transfer.times * transfer.seconds(network) for transfer in found if transfer.beside == "none"
    )
    for micro_batch in range(engine.accumulation):
        for name, seconds in passes.items():
            here = (t for t in found if t.beside == name and micro_batch in t.micro_batches)
            exposed += max(0.0, sum(transfer.seconds(network) for transfer in here) - seconds)
    return StepTime(compute, communication, exposed)
