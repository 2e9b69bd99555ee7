"""Stage 2: train the MLLM, one loop for pretraining and fine-tuning (arXiv 2502.20321, section 3.4).

B rows, L tokens per row, K sub-codebooks.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.mllm.features import FeatureOptions, FeatureSource
from open_unitok.mllm.positions import to_device
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.token_layout import TokenLayout

from ..core import deepspeed_engine, schedules
from ..core.checkpoint import Checkpoints
from ..core.compilation import compile_blocks
from ..core.metric_logger import MetricLogger
from ..core.profiler import profile_steps
from ..core.run_dir import RunDir
from ..core.saving.background import to_host
from ..core.stop_signal import StopOnSignal
from ..data import seeding
from ..data.code_shards import FeatureFacts
from ..data.collate import Batch
from ..data.mixture import Mixture, codes_layout
from ..data.mixture_options import with_replay
from ..data.sample_kinds import SAMPLE_KINDS, crop_mismatch
from ..data.sequences import SequenceBuilder
from .class_config import ClassRunConfig
from .class_model import build_class_parts, check_labels, class_inputs, class_sequences
from .config import LossOptions, MLLMRunConfig, check_conditioner
from .metrics import RunningMetrics
from .model import MLLMParts, build_parts, prepare_folder, save_parts


class TrainState(NamedTuple):
    """Everything that the loop reads and changes, after `step` optimiser steps."""

    step: int
    parts: MLLMParts
    features: FeatureSource | None  # where features follow from the codes of a batch
    engine: Any  # the DeepSpeed engine around the model
    mixture: Mixture
    metrics: RunningMetrics
    log: MetricLogger
    checkpoints: Checkpoints
    gather: bool  # ZeRO 3 shards the weights: gather them before writing


class StepOutput(NamedTuple):
    """Result of one optimiser step on this rank."""

    losses: dict[str, torch.Tensor]  # "loss", "text_loss", "image_loss"; means over ranks are the global ones
    grad_norm: torch.Tensor | float


def main(config: MLLMRunConfig | ClassRunConfig, run_dir: RunDir) -> None:
    """Train from step 0 or from the last checkpoint to the end; leaves OUT/model."""
    state = build_train_state(config, run_dir)
    log, step, schedule = state.log, state.step, config.schedule
    state.parts.model.train()
    log.start(step)
    with (
        contextlib.closing(log),
        StopOnSignal() as stop,
        state.checkpoints,
        profile_steps(config, run_dir.path, step) as profiler,
    ):
        while step < config.last_step:
            multiplier = schedules.lr_multiplier(
                schedule.kind, step, config.steps, schedule.warmup, schedule.start, schedule.end
            )
            deepspeed_engine.set_lr_multiplier(state.engine, multiplier)
            output = train_step(state, config, state.mixture.next(), step)
            step += 1
            profiler.step(step)
            if step % config.log.every == 0:
                log.note("lr", config.optimizer.lr * multiplier)
                for name, value in state.metrics.reduce().items():
                    log.note(name, value)
            log.add(step, {**output.losses, "grad_norm": output.grad_norm})
            # in every step on every rank: a signal on one rank stops all at the same step
            stopping = stop(state.checkpoints.late())
            if state.checkpoints.due(step) or stopping or step == config.last_step:
                save_checkpoint(state, step)
                stop.exit_if_signalled()
        if step == config.steps:
            log.flush()
    if step < config.steps:
        log.info(f"stopped at step {step} (stop_at); run the same command without it to continue")
        return
    # gathering is collective: every rank takes part, rank 0 writes
    weights = gathered_weights(state)
    if distributed.is_main():
        run_dir.finish(lambda path: save_parts(state.parts, path, weights))
    distributed.barrier()
    log.info(f"finished: {run_dir.model}")


def build_train_state(config: MLLMRunConfig | ClassRunConfig, run_dir: RunDir) -> TrainState:
    """Model, data and engine, at step 0 or as of the last checkpoint."""
    device = deepspeed_engine.init_distributed(config.engine, config.seed)
    # with LoRA the frozen base weights stay in `init_from`: checkpoints hold only the adapters
    checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint, trained_only=config.lora is not None)
    latest = checkpoints.latest()
    micro_batch = config.micro_batch(distributed.world_size())
    parts = build_class_parts(config) if isinstance(config, ClassRunConfig) else build_parts(config)
    mixture = build_mixture(config, parts)
    run_dir.record_facts(data=mixture.fingerprint, tokenizer=parts.model.config.unitok_fingerprint)
    metrics = RunningMetrics(parts.model, device, config.log.peak_tflops)
    engine = prepare_engine(config, parts.model, device, micro_batch)
    log = MetricLogger(run_dir, config.steps, config.log.every, config.batch_size, Path(config.out).name)
    step = 0
    if latest is not None:
        saved = checkpoints.restore(latest, {"mllm": engine}, merge_rank_states)
        step = saved["step"]
        mixture.load_state_dict(saved["mixture"])
        log.load_state_dict(saved["log"])
        metrics.load_state_dict(saved["metrics"])
        log.info(f"resumes after step {step} ({latest.name})")
    log.info(
        f"{metrics.num_trained / 1e6:.1f} M trained parameters, steps {step} to {config.last_step} of "
        f"{config.batch_size} {config.data.batch_by}"
    )
    gather = config.engine.zero_stage == 3
    features = features_of_codes(parts, device)
    return TrainState(step, parts, features, engine, mixture, metrics, log, checkpoints, gather)


def merge_rank_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's state from those of a run that was saved by another number of ranks."""
    parts = {"mixture": Mixture, "log": MetricLogger, "metrics": RunningMetrics}
    return {name: kind.merge_states([state[name] for state in states]) for name, kind in parts.items()}


def prepare_engine(
    config: MLLMRunConfig | ClassRunConfig, model: Any, device: torch.device, micro_batch: int
) -> Any:
    """The DeepSpeed engine around the model, with a learning rate per part."""
    # before sharding: under ZeRO 3 parameters have no shapes afterwards
    groups = deepspeed_engine.parameter_groups(
        model, config.optimizer.weight_decay, dict(config.prefix_factors())
    )
    deepspeed_engine.shard_to_device(model, device, config.optimizer, config.engine, micro_batch)
    engine = deepspeed_engine.build_engine(model, groups, config.optimizer, config.engine, micro_batch)
    if config.engine.compile:  # layers of the decoder, of any family, and of the depth head
        compile_blocks(model, GradientCheckpointingLayer)
    return engine


def build_mixture(config: MLLMRunConfig | ClassRunConfig, parts: MLLMParts) -> Mixture:
    """The data of this run, checked against the model.

    Raises:
        UserError: codes of another tokenizer or number of visual tokens; sequences longer than the context;
            labels that are missing or no classes of the model; no data to replay, or of another kind of
            model.
    """
    sizes = parts.model.config
    limit = sizes.context_length
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but the decoder's context is {limit} tokens "
            "(max_position_embeddings): lower it."
        )
    if isinstance(config, ClassRunConfig):
        sequences, style = class_sequences(sizes), None
    else:
        assert parts.processor is not None
        sequences = SequenceBuilder(parts.processor, config.data.max_length)
        style = parts.processor.style
    data_options = with_replay(config.data, config.init_from)
    check_conditioner(data_options, config.conditioner)
    mixture = Mixture(
        data_options,
        sequences,
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.engine.accumulation,
        fingerprint=sizes.unitok_fingerprint,
        features=stored_features(sizes),
    )
    warnings = set()
    for entry, data in zip(mixture.entries, mixture.datasets):
        if data.codes is None:
            continue
        warnings.add(crop_mismatch(data.codes, entry.kind, style))
        if SAMPLE_KINDS[entry.kind].generates_images:
            check_generated_layout(sizes, codes_layout(data.codes), entry.path)
        if isinstance(config, ClassRunConfig):
            check_labels(data.codes, sizes.num_classes)
    for text in sorted(warnings - {None}):
        if distributed.is_main():
            print(f"data: {text}", file=sys.stderr)
    return mixture


def stored_features(sizes: UniTokMLLMConfig) -> FeatureFacts | None:
    """The features that images which are read must have beside their codes; None = none are needed."""
    if sizes.visual_input == "discrete":
        return None
    options = FeatureOptions.from_config(sizes.features, sizes.visual_input)
    if options.from_codes:
        return None
    shape = (sizes.num_continuous_tokens or 0, sizes.continuous_dim or 0)
    return FeatureFacts(options.source, sizes.features_fingerprint or "", *shape)


def features_of_codes(parts: MLLMParts, device: torch.device) -> FeatureSource | None:
    """The frozen source of features that follow from codes; None for other sources.

    Raises:
        UserError: the visual tokenizer is not that of the model's features.
    """
    sizes = parts.model.config
    if sizes.visual_input == "discrete" or stored_features(sizes) is not None:
        return None
    unitok = UniTok.from_pretrained(parts.unitok, dtype=torch.float32).eval()
    source = FeatureSource(FeatureOptions.from_config(sizes.features, sizes.visual_input), unitok)
    source.check_fingerprint(sizes.features_fingerprint, str(parts.unitok))
    # encoder and decoder stay on the host
    unitok.quantizer.to(device)
    unitok.up_projection.to(device)
    return source


def check_generated_layout(sizes: UniTokMLLMConfig, layout: TokenLayout, path: str) -> None:
    """Check the layout of generated images: the model reads any layout, but generates only its own.

    Raises:
        UserError: the codes at `path` have another number of tokens or another layout.
    """
    sizes.check_generates()
    if layout.num_tokens != sizes.num_image_tokens:
        raise UserError(
            f"{path} holds {layout.num_tokens} visual tokens per image, but the model generates "
            f"{sizes.num_image_tokens} (num_image_tokens): extract codes at its image size."
        )
    own = TokenLayout.from_config(sizes.token_layout, sizes.num_image_tokens, layout.registers)
    if own != layout:
        raise UserError(
            f"{path} holds images of {layout}, but the model generates {own} (token_layout): extract codes "
            "with a tokenizer of its layout."
        )


def train_step(
    state: TrainState, config: MLLMRunConfig | ClassRunConfig, batches: list[Batch], step: int
) -> StepOutput:
    """One optimiser step from this rank's micro-batches."""
    device, world = state.metrics.device, distributed.world_size()
    # 1. the number of targets over all ranks and micro-batches of this step: the losses' denominators; on
    # the device, where the sum over ranks does not make the host wait
    counts = [[batch.text_targets, batch.code_targets] for batch in batches]
    local = torch.tensor(counts, dtype=torch.float64).sum(dim=0)
    sums = distributed.sum_over_ranks(to_device(local, device))
    targets: dict[str, torch.Tensor] = dict(zip(("text", "image"), sums))
    losses: dict[str, torch.Tensor] = {}
    grad_norm = None
    for micro_step, batch in enumerate(batches):
        seeding.seed_forward_pass(config.seed, step, micro_step)
        inputs: dict[str, Any] = {name: to_device(value, device) for name, value in batch.inputs.items()}
        plan = batch.plan.to(device)
        codes = inputs.pop("feature_codes", None)
        if codes is not None and state.features is not None:
            inputs["image_features"] = state.features.of_codes(codes)
        by_class = isinstance(config, ClassRunConfig)
        inputs = class_inputs(inputs) if by_class else {**inputs, "plan": plan}
        # 2. one forward pass for texts and images; losses come as sums, so that micro-batches add up
        output = state.engine(**inputs, reduction="sum", return_logits=False)
        micro_losses = combine_losses(output.losses, targets, config.loss)
        if (step + 1) % config.log.every == 0 and not by_class and plan.targets is not None:
            hidden = output.last_hidden_state
            state.metrics.add_text_losses(state.engine.module, hidden, batch, plan.targets)
        # 3. DeepSpeed averages over ranks and accumulation, but the denominators already cover both
        state.engine.backward(micro_losses["loss"] * (world * config.engine.accumulation))
        grad_norm = deepspeed_engine.optimizer_step(state.engine)
        # the logger averages over ranks, but ranks have shares of the loss: x world gives their sum
        for name, value in micro_losses.items():
            losses[name] = losses.get(name, 0) + value.detach() * world
        state.metrics.add(output.image_correct, batch)
    return StepOutput(losses, 0.0 if grad_norm is None else grad_norm)


def combine_losses(
    sums: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor | float], options: LossOptions
) -> dict[str, torch.Tensor]:
    """This micro-batch's share of the weighted loss and of the mean of each part, see `LossOptions`.

    Args:
        sums: name -> loss summed over this micro-batch; `options` has a weight for each and no others.
        targets: name -> targets in the whole step, over all ranks; float64 scalars.

    Returns:
        "loss", and "NAME_loss" for each name. Over micro-batches and ranks they add up.

    Raises:
        UserError: a loss has no weight, or a weight no loss.
    """
    weights = options.by_name()
    for name in sums.keys() - weights.keys():
        raise UserError(f"The model returns the loss {name!r}, but there is no weight loss.{name}.")
    for name in weights.keys() - sums.keys():
        raise UserError(f"There is a weight loss.{name}, but the model returns no loss {name!r}.")
    counts = {name: torch.as_tensor(targets[name], dtype=torch.float64) for name in sums}
    # clamp: a step may have no images, or no texts
    means = {name: value / counts[name].clamp(min=1.0).to(value.dtype) for name, value in sums.items()}
    if options.weighting == "means":
        loss = sum(weights[name] * mean for name, mean in means.items())
    else:
        # a part without targets contributes nothing to either sum
        total = torch.stack([weights[name] * counts[name] for name in sums]).sum().clamp(min=1e-9)
        loss = sum(weights[name] * value for name, value in sums.items())
        assert isinstance(loss, torch.Tensor)
        loss = loss / total.to(loss.dtype)
    assert isinstance(loss, torch.Tensor)
    return {"loss": loss, **{f"{name}_loss": mean for name, mean in means.items()}}


def gathered_weights(state: TrainState) -> dict[str, torch.Tensor] | None:
    """All weights (LoRA: the trained ones) if ZeRO 3 shards them, else None; call it on every rank."""
    if not state.gather:
        return None
    return deepspeed_engine.gather_zero3_weights(state.engine, state.checkpoints.trained_only)


def save_checkpoint(state: TrainState, step: int) -> None:
    """Write a checkpoint for exact resume, which is also a model folder."""

    def write_model(path: Path) -> None:
        weights = gathered_weights(state)
        if distributed.is_main():
            save_parts(state.parts, path, weights)

    def snapshot_model(path: Path) -> Callable[[], None]:
        weights = gathered_weights(state)
        if not distributed.is_main():
            return lambda: None
        if weights is None:
            # an adapter's frozen base is not in the checkpoint
            named = state.parts.model.named_parameters()
            trained = {name: p for name, p in named if p.requires_grad}
            weights = trained if state.checkpoints.trained_only else state.parts.model.state_dict()
        elif state.metrics.device.type == "cuda":
            return prepare_folder(state.parts, path, weights)  # gathering has copied them
        return prepare_folder(state.parts, path, to_host(weights))

    saved = {
        "mixture": state.mixture.state_dict(),
        "log": state.log.state_dict(),
        "metrics": state.metrics.state_dict(),
    }
    engines = {"mllm": state.engine}
    state.checkpoints.save(step, write_model, engines, saved, state.gather, snapshot_model)
