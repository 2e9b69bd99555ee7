"""Checks of model folders before loading, of state dicts while loading, and of the first logits."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.folder_checks import check_finite, loading, read_config
from open_unitok.tokenizer.loading import check_weights_fit

from .config import UniTokMLLMConfig

PUBLISHED_TYPE = "mini_gemini"  # model_type of the published MLLM
CLASS_TYPE = "unitok_c2i"  # model_type of a class-conditional model
GENERATION_CONFIG = "generation_config.json"
_INF = float("inf")
# field of generation_config.json -> (type, smallest, largest value)
_GENERATION_RANGES: dict[str, tuple[Any, float, float]] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences"), (int, 1, _INF)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), (int, 0, _INF)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (int, 0, _INF)),
    **dict.fromkeys(("top_p", "typical_p"), ((int, float), 0, 1)),
    **dict.fromkeys(("temperature", "repetition_penalty"), ((int, float), 0, 1e9)),
    **dict.fromkeys(("do_sample", "use_cache"), (bool, 0, 1)),
}


def folder_type(folder: str | os.PathLike[str]) -> Any:
    """The model_type of a folder.

    Raises:
        UserError: it has no valid config.json.
    """
    return read_config(folder).get("model_type")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` is not an MLLM; the message names the model type found.
    """
    kind = folder_type(folder)
    if kind == PUBLISHED_TYPE:
        raise UserError(
            f"{folder} holds the published MLLM in its own format: convert it with "
            f"`unitok convert mllm {folder} NEW_FOLDER`."
        )
    if kind != UniTokMLLMConfig.model_type:
        hints = {
            "unitok": " That is a visual tokenizer, without a language model.",
            CLASS_TYPE: " That is a class-conditional model, which reads no text.",
        }
        hint = hints.get(str(kind), "")
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not an MLLM ({UniTokMLLMConfig.model_type!r}).{hint}"
        )


def check_class_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` is not a class-conditional model; the message names the model type found.
    """
    if (kind := folder_type(folder)) != CLASS_TYPE:
        raise UserError(
            f"{folder} holds a model of type {kind!r}, not a class-conditional model ({CLASS_TYPE!r})."
        )


def check_vocabulary(config: UniTokMLLMConfig, found: str, folder: str | os.PathLike[str]) -> None:
    """Compare the fingerprint of a folder's text tokenizer with the model's.

    Raises:
        UserError: they differ: the ids would be other words.
    """
    expected = config.vocabulary_fingerprint
    if expected is not None and expected != found:
        raise UserError(
            f"{folder}: the model was saved with the vocabulary {expected[:12]}, but its text tokenizer has "
            f"{found[:12]}: restore tokenizer.json, or remove vocabulary_fingerprint from config.json after "
            "changing the vocabulary on purpose."
        )


def assign_state(model: nn.Module, state: dict[str, Tensor], source: Any) -> None:
    """Assign `state` to a model that was built on the meta device; all names and shapes must match.

    Raises:
        UserError: names or shapes differ; the message shows the first of each kind.
    """
    check_weights_fit(source, state, model.state_dict(), "an MLLM")
    model.load_state_dict(state, assign=True)
    # RoPE tables are non-persistent buffers and still on the meta device: build these modules anew
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RotaryEmbedding" in type(child).__name__:
                setattr(parent, name, type(child)(child.config))


def check_generation_config(folder: str | os.PathLike[str]) -> None:
    """Check generation_config.json, which transformers reads without checking types; a missing file is fine.

    Raises:
        UserError: a value has the wrong type or is out of range.
    """
    path = Path(folder) / GENERATION_CONFIG
    if not path.exists():
        return
    found = read_config(folder, GENERATION_CONFIG)
    for name, value in found.items():
        if value is None or name not in _GENERATION_RANGES:
            continue
        kind, low, high = _GENERATION_RANGES[name]
        numbers = value if isinstance(value, list) and name == "eos_token_id" else [value]
        for number in numbers:
            right_type = isinstance(number, kind) and isinstance(number, bool) == (kind is bool)
            if not right_type or not low <= number <= high:  # pyright: ignore
                raise UserError(f"{path}: {name} = {value!r} is not valid.")
    with loading(path):
        GenerationConfig.from_dict(found).validate()


def check_logits(logits: Tensor, model: nn.Module) -> None:
    """Check the first logits of a generation: NaN would otherwise sample noise without an error.

    Raises:
        UserError: they hold NaN or infinity; the message names the weight that does, if one does.
    """
    # processors of transformers put -inf in place of excluded entries
    if not bool((logits.isnan() | logits.isposinf()).any()):
        return
    check_finite(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    raise UserError(
        f"The model's logits are not finite in {dtype}, though its weights are: use dtype = float32."
    )


class FiniteLogits(LogitsProcessor):
    """Runs `check_logits` on the first scores of transformers' `generate`."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.model is not None:  # once: the check waits for the device
            check_logits(scores, self.model)
            self.model = None
        return scores
