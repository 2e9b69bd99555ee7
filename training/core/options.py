"""Config sections that all stages share: optimiser, schedule, engine, data, checkpoints, logging."""

import dataclasses
import math
from typing import Any, Literal

from open_unitok.core.errors import UserError

from .schedules import check_schedule_kind

# DeepSpeed's default, in elements; it allocates a bucket in full, so ours is never larger than the model
REDUCE_BUCKET_SIZE = 500_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW with the defaults of the published tokenizer recipe.

    Attributes:
        kind: "muon" updates hidden matrices by Muon (see `muon.py`), with the same `lr` and `weight_decay`.
        clip_grad: largest gradient norm; 0 turns clipping off.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.02
    clip_grad: float = 10.0

    def check(self) -> None:
        if self.lr < 0 or self.eps < 0 or self.weight_decay < 0 or self.clip_grad < 0:
            raise UserError("optimizer: lr, eps, weight_decay and clip_grad must be 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas is {self.betas}: both must be in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate: from `start` * lr to lr over `warmup` steps, then by `kind` down to `end` * lr."""

    kind: str = "cos"
    warmup: float = 0.0
    start: float = 0.0
    end: float = 0.1

    def check(self) -> None:
        check_schedule_kind(self.kind)
        if self.warmup < 0:
            raise UserError(f"schedule.warmup is {self.warmup}: it must be 0 or more steps.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How DeepSpeed runs.

    Attributes:
        dtype: of autocast; "auto" is bf16 if the processor or GPU is faster in it (`fast_bf16`).
        accumulation: micro-batches per optimiser step.
        threads: of each process; 0 is torch's default.
        offload: kept in host memory: "optimizer" moments and fp32 weights (ZeRO 1 to 3), "parameters" also
            the weights (ZeRO 3). Slower, for models that do not fit otherwise.
        reduce_dtype: of gradients while they are summed over ranks; micro-batches are added up in fp32.
            "auto" is DeepSpeed's rule: fp32 at ZeRO 0 and without bf16, else bf16 for weights of exactly
            nn.Linear and nn.Conv*, like most of the MLLM's, and fp32 for others, like the tokenizer's.
        overlap_comm: reduce gradients beside the backward pass (ZeRO 1 to 3); costs a second bucket. null =
            DeepSpeed's default: at ZeRO 3 only.
        hpz: ranks, those of a node, that keep a second partition of the weights (ZeRO 3), so that only the
            first gather of a step crosses nodes; costs 4 bytes x weights / hpz. 1 = off.
        compile: compile repeated blocks of models and losses (`compilation.py`): faster steps after a first
            one that takes minutes. Not with ZeRO 3, whose hooks would be compiled.
        deepspeed: merged over DeepSpeed's own config (bucket sizes, ...).
    """

    zero_stage: Literal[0, 1, 2, 3] = 0
    dtype: Literal["fp32", "bf16", "auto"] = "fp32"
    accumulation: int = 1
    threads: int = 0
    gradient_checkpointing: bool = False
    offload: Literal["none", "optimizer", "parameters"] = "none"
    reduce_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    overlap_comm: bool | None = None
    hpz: int = 1
    compile: bool = False
    deepspeed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        if self.accumulation < 1:
            raise UserError(f"engine.accumulation is {self.accumulation}: it must be 1 or more.")
        # DeepSpeed offloads only what ZeRO shards
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            required = f"engine.zero_stage {least} or more, not {self.zero_stage}"
            raise UserError(f"engine.offload {self.offload} needs {required}.")
        if self.overlap_comm and not self.zero_stage:
            raise UserError("engine.overlap_comm needs engine.zero_stage 1 or more, not 0.")
        if self.reduce_dtype == "bf16" and self.dtype == "fp32":
            raise UserError("engine.reduce_dtype is bf16, but engine.dtype fp32: set both to bf16.")
        if self.compile and self.zero_stage == 3:
            raise UserError("engine.compile needs engine.zero_stage 0, 1 or 2, not 3.")
        if self.hpz < 1:
            raise UserError(f"engine.hpz is {self.hpz}: it must be 1 (off) or more ranks.")
        if self.hpz > 1 and (self.zero_stage < 3 or self.offload == "parameters"):
            raise UserError(
                f"engine.hpz {self.hpz} needs engine.zero_stage 3 and weights on the device, not zero_stage "
                f"{self.zero_stage} with offload {self.offload}."
            )
        if self.threads < 0:
            raise UserError(f"engine.threads is {self.threads}: it must be 0 (all cores) or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Save a checkpoint every `every` steps, and every `every_minutes`; keep the last `keep`.

    Attributes:
        every_minutes: null = by steps alone. Results do not depend on when checkpoints are saved.
        background: write beside the next steps, from a copy of all states in host memory.
    """

    every: int = 500
    every_minutes: float | None = None
    keep: int = 2
    background: bool = False

    def check(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError("checkpoint.every and checkpoint.keep must be 1 or more.")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise UserError("checkpoint.every_minutes must be above 0, or null.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogOptions:
    """A metrics record every `every` steps; images every `images_every` steps (0: never).

    Attributes:
        peak_tflops: peak of one device in TFLOP/s, for "mfu"; null = that of the GPU in `core/gpus.py`.
    """

    every: int = 20
    images_every: int = 0
    peak_tflops: float | None = None

    def check(self) -> None:
        if self.every < 1 or self.images_every < 0:
            raise UserError("log.every must be 1 or more, log.images_every 0 (never) or more.")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"log.peak_tflops is {self.peak_tflops}: it must be above 0, or null.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Profile `steps` steps after step `start` with torch.profiler into OUT/profile; 0 steps: off."""

    start: int = 10
    steps: int = 0

    def check(self) -> None:
        if self.start < 0 or self.steps < 0:
            raise UserError("profile.start and profile.steps must be 0 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSource:
    """webdataset tars: files (globs and {000..127} braces), https: URLs, pipe:COMMAND; mixed by `weight`."""

    path: str | list[str]
    weight: float = 1.0
    name: str = ""

    def check(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"data.sources: weight of {self.path} is {self.weight}: it must be above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Reading of webdataset tars.

    Attributes:
        workers: processes per rank; 0 reads in the training process.
        shuffle: size of the shuffle buffer.
        split: "samples": ranks and workers take turns in one order of samples (global batches do not depend
            on their number; each reads all tars); "shards": each reads its own tars, for large data.
        max_bad_share: share of unreadable samples or tars above which a run stops.
    """

    sources: list[DataSource]
    workers: int = 0
    shuffle: int = 5000
    split: Literal["samples", "shards"] = "samples"
    max_bad_share: float = 0.05

    def check(self) -> None:
        if not self.sources:
            raise UserError(
                "data.sources is empty: name at least one source, e.g. [{path: 'data/train/*.tar'}]."
            )
        if self.workers < 0 or self.shuffle < 1:
            raise UserError("data.workers must be 0 or more, data.shuffle 1 (no shuffling) or more.")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share is {self.max_bad_share}: it must be from 0 to 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config of every run; a stage adds its own sections.

    Attributes:
        batch_size: of one optimiser step, over all ranks and micro-batches.
        stop_at: ends this call at a step with a checkpoint; the same command without it resumes.
        init_from: model folder whose weights (only) are loaded.
    """

    stage: str
    out: str
    steps: int
    batch_size: int
    seed: int = 0
    stop_at: int | None = None
    init_from: str | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    engine: EngineOptions = dataclasses.field(default_factory=EngineOptions)
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()
    profile: ProfileOptions = ProfileOptions()

    def check(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("steps and batch_size must be 1 or more.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: it must be 0 or more.")
        if self.stop_at is not None and self.stop_at < 1:
            raise UserError(f"stop_at is {self.stop_at}: it must be a step, 1 or more.")
        # ZeRO flattens parameters, but orthogonalisation needs each matrix in its shape
        if self.optimizer.kind == "muon" and self.engine.zero_stage:
            raise UserError(
                f"optimizer.kind is muon, but engine.zero_stage is {self.engine.zero_stage}: Muon needs "
                "whole matrices, so set engine.zero_stage to 0 or optimizer.kind to adamw."
            )

    @property
    def last_step(self) -> int:
        """The step at which this call ends."""
        return min(self.steps, self.stop_at or self.steps)

    def micro_batch(self, ranks: int) -> int:
        """Samples per rank and forward pass.

        Raises:
            UserError: batch_size is not a multiple of ranks x accumulation.
        """
        parts = ranks * self.engine.accumulation
        if self.batch_size % parts:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by {ranks} rank(s) x engine.accumulation "
                f"{self.engine.accumulation}: use a multiple of {parts}."
            )
        return self.batch_size // parts
