"""Stage 1: train the visual tokenizer to rebuild images and to match captions (arXiv 2502.20321, section 3).

B images of one micro-batch, N visual tokens, K sub-codebooks, V entries each, T text positions.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from open_unitok import ranks
from open_unitok.errors import UserError, did_you_mean
from open_unitok.tokenizer import UniTok, UniTokConfig

from . import draws, engine, schedules
from .checkpoint import Checkpoints, stopping
from .codebooks import Restarts, init_codebooks, spread
from .collectives import averaged
from .ema import Ema
from .logbook import Logbook
from .runfolder import RunFolder
from .shards import ShardStream, loader, read
from .tokenizer_config import TokenizerRun
from .tokenizer_data import PairCollate, PairDecoder, grid_picture, to_pixels
from .tokenizer_losses import contrastive_loss, reconstruction_losses, weighted_sum


def main(config: TokenizerRun, folder: RunFolder) -> None:
    """Train from the beginning, or from the last checkpoint, to the end; leaves OUT/model."""
    device = engine.start(config.engine, config.seed)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    latest = checkpoints.latest()
    captions = caption_tokenizer(config)
    model = build_model(config, captions).to(device)
    lpips = build_lpips(config, device)
    micro = config.micro_batch(ranks.world_size())
    decoder = PairDecoder(config.pictures, model.config.image_size, captions is not None)
    collate = PairCollate(captions)
    stream = ShardStream(
        config.data, decoder, seed=config.seed, micro_batch=micro, rank=ranks.rank(), ranks=ranks.world_size()
    )
    folder.note(data=stream.fingerprint())
    log = Logbook(folder, config.steps, config.log.every, config.batch_size, "tokenizer")
    if latest is None and config.codebooks.init_images:
        log.phase(f"codebooks begin on encoder outputs of {config.codebooks.init_images} images")
        first = ShardStream(config.data, decoder, seed=config.seed, micro_batch=config.codebooks.init_images)
        begin_codebooks(
            model, to_pixels(collate([pair for pair, _ in first.take()])["picture"], device), config.seed
        )
    batches = loader(stream, collate)
    groups = engine.decay_groups(model, config.optimizer.weight_decay, config.lr_factors)
    trained = engine.wrap(model, groups, config.optimizer, config.engine, micro)
    if ranks.world_size() > 1:  # entropy and usage speak of the global batch
        model.quantizer.average_over_ranks = averaged
    ema = Ema(model, config.ema) if config.ema else None
    restarts = Restarts(model.quantizer, config.codebooks, config.steps, config.seed)

    def write_model(path: Path) -> None:
        save_model(path, model, captions, ema)

    step = 0
    if latest is not None:
        state = checkpoints.restore(latest, {"tokenizer": trained})
        step = restarts.step = state["step"]
        batches.load_state_dict(state["batches"])
        log.load_state_dict(state["log"])
        restarts.load_state_dict(state["restarts"])
        if ema:
            ema.load(latest)
        log.phase(f"goes on after step {step} ({latest.name})")
    shown = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.phase(
        f"{shown / 1e6:.1f} M parameters, steps {step} to {config.last_step}, {config.batch_size} images each"
    )

    model.train()
    log.begin(step)
    rows = read(batches)
    with contextlib.closing(log), stopping() as stop:
        while step < config.last_step:
            plan = config.schedule
            rate = schedules.multiplier(plan.kind, step, config.steps, plan.warmup, plan.start, plan.end)
            engine.set_lr(trained, rate)
            sums: dict[str, torch.Tensor] = {}
            norm = None
            for part in range(config.engine.accumulation):
                batch = next(rows)
                draws.seed_step(config.seed, step, part)
                pixels = to_pixels(batch["picture"], device)
                token_ids = None if batch["token_ids"] is None else batch["token_ids"].to(device)
                # 1. all images are encoded (for contrast), the first ones are decoded (for reconstruction)
                out = trained(
                    pixels,
                    token_ids,
                    reconstruct_first=math.ceil(micro * config.reconstruct_share),
                    entropy=config.losses.entropy > 0,
                )
                losses = {**reconstruction_losses(out.reconstruction, pixels), **out.losses}
                if lpips is not None:
                    losses["lpips"] = lpips(out.reconstruction, pixels[: len(out.reconstruction)]).mean()
                if out.text_embeds is not None:
                    losses["clip"] = contrastive_loss(out.image_embeds, out.text_embeds, out.logit_scale)
                # 2. an adversarial term, weighed against the sum of the reconstruction losses, joins here
                loss = weighted_sum(losses, config.losses)
                # 3. one update of the tokenizer per accumulation
                trained.backward(loss)
                norm = engine.step(trained)
                for name, value in {
                    "loss": loss,
                    **losses,
                    "skipped": torch.tensor(batch["skipped"]),
                }.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / config.engine.accumulation
                # 4. the discriminator's update on the same images follows here
            step += 1
            # 5. what every step ends with
            engine.clamp(trained, model.logit_scale, 0.0, math.log(100.0))
            moved = restarts.after_step(step, trained)
            if ema:
                if moved is not None:
                    ema.reset_rows(model.quantizer.codebooks, moved)
                ema.update(step)
            if step % config.log.every == 0 or step == config.steps:
                note_state(log, model, config.optimizer.lr * rate)
            log.add(step, {**sums, "grad_norm": norm if norm is not None else 0.0})
            if config.log.images_every and step % config.log.images_every == 0:
                log.images(step, "originals above reconstructions", grid_picture(pixels, out.reconstruction))
            asked = stop()
            if asked or step % config.checkpoint.every == 0 or step == config.last_step:
                state = {
                    "batches": batches.state_dict(),
                    "log": log.state_dict(),
                    "restarts": restarts.state_dict(),
                }
                checkpoints.save(step, write_model, {"tokenizer": trained}, state)
                stop.exit_if_asked()
        if step == config.steps:
            log.flush()
    if step == config.steps:
        if ranks.is_main():
            folder.finish(write_model)
        ranks.barrier()
        log.phase(f"finished: {folder.model}")
    else:
        log.phase(f"stopped at step {step} as asked (stop_at); the same command without it goes on")


def caption_tokenizer(config: TokenizerRun) -> Any:
    """The CLIP-style tokenizer of captions, or None where no contrast is learnt."""
    if not config.losses.clip or config.caption_tokenizer is None:
        return None
    from open_unitok.tokenizer.text_tokens import CaptionTokenizer

    length = config.model.get("text_context_length", UniTokConfig().text_context_length)
    return CaptionTokenizer.from_path(config.caption_tokenizer, length)


def build_model(config: TokenizerRun, captions: Any) -> UniTok:
    """A fresh tokenizer (weights drawn from `seed`), or the one at `start_from`, with frozen parts frozen.

    Raises:
        UserError: an unknown field of `model`, or one that differs from the model at `start_from`.
    """
    fields = dict(config.model)
    size = fields.pop("size", "vitamin_large")
    known = set(UniTokConfig().to_dict()) - {"model_type", "transformers_version"}
    for key in fields:
        if key not in known:
            raise UserError(f"Unknown config key 'model.{key}'.{did_you_mean(key, known)}")
    if captions is not None:
        fields.setdefault("text_vocab_size", captions.vocab_size)
    wanted = UniTokConfig.named(size, **fields)
    if captions is not None and wanted.text_vocab_size < captions.vocab_size:
        raise UserError(
            f"model.text_vocab_size is {wanted.text_vocab_size}, but {config.caption_tokenizer} has "
            f"{captions.vocab_size} ids: leave the key out."
        )
    if config.start_from is None:
        torch.manual_seed(draws.key(config.seed, "model"))
        model = UniTok(wanted)
        if config.decoder_init == "kaiming":
            begin_decoder(model)
    else:
        model = start_model(config.start_from)
        for key in fields:
            if getattr(model.config, key) != getattr(wanted, key):
                other = getattr(model.config, key)
                raise UserError(f"model.{key} is {fields[key]}, but the model at start_from has {other}.")
        model.config.drop_path_rate = wanted.drop_path_rate
    for part in config.freeze:
        model.get_submodule(part).requires_grad_(False)
    if not config.losses.clip:  # without contrast these get no gradient, and must not decay
        for part in (model.text_encoder, model.image_norm, model.image_projection):
            part.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
    if config.engine.gradient_checkpointing:
        engine.checkpoint_activations(model)
    return model


def start_model(path: str) -> UniTok:
    """The tokenizer at a path or hub id, its weights in fp32.

    Raises:
        UserError: there is none.
    """
    if not Path(path).exists() and path.count("/") != 1:  # a hub id is owner/name
        raise UserError(f"start_from is {path}, but there is no such folder or file.")
    try:
        return UniTok.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise UserError(f"start_from: no model at {path} ({' '.join(str(error).split())[:200]}).") from error


def begin_decoder(model: UniTok) -> None:
    """Begin the decoder's convolutions at unit gain (He et al., arXiv 1502.01852, equation 10).

    The published start counts the outputs of all groups, so depthwise kernels begin near zero and their
    blocks pass nothing on for hundreds of steps: harmless over a million steps, half of the demo's run.
    """
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def build_lpips(config: TokenizerRun, device: torch.device) -> Any:
    """The perceptual loss with its published weights, or None where its weight is 0."""
    if not config.losses.lpips:
        return None
    from open_unitok.tokenizer.lpips import LPIPS

    return LPIPS.from_file(config.losses.lpips_weights).to(device)


@torch.no_grad()
def begin_codebooks(model: UniTok, pixels: torch.Tensor, seed: int) -> None:
    """Codebook entries become encoder outputs of (B, 3, S, S) pixels."""
    model.eval()
    latents = torch.cat([model.encode_latents(piece) for piece in pixels.split(64)])
    init_codebooks(model.quantizer.codebooks, latents.flatten(0, 1), seed)


def note_state(log: Logbook, model: UniTok, rate: float) -> None:
    """Learning rate, and usage (per cent) and perplexity of every sub-codebook, for the next row."""
    used, perplexity = spread(model.quantizer.usage)
    log.note("lr", rate)
    log.note("logit_scale", model.logit_scale.exp().item())
    for book, (share, size) in enumerate(zip(used, perplexity)):
        log.note(f"usage/{book}", share)
        log.note(f"perplexity/{book}", size)


def save_model(path: Path, model: UniTok, captions: Any, ema: Ema | None) -> None:
    """A folder that `UniTok.from_pretrained` loads, with the tokenizer of captions in caption_tokenizer/."""
    if ema is None:
        model.save_pretrained(path)
    else:
        with ema.applied():
            model.save_pretrained(path)
    if captions is not None:
        captions.save(path)
