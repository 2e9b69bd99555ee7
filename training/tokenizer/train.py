"""Stage 1: train the visual tokenizer to rebuild images and to match captions (arXiv 2502.20321, section 3).

B images of one micro-batch, N visual tokens, K sub-codebooks, V entries each, T text positions.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_unitok.core import distributed
from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.layers import drop_path_stacks

from ..core import deepspeed_engine, flops, schedules
from ..core.checkpoint import Checkpoints, StopOnSignal, load_weights_only
from ..core.collectives import averaged
from ..core.ema import EMA
from ..core.metric_logger import MetricLogger
from ..core.profiler import profile_steps
from ..core.run_dir import RunDir
from ..data import seeding
from ..data.shards import ShardStream, build_loader, read_batches
from .config import TokenizerRunConfig
from .data import PairCollate, PairDecoder, decoded_first, grid_image, to_pixels
from .dead_codes import Restarts, spread
from .gan import Adversary
from .losses import contrastive_loss, reconstruction_losses, weighted_sum
from .model import begin_codebooks, build_lpips, build_model, caption_tokenizer


class Run(NamedTuple):
    """All that the loop works with, as it stands after `step` steps."""

    step: int
    device: torch.device
    model: UniTok
    trained: Any  # the DeepSpeed engine around it
    rival: Adversary | None
    lpips: Any
    ema: EMA | None
    restarts: Restarts
    batches: Any  # the loader
    log: MetricLogger
    write_model: Callable[[Path], None]
    save: Callable[[int], None]


def main(config: TokenizerRunConfig, folder: RunDir) -> None:
    """Train from the beginning, or from the last checkpoint, to the end; leaves OUT/model."""
    run = prepare(config, folder)
    model, trained, rival, log, step = run.model, run.trained, run.rival, run.log, run.step
    model.train()
    log.start(step)
    rows = read_batches(run.batches)
    with (
        contextlib.closing(log),
        StopOnSignal() as stop,
        profile_steps(config, folder.path, step) as profiler,
    ):
        while step < config.last_step:
            plan = config.schedule
            rate = schedules.lr_multiplier(plan.kind, step, config.steps, plan.warmup, plan.start, plan.end)
            deepspeed_engine.set_lr_multiplier(trained, rate)
            if rival:
                rival.begin_step(step)
            sums: dict[str, torch.Tensor] = {}
            for part in range(config.engine.accumulation):
                turn = learn(run, config, next(rows), step, part)
                for name, value in turn.losses.items():
                    sums[name] = sums.get(name, 0) + value.float() / config.engine.accumulation
            step += 1
            # what every step ends with
            deepspeed_engine.clamp_parameter(trained, model.logit_scale, 0.0, math.log(100.0))
            moved = run.restarts.after_step(step, trained)
            if run.ema:
                if moved is not None:
                    run.ema.reset_rows(model.quantizer.codebooks, moved)
                run.ema.update(step)
            if step % config.log.every == 0 or step == config.steps:
                note_state(log, model, config.optimizer.lr * rate, rival)
            norms = {"grad_norm": turn.norm if turn.norm is not None else 0.0}
            if rival:
                norms["discriminator_grad_norm"] = rival.grad_norm
            log.add(step, {**sums, **norms})
            if config.log.images_every and step % config.log.images_every == 0:
                shown = grid_image(turn.pixels, turn.copies)
                log.log_image(step, "originals above reconstructions", shown)
            profiler.step(step)
            asked = stop()
            if asked or step % config.checkpoint.every == 0 or step == config.last_step:
                run.save(step)
                stop.exit_if_signalled()
        if step == config.steps:
            log.flush()
    if step == config.steps:
        if distributed.is_main():
            folder.finish(run.write_model)
        distributed.barrier()
        log.info(f"finished: {folder.model}")
    else:
        log.info(f"stopped at step {step} as asked (stop_at); the same command without it goes on")


class Turn(NamedTuple):
    """What one micro-batch of B images, b of them decoded, leaves behind."""

    losses: dict[str, torch.Tensor]  # detached
    norm: torch.Tensor | float | None  # of the gradients, at the end of an accumulation
    pixels: torch.Tensor  # (B, 3, S, S)
    copies: torch.Tensor  # (b, 3, S, S)


def learn(run: Run, config: TokenizerRunConfig, batch: dict[str, Any], step: int, part: int) -> Turn:
    """One micro-batch through tokenizer and discriminator; `part` counts them within the step."""
    model, trained, rival = run.model, run.trained, run.rival
    pixels = to_pixels(batch["image"], run.device)
    token_ids = None if batch["token_ids"] is None else batch["token_ids"].to(run.device)
    # all chance belongs to an image by its number in the global batch, however that is split
    order, decoded = decoded_first(len(pixels), config.reconstruct_share)
    first = (part * distributed.world_size() + distributed.rank()) * len(pixels)
    samples = [first + place for place in order]
    draw_drop_path(model, config.seed, step, samples)
    run.restarts.order = order
    # 1. all images are encoded (for contrast), the first ones are decoded (for reconstruction)
    entropy = config.losses.entropy > 0
    out = deepspeed_engine.forward(trained, pixels, token_ids, reconstruct_first=decoded, entropy=entropy)
    copies = out.reconstruction
    rebuilt = reconstruction_losses(copies, pixels)
    if run.lpips is not None:
        with deepspeed_engine.autocast(trained):
            rebuilt["lpips"] = run.lpips(copies, pixels[:decoded]).mean()
    losses = {**rebuilt, **out.losses}
    if out.text_embeds is not None:
        losses["clip"] = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
    loss = weighted_sum(losses, config.losses)
    # 2. the discriminator's judgement, weighed against the sum of the reconstruction losses
    if rival:
        target = weighted_sum(rebuilt, config.losses)
        losses |= rival.term(target, copies, model.decoder.last_weight, samples[:decoded])
        loss = loss + losses["adversarial_weight"] * losses["adversarial"]
    # 3. one update of the tokenizer per accumulation
    trained.backward(loss)
    norm = deepspeed_engine.optimizer_step(trained)
    # 4. and one of the discriminator, on the same images
    if rival:
        losses |= rival.learn(pixels, copies)
    losses = {"loss": loss, **losses, "skipped": torch.tensor(batch["skipped"])}
    return Turn({name: value.detach() for name, value in losses.items()}, norm, pixels, copies.detach())


def draw_drop_path(model: UniTok, seed: int, step: int, samples: Sequence[int]) -> None:
    """What decides drop path in the next forward pass over these images of the global batch."""
    for name, blocks in drop_path_stacks(model).items():
        shape = (len(blocks), 2)
        blocks.drop_path_noise = seeding.uniform_per_sample(shape, samples, seed, "drop path", step, name)


def prepare(config: TokenizerRunConfig, folder: RunDir) -> Run:
    """Models, data and engines at the beginning, at the last checkpoint, or at `resume_from`."""
    device = deepspeed_engine.init_distributed(config.engine, config.seed)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    latest = checkpoints.latest()
    other = Path(config.resume_from) if config.resume_from and latest is None else None
    captions = caption_tokenizer(config)
    model = build_model(config, captions).to(device)
    lpips = build_lpips(config, model.config.image_size, device)
    micro = config.micro_batch(distributed.world_size())
    rival = Adversary(config, model.config.image_size, device, micro) if config.losses.adversarial else None
    stream, collate = build_data(config, model, captions, micro)
    folder.record_facts(data=stream.fingerprint())
    log = MetricLogger(folder, config.steps, config.log.every, config.batch_size, "tokenizer")
    if distributed.is_main():
        share = decoded_first(micro, config.reconstruct_share)[1] / micro
        work = flops.tokenizer_flops(model.config, captions is not None, share)
        log.set_flops(work, config.log.peak_tflops or flops.peak_tflops(device))
    if latest is None and other is None and config.codebooks.init_images:
        log.info(f"codebooks begin on encoder outputs of {config.codebooks.init_images} images")
        first, _ = build_data(config, model, captions, config.codebooks.init_images, alone=True)
        pairs = collate([pair for pair, _ in first.take()])
        begin_codebooks(model, to_pixels(pairs["image"], device), config.seed)
    groups = deepspeed_engine.parameter_groups(model, config.optimizer.weight_decay, config.lr_factors)
    trained = deepspeed_engine.build_engine(model, groups, config.optimizer, config.engine, micro)
    engines = {"tokenizer": trained, **({"discriminator": rival.engine} if rival else {})}
    if distributed.world_size() > 1:  # entropy and usage speak of the global batch
        model.quantizer.average_over_ranks = averaged
    restarts = Restarts(model.quantizer, config.codebooks, config.steps, config.seed)
    state = None
    if other is not None:
        every = load_weights_only(other, engines)
        stream.pass_over([found["batches"] for found in every])
        state = every[0]
    batches = build_loader(stream, collate)
    if latest is not None:
        state = checkpoints.restore(latest, engines, key="resume_from")
        batches.load_state_dict(state["batches"])
        log.load_state_dict(state["log"])
    ema = EMA(model, config.ema) if config.ema else None
    if state is not None:
        restarts.step = state["step"]
        restarts.load_state_dict(state["restarts"])
        if ema:
            ema.load(latest or other)
        log.info(f"goes on after step {state['step']} ({latest or other})")
    step = state["step"] if state else 0
    shown = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        f"{shown / 1e6:.1f} M parameters, steps {step} to {config.last_step}, {config.batch_size} images each"
    )

    def write_model(path: Path) -> None:
        save_model(path, model, captions, ema)
        if captions is None and config.init_from:  # its own stays, where no captions are learnt
            kept = tokenizer_path(config.init_from) / "caption_tokenizer"
            if kept.exists():
                shutil.copytree(kept, path / kept.name, dirs_exist_ok=True)

    def save(step: int) -> None:
        state = {"batches": batches.state_dict(), "log": log.state_dict(), "restarts": restarts.state_dict()}
        checkpoints.save(step, write_model, engines, state)

    return Run(
        step, device, model, trained, rival, lpips, ema, restarts, batches, log, write_model, save
    )  # fmt: skip


def build_data(
    config: TokenizerRunConfig, model: UniTok, captions: Any, micro: int, alone: bool = False
) -> tuple[ShardStream, PairCollate]:
    """The stream of pairs in micro-batches of `micro` (for one rank `alone`, or for this one of all)."""
    decoder = PairDecoder(config.images, model.config.image_size, captions is not None)
    rank, count = (0, 1) if alone else (distributed.rank(), distributed.world_size())
    stream = ShardStream(config.data, decoder, seed=config.seed, micro_batch=micro, rank=rank, ranks=count)
    return stream, PairCollate(captions, config.reconstruct_share)


def note_state(log: MetricLogger, model: UniTok, rate: float, rival: Adversary | None) -> None:
    """Learning rates, and usage (per cent) and perplexity of every sub-codebook, for the next row."""
    used, perplexity = spread(model.quantizer.usage)
    log.note("lr", rate)
    if rival:
        log.note("discriminator_lr", rival.lr)
    log.note("logit_scale", model.logit_scale.exp().item())
    for book, (share, size) in enumerate(zip(used, perplexity)):
        log.note(f"usage/{book}", share)
        log.note(f"perplexity/{book}", size)


def save_model(path: Path, model: UniTok, captions: Any, ema: EMA | None) -> None:
    """A folder that `UniTok.from_pretrained` loads, with the tokenizer of captions in caption_tokenizer/."""
    if ema is None:
        model.save_pretrained(path)
    else:
        with ema.applied():
            model.save_pretrained(path)
    if captions is not None:
        captions.save(path)
