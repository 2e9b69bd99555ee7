"""Read a trained continuous autoencoder, and a tokenizer that is stored as an adapter beside it."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path

from ..config import UniTokConfig
from ..folder_checks import check_finite, read_config
from ..loading import check_tokenizer_folder, check_weights_fit, find_weights
from .autoencoder_kl import by_tokenizer_names, read_diffusers, tokenizer_fields
from .ldm_files import read_ldm_file
from .lora import ADAPTER_CONFIG, ADAPTER_FOLDER, add_products, read_adapter

# of a continuous UniTok, but not of the tokenizer made of it
REPLACED = ("quantizer.", "variance_projection.")
_WANTED = "stage adapt takes an AutoencoderKL, or a UniTok trained with quantizer: none."
_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")


class Autoencoder(NamedTuple):
    """A trained continuous autoencoder."""

    path: str
    fields: dict[str, Any]  # of UniTokConfig
    weights: dict[str, Tensor]  # by the names in a `UniTok`, without those in `REPLACED`

    @property
    def sha256(self) -> str:
        """Hex digest of the weights, as float32."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode())
            tensor = self.weights[name].detach().float().cpu().contiguous()
            digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")  # pyright: ignore
        return digest.hexdigest()


def read_fields(path: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of UniTokConfig of an autoencoder; see `read_autoencoder`."""
    found = _locate(path)
    if found.kind == "file":
        return tokenizer_fields(read_ldm_file(Path(found.source), options or {})[0])
    if found.kind == "diffusers":
        return tokenizer_fields(found.config)
    return _continuous_fields(path, UniTokConfig.from_pretrained(found.source))


def read_autoencoder(path: str, unitok: Any, options: Mapping[str, Any] | None = None) -> Autoencoder:
    """The continuous autoencoder at a path or hub id: a folder of a UniTok, a diffusers AutoencoderKL or a
    pipeline with one in vae/, or a single file in LDM's layout.

    Args:
        unitok: the class `UniTok`.
        options: scaling_factor and shift_factor, which a single file does not hold.

    Raises:
        UserError: there is none; it has codes; diffusers is missing.
    """
    found = _locate(path)
    if found.kind == "unitok":
        fields = _continuous_fields(path, UniTokConfig.from_pretrained(found.source))
        model = unitok.from_pretrained(found.source, dtype=torch.float32)
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith(REPLACED)}
        return Autoencoder(path, fields, weights)
    if found.kind == "file":
        config, weights = read_ldm_file(Path(found.source), options or {})
        return Autoencoder(path, tokenizer_fields(config), by_tokenizer_names(weights))
    fields, weights = read_diffusers(found.source, found.subfolder)
    return Autoencoder(path, fields, weights)


class _Place(NamedTuple):
    kind: Literal["unitok", "diffusers", "file"]
    source: str  # a path or a hub id
    subfolder: str | None
    config: dict[str, Any]


def _locate(path: str) -> _Place:
    """
    Raises:
        UserError: there is nothing, or something else.
    """
    folder, subfolder = tokenizer_path(path), None
    if folder.is_file():
        return _Place("file", str(folder), None, {})
    if folder.suffix in _SUFFIXES and not folder.exists():
        raise UserError(f"{path} does not exist: {_WANTED}")
    if folder.is_dir():
        if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
            subfolder = "vae"
        config = read_config(folder / (subfolder or ""))
    else:
        source = "https://huggingface.co/black-forest-labs/FLUX.1-dev (vae/)"
        file = find_weights(path, ("config.json", "vae/config.json"), "The autoencoder", source)
        subfolder = "vae" if file.parent.name == "vae" else None
        config = read_config(file.parent)
    if config.get("model_type") == "unitok":
        return _Place("unitok", str(folder), None, config)
    if config.get("_class_name") != "AutoencoderKL":
        found = config.get("_class_name") or config.get("model_type")
        raise UserError(f"{path} holds a model of type {found!r}: {_WANTED}")
    return _Place("diffusers", str(folder), subfolder, config)


def _continuous_fields(path: str, config: UniTokConfig) -> dict[str, Any]:
    if config.quantizer != "none":
        raise UserError(f"{path} is a tokenizer with quantizer = {config.quantizer!r}: {_WANTED}")
    fields = config.to_dict()
    for name in ("model_type", "transformers_version", "architectures", "dtype"):
        fields.pop(name, None)
    return fields


def load_weights(model: Any, base: Autoencoder) -> None:
    """Copy the autoencoder's weights into a tokenizer of its fields; the quantiser stays.

    Raises:
        UserError: they do not fit.
    """
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(REPLACED)}
    check_weights_fit(base.path, base.weights, own, "its config")
    model.load_state_dict(base.weights, strict=False)


def is_adapter_folder(folder: Path) -> bool:
    """Whether the folder holds a tokenizer as an adapter alone."""
    whole = any(folder.glob("model*.safetensors"))
    return not whole and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).exists()


def load_adapted(unitok: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The tokenizer of an adapter folder, merged with the autoencoder that it names.

    Raises:
        UserError: that autoencoder is not there, or another one; a tensor is missing or of another shape.
    """
    check_tokenizer_folder(folder)
    description = read_config(folder / ADAPTER_FOLDER, ADAPTER_CONFIG)
    path = str(description.get("base_model_name_or_path"))
    config = UniTokConfig.from_pretrained(str(folder))
    try:
        base = read_autoencoder(path, unitok, config.encoder_options)
    except UserError as error:
        raise UserError(f"{folder} is an adapter of {path}, which cannot be read: {error}") from error
    if description.get("base_sha256") not in (None, base.sha256):
        raise UserError(f"{folder} is an adapter of {path}, whose weights have changed since.")
    trained = read_adapter(folder)
    _check_layers(folder, base.weights, trained)
    model = unitok(config)
    weights = add_products(base.weights, trained)
    weights |= {n: t for n, t in trained.items() if n.startswith("quantizer.")}
    check_weights_fit(folder, weights, model.state_dict(), "its config")
    model.load_state_dict(weights)
    check_finite(model, folder)
    return model.eval().to(dtype or torch.float32)


def _check_layers(folder: Path, weights: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
    """
    Raises:
        UserError: an adapter's factor is of no layer, or does not have its shape.
    """
    for name, down in trained.items():
        layer, found, _ = name.partition(".lora_A.")
        if not found:
            continue
        up, weight = trained[f"{layer}.lora_B.weight"], weights.get(f"{layer}.weight")
        shape = None if weight is None else (up.shape[0], *down.shape[1:])
        if weight is None or shape != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise UserError(f"{folder}: the adapter of {layer} does not fit its autoencoder.")
