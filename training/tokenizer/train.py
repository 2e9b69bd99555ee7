"""The tokenizer stage: train UniTok to reconstruct images and match captions (arXiv 2502.20321, section 3).

B images of one micro-batch, b of them decoded, H and W rows and columns, K codes per token.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from open_unitok.core import distributed
from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.frozen.dinov2 import DinoBlock
from open_unitok.tokenizer.layers import Block, ConvBlock
from open_unitok.tokenizer.precision import tf32_products
from open_unitok.tokenizer.text_tower import TextBlock
from open_unitok.tokenizer.token_transformer import PreNormBlock
from open_unitok.tokenizer.vqgan.blocks import ResidualBlock

from ..core import deepspeed_engine, flops, schedules
from ..core.checkpoint import Checkpoints
from ..core.collectives import all_gather_with_grad, mean_over_ranks
from ..core.compilation import compile_blocks
from ..core.ema import EMA
from ..core.metric_logger import MetricLogger
from ..core.profiler import profile_steps
from ..core.run_dir import RunDir
from ..core.saving.background import to_host
from ..core.saving.integrity import check_complete
from ..core.stop_signal import StopOnSignal
from ..data import seeding
from ..data.shards import build_loader, read_batches
from .adapt import Adaptation, build_adapted
from .adapt_config import AdaptRunConfig
from .config import RECONSTRUCTION, TokenizerRunConfig
from .data import PairCollate, build_pair_stream, order_decoded_first, pixels_from_uint8, reconstruction_grid
from .dead_codes import DeadCodes, init_codebooks, usage_and_perplexity
from .discriminator import DinoDiscriminator
from .gan import GAN
from .image_losses import PIECE, loss_of_images
from .losses import build_lpips, contrastive_loss, reconstruction_losses, weighted_sum
from .model import build_model, load_caption_tokenizer
from .noise import place_noise
from .teacher import TaughtTokenizer, build_taught

# Blocks of all encoders and decoders, of transformers' vision towers the last kind. What lies between them,
# like the quantiser, is not compiled.
COMPILED_BLOCKS = (Block, ConvBlock, PreNormBlock, ResidualBlock, TextBlock, GradientCheckpointingLayer)


@dataclasses.dataclass
class TrainState:
    """Everything that the loop reads and changes, after `step` optimiser steps."""

    step: int
    device: torch.device
    model: UniTok
    taught: TaughtTokenizer | None  # the model with its teachers' heads
    engine: Any  # DeepSpeed around the model, or around `taught`
    lpips: Any
    gan: GAN | None
    dead_codes: DeadCodes
    ema: EMA | None
    loader: Any  # of this rank's micro-batches
    captions: Any  # the tokenizer of captions, or None
    adaptation: Adaptation | None  # of stage adapt


def main(config: TokenizerRunConfig, run_dir: RunDir) -> None:
    """Train from the start, or from the last checkpoint, to the end; leaves OUT/model."""
    device = deepspeed_engine.init_distributed(config.engine, config.seed)
    checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoint)
    latest = checkpoints.latest()
    other_run = Path(config.resume_from) if config.resume_from and latest is None else None
    state = build_train_state(config, run_dir, device, new=latest is None and other_run is None)
    log = build_logger(config, run_dir, state)
    if latest is not None:
        resume(state, latest, checkpoints, log)
    elif other_run is not None:
        resume_from_other_run(state, other_run, checkpoints, log)
    log.info(f"steps {state.step} to {config.last_step}, {config.batch_size} images each")
    state.model.train()
    log.start(state.step)
    batches = read_batches(state.loader)
    fast = device.type == "cuda" and config.projections == "tf32"
    with (
        tf32_products() if fast else contextlib.nullcontext(),
        contextlib.closing(log),
        StopOnSignal() as stop,
        checkpoints,
        profile_steps(config, run_dir.path, state.step) as profiler,
    ):
        while state.step < config.last_step:
            multiplier = set_schedules(state, config)
            output = train_step(state, config, batches)
            if state.step % config.log.every == 0 or state.step == config.steps:
                log_train_state(log, state, config.optimizer.lr * multiplier)
            log.add(state.step, output.metrics)
            if config.log.images_every and state.step % config.log.images_every == 0:
                grid = reconstruction_grid(output.pixels, output.reconstruction)
                log.log_image(state.step, "originals above reconstructions", grid)
            profiler.step(state.step)
            # in every step on every rank: the signal may have reached only one of them
            stopped = stop(checkpoints.late())
            if checkpoints.due(state.step) or stopped or state.step == config.last_step:
                save_checkpoint(state, config, checkpoints, log)
                stop.exit_if_signalled()
        if state.step == config.steps:
            log.flush()
    if state.step < config.steps:
        log.info(f"stopped at step {state.step} (stop_at); run the same command without stop_at to resume")
        return
    if distributed.is_main():
        run_dir.finish(lambda path: save_model(path, state, config, final=True))
    distributed.barrier()
    log.info(f"finished: {run_dir.model}")


def set_schedules(state: TrainState, config: TokenizerRunConfig) -> float:
    """Set learning rates, GAN weight and blur of the coming step; returns the factor on the model's rate."""
    schedule = config.schedule
    multiplier = schedules.lr_multiplier(
        schedule.kind, state.step, config.steps, schedule.warmup, schedule.start, schedule.end
    )
    deepspeed_engine.set_lr_multiplier(state.engine, multiplier)
    if state.gan:
        state.gan.start_step(state.step)
    return multiplier


class StepOutput(NamedTuple):
    """Result of one optimiser step; images are those of its last micro-batch."""

    metrics: dict[str, Tensor | float]
    pixels: Tensor  # (B, 3, H, W)
    reconstruction: Tensor  # (b, 3, H, W)


def train_step(
    state: TrainState, config: TokenizerRunConfig, batches: Iterator[dict[str, Any]]
) -> StepOutput:
    """One optimiser step of tokenizer and discriminator over `engine.accumulation` micro-batches."""
    metrics: dict[str, Any] = {}
    accumulation = config.engine.accumulation
    # the engines step in the last micro-step, at the end of the accumulation
    for part in range(accumulation):
        output = micro_step(state, config, next(batches), part)
        for name, value in output.losses.items():
            metrics[name] = metrics.get(name, 0) + value.float() / accumulation
    state.step += 1
    # CLIP bounds the temperature: logit_scale is its logarithm (arXiv 2103.00020, section 2.5)
    if state.model.config.embed_dim:
        deepspeed_engine.clamp_parameter(state.engine, state.model.logit_scale, 0.0, math.log(100.0))
    reset = state.dead_codes.reset_codes(state.step, state.engine)
    if state.ema:
        rows = state.model.quantizer.codebooks
        if reset is not None and rows is not None:
            state.ema.reset_rows(rows, reset[: len(rows)])
        state.ema.update(state.step)
    metrics["grad_norm"] = output.grad_norm if output.grad_norm is not None else 0.0
    if state.gan:
        metrics["discriminator_grad_norm"] = state.gan.grad_norm
    return StepOutput(metrics, output.pixels, output.reconstruction)


class MicroStepOutput(NamedTuple):
    """Result of one micro-batch."""

    losses: dict[str, Tensor]  # detached
    grad_norm: Tensor | float | None  # at the end of an accumulation
    pixels: Tensor  # (B, 3, H, W)
    reconstruction: Tensor  # (b, 3, H, W)


def micro_step(
    state: TrainState, config: TokenizerRunConfig, batch: dict[str, Any], part: int
) -> MicroStepOutput:
    """Forward and backward pass of one micro-batch; `part` is its number within the step."""
    model, engine = state.model, state.engine
    pixels = pixels_from_uint8(batch["image"], state.device)
    token_ids = None
    if batch["token_ids"] is not None:  # pinned by the loader
        token_ids = batch["token_ids"].to(state.device, non_blocking=True)
    # random numbers are keyed by an image's number in the global batch, so they do not depend on the split
    order, num_decoded = order_decoded_first(len(pixels), config.reconstruct_share)
    first = (part * distributed.world_size() + distributed.rank()) * len(pixels)
    samples = [first + position for position in order]
    size = (pixels.shape[2], pixels.shape[3])
    place_noise(model, state.gan, config.seed, state.step, samples, num_decoded, size, state.device)
    model.quantizer.start_step(seeding.torch_generator(config.seed, "quantizer", state.step))
    # the latents that DeadCodes collects in this forward pass are put back into the order of the batch
    reordered = None if num_decoded == len(pixels) else order
    state.dead_codes.order = model.quantizer.order = reordered
    if state.taught is not None:
        state.taught.order = reordered

    # 1. encode all images (for the contrastive loss), decode the first ones (for the reconstruction losses)
    entropy = config.losses.entropy > 0
    out = deepspeed_engine.forward(engine, pixels, token_ids, reconstruct_first=num_decoded, entropy=entropy)
    reconstruction = out.reconstruction
    losses = reconstruction_losses(reconstruction, pixels)
    if state.lpips is not None:
        with deepspeed_engine.autocast(engine):
            losses["lpips"] = perceptual_loss(state, config, reconstruction, pixels)
    losses |= out.losses
    if out.text_embeds is not None:
        losses["clip"] = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
    weights = config.losses.by_name()
    loss = weighted_sum(losses, weights)

    # 2. generator step: the discriminator's output joins the loss, balanced against the reconstruction losses
    if state.gan:
        balanced = {name: losses[name] for name in RECONSTRUCTION if name in losses}
        gan_losses = state.gan.generator_step(
            weighted_sum(balanced, {name: weights[name] for name in balanced}),
            reconstruction,
            state.adaptation.last_weight(model) if state.adaptation else model.decoder.last_weight,
        )
        loss = loss + gan_losses["adversarial_weight"] * gan_losses["adversarial"]
        losses |= gan_losses
    engine.backward(loss)
    grad_norm = deepspeed_engine.optimizer_step(engine)

    # 3. discriminator step on the same images
    if state.gan:
        losses |= state.gan.discriminator_step(pixels, reconstruction)
    # a loss of weight 0 is logged, too
    losses = {"loss": loss, **losses, "skipped": torch.tensor(batch["skipped"])}
    detached = {name: value.detach() for name, value in losses.items()}
    return MicroStepOutput(detached, grad_norm, pixels, reconstruction.detach())


def perceptual_loss(
    state: TrainState, config: TokenizerRunConfig, reconstruction: Tensor, pixels: Tensor
) -> Tensor:
    """Mean LPIPS of the reconstructions and their originals, the first images of `pixels`."""
    recomputes = config.engine.gradient_checkpointing
    if recomputes or (state.gan and state.gan.balances):
        piece = PIECE if recomputes else None
        return loss_of_images(reconstruction, lambda a, part: state.lpips(a, pixels[part]).mean(), piece)
    return state.lpips(reconstruction, pixels[: len(reconstruction)]).mean()


# ---- building, resuming, saving --------------------------------------------------------------------------


def build_train_state(
    config: TokenizerRunConfig, run_dir: RunDir, device: torch.device, new: bool
) -> TrainState:
    """Models, data and engines at step 0; `new`: no checkpoint will replace the weights."""
    micro_batch = config.micro_batch(distributed.world_size())

    # 1. models
    captions = load_caption_tokenizer(config)
    model, adaptation = build_run_model(config, captions, device)
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    image_shape = model.config.image_shape
    lpips = build_lpips(config.losses.lpips_weights, image_shape, device) if config.losses.lpips else None
    gan = GAN(config, image_shape, device, micro_batch) if config.losses.adversarial else None
    taught = build_taught(model, config, device) if config.teachers else None

    # 2. data
    pairs = (config.data, config.images, image_shape, captions is not None, config.seed)
    stream = build_pair_stream(*pairs, micro_batch, distributed.rank(), distributed.world_size())
    collate = PairCollate(captions, config.reconstruct_share)
    loader = build_loader(stream, collate)
    run_dir.record_facts(data=stream.fingerprint())

    # 3. codebooks: initialised before the engine copies the weights; dead codes are reset in training
    start = config.codebooks.start
    # of a model at init_from, too, k-means is not repeated
    started = start == "kmeans" and bool(getattr(model.quantizer, "started", False))
    if new and start != "random" and not started:
        count = config.codebooks.init_images or config.batch_size
        sample = collate([pair for pair, _ in build_pair_stream(*pairs, count).take()])
        init_codebooks(model, pixels_from_uint8(sample["image"], device), config.seed, start)
    last_reset = round(config.codebooks.reset_share * config.steps)
    dead_codes = DeadCodes(model.quantizer, config.codebooks.reset_after, last_reset, config.seed)

    # 4. engine and averaged weights
    trained = model if taught is None else taught
    groups = deepspeed_engine.parameter_groups(trained, config.optimizer.weight_decay, config.lr_factors)
    engine = deepspeed_engine.build_engine(trained, groups, config.optimizer, config.engine, micro_batch)
    if config.engine.compile:
        compile_tokenizer(model, lpips, gan)
    if distributed.world_size() > 1:  # entropy loss and usage refer to the global batch
        model.quantizer.average_over_ranks = mean_over_ranks
        model.quantizer.gather_over_ranks = all_gather_with_grad
    ema = build_ema(model, config)
    return TrainState(
        0, device, model, taught, engine, lpips, gan, dead_codes, ema, loader, captions, adaptation
    )


def build_run_model(
    config: TokenizerRunConfig, captions: Any, device: torch.device | str = "cpu"
) -> tuple[UniTok, Adaptation | None]:
    """The model of either stage, and how stage adapt changes it."""
    if isinstance(config, AdaptRunConfig):
        return build_adapted(config)
    return build_model(config, captions, device), None


def compile_tokenizer(model: UniTok, lpips: Any, gan: GAN | None) -> None:
    """Compile the blocks of encoder, decoder and text tower, and those of LPIPS and the discriminator."""
    # images have one size, and inductor fails on convolutions of any size
    compile_blocks(model, *COMPILED_BLOCKS, dynamic=False)
    if lpips is not None:
        compile_blocks(lpips.net, nn.Sequential, dynamic=False)
    if gan is not None and isinstance(gan.module, DinoDiscriminator):
        compile_blocks(gan.module.dino, DinoBlock, dynamic=False)  # hidden from the discriminator's modules


def build_ema(model: UniTok, config: TokenizerRunConfig) -> EMA | None:
    """The averaged weights, if there are any."""
    if not config.ema:
        return None
    adapt = isinstance(config, AdaptRunConfig)
    return EMA(model, config.ema, config.ema_start, config.ema_pace) if adapt else EMA(model, config.ema)


def build_logger(config: TokenizerRunConfig, run_dir: RunDir, state: TrainState) -> MetricLogger:
    """The metric logger, with the FLOPs of one image."""
    log = MetricLogger(run_dir, config.steps, config.log.every, config.batch_size, "tokenizer")
    if distributed.is_main():
        micro_batch = config.micro_batch(distributed.world_size())
        share = order_decoded_first(micro_batch, config.reconstruct_share)[1] / micro_batch
        backward = 1.0 if state.adaptation else 2.0
        per_sample = flops.tokenizer_flops(state.model.config, state.captions is not None, share, backward)
        log.set_flops(per_sample, config.log.peak_tflops or flops.peak_tflops(state.device))
    trained = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    log.info(f"{trained / 1e6:.1f} M trained parameters")
    log.info(state.model.quantizer.describe_rate(state.model.config.layout) or "no codes")
    return log


def resume(state: TrainState, checkpoint: Path, checkpoints: Checkpoints, log: MetricLogger) -> None:
    """Continue exactly after a checkpoint of this run, on any number of ranks."""
    saved = checkpoints.restore(checkpoint, _engines(state), merge_rank_states)
    if "readers" in saved:
        state.loader.dataset.continue_after(saved["readers"])
    else:
        state.loader.load_state_dict(saved["batches"])
    log.load_state_dict(saved["log"])
    _load_saved(state, saved, checkpoint, log)


def resume_from_other_run(
    state: TrainState, checkpoint: Path, checkpoints: Checkpoints, log: MetricLogger
) -> None:
    """Continue at the step of another run with any number of ranks and workers."""
    check_complete(checkpoint)
    saved = checkpoints.restore(checkpoint, _engines(state), merge_rank_states, always_merge=True)
    state.loader.dataset.continue_after(saved["readers"])
    _load_saved(state, saved, checkpoint, log)


def merge_rank_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """This rank's state from those of a run that was saved by another number of ranks."""
    merged = {"log": MetricLogger, "dead_codes": DeadCodes}
    return {
        **{name: kind.merge_states([own[name] for own in states]) for name, kind in merged.items()},
        "gan": states[0].get("gan", {}),
        "readers": [own["batches"] for own in states],
    }


def _load_saved(state: TrainState, saved: dict[str, Any], checkpoint: Path, log: MetricLogger) -> None:
    state.step = saved["step"]
    state.dead_codes.load_state_dict(saved["dead_codes"])
    if state.gan:
        state.gan.load_state_dict(saved.get("gan", {}))
    if state.ema:
        if state.adaptation:  # the model file has merged weights
            state.ema.set(state.adaptation.read_averages(checkpoint))
        else:
            # not by the names in the file: transformers stores some towers under older names
            averaged = UniTok.from_pretrained(checkpoint, dtype=torch.float32)
            state.ema.set(dict(averaged.named_parameters()))
    log.info(f"resuming after step {state.step} ({checkpoint})")


def _engines(state: TrainState) -> dict[str, Any]:
    """The engines by their names in a checkpoint."""
    gan = {"discriminator": state.gan.engine} if state.gan else {}
    return {"tokenizer": state.engine, **gan}


def save_checkpoint(
    state: TrainState, config: TokenizerRunConfig, checkpoints: Checkpoints, log: MetricLogger
) -> None:
    """Write checkpoints/step-XXXXXXXX: a model folder, the engines, and this rank's state."""
    own = {
        "batches": state.loader.state_dict(),
        "log": log.state_dict(),
        "dead_codes": state.dead_codes.state_dict(),
        "gan": state.gan.state_dict() if state.gan else {},
    }
    engines = _engines(state)
    # stage adapt writes its model, which is small, in the step
    snapshot = None if state.adaptation else lambda path: snapshot_model(path, state, config)
    write = lambda path: save_model(path, state, config)  # noqa: E731
    checkpoints.save(state.step, write, engines, own, snapshot_model=snapshot)


def save_model(path: Path, state: TrainState, config: TokenizerRunConfig, final: bool = False) -> None:
    """A folder that `UniTok.from_pretrained` loads, with the tokenizer of captions in caption_tokenizer/."""
    with state.ema.applied() if state.ema else contextlib.nullcontext():
        if state.adaptation:
            state.adaptation.write(path, state.model, final)
        else:
            state.model.save_pretrained(path)
    _save_captions(path, state, config)


def snapshot_model(path: Path, state: TrainState, config: TokenizerRunConfig) -> Callable[[], None]:
    """As `save_model`, but the returned function writes the weights of now, in another thread if need be."""
    with state.ema.applied() if state.ema else contextlib.nullcontext():
        weights = to_host(state.model.state_dict())
    _save_captions(path, state, config)
    return partial(state.model.save_pretrained, path, state_dict=weights)


def _save_captions(path: Path, state: TrainState, config: TokenizerRunConfig) -> None:
    if state.captions is not None:
        state.captions.save(path)
    elif config.init_from:  # without the contrastive loss the caption tokenizer of init_from stays valid
        initial = tokenizer_path(config.init_from) / "caption_tokenizer"
        if initial.exists():
            shutil.copytree(initial, path / initial.name, dirs_exist_ok=True)


def log_train_state(log: MetricLogger, state: TrainState, lr: float) -> None:
    """Learning rates, and usage (per cent) and perplexity of each of the K codes, for the next record."""
    log.note("lr", lr)
    if state.gan:
        log.note("discriminator_lr", state.gan.lr)
    if state.model.config.embed_dim:
        log.note("logit_scale", state.model.logit_scale.exp().item())
    quantizer = state.model.quantizer
    shares = usage_and_perplexity(quantizer.usage, quantizer.code_sizes)
    for code, (used, perplexity) in enumerate(zip(*shares)):
        log.note(f"usage/{code}", used)
        log.note(f"perplexity/{code}", perplexity)
