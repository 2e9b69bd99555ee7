"""The processor as transformers expects it: callable, with chat messages and batch decoding.

I images, N visual tokens per image, K sub-codebooks.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.images import load_image

from .features import FeatureOptions, FeatureSource, ReadImages
from .prompts import IMAGE_MARK, expand_images, find_template

CHAT = "chat"  # the text tokenizer's own chat template
BYTE = re.compile("<0x[0-9A-F]{2}>")  # sentencepiece's byte fallback
_ROLES = ("system", "user", "assistant")
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
# options of transformers' processors that this one takes; others are refused, not ignored
_OPTIONS = {
    "return_tensors", "padding", "padding_side", "truncation", "max_length", "add_special_tokens",
    "return_attention_mask", "text_kwargs", "images_kwargs", "common_kwargs",
}  # fmt: skip


class ProcessorCalls(ProcessorMixin):
    """The base of `UniTokProcessor`; of `ProcessorMixin`, which pipelines ask for, only the type is used."""

    text_tokenizer: Any
    template: str
    image_token_id: int
    feature_token_id: int
    boi_token_id: int
    eoi_token_id: int
    sep_token_id: int | None
    pad_token_id: int
    num_image_tokens: int
    visual_input: str
    features: dict[str, Any] | None
    _feature_source: FeatureSource | None = None
    _unitok: UniTok | None = None
    _unitok_source: Any = None
    model_input_names = ("input_ids", "attention_mask", "image_codes", "image_features")  # pyright: ignore

    def __repr__(self) -> str:
        return f"{type(self).__name__}(template={self.template!r}, num_image_tokens={self.num_image_tokens})"

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> BatchFeature:
        """Text and images to `input_ids`, `attention_mask` and, with images, `image_codes` (I, N, K).

        With continuous or dual visual input also `image_features` (I, M, F); I = 0 codes with continuous.

        Args:
            images: an image (path, bytes, PIL) or a list; for several texts one list per text, or one flat
                list, distributed by the `<image>` marks, or one image per text without marks.
            text: a prompt or a list of prompts, used as it is: for questions call `apply_chat_template`
                first. Without marks the images come first.
            options: return_tensors ("pt", the default, or "np"), padding, padding_side ("left", the default,
                is for generation), truncation with max_length, add_special_tokens.

        Raises:
            UserError: an unknown option, marks and images that do not match, images without a visual
                tokenizer.
        """
        if text is not None and images is not None and _is_text(images) and not _is_text(text):
            images, text = text, images  # the order of older versions of transformers
        if text is None:
            raise UserError("The processor needs text: a prompt or a list of prompts.")
        if not _is_text(text):
            raise UserError(f"text must be a string or a list of strings, got {type(text).__name__}.")
        texts = [text] if isinstance(text, str) else list(text)
        groups = _group_images(images, texts)
        return self._inputs(texts, groups, options)

    def _inputs(self, texts: list[str], groups: list[list[Any]], options: dict[str, Any]) -> BatchFeature:
        for key in ("text_kwargs", "images_kwargs", "common_kwargs"):
            options = {**options, **(options.pop(key, None) or {})}
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise UserError(
                f"The processor has no option {min(unknown)!r}. Allowed: {', '.join(sorted(_OPTIONS))}."
            )
        rows = []
        for prompt, images in zip(texts, groups):
            if images and IMAGE_MARK not in prompt:
                prompt = f"{IMAGE_MARK}\n" * len(images) + prompt
            bos = getattr(self.text_tokenizer, "bos_token", None)
            wants_bos = options.get("add_special_tokens", True) and not (bos and prompt.startswith(bos))
            ids = self._mark(prompt, bos=bool(wants_bos))  # type: ignore[attr-defined]
            image_ids = [self.image_ids(self.num_image_tokens)] * len(images)  # type: ignore[attr-defined]
            rows.append(self._truncate(expand_images(ids, self.image_token_id, image_ids), options))
        found = self._pad(rows, options)
        images = [image for group in groups for image in group]
        if images:
            read = self.read_images([_open(image) for image in images])
            found["image_codes"] = read.codes
            if read.features is not None:
                found["image_features"] = read.features
        if options.get("return_attention_mask", True) is False:
            del found["attention_mask"]
        return BatchFeature(found, tensor_type=options.get("return_tensors") or "pt")

    def _truncate(self, ids: list[int], options: Mapping[str, Any]) -> list[int]:
        limit = options.get("max_length")
        if not options.get("truncation") or limit is None or len(ids) <= limit:
            return ids
        if {self.image_token_id, self.feature_token_id} & set(ids[limit:]):
            raise UserError(f"max_length = {limit} would cut an image: the prompt has {len(ids)} tokens.")
        return ids[:limit]

    def _pad(self, rows: list[list[int]], options: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, padded to the longest row or to max_length."""
        ids, mask = self.pad(rows, options.get("padding_side") or "left")  # type: ignore[attr-defined]
        missing = (options.get("max_length") or 0) - ids.shape[1]
        if options.get("padding") == "max_length" and missing > 0:
            sides = (missing, 0) if options.get("padding_side", "left") == "left" else (0, missing)
            ids = torch.nn.functional.pad(ids, sides, value=self.pad_token_id)
            mask = torch.nn.functional.pad(mask, sides)
        return {"input_ids": ids, "attention_mask": mask}

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Chat messages to a prompt, to ids, or (tokenize, return_dict) to inputs of the model.

        Args:
            conversation: [{"role": "system" | "user" | "assistant", "content": text or a list of {"type":
                "text", "text": ...} and {"type": "image", "image" | "path" | "url" | "base64": ...}}, ...],
                or a list of such conversations.
            chat_template: only None, the model's own.
            add_generation_prompt: end with the start of an answer. continue_final_message: leave the last
                answer open.
            processor_kwargs, options: of `__call__`.

        Raises:
            UserError: a message or an option that is not valid.
        """
        if chat_template is not None:
            raise UserError("chat_template cannot be replaced here: set the processor's template.")
        single = not conversation or isinstance(conversation[0], Mapping)
        conversations = [conversation] if single else list(conversation)
        prompts, groups = [], []
        for messages in conversations:
            turns, images = _read_messages(messages)
            prompts.append(self._render(turns, add_generation_prompt, bool(continue_final_message)))
            groups.append(images)
        if not tokenize:
            return prompts[0] if single else prompts
        settings = {**options, **(processor_kwargs or {})}
        # a chat template writes bos itself
        settings.setdefault("add_special_tokens", self.template != CHAT)
        if groups and "images" in settings:
            given = settings.pop("images")
            groups = [_as_list(given)] if single else [_as_list(entry) for entry in given]
        found = self._inputs(prompts, groups, settings)
        return found if return_dict else found["input_ids"]

    def _render(self, turns: list[tuple[str, str]], add_prompt: bool, is_open: bool) -> str:
        if self.template == CHAT:
            messages = [{"role": role, "content": text} for role, text in turns]
            return self.text_tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_prompt, continue_final_message=is_open
            )
        template = find_template(self.template)
        text = template.opening
        for i, (role, content) in enumerate(turns):
            is_last = i == len(turns) - 1
            if role == "system":
                text = f"{content} "
            elif role == "user":
                text += f"{template.user}: {content}" + ("" if is_last and not add_prompt else " ")
            elif is_last and is_open:
                text += f"{template.assistant}: {content}"
            else:
                text += f"{template.assistant}:{self._answer(content)}"  # type: ignore[attr-defined]
        return f"{text}{template.assistant}:" if add_prompt and not is_open else text

    # ---- ids -> text ----

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True, **_: Any) -> str:
        """Ids to text; images and, unless wanted, special ids are skipped."""
        skipped = {self.image_token_id, self.boi_token_id, self.eoi_token_id, self.sep_token_id}
        kept = [i for i in map(int, ids) if i >= 0 and i not in skipped]
        return self.text_tokenizer.decode(kept, skip_special_tokens=skip_special_tokens)

    def decode_settled(self, ids: Iterable[int]) -> str:
        """The prefix of `decode(ids)` that later ids cannot change.

        Byte tokens at the end are held back until another token ends their run: one invalid byte turns the
        whole run into replacement characters. An incomplete character is held back as well.
        """
        images = {self.image_token_id, self.boi_token_id, self.eoi_token_id, self.sep_token_id}
        skipped = {*self.text_tokenizer.all_special_ids, *images}
        kept = [int(i) for i in ids]
        while kept:  # skipped ids do not end a run of bytes
            piece = "" if kept[-1] < 0 else self.text_tokenizer.convert_ids_to_tokens(kept[-1])
            if piece and kept[-1] not in skipped and not BYTE.fullmatch(piece):
                break
            kept.pop()
        return self.decode(kept).rstrip("\ufffd")

    @property
    def tokenizer(self) -> Any:
        """The text tokenizer, under the name that transformers' pipelines read."""
        return self.text_tokenizer

    @property
    def chat_template(self) -> str:
        """The name of the conversation template, or the tokenizer's own template."""
        return self.text_tokenizer.chat_template if self.template == CHAT else self.template

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = True, **_: Any) -> list[str]:
        """Rows of ids to texts; placeholders of images are skipped."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **_: Any
    ) -> list[str]:
        """As `batch_decode`, under the name that transformers' pipelines call."""
        return self.batch_decode(generated_outputs, skip_special_tokens)

    # ---- images ----

    @property
    def unitok(self) -> UniTok | None:
        """The visual tokenizer that encodes the images of calls; loaded from the model's folder on first use.

        Assign one to share it or to run it on another device.
        """
        if self._unitok is None and self._unitok_source is not None:
            self._unitok = UniTok.from_pretrained(self._unitok_source).eval()
        return self._unitok

    @unitok.setter
    def unitok(self, value: UniTok | None) -> None:
        if value is not self._unitok:
            self._unitok, self._feature_source = value, None

    @property
    def feature_source(self) -> FeatureSource | None:
        """What computes the features of images that are read; None with discrete input, or without a visual
        tokenizer. Loaded on first use."""
        if self._feature_source is None and self.features is not None and self.unitok is not None:
            self._feature_source = FeatureSource(FeatureOptions(**self.features), self.unitok)
        return self._feature_source

    def encode_images(self, images: Sequence[Any]) -> torch.Tensor:
        """Input images, URLs and base64 included, -> codes (I, N, K) on the CPU.

        Raises:
            UserError: the processor has no visual tokenizer, or an image cannot be read.
        """
        return self._encode([_open(image) for image in images])[0].cpu()

    def read_images(self, images: Sequence[Any]) -> ReadImages:
        """Input images (path, bytes, PIL) -> codes and features on the CPU; errors as `encode_images`."""
        codes, features = self._encode(images)
        if self.visual_input == "continuous":
            codes = codes[:0]
        return ReadImages(codes.cpu(), None if features is None else features.cpu())

    @torch.no_grad()
    def _encode(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Codes (I, N, K) and features (I, M, F) on the visual tokenizer's device."""
        unitok = self.unitok
        if unitok is None:
            raise UserError(
                "The processor has no visual tokenizer for images: load it from an MLLM folder with unitok/, "
                "or assign processor.unitok."
            )
        source = self.feature_source
        if source is not None and source.tower is not None:  # read once, at a size that suits both
            images = [load_image(image, needed=source.image_shape(self.image_shape)) for image in images]  # type: ignore[attr-defined]
        pixels = torch.stack([self.pixels(image) for image in images]).to(unitok.device)  # type: ignore[attr-defined]
        if source is None:
            return unitok.encode(pixels), None
        return source.encode(pixels, source.tower_batch(images))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, str) for entry in value)
    )


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _group_images(images: Any, texts: list[str]) -> list[list[Any]]:
    """The images of each text.

    Raises:
        UserError: their number does not fit the texts and their marks.
    """
    entries = _as_list(images)
    nested = any(isinstance(entry, (list, tuple)) for entry in entries)
    if len(texts) == 1:
        return [[image for entry in entries for image in _as_list(entry)] if nested else entries]
    if nested:
        if len(entries) != len(texts):
            raise UserError(f"{len(entries)} lists of images for {len(texts)} texts: give one list per text.")
        return [_as_list(entry) for entry in entries]
    counts = [text.count(IMAGE_MARK) for text in texts]
    if not any(counts) and len(entries) == len(texts):
        counts = [1] * len(texts)
    if sum(counts) != len(entries):
        raise UserError(f"The texts mark {sum(counts)} images ({IMAGE_MARK}), but {len(entries)} were given.")
    rest = iter(entries)
    return [[next(rest) for _ in range(count)] for count in counts]


def _read_messages(messages: Sequence[Any]) -> tuple[list[tuple[str, str]], list[Any]]:
    """Messages -> (role, text with marks) per message, messages of one role in a row joined, and the images.

    Raises:
        UserError: a message that is not valid.
    """
    turns: list[tuple[str, str]] = []
    images: list[Any] = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES:
            raise UserError(f"Message {i} has role {role!r}; allowed: {', '.join(_ROLES)}.")
        text, found = _read_content(message.get("content"), i)
        if role == "assistant":  # a mark in an answer is text that the model generated, not an image
            text = text.replace(IMAGE_MARK, "")
        if found and role != "user":
            raise UserError(f"Message {i} of role {role!r} has an image: only the user's may.")
        images += found
        if turns and turns[-1][0] == role:
            text = f"{turns.pop()[1]}\n{text}"
        turns.append((role, text))
    if not turns:
        raise UserError("The conversation has no message.")
    return turns, images


def _read_content(content: Any, number: int) -> tuple[str, list[Any]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"Message {number} has content {content!r}; it must be a text or a list of parts.")
    pieces, images = [], []
    marked = any(IMAGE_MARK in str(p.get("text", "")) for p in parts if isinstance(p, Mapping))
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url"):
            value = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            value = value.get("url") if isinstance(value, Mapping) else value
            images += [] if value is None else [value]
            # marks within the text say where the images are
            pieces += [] if marked else [IMAGE_MARK]
        else:
            raise UserError(f"Message {number} has a part {part!r}; allowed types: text, image.")
    return "\n".join(pieces), images


def _open(source: Any) -> Any:
    """An image of `load_image`; also a data or http(s) URL, or base64, as chat messages hold them."""
    if not isinstance(source, str):
        return load_image(source)
    if source.startswith(("http://", "https://")):
        import httpx  # of huggingface_hub

        try:
            response = httpx.get(source, timeout=30, follow_redirects=True).raise_for_status()
        except httpx.HTTPError as error:
            raise UserError(f"{source} cannot be downloaded: {error}") from error
        return load_image(response.content)
    if source.startswith("data:"):
        source, is_base64 = source.partition(",")[2], True
    else:
        is_base64 = len(source) > 255 and "." not in source[:255]
    if is_base64:
        try:
            return load_image(base64.b64decode(source, validate=False))
        except binascii.Error as error:
            raise UserError(f"The image is not valid base64: {error}") from error
    return load_image(source.removeprefix("file://"))
