"""Stage 2: train the MLLM to read and to draw, in one loop for pretraining and fine-tuning (arXiv 2502.20321,
section 3.4).

B rows, L tokens per row, K sub-codebooks.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import is_flash_attn_2_available

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.mllm.lora import add_lora

from ..core import deepspeed_engine, schedules
from ..core.checkpoint import Checkpoints, StopOnSignal
from ..core.metric_logger import MetricLogger
from ..core.profiler import profile_steps
from ..core.run_dir import RunDir
from ..data import seeding
from ..data.collate import Batch
from ..data.mixture import Mixture
from ..data.sample_kinds import SAMPLE_KINDS, crop_mismatch
from ..data.sequences import SequenceBuilder
from .config import PARTS, LossOptions, MLLMRunConfig
from .metrics import Progress
from .model import Parts, load_parts, new_parts, save_parts


def main(config: MLLMRunConfig, folder: RunDir) -> None:
    """Train from the beginning, or from the last checkpoint, to the end; leaves OUT/model."""
    device = deepspeed_engine.init_distributed(config.engine, config.seed)
    # with adapters the weights they sit on are in `init_from` already, and in no checkpoint
    adapters = config.lora is not None
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep, trained_alone=adapters)
    latest = checkpoints.latest()
    micro = config.micro_batch(distributed.world_size())
    parts = prepare(config)
    model = parts.model
    mixture = build_mixture(config, parts)
    folder.record_facts(data=mixture.fingerprint, tokenizer=model.config.unitok_fingerprint)
    progress = Progress(model, device, config.log.peak_tflops)
    groups = deepspeed_engine.parameter_groups(
        model, config.optimizer.weight_decay, dict(config.prefix_factors())
    )
    deepspeed_engine.shard_to_device(
        model, device, config.optimizer, config.engine, micro
    )  # from here on ZeRO 3 hides all shapes
    trained = deepspeed_engine.build_engine(model, groups, config.optimizer, config.engine, micro)
    log = MetricLogger(folder, config.steps, config.log.every, config.batch_size, Path(config.out).name)
    gathers = config.engine.zero_stage == 3

    def weights() -> dict[str, torch.Tensor] | None:
        return trained._zero3_consolidated_16bit_state_dict(adapters) if gathers else None

    def write_model(path: Path) -> None:
        state = weights()
        if distributed.is_main():
            save_parts(parts, path, state)

    step = 0
    if latest is not None:
        state = checkpoints.restore(latest, {"mllm": trained})
        step = state["step"]
        mixture.load_state_dict(state["mixture"])
        log.load_state_dict(state["log"])
        progress.load_state_dict(state["progress"])
        log.info(f"goes on after step {step} ({latest.name})")
    log.info(
        f"{progress.trained / 1e6:.1f} M parameters are trained, steps {step} to {config.last_step} of "
        f"{config.batch_size} samples"
    )

    model.train()
    log.start(step)
    with (
        contextlib.closing(log),
        StopOnSignal() as stop,
        profile_steps(config, folder.path, step) as profiler,
    ):
        while step < config.last_step:
            plan = config.schedule
            rate = schedules.lr_multiplier(plan.kind, step, config.steps, plan.warmup, plan.start, plan.end)
            deepspeed_engine.set_lr_multiplier(trained, rate)
            sums, norm = learn(trained, config, mixture.next(), step, progress)
            step += 1
            profiler.step(step)
            if step % config.log.every == 0:
                log.note("lr", config.optimizer.lr * rate)
                for name, value in progress.take().items():
                    log.note(name, value)
            loss, text_loss, image_loss = sums.unbind()
            values = {"loss": loss, "text_loss": text_loss, "image_loss": image_loss}
            log.add(step, {**values, "grad_norm": norm if norm is not None else 0.0})
            asked = stop()
            if asked or step % config.checkpoint.every == 0 or step == config.last_step:
                state = {
                    "mixture": mixture.state_dict(),
                    "log": log.state_dict(),
                    "progress": progress.state_dict(),
                }
                checkpoints.save(step, write_model, {"mllm": trained}, state, gathers)
                stop.exit_if_signalled()
        if step == config.steps:
            log.flush()
    if step < config.steps:
        log.info(f"stopped at step {step} as asked (stop_at); the same command without it goes on")
        return
    final = weights()
    if distributed.is_main():
        folder.finish(lambda path: save_parts(parts, path, final))
    distributed.barrier()
    log.info(f"finished: {folder.model}")


def learn(
    trained: Any, config: MLLMRunConfig, batches: list[Batch], step: int, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """One update from this rank's micro-batches; returns (loss, text loss, image loss), whose mean over ranks
    is that of the global batch, and the norm of the gradients."""
    # 1. how much is learnt on all ranks and in all micro-batches of this step: the denominators
    counts = torch.tensor([[batch.text_targets, batch.code_targets] for batch in batches])
    targets = distributed.sum_over_ranks(counts.sum(dim=0))
    sums = torch.zeros(3, device=progress.device)
    norm = None
    for part, batch in enumerate(batches):
        seeding.seed_forward_pass(config.seed, step, part)
        inputs = {
            name: None if value is None else value.to(progress.device) for name, value in batch.inputs.items()
        }
        # 2. one pass over texts and images, read and drawn; the losses come as sums
        out = trained(**inputs, reduction="sum", return_logits=False)
        joined = join(out.text_loss, out.image_loss, targets, config.loss)
        if (step + 1) % config.log.every == 0:
            progress.add_texts(trained.module, out.last_hidden_state, batch, inputs)
        # 3. DeepSpeed divides by ranks and accumulation; the counts have done so already
        trained.backward(joined.loss * (distributed.world_size() * config.engine.accumulation))
        norm = deepspeed_engine.optimizer_step(trained)
        sums += torch.stack([value.detach() for value in joined]) * distributed.world_size()
        progress.add(out.image_correct, batch)
    return sums, norm


class Joined(NamedTuple):
    """This rank's share of the loss and of the two mean losses: over ranks and micro-batches they add up."""

    loss: torch.Tensor
    text_loss: torch.Tensor
    image_loss: torch.Tensor


def join(
    text_sum: torch.Tensor, image_sum: torch.Tensor, targets: torch.Tensor, options: LossOptions
) -> Joined:
    """Text and image loss as one number; see `LossOptions`.

    Args:
        text_sum, image_sum: summed over this micro-batch.
        targets: (2,) text tokens and codes that are learnt in the whole step, on all ranks.
    """
    text_count, code_count = targets.tolist()
    text, image = text_sum / max(text_count, 1.0), image_sum / max(code_count, 1.0)
    if options.weighting == "means":
        return Joined(options.text * text + options.image * image, text, image)
    total = max(options.text * text_count + options.image * code_count, 1e-9)
    return Joined((options.text * text_sum + options.image * image_sum) / total, text, image)


def prepare(config: MLLMRunConfig) -> Parts:
    """The model that is trained, with adapters where asked for, and what is frozen frozen.

    Raises:
        UserError: as `new_parts`, `load_parts`, `add_lora` and `choose_attention`.
    """
    parts = new_parts(config) if config.model else load_parts(str(config.init_from))
    parts.model.language_model.set_attn_implementation(choose_attention(config.attention))
    torch.manual_seed(seeding.derive_seed(config.seed, "lora"))
    put_adapters(parts.model, config)
    freeze(parts.model, config)
    if config.engine.gradient_checkpointing:
        deepspeed_engine.enable_activation_checkpointing(parts.model)
    return parts


def build_mixture(config: MLLMRunConfig, parts: Parts) -> Mixture:
    """The data of this run, checked against the model.

    Raises:
        UserError: codes of another tokenizer or number of visual tokens; rows longer than the context.
    """
    model: UniTokForConditionalGeneration = parts.model
    processor: UniTokProcessor = parts.processor
    limit = model.config.context_length
    if limit is not None and config.data.max_length > limit:
        raise UserError(
            f"data.max_length is {config.data.max_length}, but the decoder's context is {limit} tokens "
            "(max_position_embeddings): lower it."
        )
    mixture = Mixture(
        config.data,
        SequenceBuilder(processor, config.data.max_length),
        seed=config.seed,
        batch_size=config.batch_size,
        accumulation=config.engine.accumulation,
        fingerprint=model.config.unitok_fingerprint,
    )
    warnings = set()
    for entry, data in zip(config.data.mixture, mixture.datasets):
        if data.codes is None:
            continue
        warnings.add(crop_mismatch(data.codes, entry.kind))
        tokens = data.codes.manifest["num_tokens"]
        if SAMPLE_KINDS[entry.kind].generates_images and tokens != model.config.num_image_tokens:
            raise UserError(
                f"{entry.path} holds {tokens} visual tokens per image, but the model generates "
                f"{model.config.num_image_tokens} (num_image_tokens): extract codes at its image size."
            )
    for text in sorted(warnings - {None}):
        if distributed.is_main():
            print(f"data: {text}", file=sys.stderr)
    return mixture


def put_adapters(model: Any, config: MLLMRunConfig) -> None:
    """LoRA where the config asks for it, on a base that keeps its number format or is rounded to bf16."""
    lora = config.lora
    if lora is None:
        return
    add_lora(model, [PARTS[part].rstrip(".") for part in lora.parts], lora.rank, lora.alpha, lora.dropout)
    if lora.base == "bf16":
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and not name.startswith(PARTS["visual_embedder"]):
                parameter.data = parameter.data.to(torch.bfloat16)


def freeze(model: Any, config: MLLMRunConfig) -> None:
    """No gradient for parts with factor 0, nor ever for the sub-codebooks: stored codes keep meaning."""
    for name, parameter in model.named_parameters():
        if config.lr_factor(name) == 0:
            parameter.requires_grad_(False)
    model.visual_embedder.codebooks.requires_grad_(False)


def choose_attention(name: str) -> str:
    """The attention that transformers is told: "auto" becomes flash_attention_2 where that can run.

    Raises:
        UserError: flash attention is asked for where it is not.
    """
    there = torch.cuda.is_available() and is_flash_attn_2_available()
    if name == "flash_attention_2" and not there:
        raise UserError(
            "attention: flash_attention_2 needs a CUDA GPU and the package flash-attn, which are not both "
            "here (`unitok doctor` says more): take `auto` or `sdpa`."
        )
    if name == "auto":
        return "flash_attention_2" if there else "sdpa"
    return name
