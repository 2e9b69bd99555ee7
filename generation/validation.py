"""What users ask for, checked before any work begins."""

from collections.abc import Sequence
from typing import Any

from open_unitok.core.errors import UserError

from .kv_cache import context_length
from .sampling import check_seed


def check_texts(texts: Any, name: str) -> Sequence[str]:
    """The texts; UserError where they are no list, or one of them is empty or no text."""
    if isinstance(texts, str):
        raise UserError(f"One string was given where a list of {name}s is needed: put it into [...].")
    if not isinstance(texts, Sequence):
        raise UserError(f"{texts!r} was given where a list of {name}s is needed.")
    for i, text in enumerate(texts):
        if not is_text(text) or not text.strip():
            raise UserError(f"{name.capitalize()} {i} is {text!r}; it must be a text that is not empty.")
    return texts


def is_text(value: Any) -> bool:
    """True for a string without halves of characters, which bytes that are no UTF-8 leave behind."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def check_history(history: Any) -> tuple[tuple[str, str], ...]:
    """
    Raises:
        UserError: not pairs of two texts.
    """
    pairs = list(history) if isinstance(history, (list, tuple)) else [history]
    for i, pair in enumerate(pairs):
        whole = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not whole or not all(is_text(text) for text in pair):
            raise UserError(f"Entry {i} of a history is {pair!r}; it must be (question, answer), two texts.")
    return tuple((question, answer) for question, answer in pairs)


def spread_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per image: the list given, or seed, seed + 1, ..."""
    if isinstance(seed, (list, tuple, range)):
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} images: give one seed per image.")
        return [check_seed(s) for s in seed]
    first = check_seed(seed)
    return [first + i for i in range(count)]


def check_whole(name: str, value: Any) -> None:
    """
    Raises:
        UserError: `value` is no whole number >= 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number >= 1.")


def check_prompts(
    prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], config: Any, name: str = "Prompt"
) -> None:
    """
    Raises:
        UserError: not one seed per prompt, an empty prompt, or one that leaves no room for the image.
    """
    if len(seeds) != len(prompt_ids):
        raise UserError(f"{len(seeds)} seeds for {len(prompt_ids)} prompts: give one seed per prompt.")
    limit = context_length(config)
    for i, row in enumerate(prompt_ids):
        if not len(row):
            raise UserError(f"{name} {i} is empty: write what to draw.")
        if limit is not None and len(row) + config.num_image_tokens > limit:
            raise UserError(
                f"{name} {i} has {len(row)} tokens and its image {config.num_image_tokens}, more than the "
                f"model's context of {limit}: shorten the prompt to {limit - config.num_image_tokens} tokens."
            )
