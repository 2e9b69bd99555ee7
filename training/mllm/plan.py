"""What a run of the MLLM stage needs, before it has a GPU: parameters, memory, time.

Nothing is loaded: the model is built without storage from the config and from what is on disk. Where a folder
or hub id that the config names is not here, the published sizes stand in, and the plan says so.

N trained and F frozen parameters, W ranks. With fp32 weights ZeRO 0 holds N+F weights, N gradients and 2N
moments, 4 bytes each; ZeRO 1 and 2 cut gradients and moments in W parts and add an fp32 copy, cut as well;
ZeRO 3 cuts the weights too, but for small ones, and keeps a bucket for the reduction of gradients.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from open_unitok.core.files import model_path

from ..core.gpus import PEAK_TFLOPS
from ..data.sample_kinds import SAMPLE_KINDS
from .config import PARTS, MLLMRunConfig

if TYPE_CHECKING:  # `unitok plan --help` shall not wait for torch
    import torch

    from ..core.flops import TokenCounts

# DeepSpeed's defaults, where `engine.deepspeed` does not say otherwise
BUCKET, SMALL, LIVE = 500_000_000, 100_000, 1_000_000_000


class Memory(NamedTuple):
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float  # of DeepSpeed: the bucket in which gradients are summed up
    activations: float

    @property
    def states(self) -> float:
        """All that lives from step to step."""
        return self.parameters + self.gradients + self.optimizer


class Plan(NamedTuple):
    """What `plan` finds."""

    counts: dict[str, tuple[int, int]]  # part -> parameters, trained ones
    memory: dict[int, Memory]  # ZeRO stage -> memory of one rank
    work: "TokenCounts"  # of a whole step
    flops: float  # of a whole step
    assumed: list[str]  # what stands in for what is not here


def plan(config: MLLMRunConfig, gpus: int, text_tokens: int = 64) -> Plan:
    """What the run needs on `gpus` ranks.

    Args:
        text_tokens: of a mean sample: a caption, an answer, a line.

    Raises:
        UserError: the config does not fit what is on disk, or does not split over the ranks.
    """
    from ..core.flops import MLLMFlops, TokenCounts

    micro = config.micro_batch(gpus)
    model, assumed = model_without_storage(config)
    work = TokenCounts(
        *(config.batch_size * value for value in mean_sample(config, model.config, text_tokens))
    )
    activations = activation_bytes(config, model, micro, text_tokens)
    memory = {stage: states(config, model, stage, gpus, activations) for stage in range(4)}
    counts = {
        name: (sum(p.numel() for p in part.parameters()), sum(_trained(part)))
        for name, part in model.named_children()
    }
    return Plan(counts, memory, work, MLLMFlops(model).flops(work), assumed)


def _trained(module: "torch.nn.Module") -> list[int]:
    return [p.numel() for p in module.parameters() if p.requires_grad]


# ---- the model, from what is on disk -----------------------------------------------------------------------


def model_without_storage(config: MLLMRunConfig) -> tuple[Any, list[str]]:
    """The model of the run on the meta device, frozen and adapted as it will be; and what was assumed."""
    import torch

    from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig

    from .train import freeze, put_adapters

    assumed: list[str] = []
    if config.init_from:
        sizes = _known_or(
            config.init_from,
            assumed,
            lambda: UniTokMLLMConfig.from_pretrained(str(model_path(config.init_from))),
            lambda: UniTokMLLMConfig.named("unitok_mllm_7b"),
        )
    else:
        sizes = _new_sizes(config, assumed)
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(sizes)
        put_adapters(model, config)
    freeze(model, config)
    return model, assumed


def _new_sizes(config: MLLMRunConfig, assumed: list[str]) -> Any:
    """The config that `new_parts` would give the model."""
    from transformers import AutoConfig

    from open_unitok.mllm import UniTokMLLMConfig, UniTokProcessor
    from open_unitok.tokenizer import UniTokConfig

    wanted = config.model
    assert wanted is not None
    unitok = _known_or(
        wanted.unitok, assumed, lambda: UniTokConfig.from_pretrained(wanted.unitok), UniTokConfig
    )
    published = UniTokMLLMConfig.named("unitok_mllm_7b").text_config
    if wanted.language_model:
        name = wanted.language_model
        text = _known_or(name, assumed, lambda: AutoConfig.from_pretrained(name), lambda: published)
    else:
        path = wanted.text_tokenizer

        def count() -> int:
            return UniTokProcessor.from_text_tokenizer(path, **wanted.processor).vocab_size

        rows = _known_or(path, assumed, count, lambda: published.vocab_size)
        text = {"model_type": "llama", "vocab_size": rows, **wanted.text}
    return UniTokMLLMConfig.for_tokenizer(
        unitok, text_config=text, depth_config=wanted.depth, **wanted.fields
    )


def _known_or(name: str, assumed: list[str], look: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What `look` finds at `name`, if that is here; else `otherwise`, noted."""
    if Path(name).exists():
        return look()
    assumed.append(f"{name} is not here: the published sizes stand in")
    return otherwise()


# ---- memory ------------------------------------------------------------------------------------------------


def states(config: MLLMRunConfig, model: Any, stage: int, ranks: int, activations: float = 0.0) -> Memory:
    """Bytes on one rank under a ZeRO stage; weights are fp32, but for a frozen base in bf16 (`lora.base`)."""
    zero = config.engine.deepspeed.get("zero_optimization", {})
    trained = 4.0 * sum(_trained(model))
    frozen = float(sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad))
    part = ranks if stage else 1
    gradients = trained / part
    if stage == 1 and config.engine.accumulation > 1:  # cut only when the last micro-batch has been added
        gradients = trained
    optimizer = (3 if stage else 2) * trained / part
    parameters, buffers = trained + frozen, 0.0
    if stage >= 2 or (stage == 1 and ranks > 1):
        buffers = 4.0 * min(float(zero.get("reduce_bucket_size", BUCKET)), max(trained / 4, 1.0))
    if stage == 3:
        small = zero.get("stage3_param_persistence_threshold", SMALL)
        kept = sum(p.numel() * p.element_size() for p in model.parameters() if p.numel() <= small)
        parameters = parameters / ranks + kept
        buffers = 4.0 * float(zero.get("reduce_bucket_size", BUCKET))
        if ranks > 1:  # weights that are gathered around the layer at work
            layers = model.config.text_config.num_hidden_layers
            layer = sum(p.numel() for p in model.language_model.parameters()) / max(layers, 1)
            buffers += 4.0 * min(2 * layer, float(zero.get("stage3_max_live_parameters", LIVE)))
    return Memory(parameters, gradients, optimizer, buffers, activations)


def activation_bytes(config: MLLMRunConfig, model: Any, micro: int, text_tokens: int) -> float:
    """Bytes that one micro-batch leaves for its backward pass, at its most.

    A LLaMA layer under bf16 autocast keeps about 28 bytes per token and unit of its width (two norms in fp32,
    queries, keys, values, attention's result) and 8 per unit of its MLP; in fp32 half as much again. With
    checkpointing a layer keeps its input alone, and one layer is at work.
    """
    sizes, sample = model.config, mean_sample(config, model.config, text_tokens)
    wide = 1.0 if config.engine.dtype != "fp32" else 1.5
    tokens = micro * (sample.tokens if config.data.pack_to else longest_sample(config, sizes, text_tokens))
    places = micro * sample.image_targets * sizes.num_codebooks
    vocabulary = 12.0 * micro * sample.text_targets * sizes.text_config.vocab_size
    books = 12.0 * places * sizes.codebook_size

    def layers(part: Any, count: float) -> float:
        one = wide * count * (28 * part.hidden_size + 8 * part.intermediate_size)
        if config.engine.gradient_checkpointing:
            return 4.0 * count * part.hidden_size * part.num_hidden_layers + one
        return one * part.num_hidden_layers

    return layers(sizes.text_config, tokens) + layers(sizes.depth_config, places) + vocabulary + books


# ---- work --------------------------------------------------------------------------------------------------


def mean_sample(config: MLLMRunConfig, sizes: Any, text_tokens: int) -> "TokenCounts":
    """What a sample of the mixture brings on average; every caption, answer or line has `text_tokens`.

    A document is taken as those and one image.
    """
    import torch

    from ..core.flops import TokenCounts

    total = sum(entry.weight for entry in config.data.mixture)
    image = sizes.num_image_tokens
    mean = torch.zeros(len(TokenCounts._fields), dtype=torch.float64)
    for entry in config.data.mixture:
        kind = SAMPLE_KINDS[entry.kind]
        share = kind.generated_share(config.data)
        has_image = kind.reads_images
        tokens = min(text_tokens + (image + 4) * has_image, config.data.max_length)
        # boi, eoi and eos around a generated image; a kind that learns no text is captioned by the rest
        targets = share * 3 + (1 - share * (not kind.learns_text)) * text_tokens
        one = TokenCounts(tokens, tokens * (tokens + 1) / 2, targets, image * has_image, share * image)
        mean += torch.tensor(one, dtype=torch.float64) * (entry.weight / total)
    return TokenCounts(*mean.tolist())


def longest_sample(config: MLLMRunConfig, sizes: Any, text_tokens: int) -> int:
    """Tokens of a row where samples are not packed: every row is as long as the longest."""
    has_image = any(SAMPLE_KINDS[entry.kind].reads_images for entry in config.data.mixture)
    return min(2 * text_tokens + (sizes.num_image_tokens + 4) * has_image, config.data.max_length)


# ---- in words ----------------------------------------------------------------------------------------------


def describe(found: Plan, config: MLLMRunConfig, args: argparse.Namespace) -> list[str]:
    """The plan as lines of text."""
    engine, micro = config.engine, config.micro_batch(args.gpus)
    total, trained = (sum(counts) for counts in zip(*found.counts.values()))
    lines = [f"! {text}" for text in found.assumed]
    lines += [f"parameters {total / 1e6:,.1f} M, of which {trained / 1e6:,.1f} M are trained"]
    width = max(map(len, PARTS))
    for name, (count, learnt) in found.counts.items():
        lines.append(f"  {name:<{width}} {count / 1e6:10,.1f} M {learnt / 1e6:10,.1f} M trained")
    host = {
        "none": "",
        "optimizer": "; optimizer and gradients are on the host",
        "parameters": "; only buffers ",
    }
    host["parameters"] += "and activations are on the GPU"
    largest = max(sum(memory) for memory in found.memory.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    lines += ["", f"{name} per rank on {args.gpus}{host[engine.offload]}"]
    lines.append("  ZeRO " + "".join(f"{field:>13}" for field in [*Memory._fields, "total"]))
    for stage, memory in found.memory.items():
        mark = "*" if stage == engine.zero_stage else " "
        values = "".join(f"{value / unit:13,.2f}" for value in [*memory, sum(memory)])
        lines.append(f"{mark} {stage:>4} {values}")
    seconds = found.flops / (args.mfu * 1e12 * PEAK_TFLOPS[args.gpu] * args.gpus)
    hours = seconds * config.steps / 3600
    speed = f"{100 * args.mfu:.0f} % of the {PEAK_TFLOPS[args.gpu]:,.0f} TFLOP/s of {args.gpu}"
    cut = f"{micro} per micro-batch, {args.gpus} ranks, accumulation {engine.accumulation}"
    lines += [
        "",
        f"a step: {config.batch_size} samples ({cut}), about {found.work.tokens:,.0f} tokens with "
        f"{args.text_tokens} of text per sample, {found.flops:.3g} FLOP",
        f"at {speed}: {seconds:.3g} s a step, {found.work.tokens / seconds:,.0f} tokens/s; "
        f"{config.steps:,} steps take {hours:,.1f} h, {hours * args.gpus:,.1f} GPU-hours",
    ]
    return lines
