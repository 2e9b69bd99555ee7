"""Estimate parameters, memory, communication and time of a run of stage tokenizer or adapt without a GPU.

The model is built on the meta device from the config and, for stage adapt, from the autoencoder's config;
no weights are loaded. torch counts the products of a step; see `activations.py` for what is kept in memory.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.adaptation.autoencoder_kl import tokenizer_fields
from open_unitok.tokenizer.adaptation.folders import read_fields
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.tokenizer.loading import check_tokenizer_folder
from open_unitok.tokenizer.quantizers.base import SIMILARITY_BLOCK
from open_unitok.tokenizer.text_tower import TextEncoder

from ..core.communication import Transfer, parameter_sizes, transfers
from ..core.plan import Memory, engine_memory
from .activations import Activations, describe_activations, measure_activations
from .adapt import adapted_config, freeze_but_lora
from .adapt_config import AdaptRunConfig
from .config import TokenizerRunConfig
from .data import order_decoded_first
from .discriminator import DinoDiscriminator, PatchDiscriminator
from .model import BLOCK_STACKS, check_repeated_fields, load_caption_tokenizer, model_fields

# of one block of similarities, in float32: themselves, softmax, its logarithm and their gradients
SIMILARITY_TENSORS = 6


class Plan(NamedTuple):
    """The estimates of `plan_run`."""

    parameters: dict[str, tuple[int, int]]  # part -> all, trained
    memory: dict[int, Memory]  # ZeRO stage -> memory of one rank
    transfers: list[Transfer]  # of a step at the run's ZeRO stage
    flops: float  # of a whole step
    images: int  # of a whole step
    activations: dict[bool, Activations]  # by whether engine.gradient_checkpointing is on
    peaks: dict[bool, float]  # bytes of a rank's activations, likewise
    recomputed: float  # FLOPs that gradient checkpointing adds to a step
    tokens: int  # N of an image
    assumed: list[str]

    @property
    def work(self) -> tuple[float, str]:
        """What a step processes, and its unit."""
        return self.images, "images"


class Cost(NamedTuple):
    """FLOPs of one image, of which a share is decoded."""

    flops: float  # of all passes
    forward: float  # of the model's forward pass
    blocks: float  # of its transformer blocks therein


def plan_run(config: TokenizerRunConfig, gpus: int, text_tokens: int = 0) -> Plan:
    """Parameters, memory and FLOPs of the run on `gpus` ranks.

    Raises:
        UserError: the config does not fit the files on disk, or batch_size does not split over the ranks.
    """
    micro_batch = config.micro_batch(gpus)
    model, assumed = model_on_meta(config)
    networks = loss_networks(config, model.config.image_shape)
    decoded_images = order_decoded_first(micro_batch, config.reconstruct_share)[1]
    decoded = decoded_images / micro_batch
    cost = measure(model, networks, config, decoded)
    found_activations = measure_activations(model, networks, config)
    block = _block_bytes(model, micro_batch)
    peaks = {on: a.of_batch(micro_batch, decoded_images) + block for on, a in found_activations.items()}
    activations = peaks[config.engine.gradient_checkpointing]
    frozen_networks = float(sum(p.numel() for n in networks.values() for p in _all(n) if not p.requires_grad))
    memory = {}
    trained, frozen = (4.0 * count for count in _counts(model))
    for stage in range(3):
        sizes = parameter_sizes(model, config.engine, stage)
        found = engine_memory(config.engine, stage, gpus, sizes, frozen, activations)
        if "discriminator" in networks:
            sizes = parameter_sizes(networks["discriminator"], config.engine, stage)
            second = engine_memory(config.engine, stage, gpus, sizes, 0.0, 0.0)
            found = Memory(*(a + b for a, b in zip(found, second)))
        memory[stage] = found._replace(parameters=found.parameters + 4.0 * frozen_networks)
        if config.ema:  # the averages
            memory[stage] = memory[stage]._replace(optimizer=memory[stage].optimizer + trained)
    parameters = {name: part_sizes(part) for name, part in model.named_children()}
    parameters |= {name: part_sizes(network) for name, network in networks.items()}
    sent = sent_by(model, config, gpus)
    if "discriminator" in networks:  # an engine of its own, which steps after the generator's
        sent += [
            found._replace(what=f"{found.what} of D")
            for found in sent_by(networks["discriminator"], config, gpus)
        ]
    flops, tokens = config.batch_size * cost.flops, model.config.num_visual_tokens
    recomputed = config.batch_size * (cost.forward - cost.blocks * (config.recompute != "all"))
    return Plan(
        parameters,
        memory,
        sent,
        flops,
        config.batch_size,
        found_activations,
        peaks,
        recomputed,
        tokens,
        assumed,
    )


def sent_by(module: nn.Module, config: TokenizerRunConfig, ranks: int) -> list[Transfer]:
    """What the engine around `module` sends in a step."""
    stage = config.engine.zero_stage
    return transfers(parameter_sizes(module, config.engine, stage), config.engine, stage, ranks)


def model_on_meta(config: TokenizerRunConfig) -> tuple[UniTok, list[str]]:
    """The model of the run without storage, and what had to be assumed."""
    assumed: list[str] = []
    with torch.device("meta"):
        if isinstance(config, AdaptRunConfig):
            model = UniTok(adapted_config(_base_fields(config, assumed), config.model))
            freeze_but_lora(model, config)
        else:
            model = UniTok(_tokenizer_config(config, assumed))
            for part in config.freeze:
                model.get_submodule(part).requires_grad_(False)
        if not config.losses.clip:
            for name, parameter in model.named_parameters():
                if name.startswith(("text_encoder", "image_norm", "image_projection", "logit_scale")):
                    parameter.requires_grad_(False)
    if config.teachers:
        assumed.append(f"{len(config.teachers)} teacher(s) and their heads are not counted")
    return model.train(), assumed


def _base_fields(config: AdaptRunConfig, assumed: list[str]) -> dict[str, Any]:
    path = str(config.init_from)
    options = config.model.get("encoder_options")
    if options and not tokenizer_path(path).exists():
        assumed.append(f"{path} is not here: the sizes in model.encoder_options are assumed")
        return tokenizer_fields({**options, **config.model.get("decoder_options", {})})
    return read_fields(path, options)


def _tokenizer_config(config: TokenizerRunConfig, assumed: list[str]) -> UniTokConfig:
    size, fields, _ = model_fields(config)
    stored = None
    if config.init_from:
        folder = tokenizer_path(config.init_from)
        if (folder / "config.json").is_file():
            check_tokenizer_folder(folder)
            stored = UniTokConfig.from_pretrained(str(folder))
        elif config.model:
            assumed.append(f"{config.init_from} is not here: the sizes in the section model are assumed")
        else:
            raise UserError(f"init_from is {config.init_from}, but there is no {folder / 'config.json'}.")
    if stored is None and config.losses.clip and "text_vocab_size" not in fields:
        path = str(config.caption_tokenizer)
        if tokenizer_path(path).exists():
            fields["text_vocab_size"] = load_caption_tokenizer(config).vocab_size
        else:
            assumed.append(f"{path} is not here: the published vocabulary is assumed")
    wanted = UniTokConfig.named(size, **fields)
    if stored is None:
        return wanted
    changes = {name: fields[name] for name in ("image_size", "drop_path_rate") if name in fields}
    options = fields.get("encoder_options") or {}
    if "merge" in options:
        changes["encoder_options"] = {**(stored.encoder_options or {}), "merge": options["merge"]}
    found = UniTokConfig.from_dict({**stored.to_dict(), **changes})
    if "merge" in options and options["merge"] is None:
        kept = {k: v for k, v in (found.encoder_options or {}).items() if k != "merge"}
        found.encoder_options = kept or None
    check_repeated_fields(found, fields, wanted)
    return found


def loss_networks(config: TokenizerRunConfig, shape: tuple[int, int]) -> dict[str, Any]:
    """LPIPS and the discriminator, if the run has them, without storage; DINOv2 is the published ViT-S/14."""
    found: dict[str, Any] = {}
    options = config.discriminator
    with torch.device("meta"):
        if config.losses.lpips:
            found["lpips"] = LPIPS().requires_grad_(False)
        if config.losses.adversarial:
            found["discriminator"] = (
                DinoDiscriminator(DINOv2(), norm=options.norm)
                if options.kind == "dino"
                else PatchDiscriminator(options.width, options.layers)
            )
    return found


def measure(model: UniTok, networks: dict[str, Any], config: TokenizerRunConfig, decoded: float) -> Cost:
    """A step's passes over an image and its caption, on the meta device; `decoded`: share of the images."""
    whole = _measure_image(model, networks, config, True)
    if decoded == 1:
        return whole
    others = _measure_image(model, {}, config, False)
    return Cost(*(decoded * one + (1 - decoded) * other for one, other in zip(whole, others)))


def _measure_image(model: UniTok, networks: dict[str, Any], config: TokenizerRunConfig, decode: bool) -> Cost:
    clip = config.losses.clip > 0
    with torch.device("meta"):
        pixels = torch.zeros(1, 3, *model.config.image_shape)
        ids = torch.zeros(1, model.config.text_context_length, dtype=torch.int64) if clip else None
        with FlopCounterMode(display=False) as counter:
            out = model(pixels, ids, None if decode else 0, entropy=config.losses.entropy > 0)
            forward = float(counter.get_total_flops())
            blocks = _flops_of_blocks(counter, model)
            loss = (out.reconstruction if decode else out.quantised).square().mean() + sum(
                out.losses.values()
            )
            if out.text_embeds is not None:
                loss = loss + (out.image_embeds * out.text_embeds).sum()
            if "lpips" in networks:
                loss = loss + networks["lpips"](out.reconstruction, pixels).mean()
            if "discriminator" in networks:
                loss = loss - networks["discriminator"](out.reconstruction).mean()
            loss.backward()
            if "discriminator" in networks:  # its own step: real images and reconstructions
                for image in (pixels, out.reconstruction.detach()):
                    networks["discriminator"](image).mean().backward()
    return Cost(float(counter.get_total_flops()), forward, blocks)


def _flops_of_blocks(counter: FlopCounterMode, model: UniTok) -> float:
    """Of the forward pass so far, those in transformer blocks and the text tower."""
    found, counts = 0.0, counter.get_flop_counts()
    for name, module in model.named_modules():
        if isinstance(module, (*BLOCK_STACKS, TextEncoder)):
            found += sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
    return found


def _block_bytes(model: UniTok, micro_batch: int) -> float:
    """Of the largest block of similarities, which is computed again in the backward pass."""
    entries = max(model.quantizer.code_sizes, default=0)
    rows = micro_batch * model.config.layout.num_tokens
    return 4.0 * SIMILARITY_TENSORS * min(SIMILARITY_BLOCK, rows * entries)


def part_sizes(part: Any) -> tuple[int, int]:
    """All and trained parameters."""
    return sum(p.numel() for p in _all(part)), _counts(part)[0]


def _counts(part: Any) -> tuple[int, int]:
    """Trained and frozen parameters that `parameters()` shows."""
    trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in part.parameters()) - trained


def _all(part: Any) -> list[nn.Parameter]:
    """With those of the DINOv2, which a discriminator hides."""
    hidden = part.dino.parameters() if isinstance(part, DinoDiscriminator) else ()
    return [*part.parameters(), *hidden]


def describe_step(plan: Plan, config: TokenizerRunConfig, ranks: int, text_tokens: int) -> str:
    """Lines on the activations of an image by part, and on the work of a step."""
    on = config.engine.gradient_checkpointing
    split = f"{config.micro_batch(ranks)} per micro-batch, {ranks} ranks"
    more = f" and {plan.recomputed:.3g} of recomputation" if on else ""
    step = (
        f"a step: {config.batch_size} images ({split}, accumulation {config.engine.accumulation}) of "
        f"{plan.tokens:,} codes, {plan.flops:.3g} FLOP{more}"
    )
    precision = "fp32" if config.engine.dtype == "fp32" else "bf16"
    lines = describe_activations(plan.activations, plan.peaks, config.micro_batch(ranks), precision, on)
    return "\n".join([*lines, "", step])
