"""An adapter for lmms-eval: `--model open_unitok --model_args pretrained=FOLDER`, simple and chat tasks.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`. Its own package is needed for the
classes (`lmms_models`), not for what stands here. Batches are made here: lmms-eval hands over all requests at
once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline

NAME, ALIASES = "open_unitok", ("unitok",)
MARK = "<image>"


class Question(NamedTuple):
    """Images, a text that may hold their marks, and how the answer is to be generated."""

    images: list[Any]
    text: str
    options: dict[str, Any]


def manifest() -> Any:
    """What lmms-eval registers: a name, its aliases, the classes of simple and of chat tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    module = "open_unitok.eval.lmms_eval.models"
    return ModelManifest(
        NAME,
        simple_class_path=f"{module}.OpenUniTok",
        chat_class_path=f"{module}.OpenUniTokChat",
        aliases=ALIASES,
    )


def load(pretrained: str, device: str | None, dtype: str | None, local_rank: int = 0) -> Pipeline:
    """The model of a folder or hub id; several processes take a GPU each."""
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Pipeline.from_pretrained(pretrained, f"cuda:{local_rank}" if device == "cuda" else device, dtype)


def answer(
    pipeline: Pipeline, questions: Sequence[Question], batch_size: int, done: Callable[[int], Any]
) -> list[str]:
    """One answer per question, in their order; those of the same options are answered together.

    Raises:
        UserError: an option that we do not have, a question that is too long or empty.
    """
    answers = [""] * len(questions)
    groups: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        groups.setdefault(repr(sorted(question.options.items())), []).append(i)
    for places in groups.values():
        until, longest, options = options_of(questions[places[0]].options)
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            texts = pipeline.answer(
                [questions[i].images for i in part],
                [questions[i].text for i in part],
                longest,
                batch_size,
                **options,
            )
            for i, text in zip(part, texts):
                answers[i] = cut(text, until)
            done(len(part))
    return answers


def options_of(wanted: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """lmms-eval's generation keywords -> (where an answer stops, its longest, options of `generate`)."""
    wanted = {key: value for key, value in wanted.items() if value is not None}
    until = wanted.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    longest = int(wanted.pop("max_new_tokens", 128))
    beams, top_p = int(wanted.pop("num_beams", 1)), wanted.pop("top_p", None)
    temperature = float(wanted.pop("temperature", 0.0))
    sampled = wanted.pop("do_sample", temperature > 0)
    options: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
    if sampled and temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
        options |= {} if top_p is None else {"top_p": float(top_p)}
    for ignored in ("image_aspect_ratio", "use_cache"):  # of other models' tasks; they change nothing here
        wanted.pop(ignored, None)
    if wanted:
        raise UserError(
            f"The task asks for generation options that are not known here: {', '.join(sorted(wanted))}."
        )
    return until, longest, options


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stops."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def images_of(visuals: Any) -> list[Any]:
    """What a task's `doc_to_visual` gave, as a list of images.

    Raises:
        UserError: something that is no image, such as a video's path.
    """
    visuals = [] if visuals is None else visuals if isinstance(visuals, (list, tuple)) else [visuals]
    for visual in visuals:
        if not hasattr(visual, "convert"):
            raise UserError(
                f"The task shows {type(visual).__name__} {str(visual)[:60]!r}; only images can be read."
            )
    return [visual.convert("RGB") if visual.mode != "RGB" else visual for visual in visuals]


def question_of(messages: Sequence[dict[str, Any]]) -> tuple[list[Any], str]:
    """Chat messages -> (images, text with a mark where each of them stands); turns follow each other.

    Raises:
        UserError: a video or a sound.
    """
    images, parts = [], []
    for message in messages:
        content = message["content"]
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                parts.append(str(piece["text"]))
            elif piece["type"] == "image":
                images += images_of(piece["url"])
                parts.append(MARK)
            else:
                raise UserError(f"The task shows a {piece['type']}; only images and texts can be read.")
    return images, "\n".join(parts)


@torch.no_grad()
def loss_of(pipeline: Pipeline, images: Sequence[Any], text: str, continuation: str) -> tuple[float, bool]:
    """(sum of -log p over the continuation's tokens, would greedy decoding write it)."""
    processor, model = pipeline.processor, pipeline.model
    prompt = processor.question_ids(text, len(images))
    target = processor.text_tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
    if not target:
        raise UserError(f"The option {continuation!r} has no tokens.")
    codes = pipeline.encode_for_reading(list(images))
    ids = torch.tensor([[*prompt, *target]], device=model.device)
    logits = model(input_ids=ids, image_codes=codes.to(model.device), return_logits=True).logits
    logits = logits[0, len(prompt) - 1 : -1].float()
    wanted = ids[0, len(prompt) :]
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return float(losses), bool((logits.argmax(-1) == wanted).all())
