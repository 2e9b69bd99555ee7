"""Published UniTok checkpoints to our configs and state dicts and back; weights of an open_clip ViTamin.

The published code keeps codes as (B, K, N) and one table per sub-codebook; ours are (B, N, K) and one stacked
parameter. Only this module knows both. It builds no model: see `UniTok.from_reference`.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_unitok.core.errors import UserError

from .config import TOKENIZER_SIZES, UniTokConfig
from .loading import check_weights_fit, read_checkpoint

# Published module -> ours; # is a number. A tensor keeps its last name (weight, bias) unless listed here.
_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "norm2",
    "mlp.norm": "mlp.norm",
    "mlp.w0": "mlp.gate",
    "mlp.w1": "mlp.up",
    "mlp.w2": "mlp.down",
}
_CONV_BLOCK = {
    "pre_norm": "norm",
    "conv1_1x1": "widen",
    "conv2_kxk": "depthwise",
    "conv3_1x1": "narrow",
    "shortcut.expand": "shortcut",
    "shortcut.conv": "shortcut.conv",
    "up.conv": "upsample.conv",
}
PROJECTION = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "norm3": "linear_norm",
    "attn.q_bias": "attention.query_bias",
    "attn.v_bias": "attention.value_bias",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "proj": "linear",
    "mlp.norm": "mlp.norm",
    "mlp.w0": "mlp.gate",
    "mlp.w1": "mlp.up",
    "mlp.w2": "mlp.down",
}
_TEXT_BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_weight": "attention.qkv.weight",
    "attn.in_proj_bias": "attention.qkv.bias",
    "attn.out_proj": "attention.out",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}
_NAMES = {
    "logit_scale": "logit_scale",
    "encoder.reg_token": "encoder.register_tokens",
    "encoder.pos_embed": "encoder.position_offset",
    "encoder.patch_embed.backbone.stem.conv1": "encoder.stem.conv1",
    "encoder.patch_embed.backbone.stem.norm1": "encoder.stem.norm",
    "encoder.patch_embed.backbone.stem.conv2": "encoder.stem.conv2",
    "encoder.patch_embed.backbone.pool.norm": "encoder.pool_norm",
    "encoder.patch_embed.backbone.pool.proj": "encoder.pool",
    "encoder.norm": "encoder.norm",
    "quant_proj": "down_projection",
    "post_quant_proj": "up_projection",
    "decoder.norm": "decoder.norm",
    "decoder.up_conv1.conv": "decoder.enter.conv",
    "decoder.up_conv4.conv1.conv": "decoder.leave.conv",
    "decoder.up_conv4.norm1": "decoder.leave_norm",
    "decoder.up_conv4.conv2": "decoder.to_pixels",
    "fc_norm": "image_norm",
    "projection": "image_projection",
    "text_encoder.token_embedding": "text_encoder.token_embedding",
    "text_encoder.positional_embedding": "text_encoder.position_embedding",
    "text_encoder.ln_final": "text_encoder.norm",
    "text_encoder.text_projection": "text_encoder.projection.weight",
}
for _theirs, _ours, _parts in (
    ("encoder.blocks.#", "encoder.blocks.#", _BLOCK),
    ("decoder.blocks.#", "decoder.blocks.#", _BLOCK),
    ("encoder.patch_embed.backbone.stages.#.#", "encoder.stages.#.#", _CONV_BLOCK),
    ("decoder.up_conv2.#", "decoder.wide.#", _CONV_BLOCK),
    ("decoder.up_conv3.#", "decoder.narrow.#", _CONV_BLOCK),
    ("quant_proj", "down_projection", PROJECTION),
    ("post_quant_proj", "up_projection", PROJECTION),
    ("text_encoder.transformer.resblocks.#", "text_encoder.blocks.#", _TEXT_BLOCK),
):
    _NAMES |= {f"{_theirs}.{part}": f"{_ours}.{name}" for part, name in _parts.items()}
_NAMES_BACK = {ours: theirs for theirs, ours in _NAMES.items()}

# One tensor per sub-codebook in the published file, one stacked tensor in ours.
_STACKS = {"codebook.weight": "quantizer.codebooks", "vocab_usage": "quantizer.usage"}
_TRANSPOSED = ("text_encoder.text_projection",)  # a parameter (width, E) there, the weight of a Linear here

# Fields of our config that a published file cannot hold.
_UNPUBLISHED = (
    "encoder",
    "encoder_options",
    "decoder",
    "decoder_options",
    "patch_size",
    "quantizer",
    "quantizer_options",
    "token_layout",
)


def rename(name: str, names: Mapping[str, str]) -> str | None:
    """Translate a tensor's name by a table of templates (# = a number); None if no template fits."""
    # "encoder.blocks.3.norm1.weight": the template "encoder.blocks.#.norm1.weight" and the numbers ["3"]
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    template = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)
    stem, _, last = template.rpartition(".")
    # Most entries name a module; its tensors keep their last name. A full name has precedence.
    found = names.get(template)
    if found is None and last in ("weight", "bias") and stem in names:
        found = f"{names[stem]}.{last}"
    if found is None or found.count("#") != len(numbers):
        return None
    for number in numbers:
        found = found.replace("#", number, 1)
    return found


def state_from_published(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; works on the meta device as well.

    Raises:
        UserError: a name that UniTok does not have, or a key bias that is not zero.
    """
    state: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in published.items():
        # 1. codebooks and their statistics are collected by number and stacked below
        book = re.fullmatch(r"quantizer\.codebooks\.(\d+)\.(.+)", name)
        if book and book[2] in _STACKS:
            stacks.setdefault(_STACKS[book[2]], {})[int(book[1])] = tensor
        # 2. a buffer of zeros that the published attention concatenates; ours builds it in `forward`
        elif name.endswith(".attn.zero_k_bias"):
            if not tensor.is_meta and tensor.any():
                raise UserError(f"{name} is not zero: this is not a UniTok checkpoint.")
        # 3. the rest is renamed
        elif (ours := rename(name, _NAMES)) is not None:
            state[ours] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
        else:
            raise UserError(f"{name!r} is not a weight of a published UniTok: this is another kind of model.")
    for name, parts in stacks.items():
        state[name] = torch.stack([parts[book] for book in sorted(parts)])
    if "quantizer.usage" in state:
        # The file lacks the number of batches seen; from 100 on the running average decays at its final rate.
        usage = state["quantizer.usage"]
        state["quantizer.calls"] = torch.full((), 100, dtype=torch.int64, device=usage.device)
    return state


def state_to_published(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the published names, with the zero key biases; inverts `state_from_published`.

    Raises:
        UserError: a name that our UniTok does not have.
    """
    state: dict[str, Tensor] = {}
    stacks = {stack: part for part, stack in _STACKS.items()}
    for name, tensor in ours.items():
        if name in stacks:
            state |= {f"quantizer.codebooks.{i}.{stacks[name]}": part for i, part in enumerate(tensor)}
        elif name == "quantizer.calls":
            continue  # published files do not store the number of batches
        elif (published := rename(name, _NAMES_BACK)) is not None:
            state[published] = tensor.T.contiguous() if published in _TRANSPOSED else tensor
            if name.endswith(".query_bias"):
                state[published.replace("q_bias", "zero_k_bias")] = torch.zeros_like(tensor)
        else:
            raise UserError(f"{name!r} is not a weight that published UniTok files have.")
    return state


def codes_from_published(codes: Tensor) -> Tensor:
    """Published (B, K, N) codes -> (B, N, K); the same call converts ours to the published order."""
    return codes.transpose(1, 2).contiguous()


def tokenizer_config_from_published(args: Mapping[str, Any]) -> UniTokConfig:
    """The config described by a published checkpoint's `args`.

    Raises:
        UserError: its model name is not one of `TOKENIZER_SIZES`, so that its widths are unknown.
    """
    name = args.get("model")
    if name not in TOKENIZER_SIZES:
        raise UserError(
            f"The checkpoint's model is {name!r}; sizes are known for {', '.join(TOKENIZER_SIZES)}. Pass a "
            "config: UniTok.from_reference(path, config), or unitok convert tokenizer --config FILE."
        )
    # The published arguments give totals over all sub-codebooks.
    books = args["num_codebooks"]
    return UniTokConfig.named(
        name,
        image_size=args["img_size"],
        drop_path_rate=args["drop_path"],
        num_register_tokens=args["num_query"],
        num_codebooks=books,
        codebook_size=args["vocab_size"] // books,
        codebook_dim=args["vocab_width"] // books,
        projection={"attn": "attention"}.get(args["quant_proj"], args["quant_proj"]),
        embed_dim=args["embed_dim"],
        text_hidden_size=args["text_width"],
        text_num_layers=args["text_layers"],
        text_num_heads=args["text_heads"],
        text_vocab_size=args["text_vocab_size"],
        text_context_length=args["text_context_length"],
    )


def read_published_tokenizer(
    path: str | os.PathLike[str], config: UniTokConfig | None = None
) -> tuple[UniTokConfig, dict[str, Tensor]]:
    """Config and float32 state dict of a published checkpoint file.

    Args:
        config: needed where the file's model name is not one of `TOKENIZER_SIZES`.

    Raises:
        UserError: the file is not such a checkpoint, or its sizes are unknown.
    """
    checkpoint = read_checkpoint(path)
    try:
        weights = checkpoint["trainer"]["unitok"]
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not a published UniTok checkpoint: it has no ['trainer']['unitok']."
        ) from None
    if config is None:
        config = tokenizer_config_from_published(checkpoint.get("args", {}))
    # Clones: tensors of one file may share memory, and the state dict becomes a model's parameters.
    state = {
        name: tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state_from_published(weights).items()
    }
    return config, state


def write_published_tokenizer(
    config: UniTokConfig, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Write a state dict as a published checkpoint file (weights and the model's `args` only).

    Raises:
        UserError: the model has parts that the published code does not know.
    """
    # A field that the published code lacks would be dropped, and loading would silently build another model.
    plain = UniTokConfig()
    if not config.embed_dim:
        raise UserError("A published file has a text tower, but embed_dim is 0: this tokenizer has none.")
    for name in _UNPUBLISHED:
        if getattr(config, name) not in (None, {}, getattr(plain, name)):
            raise UserError(
                f"{name} = {getattr(config, name)!r} has no counterpart in a published file: only the "
                f"default, {getattr(plain, name)!r}, can be written."
            )
    shape = {
        "stem_width",
        "stage_widths",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "decoder_widths",
    }
    # The file stores a size's name, not its widths; other widths are written as "unnamed" and need a config
    # to load. TOKENIZER_SIZES has tuples, a config lists.
    ours = {key: _as_list(getattr(config, key)) for key in shape}
    name = next(
        (n for n, s in TOKENIZER_SIZES.items() if {k: _as_list(v) for k, v in s.items()} == ours), "unnamed"
    )
    args = {
        "model": name,
        "img_size": config.image_size,
        "drop_path": config.drop_path_rate,
        "num_query": config.num_register_tokens,
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.num_codebooks * config.codebook_size,
        "vocab_width": config.latent_dim,
        "quant_proj": {"attention": "attn"}.get(config.projection, config.projection),
        "embed_dim": config.embed_dim,
        "text_width": config.text_hidden_size,
        "text_layers": config.text_num_layers,
        "text_heads": config.text_num_heads,
        "text_vocab_size": config.text_vocab_size,
        "text_context_length": config.text_context_length,
    }
    published = {name: tensor.detach().cpu() for name, tensor in state_to_published(state).items()}
    path = Path(path)
    # atomic replace: an interrupted run leaves no truncated file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save({"args": args, "trainer": {"unitok": published}}, temporary)
    os.replace(temporary, path)


def read_clip_weights(
    path: str | os.PathLike[str], target: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of encoder and text tower from an open_clip ViTamin checkpoint, under our names.

    The file's heads, logit scale and position embeddings are left out.

    Args:
        target: the state dict of the `UniTok` to initialise.

    Returns:
        The weights, and the names of both towers that the file lacks.

    Raises:
        UserError: the file is not such a checkpoint, or its sizes differ from the target's.
    """
    checkpoint = read_checkpoint(path)
    checkpoint = checkpoint.get("state_dict", checkpoint)
    if "encoder.stem.conv1.weight" not in target:
        raise UserError(f"{path} can only initialise encoder 'vitamin'; this model has another.")
    published = {}
    # open_clip's names inside the two towers are those of the published UniTok: only the prefixes differ.
    for name, tensor in checkpoint.items():
        name = name.removeprefix("module.")  # added by DistributedDataParallel
        if "head" in name or "pos_embed" in name:
            continue
        for prefix, ours in (("visual.trunk.", "encoder."), ("text.", "text_encoder.")):
            if name.startswith(prefix):
                published[ours + name.removeprefix(prefix)] = tensor
    known = {name: tensor for name, tensor in published.items() if rename(name, _NAMES) is not None}
    state = {name: tensor.float() for name, tensor in state_from_published(known).items() if name in target}
    if not any(name.startswith("encoder.blocks.") for name in state):
        raise UserError(f"{path} is not an open_clip ViTamin checkpoint: it has no visual.trunk.blocks.*")
    check_weights_fit(path, state, {name: target[name] for name in state}, "the config")
    wanted = {name for name in target if name.startswith(("encoder.", "text_encoder."))}
    ours_alone = {"encoder.position_offset", "encoder.register_tokens"}  # CLIP has none
    return state, sorted(wanted - state.keys() - ours_alone)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
