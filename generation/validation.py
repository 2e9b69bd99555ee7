"""Checks of arguments, made before any computation."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from open_unitok.core.errors import UserError

from .sampling import check_seed


def check_texts(texts: Any, name: str) -> Sequence[str]:
    """Return `texts`, a list of non-empty strings; error texts call an entry `name`.

    Raises:
        UserError: not a list, or an entry is empty or not a string.
    """
    # a string is a sequence too: each of its characters would become a prompt
    if isinstance(texts, str):
        raise UserError(f"Expected a list of {name}s, got one string: put it into [...].")
    if not isinstance(texts, Sequence):
        raise UserError(f"Expected a list of {name}s, got {texts!r}.")
    for i, text in enumerate(texts):
        if not _is_text(text) or not text.strip():
            raise UserError(f"{name.capitalize()} {i} is {text!r}; it must be a string that is not empty.")
    return texts


def _is_text(value: Any) -> bool:
    """True for a string without lone surrogates: Python decodes invalid UTF-8 of command lines to these."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def check_history(history: Any) -> tuple[tuple[str, str], ...]:
    """
    Raises:
        UserError: not pairs of two texts.
    """
    pairs = list(history) if isinstance(history, (list, tuple)) else [history]
    for i, pair in enumerate(pairs):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(_is_text(text) for text in pair):
            raise UserError(f"Entry {i} of a history is {pair!r}; it must be (question, answer), two texts.")
    return tuple((question, answer) for question, answer in pairs)


def check_one_per_question(name: str, entries: Any, count: int) -> None:
    """
    Raises:
        UserError: `entries` is not a list with one entry for each of `count` questions.
    """
    if not isinstance(entries, Sequence):
        raise UserError(f"{name} is {entries!r}; it must be a list with one entry per question.")
    if len(entries) != count:
        raise UserError(f"{len(entries)} {name} for {count} questions: give one entry per question.")


def expand_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: the given list, or seed, seed + 1, ..."""
    if isinstance(seed, (list, tuple, range)):
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} images: give one seed per image.")
        return [check_seed(s) for s in seed]
    first = check_seed(seed)
    return [first + i for i in range(count)]


def check_whole(name: str, value: Any) -> None:
    """
    Raises:
        UserError: `value` is not a whole number >= 1.
    """
    # bool is a subclass of int
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number >= 1.")


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], config: Any, name: str = "Prompt"
) -> None:
    """
    Raises:
        UserError: not one seed per prompt, an empty prompt, or one that leaves no context for the image.
    """
    if len(seeds) != len(prompt_ids):
        raise UserError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts: give one seed per prompt.")
    limit = config.context_length
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"{name} {i} is empty: describe the image.")
        if limit is not None and len(row) + config.num_image_tokens > limit:
            raise UserError(
                f"{name} {i} has {len(row)} tokens and its image {config.num_image_tokens}, more than the "
                f"model's context of {limit}: shorten the prompt to {limit - config.num_image_tokens} tokens."
            )


def check_prefix(prefix: Any, images: int, config: Any) -> None:
    """
    Raises:
        UserError: not a tensor of shape (1 or `images`, n < N, K).
    """
    shape = tuple(prefix.shape) if isinstance(prefix, Tensor) else ()
    num_tokens = config.num_image_tokens
    if len(shape) != 3 or shape[0] not in (1, images) or shape[1] >= num_tokens:
        raise UserError(
            f"prefix has shape {shape}; expected a tensor of (1 or {images} images, at most {num_tokens - 1} "
            f"visual tokens, {config.num_codebooks} sub-codebooks)."
        )


# options of transformers' `generate`: given otherwise, or without meaning for answers
_NO_ANSWER_OPTIONS = {
    "max_length", "max_new_tokens", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states", "bos_token_id", "transformers_version",
    "cache_implementation",
}  # fmt: skip
# those that transformers implements by code which it downloads
_HUB_OPTIONS = {
    "penalty_alpha", "dola_layers", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids",
}  # fmt: skip
_CALL_OPTIONS = {
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model",
    "negative_prompt_ids", "negative_prompt_attention_mask", "streamer", "tokenizer", "generation_config",
}  # fmt: skip


def check_text_options(options: Mapping[str, Any]) -> None:
    """Check the options of transformers' `generate` that an answer takes.

    Raises:
        UserError: there is no such option, or a number is out of range.
    """
    allowed = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | _CALL_OPTIONS
    allowed -= _NO_ANSWER_OPTIONS
    for name in options:
        if name in _HUB_OPTIONS and options[name] is not None:
            raise UserError(f"The option {name} needs code from a hub, which is not run.")
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " Allowed: those of transformers' generate."
            raise UserError(f"An answer has no option {name!r}.{hint}")
    for name in ("num_beams", "num_return_sequences"):
        check_whole(name, options.get(name, 1))
    if options.get("num_return_sequences", 1) != 1:
        raise UserError("num_return_sequences must be 1: repeat the question instead.")
    for name, low, high in (("temperature", 0, 1e9), ("top_k", 0, 1e9), ("top_p", 0, 1), ("min_p", 0, 1)):
        value = options.get(name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high):
            raise UserError(f"{name} is {value!r}; it must be a number from {low} to {high:g}.")


def check_questions(
    prompt_ids: Sequence[Sequence[int]], max_new_tokens: Any, batch_size: Any, config: Any
) -> None:
    """
    Raises:
        UserError: a question is empty or leaves no context for the answer, or a number is out of range.
    """
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("batch_size", batch_size)
    limit = config.context_length
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"Question {i} is empty.")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise UserError(
                f"Question {i} has {len(row)} tokens, images included; with {max_new_tokens} new ones "
                f"more than the context of {limit}: shorten the question or lower max_new_tokens."
            )
