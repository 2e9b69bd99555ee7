"""An adapter for lmms-eval: `--model open_unitok --model_args pretrained=FOLDER`, simple and chat tasks.

lmms-eval finds `manifest` through the entry-point group `lmms_eval.models`; only the module `models` imports
lmms-eval. It passes all requests at once, so batches are formed here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline
from open_unitok.mllm import IMAGE_MARK
from open_unitok.tokenizer.images import load_image

NAME, ALIASES = "open_unitok", ("unitok",)


class VisualRequest(NamedTuple):
    """Images, a text that may contain image marks, and generation options."""

    images: list[Any]
    text: str
    options: dict[str, Any]


def manifest() -> Any:
    """The entry point: name, aliases, and the classes for simple and chat tasks."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    module = "open_unitok.eval.lmms_eval.models"
    return ModelManifest(
        NAME,
        simple_class_path=f"{module}.OpenUniTok",
        chat_class_path=f"{module}.OpenUniTokChat",
        aliases=ALIASES,
    )


def load_lmms_pipeline(
    pretrained: str, device: str | None, dtype: str | None, local_rank: int = 0
) -> Pipeline:
    """The pipeline of a folder or hub id; every process uses its own GPU."""
    # lmms-eval passes None unless --device is given
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Pipeline.from_pretrained(pretrained, f"cuda:{local_rank}" if device == "cuda" else device, dtype)


def answer_requests(
    pipeline: Pipeline, requests: Sequence[VisualRequest], batch_size: int, done: Callable[[int], Any]
) -> list[str]:
    """One answer per request, in order; requests with the same options share batches.

    Raises:
        UserError: an unsupported option, or a question that is empty or too long.
    """
    answers = [""] * len(requests)
    # a batch shares one set of generation options
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.options.items())), []).append(i)
    for members in groups.values():
        until, longest, options = generation_options(requests[members[0]].options)
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            texts = pipeline.answer(
                [requests[i].images for i in part],
                [requests[i].text for i in part],
                longest,
                batch_size,
                **options,
            )
            for i, text in zip(part, texts):
                answers[i] = truncate_at_stops(text, until)
            done(len(part))
    return answers


def generation_options(wanted: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """lmms-eval's generation keywords -> (stop strings, max_new_tokens, options of `generate`)."""
    wanted = {key: value for key, value in wanted.items() if value is not None}
    until = wanted.pop("until", [])
    until = [until] if isinstance(until, str) else list(until)
    longest = int(wanted.pop("max_new_tokens", 128))
    beams, top_p = int(wanted.pop("num_beams", 1)), wanted.pop("top_p", None)
    temperature = float(wanted.pop("temperature", 0.0))
    # some tasks pass do_sample with temperature 0 and mean greedy decoding
    sampled = wanted.pop("do_sample", temperature > 0)
    options: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
    if sampled and temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
        options |= {} if top_p is None else {"top_p": float(top_p)}
    for ignored in ("image_aspect_ratio", "use_cache"):  # options of other models, without effect here
        wanted.pop(ignored, None)
    if wanted:
        raise UserError(f"The task has unsupported generation options: {', '.join(sorted(wanted))}.")
    return until, longest, options


def truncate_at_stops(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop string."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text.strip()


def images_of(visuals: Any) -> list[Any]:
    """The result of a task's `doc_to_visual` as a list of RGB images.

    Raises:
        UserError: not an image, e.g. the path of a video.
    """
    visuals = [] if visuals is None else visuals if isinstance(visuals, (list, tuple)) else [visuals]
    for visual in visuals:
        if not hasattr(visual, "convert"):
            raise UserError(
                f"The task contains {type(visual).__name__} {str(visual)[:60]!r}; only images are supported."
            )
    return [load_image(visual) for visual in visuals]


def parse_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[Any], str]:
    """Chat messages -> (images, text with an image mark per image); messages are joined by newlines.

    Raises:
        UserError: a message contains video or audio.
    """
    images, parts = [], []
    for message in messages:
        content = message["content"]
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                parts.append(str(piece["text"]))
            elif piece["type"] == "image":
                images += images_of(piece["url"])
                parts.append(IMAGE_MARK)
            else:
                raise UserError(f"The task contains a {piece['type']}; only images and text are supported.")
    return images, "\n".join(parts)


@torch.no_grad()
def continuation_loss(
    pipeline: Pipeline, images: Sequence[Any], text: str, continuation: str
) -> tuple[float, bool]:
    """(sum of -log p over the tokens of the continuation, whether greedy decoding would generate it)."""
    processor, model = pipeline.processor, pipeline.model
    prompt = processor.question_ids(text, len(images))
    target = processor.text_tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
    if not target:
        raise UserError(f"The option {continuation!r} has no tokens.")
    # all images are in the prompt
    read = pipeline.encode_for_reading(list(images))
    ids = torch.tensor([[*prompt, *target]], device=model.device)
    logits = model(input_ids=ids, **read.inputs(model.device), return_logits=True).logits
    # the logits at position t predict token t + 1
    logits = logits[0, len(prompt) - 1 : -1].float()
    wanted = ids[0, len(prompt) :]
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    return float(losses), bool((logits.argmax(-1) == wanted).all())
