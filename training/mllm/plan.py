"""Estimate parameters, memory, communication and time of an MLLM run without a GPU.

No weights are loaded: the model is built on the meta device from the config and from files on disk. If a
folder or hub id of the config is not on disk, the published sizes are assumed, and the plan says so.

N trained and F frozen parameters, W ranks. With fp32 weights ZeRO 0 holds N+F weights, N gradients and 2N
moments, 4 bytes each; ZeRO 1 and 2 shard gradients and moments over W ranks and add an fp32 copy, sharded as
well; ZeRO 3 shards the weights too, except for small ones, and keeps a bucket to reduce gradients in.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from open_unitok.core.files import model_path, tokenizer_path
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.mllm.features import FeatureOptions
from open_unitok.mllm.losses import WHOLE_LOGITS
from open_unitok.tokenizer import UniTokConfig

from ..core.communication import Transfer, parameter_sizes, persistence_threshold, transfers
from ..core.flops import MLLMFlops, TokenCounts
from ..core.plan import Memory, engine_memory
from ..data.mixture_options import with_replay
from ..data.sample_kinds import SAMPLE_KINDS
from .config import MLLMRunConfig
from .model import add_adapters, decoder_config, freeze_parts

PUBLISHED = "unitok_mllm_7b"
MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default, where `engine.deepspeed` does not set it
# tokens around an image: bos, boi, eoi, eos; around a generated one boi, eoi and eos are learned
IMAGE_FRAME, LEARNED_FRAME = 4, 3


class Plan(NamedTuple):
    """The estimates of `plan_run`."""

    parameters: dict[str, tuple[int, int]]  # part -> all, trained
    memory: dict[int, Memory]  # ZeRO stage -> memory of one rank
    transfers: list[Transfer]  # of a step at the run's ZeRO stage
    counts: TokenCounts  # of a whole step
    flops: float  # of a whole step
    assumed: list[str]  # notes on published sizes that replace missing files

    @property
    def work(self) -> tuple[float, str]:
        """What a step processes, and its unit."""
        return self.counts.tokens, "tokens"


def plan_run(config: MLLMRunConfig, gpus: int, text_tokens: int = 64) -> Plan:
    """Parameters, memory and FLOPs of the run on `gpus` ranks.

    Args:
        text_tokens: mean length of a caption, an answer or a line.

    Raises:
        UserError: the config does not fit the files on disk or the model, batch_size does not split over the
            ranks, or the mixture generates images of a tokenizer whose codes an MLLM only reads.
    """
    micro_batch = config.micro_batch(gpus)
    model, assumed = model_on_meta(config)
    # of a base that is not here, what is replayed is assumed to be like the mixture
    if config.data.replay_path or not assumed:
        config = dataclasses.replace(config, data=with_replay(config.data, config.init_from))
    if any(SAMPLE_KINDS[entry.kind].generates_images for entry in config.data.mixture):
        model.config.check_generates()
    sample = mean_sample(config, model.config, text_tokens)
    counts = TokenCounts(*(config.batch_size * samples_per_row(config, sample) * value for value in sample))
    activations = activation_bytes(config, model, micro_batch, text_tokens)
    memory = {stage: memory_of_stage(config, model, stage, gpus, activations) for stage in range(4)}
    parameters = {
        name: (sum(p.numel() for p in part.parameters()), sum(_trained_sizes(part)))
        for name, part in model.named_children()
    }
    stage = config.engine.zero_stage
    sent = transfers(parameter_sizes(model, config.engine, stage), config.engine, stage, gpus)
    return Plan(parameters, memory, sent, counts, MLLMFlops(model).flops(counts), assumed)


def _trained_sizes(module: torch.nn.Module) -> list[int]:
    return [p.numel() for p in module.parameters() if p.requires_grad]


# ---- the model, from files on disk -------------------------------------------------------------------------


def model_on_meta(config: MLLMRunConfig) -> tuple[Any, list[str]]:
    """The model of the run without storage, with its adapters and frozen parts; and the assumptions made."""
    assumed: list[str] = []
    if config.init_from:
        base = str(model_path(config.init_from))
        sizes = _on_disk_or(
            base,
            assumed,
            lambda: UniTokMLLMConfig.from_pretrained(base),
            lambda: UniTokMLLMConfig.named(PUBLISHED),
        )
        if config.visual_positions and sizes.visual_positions == "none":  # as `load_parts` does
            sizes.visual_positions = config.visual_positions
            sizes.check_places()
    else:
        sizes = _new_model_config(config, assumed)
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(sizes)
        add_adapters(model, config)
    freeze_parts(model, config)
    return model, assumed


def _new_model_config(config: MLLMRunConfig, assumed: list[str]) -> Any:
    """The config that `new_parts` gives the model."""
    options = config.model
    assert options is not None
    folder = str(tokenizer_path(options.unitok))
    unitok = _on_disk_or(folder, assumed, lambda: UniTokConfig.from_pretrained(folder), UniTokConfig)
    published = UniTokMLLMConfig.named(PUBLISHED).text_config
    if options.language_model:
        name = options.language_model
        path = str(model_path(name))
        read = lambda: decoder_config(AutoConfig.from_pretrained(path))  # noqa: E731
        text = _on_disk_or(path, assumed, read, lambda: published)
    else:
        path = str(model_path(options.text_tokenizer))

        def vocab_size() -> int:
            return UniTokProcessor.from_text_tokenizer(path, **options.processor).vocab_size

        size = _on_disk_or(path, assumed, vocab_size, lambda: published.vocab_size)
        text = {"model_type": "llama", "vocab_size": size, **options.text}
    fields = dict(options.fields)
    if fields.get("visual_input") == "dual":  # any id: only the number of tokens counts
        separates = FeatureOptions.from_config(fields.get("features"), "dual").separator
        fields |= {"sep_token_id": 0} if separates else {}
    return UniTokMLLMConfig.for_tokenizer(unitok, text_config=text, depth_config=options.depth, **fields)


def _on_disk_or(name: str, assumed: list[str], read: Callable[[], Any], default: Callable[[], Any]) -> Any:
    """The result of `read` if `name` exists; else that of `default`, with a note in `assumed`."""
    if Path(name).exists():
        return read()
    assumed.append(f"{name} is not here: the published sizes are assumed")
    return default()


# ---- memory ------------------------------------------------------------------------------------------------


def memory_of_stage(
    config: MLLMRunConfig, model: Any, stage: int, ranks: int, activations: float = 0.0
) -> Memory:
    """Bytes on one rank under a ZeRO stage; weights are fp32, or bf16 in a frozen base (`lora.base`)."""
    zero = config.engine.deepspeed.get("zero_optimization", {})
    sizes = parameter_sizes(model, config.engine, stage)
    frozen = float(sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad))
    memory = engine_memory(config.engine, stage, ranks, sizes, frozen, activations)
    if stage < 3:
        return memory
    parameters, bucket = memory.parameters, memory.buffers
    threshold = persistence_threshold(config.engine)
    unsharded = sum(p.numel() * p.element_size() for p in model.parameters() if p.numel() <= threshold)
    buffers = bucket
    if ranks > 1:  # gathered weights of the current layer and the next
        layers = model.config.text_config.num_hidden_layers
        layer = sum(p.numel() for p in model.language_model.parameters()) / max(layers, 1)
        live = float(zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS))
        buffers += 4.0 * min(2 * layer, live)
    shared = parameters / ranks + unsharded
    hpz = int(zero.get("zero_hpz_partition_size", config.engine.hpz))
    if hpz > 1:  # the second partition of each weight
        shared += parameters / hpz
    return memory._replace(parameters=shared, buffers=buffers)


def activation_bytes(config: MLLMRunConfig, model: Any, micro_batch: int, text_tokens: int) -> float:
    """Peak bytes that one micro-batch keeps for its backward pass.

    A LLaMA layer under bf16 autocast keeps about 28 bytes per token and unit of its width (two norms in fp32,
    queries, keys, values, the attention output) and 8 per unit of its MLP; in fp32 half as much again. With
    checkpointing a layer keeps only its input, and one layer is recomputed at a time.
    """
    sizes, sample = model.config, mean_sample(config, model.config, text_tokens)
    width_factor = 1.0 if config.engine.dtype != "fp32" else 1.5
    row = sample.tokens if config.data.pack_to else longest_sample(config, sizes, text_tokens)
    samples = micro_batch * samples_per_row(config, sample)
    tokens = samples * row
    depth_positions = samples * sample.image_targets * sizes.num_codebooks
    text_logits = _logit_bytes(config, samples * sample.text_targets * sizes.text_config.vocab_size)
    code_logits = _logit_bytes(config, depth_positions * sizes.codebook_size)

    def layers(part: Any, count: float) -> float:
        one = width_factor * count * (28 * part.hidden_size + 8 * part.intermediate_size)
        if config.engine.gradient_checkpointing:
            return 4.0 * count * part.hidden_size * part.num_hidden_layers + one
        return one * part.num_hidden_layers

    # the depth head runs after the decoder, but all activations are kept until the backward pass
    decoder = layers(sizes.text_config, tokens)
    return decoder + layers(sizes.depth_config, depth_positions) + text_logits + code_logits


def _logit_bytes(config: MLLMRunConfig, logits: float) -> float:
    if logits <= WHOLE_LOGITS:  # logits, their gradient and the softmax, fp32 each
        return 12.0 * logits
    return (4.0 if config.engine.dtype == "fp32" else 2.0) * logits  # the gradient takes their memory


# ---- work --------------------------------------------------------------------------------------------------


def mean_sample(config: MLLMRunConfig, sizes: Any, text_tokens: int) -> TokenCounts:
    """Mean counts of one sample of the mixture; every caption, answer or line has `text_tokens`.

    A document counts as one text and one image.
    """
    total = sum(entry.weight for entry in config.data.mixture)
    mean = torch.zeros(len(TokenCounts._fields), dtype=torch.float64)
    for entry in config.data.mixture:
        kind = SAMPLE_KINDS[entry.kind]
        share = kind.generated_share(config.data)
        codes = 0 if sizes.visual_input == "continuous" else sizes.num_image_tokens
        codes = (share * sizes.num_image_tokens + (1 - share) * codes) * kind.reads_images
        features = (1 - share) * (sizes.num_continuous_tokens or 0) * kind.reads_images
        image = (share * sizes.num_image_tokens + (1 - share) * sizes.read_length) * kind.reads_images
        tokens = min(text_tokens + image + IMAGE_FRAME * kind.reads_images, config.data.max_length)
        # samples of a kind that learns no text are captioned where they do not generate their image
        text_share = 1.0 if kind.learns_text else 1 - share
        counts = TokenCounts(
            tokens=tokens,
            attention_pairs=tokens * (tokens + 1) / 2,
            text_targets=share * LEARNED_FRAME + text_share * text_tokens,
            image_tokens=codes,
            image_targets=share * sizes.num_image_tokens * kind.reads_images,
            feature_tokens=features,
        )
        mean += torch.tensor(counts, dtype=torch.float64) * (entry.weight / total)
    return TokenCounts(*mean.tolist())


def samples_per_row(config: MLLMRunConfig, sample: TokenCounts) -> float:
    """Samples that one unit of batch_size stands for: a row's, where it counts rows."""
    return config.data.pack_to / sample.tokens if config.data.batch_by == "rows" else 1.0


def longest_sample(config: MLLMRunConfig, sizes: Any, text_tokens: int) -> int:
    """Length of a row that is not packed: rows are padded to the longest, taken as twice the mean text."""
    reads_images = any(SAMPLE_KINDS[entry.kind].reads_images for entry in config.data.mixture)
    image = (max(sizes.num_image_tokens, sizes.read_length) + IMAGE_FRAME) * reads_images
    return min(2 * text_tokens + image, config.data.max_length)


def describe_step(plan: Plan, config: MLLMRunConfig, ranks: int, text_tokens: int) -> str:
    """A line on the work of a step."""
    split = f"{config.micro_batch(ranks)} per micro-batch, {ranks} ranks"
    batch = f"{config.batch_size} {config.data.batch_by}"
    return (
        f"a step: {batch} ({split}, accumulation {config.engine.accumulation}), about "
        f"{plan.counts.tokens:,.0f} tokens with {text_tokens} of text per sample, {plan.flops:.3g} FLOP"
    )
