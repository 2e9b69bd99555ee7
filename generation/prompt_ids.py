"""The ids of prompts and questions, checked: what `Pipeline` gives to the sampling loops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer.images import ImageSource

from .validation import check_history, check_one_per_question, check_texts, check_whole, expand_seeds

CHAT_TOKENS = 256  # max_new_tokens of a chat answer unless given
History = Sequence[tuple[str, str]]  # earlier questions of a conversation and their answers


def image_prompts(
    processor: Any, prompts: Any, negative_prompt: Any, seed: Any, num_images: Any, classes: Any
) -> tuple[list[list[int]], list[list[int]] | None, list[int]]:
    """Prompt ids, unconditional ids (None: the model has none) and seeds; one of each per image.

    Args:
        processor: a `UniTokProcessor`, or a `ClassProcessor`, which takes `classes` in place of `prompts`.

    Raises:
        UserError: an argument of `Pipeline.generate` that is not valid.
    """
    check_whole("num_images", num_images)
    if (prompts is None) == (classes is None):
        raise UserError(f"Give prompts or classes, not {'both' if classes is not None else 'neither'}.")
    if classes is not None:
        if isinstance(processor, UniTokProcessor):
            raise UserError("classes are for class-conditional models; this one generates from prompts.")
        if negative_prompt is not None:
            raise UserError("A class-conditional model has no negative prompt, but its null class.")
        ids, unconditional = processor.class_rows(classes, num_images)
        return ids, unconditional, expand_seeds(seed, len(ids))
    count = len(check_texts(prompts, "prompt"))
    seeds = expand_seeds(seed, count * num_images)
    unconditional = [processor.unconditional_ids()] * count
    if negative_prompt is not None:
        texts = [negative_prompt] * count if isinstance(negative_prompt, str) else negative_prompt
        if len(check_texts(texts, "negative prompt")) != count:
            raise UserError(f"{len(texts)} negative prompts for {count} prompts: give one, or one each.")
        unconditional = prompt_ids(processor, texts, "Negative prompt")
    ids = [row for row in prompt_ids(processor, prompts) for _ in range(num_images)]
    return ids, [row for row in unconditional for _ in range(num_images)], seeds


def prompt_ids(processor: UniTokProcessor, prompts: Sequence[str], name: str = "Prompt") -> list[list[int]]:
    """The ids of text-to-image prompts, each ending in boi.

    Raises:
        UserError: a prompt that the processor would truncate; the message starts with `name`.
    """
    rows, limit = [processor.text_to_image_ids(p) for p in prompts], processor.max_prompt
    for i, row in enumerate(rows):
        if len(row) > limit:  # `text_to_image_ids` returned `max_prompt` ids and boi: it has truncated
            raise UserError(f"{name} {i} has {limit} tokens or more: shorten the prompt.")
    return rows


def question_prompts(
    processor: UniTokProcessor,
    images: Sequence[Any],
    questions: Sequence[str],
    histories: Sequence[History] | None,
) -> tuple[list[list[int]], list[ImageSource], list[list[int]]]:
    """The ids of each question, the different images of all, and for each question the numbers of its own.

    Raises:
        UserError: an argument of `Pipeline.answer` that is not valid.
    """
    check_texts(questions, "question")
    histories = [()] * len(questions) if histories is None else histories
    check_one_per_question("images", images, len(questions))
    check_one_per_question("histories", histories, len(questions))
    earlier = [check_history(entry) for entry in histories]
    groups = [_as_list(entry) for entry in images]
    # encode each image once
    unique = {_identity(image): image for group in groups for image in group}
    index = {key: i for i, key in enumerate(unique)}
    places = [[index[_identity(image)] for image in group] for group in groups]
    # benchmarks repeat questions: tokenize each once
    asked = [(question, len(group), past) for question, group, past in zip(questions, groups, earlier)]
    ids = {key: processor.question_ids(key[0], key[1], history=key[2]) for key in set(asked)}
    return [ids[key] for key in asked], list(unique.values()), places


def chat_tokens(
    limit: int | None,
    processor: UniTokProcessor,
    question: str,
    images: Any,
    history: Any,
    wanted: int | None,
) -> int:
    """Maximum length of the next answer: `wanted`, else the rest of the context up to `CHAT_TOKENS`.

    Args:
        limit: of the context in tokens; None = there is none.
    """
    if wanted is not None or limit is None:
        return CHAT_TOKENS if wanted is None else wanted
    check_texts([question], "question")
    ids = processor.question_ids(question, len(_as_list(images)), history=check_history(history))
    return max(1, min(CHAT_TOKENS, limit - len(ids)))


def _as_list(entry: Any) -> list[Any]:
    """The images of a question: one image, a list of images or None -> a list."""
    return [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _identity(image: ImageSource) -> Any:
    """Key of an image: its path, or the object's id."""
    # ids are unique while the caller's list keeps the objects alive
    return str(image) if isinstance(image, (str, Path)) else id(image)
