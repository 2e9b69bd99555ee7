"""The processor: text and images to the inputs of the MLLM, ids to text (arXiv 2502.20321; formats as in the
published code).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.tokenizer.folder_checks import loading, read_config
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.tokenizer.standalone import make_standalone
from open_unitok.tokenizer.token_layout import TokenLayout

from .config import FEATURE_TOKEN_ID, IGNORED, IMAGE_TOKEN_ID
from .features import FeatureOptions
from .processor_calls import CHAT, ProcessorCalls
from .prompts import (
    IMAGE_MARK,
    UNCONDITIONAL,
    Turns,
    check_turns,
    conversation_ids,
    conversation_pieces,
    expand_images,
    find_reading_style,
    find_template,
    ids_with_images,
    located_conversation_ids,
    put_images_first,
)
from .text_tokenizer import find_or_add, load_text_tokenizer, vocabulary_fingerprint

if TYPE_CHECKING:
    from PIL import Image

CONFIG = "processor_config.json"
# A byte token of LLaMA's vocabulary; tokenizers without it get a new token.
BOI, EOI = ("<0x00>", "<|boi|>"), ("<0x01>", "<|eoi|>")
SEPARATOR = ("<0x02>", "<|sep|>")  # between codes and features


class UniTokProcessor(ProcessorCalls):
    """A text tokenizer, a conversation template and image preprocessing; saved in the model's folder.

    Args:
        text_tokenizer: a tokenizer of transformers. If it lacks LLaMA's byte tokens, two new tokens are added
            for boi and eoi; the model's embeddings are then resized to `vocab_size`.
        image_size: side in pixels of the square images that the visual tokenizer reads; with a
            `token_layout`, the longer side.
        num_image_tokens: N of such an image.
        template: a name in `TEMPLATES`, or "chat" for the tokenizer's own chat template.
        legacy: LLaMA's tokenizer option for text after an eos (see `conversation_ids`); True as published.
        image_token_id: the placeholder of visual tokens.
        max_prompt: maximum text ids of a text-to-image prompt, bos included; longer ones are truncated
            (published: 1750).
        token_layout: see `TokenLayout`, of such an image's tokens; None = square.
        reading: a name in `READING_STYLES`: how images and the text around them are prepared.
        visual_input, features, num_continuous_tokens, feature_token_id: as in `UniTokMLLMConfig`.

    Attributes:
        style: the `ReadingStyle`.
        sep_token_id: None without a separator.
        boi_token_id, eoi_token_id, pad_token_id, bos_token_id (None in some families), eos_token_id.
    """

    def __init__(
        self,
        text_tokenizer: Any,
        image_size: int = 256,
        num_image_tokens: int = 256,
        template: str = "vicuna_v1",
        legacy: bool = True,
        image_token_id: int = IMAGE_TOKEN_ID,
        max_prompt: int = 1750,
        token_layout: dict[str, int] | None = None,
        visual_input: str = "discrete",
        features: dict[str, Any] | None = None,
        num_continuous_tokens: int | None = None,
        feature_token_id: int = FEATURE_TOKEN_ID,
        reading: str = "unitok",
    ) -> None:
        if template != CHAT:
            find_template(template)
        elif not getattr(text_tokenizer, "chat_template", None):
            raise UserError(
                "template = 'chat', but this text tokenizer has no chat template: use 'vicuna_v1'."
            )
        self.text_tokenizer, self.template, self.legacy = text_tokenizer, template, legacy
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.image_token_id, self.max_prompt = image_token_id, max_prompt
        self.token_layout, self.reading = token_layout, reading
        self.style = find_reading_style(reading)
        self.boi_token_id, self.eoi_token_id = (find_or_add(text_tokenizer, names) for names in (BOI, EOI))
        self.visual_input, self.num_continuous_tokens = visual_input, num_continuous_tokens
        self.feature_token_id, self.sep_token_id, self.features = feature_token_id, None, None
        if visual_input != "discrete":
            self.features = FeatureOptions.from_config(features, visual_input).to_dict()
            if self.features["separator"]:
                self.sep_token_id = find_or_add(text_tokenizer, SEPARATOR)
        self.bos_token_id: int | None = text_tokenizer.bos_token_id
        if text_tokenizer.eos_token_id is None:
            raise UserError("The text tokenizer has no eos token, which ends an answer.")
        self.eos_token_id: int = text_tokenizer.eos_token_id
        # any id works: the mask hides padding
        candidates = (text_tokenizer.pad_token_id, text_tokenizer.unk_token_id, self.eos_token_id)
        self.pad_token_id: int = next(i for i in candidates if i is not None)

    @classmethod
    def from_text_tokenizer(cls, path: str | os.PathLike[str], **options: Any) -> UniTokProcessor:
        """A new processor with the text tokenizer of a sentencepiece `tokenizer.model`, a folder or a hub id.

        Raises:
            UserError: the path holds no text tokenizer.
        """
        return cls(load_text_tokenizer(path, legacy=options.get("legacy", True)), **options)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **changes: Any) -> UniTokProcessor:
        """Load from an MLLM folder or hub id; `changes` replace saved options, such as the template.

        Raises:
            UserError: the folder holds no processor.
        """
        path = Path(folder)
        if not path.is_dir():
            from huggingface_hub import snapshot_download

            # everything but the weights of the decoder: tokenizer, configs, visual tokenizer
            with loading(path):
                path = Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.model", "unitok/*"]))
        if not (path / CONFIG).exists():
            raise UserError(f"{folder} has no {CONFIG}: it is not an MLLM folder.")
        changes = {name: value for name, value in changes.items() if name in _OPTIONS}
        options = {name: value for name, value in read_config(path, CONFIG).items() if name in _OPTIONS}
        options |= changes
        _check_options(path / CONFIG, options)
        text_tokenizer = load_text_tokenizer(path, legacy=options.get("legacy", True))
        with loading(path / CONFIG):
            processor = cls(text_tokenizer, **options)
        if (path / "unitok" / "config.json").exists():
            processor._unitok_source = path / "unitok"
        return processor

    def save_pretrained(  # type: ignore[override]
        self, folder: str | os.PathLike[str], standalone: bool = False, **_: Any
    ) -> None:
        """Write the text tokenizer and `processor_config.json` into `folder`, and a missing `unitok/`.

        That is the visual tokenizer of the folder that the processor was loaded from. With `standalone`,
        transformers loads the folder without an import of open_unitok (see `make_standalone`).
        """
        self.text_tokenizer.save_pretrained(folder)
        if self._unitok_source is not None and not (Path(folder) / "unitok").exists():
            shutil.copytree(self._unitok_source, Path(folder) / "unitok")
        options = {name: getattr(self, name) for name in _OPTIONS}
        if self.token_layout is None:  # not stored for square images, as in files of earlier versions
            del options["token_layout"]
        if self.reading == "unitok":
            del options["reading"]
        if self.visual_input == "discrete":
            options = {name: value for name, value in options.items() if name not in _FEATURE_OPTIONS}
        write_json(Path(folder) / CONFIG, {"processor_class": type(self).__name__, **options})
        if standalone:
            make_standalone(folder)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing, as `InstalledCode`."""

    @property
    def vocab_size(self) -> int:
        """Minimum number of rows of the model's text embeddings."""
        return len(self.text_tokenizer)

    def token_ids(self) -> dict[str, int | None]:
        """The special ids by the names of `UniTokMLLMConfig`'s fields."""
        names = _TOKEN_IDS if self.visual_input == "discrete" else (*_TOKEN_IDS, *_FEATURE_IDS)
        return {name: getattr(self, name) for name in names}

    def end_token_ids(self) -> set[int]:
        """The ids that end an answer: eos, and those that are no text.

        As LLaMA's byte tokens, boi and eoi would put U+0000 and U+0001 into the answer.
        """
        ends = {self.eos_token_id, self.boi_token_id, self.eoi_token_id, self.pad_token_id}
        return ends if self.sep_token_id is None else {*ends, self.sep_token_id}

    def image_ids(self, num_codes: int, read: bool = True) -> list[int]:
        """Placeholders of an image: of its codes, and, where it is read, of its features.

        An image that is generated has no features: which form it takes is the only switch between reading and
        generating.
        """
        codes = [self.image_token_id] * num_codes
        if self.visual_input == "discrete" or not read:
            return codes
        separator = [] if self.sep_token_id is None else [self.sep_token_id]
        features = [self.feature_token_id] * (self.num_continuous_tokens or 0)
        return ([] if self.visual_input == "continuous" else codes) + separator + features

    # ---- text -> ids; an image is one placeholder, except in `question_ids`, which has all of it ----

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, bos first if the tokenizer has one."""
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return start + self._pieces(text)

    def question_ids(
        self,
        question: str,
        num_images: int = 1,
        tokens: int | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[int]:
        """Ids of a question with its images, up to the start of the answer; `image_ids` per image.

        Args:
            question: may contain `<image>` marks, one per image; else the images come first.
            tokens: N if it differs from `num_image_tokens`.
            history: earlier questions and their answers. `num_images` then counts the images of the whole
                conversation, at the marks in its questions, or all before the first question.

        Raises:
            UserError: the number of marks is neither 0 nor `num_images`.
        """
        questions = [*(q for q, _ in history), question]
        if not any(IMAGE_MARK in q for q in questions):
            questions[0] = f"{IMAGE_MARK}\n" * num_images + questions[0]
        elif self.style.images_first:
            questions = list(map(put_images_first, questions))
        # a mark in an answer is text that the model generated, not an image
        earlier = [(q, a.replace(IMAGE_MARK, "")) for q, (_, a) in zip(questions, history)]
        # a chat template writes bos itself
        ids = self._mark(self._prompt(earlier, questions[-1]), bos=self.template != CHAT)
        image = self.image_ids(tokens or self.num_image_tokens)
        return expand_images(ids, self.image_token_id, [image] * num_images)

    def text_to_image_ids(self, prompt: str) -> list[int]:
        """Ids of a text-to-image prompt with its instruction, truncated to `max_prompt`, then boi."""
        # chat templates have no text-to-image instruction
        template = find_template("vicuna_v1" if self.template == CHAT else self.template)
        return [*self.encode_text(prompt + template.text_to_image)[: self.max_prompt], self.boi_token_id]

    def unconditional_ids(self) -> list[int]:
        """Ids of the unconditional prompt of classifier-free guidance, then boi."""
        return [*self.encode_text(UNCONDITIONAL), self.boi_token_id]

    def conversation_ids(self, turns: Turns) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation [{"from": "human" | "gpt", "value": text}, ...]; targets are the
        answers and their eos.

        Raises:
            UserError: the turns do not alternate.
        """
        if self.style.images_first:
            turns = [
                {**turn, "value": put_images_first(turn["value"])} if turn.get("from") == "human" else turn
                for turn in turns
            ]
        # the published way, which counts ids, needs a tokenizer with bos
        if self.template != CHAT and self.bos_token_id is not None:
            return self._bos_conversation_ids(turns)
        ids: list[int] = []
        labels: list[int] = []
        for text, is_target in conversation_pieces(turns, self._prompt, self._answer):
            # a mark in an answer is text
            piece = self._pieces(text) if is_target else self._mark(text, not ids and self.template != CHAT)
            ids += piece
            labels += piece if is_target else [IGNORED] * len(piece)
        return ids, labels

    def _bos_conversation_ids(self, turns: Turns) -> tuple[list[int], list[int]]:
        """`conversation_ids` for a tokenizer with bos."""
        template, end = find_template(self.template), self.text_tokenizer.eos_token
        rounds = check_turns(turns)
        # the published way finds the answers by these words, so that no turn may hold them
        words = (f"{template.assistant}:", end)
        by_words = not any(word in text for pair in rounds for text in pair for word in words)
        if by_words and not any(IMAGE_MARK in answer for _, answer in rounds):
            return conversation_ids(turns, self.encode_text, template, self.image_token_id, end, self.legacy)

        def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
            backend = getattr(self.text_tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise UserError(
                    "An answer cannot be located in its conversation, which holds template words."
                )
            found = backend.encode(text, add_special_tokens=False)
            return self._check_text(found.ids), found.offsets

        ids, labels = located_conversation_ids(turns, encode, template, self.image_token_id, end)
        return [self.bos_token_id, *ids], [IGNORED, *labels]  # pyright: ignore

    def alignment_ids(self, turns: Turns) -> tuple[list[int], list[int]]:
        """Ids and labels of the image followed by the first answer, for projector pretraining; it ends with
        the style's text instead of eos: a space (published), in LLaVA's recipe a line end.

        Raises:
            UserError: the turns do not alternate.
        """
        answer = check_turns(turns)[0][1].replace(IMAGE_MARK, "")
        given = ([] if self.bos_token_id is None else [self.bos_token_id]) + [self.image_token_id]
        target = self._pieces(answer + self.style.alignment_end)
        return given + target, [IGNORED] * len(given) + target

    def vocabulary_fingerprint(self) -> str:
        """Hex sha256 of the vocabulary, which the config of an MLLM keeps."""
        return vocabulary_fingerprint(self.text_tokenizer)

    # ---- batches and images ----

    def pad(self, rows: Sequence[Sequence[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ids -> padded ids and mask (B, L), int64; "left" padding is for generation."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            real = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
            ids[i, real] = torch.as_tensor(list(row), dtype=ids.dtype)
            mask[i, real] = 1
        return ids, mask

    def pixels(self, image: Image.Image | str | bytes | os.PathLike[str]) -> torch.Tensor:
        """An input image -> (3, H, W) in [-1, 1], padded to the aspect ratio with the style's colour."""
        loaded = load_image(image, needed=self.image_shape)
        return to_pixels(loaded, self.image_shape, mode=self.style.image_mode)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the visual tokenizer reads."""
        # without a layout any square gives the same result: use 1 x 1
        layout = TokenLayout.from_config(self.token_layout or {"rows": 1, "columns": 1}, None)
        patch_size = self.image_size // max(layout.grid)
        return layout.rows * patch_size, layout.columns * patch_size

    def _pieces(self, text: str) -> list[int]:
        return self._check_text(self.text_tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_text(self, ids: list[int]) -> list[int]:
        """`ids` of a text; raises UserError if they hold boi or eoi."""
        # as LLaMA's byte tokens, boi and eoi are the characters U+0000 and U+0001
        for token in (self.boi_token_id, self.eoi_token_id, self.sep_token_id):
            if token is not None and token in ids:
                name = self.text_tokenizer.convert_ids_to_tokens(token)
                raise UserError(f"A text holds {name}, which marks images in this model: remove it.")
        return ids

    def _mark(self, text: str, bos: bool = False) -> list[int]:
        """Ids of text with image marks, with or without bos."""
        # `ids_with_images` expects a bos from the tokenizer: 0 is a dummy, removed by [1:]
        ids = ids_with_images(lambda piece: [0, *self._pieces(piece)], text, self.image_token_id)[1:]
        return ids if not bos or self.bos_token_id is None else [self.bos_token_id, *ids]

    def _prompt(self, earlier: list[tuple[str, str]], question: str) -> str:
        """The text up to the answer to `question`."""
        if self.template == CHAT:
            return self._chat_prompt(earlier, question)
        template = find_template(self.template)
        rounds = "".join(f"{template.user}: {q} {template.assistant}:{self._answer(a)}" for q, a in earlier)
        return template.opening + rounds + template._replace(system="").prompt(question)

    def _answer(self, answer: str) -> str:
        """The answer with the text before it and its end-of-answer text."""
        if self.template != CHAT:
            return f" {answer}{self.text_tokenizer.eos_token}"
        # find the text after an answer by comparing prompts with and without one round
        before = self._chat_prompt([], "?")
        after = self._chat_prompt([("?", answer)], "?")
        closing = after[len(before) + len(answer) :] if after.startswith(before + answer) else ""
        return answer + (
            self.text_tokenizer.eos_token if closing.startswith(self.text_tokenizer.eos_token) else ""
        )

    def _chat_prompt(self, earlier: list[tuple[str, str]], question: str) -> str:
        messages = [
            {"role": role, "content": text}
            for pair in earlier
            for role, text in zip(("user", "assistant"), pair)
        ]
        messages.append({"role": "user", "content": question})
        return self.text_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


_FEATURE_OPTIONS = ("visual_input", "features", "num_continuous_tokens", "feature_token_id")
_OPTIONS = (
    "image_size", "num_image_tokens", "template", "legacy", "image_token_id", "max_prompt", "token_layout",
    "reading", *_FEATURE_OPTIONS,
)  # fmt: skip
_TOKEN_IDS = (
    "image_token_id", "boi_token_id", "eoi_token_id", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_FEATURE_IDS = ("sep_token_id", "feature_token_id")


def _check_options(path: Path, options: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: a value of processor_config.json has the wrong type or is out of range.
    """
    for name in ("image_size", "num_image_tokens", "max_prompt"):
        value = options.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{path}: {name} = {value!r} must be a whole number >= 1.")
    if not isinstance(options.get("legacy", True), bool):
        raise UserError(f"{path}: legacy = {options['legacy']!r} must be true or false.")
    if not isinstance(options.get("image_token_id", 0), int):
        raise UserError(f"{path}: image_token_id = {options['image_token_id']!r} must be a whole number.")
