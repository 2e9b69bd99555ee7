"""Kinds of training samples: how a sample becomes a sequence, and which tokens have a loss (arXiv 2502.20321,
section 3.4).

`SAMPLE_KINDS` maps a name to one object; a new kind is one subclass and one entry, and every other list of
kinds is derived from this dict. Configs are checked against it, so this module imports no torch.

A sample is the codes of I images, each (N, K), and the `info` of its KEY.json. The ids that a kind builds
hold one placeholder per image, which `SequenceBuilder` expands.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean

from .captions import caption_list
from .code_shards import CodeFolder, CodeSample
from .records import caption_texts, class_label, conversation_turns, document_pieces, find_label
from .tar_index import BadSample

# label of positions without a loss: the `ignore_index` of torch's cross_entropy
IGNORE_INDEX = -100

# types of data sets; `MixtureEntry.dataset` chooses among those that a kind reads, by the path
CODE_FOLDER, CONVERSATION_FILE, TEXT_FILE = "code folder", "conversation file", "text file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropOptions:
    """Shares of samples that drop something; the defaults are published UniTok's.

    unconditional: text_to_image samples without their caption, for classifier-free guidance. short_captions:
    samples that take the short caption where there is also a long one. text_to_image_share: samples of a
    text_to_image entry that generate their image; the rest becomes captioning.
    """

    unconditional: float = 0.1
    short_captions: float = 0.2
    text_to_image_share: float = 1.0


class Selection(NamedTuple):
    """The part of a sample that a sequence is built from."""

    text: str | None  # text, or JSON of turns or of a document; None = unconditional
    images: tuple[int, ...]  # numbers of the sample's images, in the order of their placeholders


class SampleKind:
    """One kind of training sample. Subclasses set attributes and define `texts`, `select` and `sequence`."""

    reads: tuple[str, ...] = (CODE_FOLDER,)  # data sets it can be read from
    field: str = ""  # key of KEY.json that it is made of
    crop: str | None = None  # --mode of extract-codes that suits it; None = any
    reads_images: bool = True
    generates_images: bool = False  # images are learned, so their number of tokens must be the model's
    learns_text: bool = True
    may_drop_images: bool = False  # a sequence that is too long ends before an image
    conditioner: str = "prompt"  # of the training config: what images are generated from
    samples_crops: bool = False  # may read folders whose samples are several crops of one image
    shuffle_name: str | None = None  # seeds the shuffle in place of the kind's name

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        """The texts of a sample that this kind can use, for `unitok data check`; [] if there are none.

        Raises:
            BadSample: `info` is malformed.
        """
        raise NotImplementedError

    def alternative(self, options: DropOptions, random: Sequence[float]) -> str | None:
        """Name of another kind that this sample becomes, or None; `random` as in `select`."""
        return None

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        """Choose text and images of a sample.

        Args:
            random: three uniform numbers in [0, 1), a function of seed, step and position in the batch.

        Raises:
            BadSample: this kind cannot use the sample.
        """
        raise NotImplementedError

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        """Ids and labels with one placeholder per image; labels are IGNORE_INDEX where nothing is learned.

        Args:
            processor: a UniTokProcessor.

        Raises:
            BadSample, UserError: no sequence can be made of this text.
        """
        raise NotImplementedError

    def crop_for(self, style: Any) -> str | None:
        """`crop` for a processor's `ReadingStyle`."""
        return self.crop

    def generated_share(self, options: DropOptions) -> float:
        """Share of the samples that learn their images; the images of the others are read."""
        return float(self.generates_images)


def bos_ids(processor: Any) -> list[int]:
    """[bos], or [] for a text tokenizer without one."""
    return [] if processor.bos_token_id is None else [processor.bos_token_id]


class CaptioningKind(SampleKind):
    """Image to text, as in the published pretraining: the caption and eos are learned. Of several crops one
    is sampled."""

    field = "captions"
    samples_crops = True

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        return caption_texts(info)

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        caption = choose_caption(sample, options, random[0])
        if not caption:
            raise BadSample("has no caption")
        return Selection(caption, (int(random[1] * sample.crops),))

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        # encode_text prepends bos, which is already the first id
        bos = bos_ids(processor)
        caption = processor.encode_text(text or "")[len(bos) :]
        given = [*bos, processor.boi_token_id, processor.image_token_id, processor.eoi_token_id]
        learned = [*caption, processor.eos_token_id]
        return given + learned, [IGNORE_INDEX] * len(given) + learned


class TextToImageKind(CaptioningKind):
    """Text to image: the prompt is given; boi, the image, eoi and eos are learned."""

    crop = "crop"
    generates_images = True
    learns_text = False
    samples_crops = False  # a prompt generates the whole image
    shuffle_name = "drawing"  # the kind's first name: a seed keeps giving the same run

    def alternative(self, options: DropOptions, random: Sequence[float]) -> str | None:
        return None if random[2] < options.text_to_image_share else "captioning"

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        caption = choose_caption(sample, options, random[0])
        # classifier-free guidance needs a model that is also trained without a prompt
        unconditional = random[1] >= 1 - options.unconditional
        return Selection(None if unconditional else caption, (0,))

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        ids = processor.unconditional_ids() if text is None else processor.text_to_image_ids(text)
        # boi ends the prompt at inference, but is learned in training
        *prompt, boi = ids
        learned = [boi, processor.image_token_id, processor.eoi_token_id, processor.eos_token_id]
        return prompt + learned, [IGNORE_INDEX] * len(prompt) + learned

    def generated_share(self, options: DropOptions) -> float:
        return options.text_to_image_share


class ConversationKind(SampleKind):
    """Questions and answers in the processor's template; the answers are learned. Of several crops one
    is sampled."""

    reads = (CODE_FOLDER, CONVERSATION_FILE)
    field = "conversations"
    samples_crops = True
    crop = "pad"

    def crop_for(self, style: Any) -> str | None:
        return style.image_mode

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        given = info.get("conversations") or []
        if not isinstance(given, list):
            raise BadSample("has conversations that are not a list")
        turns = [turn for c in given for turn in conversation_turns({"conversations": c}, num_images)]
        return [turn["value"] for turn in turns if turn["from"] == "gpt"]

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        given = sample.info.get("conversations")
        if not isinstance(given, list) or not given:
            raise BadSample("has no conversation")
        chosen = {"conversations": given[int(random[0] * len(given))]}
        numbers = tuple(range(len(sample.images)))
        if sample.crops > 1:
            numbers = (int(random[1] * sample.crops),)
        return Selection(json.dumps(conversation_turns(chosen, len(numbers))), numbers)

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        return processor.conversation_ids(json.loads(text or "[]"))


class AlignmentKind(ConversationKind):
    """The first answer of a conversation right after the image, without eos: how LLaVA pretrains its
    projector."""

    def crop_for(self, style: Any) -> str | None:
        return style.alignment_mode

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        return processor.alignment_ids(json.loads(text or "[]"))


class TextKind(SampleKind):
    """Plain text, learned from its second token on, without eos."""

    reads = (TEXT_FILE,)
    field = "text"
    reads_images = False

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        return [info["text"]] if isinstance(info.get("text"), str) else []

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        return Selection(sample.info["text"], ())

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        ids = list(processor.encode_text(text or ""))
        return ids, ids


class DocumentKind(SampleKind):
    """Interleaved texts and images, as many as fit into max_length; texts, images and eos are learned."""

    field = "document"
    generates_images = True
    may_drop_images = True

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        if info.get("document") is None:
            return []
        pieces = document_pieces(info, num_images)
        return [" ".join(piece for piece in pieces if isinstance(piece, str))]

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        pieces = document_pieces(sample.info, len(sample.images))
        if not pieces:
            raise BadSample("has no document")
        return Selection(json.dumps(pieces), tuple(piece for piece in pieces if isinstance(piece, int)))

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        bos = bos_ids(processor)
        image = [processor.boi_token_id, processor.image_token_id, processor.eoi_token_id]
        ids, labels = list(bos), [IGNORE_INDEX] * len(bos)
        for piece in json.loads(text or "[]"):
            is_text = isinstance(piece, str)
            added = processor.encode_text(piece)[len(bos) :] if is_text else image
            ids += added
            labels += added if is_text or self.generates_images else [IGNORE_INDEX] * len(added)
        return [*ids, processor.eos_token_id], [*labels, processor.eos_token_id]


class ReadingKind(DocumentKind):
    """A document with a loss on texts and eos only."""

    generates_images = False


class ClassConditionalKind(SampleKind):
    """The image of a class: [class, image] for a class-conditional model; of several crops one is sampled."""

    field = "label"
    crop = "crop"
    generates_images = True
    learns_text = False
    conditioner = "class"
    samples_crops = True

    def texts(self, info: dict[str, Any], num_images: int) -> list[str]:
        label = find_label(info)
        return [] if label is None else [str(label)]

    def select(self, sample: CodeSample, options: DropOptions, random: Sequence[float]) -> Selection:
        label = class_label(sample.info)
        if len(sample.images) != sample.crops:
            raise BadSample(f"has {len(sample.images)} images, expected 1")
        # null class: guidance needs a model that is also trained without a class
        unconditional = random[1] >= 1 - options.unconditional
        return Selection(None if unconditional else str(label), (int(random[0] * sample.crops),))

    def sequence(self, processor: Any, text: str | None) -> tuple[list[int], list[int]]:
        # `processor` is a ClassPrompts: the class takes the place of the prompt
        condition = processor.null_class if text is None else int(text)
        return [condition, processor.image_token_id], [IGNORE_INDEX, processor.image_token_id]


# the order decides the numbers in `Batch.kinds`, and which kind `unitok data check` warns about
SAMPLE_KINDS: dict[str, SampleKind] = {
    "text_to_image": TextToImageKind(),
    "captioning": CaptioningKind(),
    "conversation": ConversationKind(),
    "alignment": AlignmentKind(),
    "text": TextKind(),
    "document": DocumentKind(),
    "reading": ReadingKind(),
    "class_conditional": ClassConditionalKind(),
}


def find_sample_kind(name: str) -> SampleKind:
    """The kind of this name.

    Raises:
        UserError: there is no such kind.
    """
    if name not in SAMPLE_KINDS:
        raise UserError(
            f"data.mixture: kind {name!r} is not in SAMPLE_KINDS (training/data/sample_kinds.py)."
            f"{did_you_mean(name, SAMPLE_KINDS)}"
        )
    return SAMPLE_KINDS[name]


def choose_caption(sample: CodeSample, options: DropOptions, random: float) -> str | None:
    """A caption of a sample with one image: the long one, for a share the short one, else any; None if it
    has none.

    Raises:
        BadSample: another number of images, or captions that are not texts.
    """
    if len(sample.images) != sample.crops:
        raise BadSample(f"has {len(sample.images)} images, expected 1")
    long, short, captions = (sample.info.get(n) for n in ("long_caption", "short_caption", "captions"))
    # one number for both choices: `captions` is sampled only without a long and a short caption
    caption = (short or long) if random >= 1 - options.short_captions or not long else long
    if caption is None and captions:
        captions = caption_list(captions)
        caption = captions[int(random * len(captions))]
    return None if caption is None else caption_list([caption])[0]


def crop_mismatch(codes: CodeFolder, kind: str, style: Any = None) -> str | None:
    """A warning if the images of `codes` were cropped or padded in another way than `kind` expects.

    Args:
        style: the processor's `ReadingStyle`, if it is known.
    """
    mode, reshaped = codes.manifest.get("mode"), codes.manifest.get("oblong", 0)
    sample_kind = SAMPLE_KINDS[kind]
    wanted = sample_kind.crop if style is None else sample_kind.crop_for(style)
    if not reshaped or mode is None or wanted in (None, mode):  # older folders do not store the mode
        return None
    if style is None and wanted == "pad" and mode.startswith("pad"):  # the style says with which colour
        return None
    shape = codes.manifest.get("layout", {"rows": 1, "columns": 1})
    expected = "square" if shape["rows"] == shape["columns"] else "of the tokenizer's aspect ratio"
    return (
        f"{codes.folder}: {reshaped} of {codes.manifest['images']} images were not {expected} and were "
        f"extracted with --mode {mode}; kind {kind} expects codes of `unitok extract-codes --mode {wanted}`."
    )
