"""Folders of the published MLLM to model folders with processor and visual tokenizer, and back."""

import shutil
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder
from open_unitok.tokenizer import UniTok

from .config import check_mllm_quantizer
from .convert import check_same_codebooks, read_published, save_published
from .model import UniTokForConditionalGeneration
from .processor import UniTokProcessor

_IMAGE_SIZE = 256  # of the published model


def from_published_folder(
    source: Path, target: Path, unitok: UniTok | None = None, text_tokenizer: str | Path | None = None
) -> None:
    """Write the published MLLM in `source` as a model folder.

    Args:
        unitok: its visual tokenizer; None = write a folder without one, which cannot read or generate images.
        text_tokenizer: tokenizer.model or its folder; None = that of `source`.

    Raises:
        UserError: `source` is not in the published layout, or a tokenizer is not the one of training.
    """
    model = UniTokForConditionalGeneration.from_state(*read_published(source), source=source)
    image_size = _IMAGE_SIZE
    if unitok is not None:
        check_mllm_quantizer(unitok.config.quantizer, unitok.quantizer)
        if unitok.quantizer.row_norm != model.config.row_norm:  # the check of rows ignores their norms
            raise UserError(
                f"row_norm = {model.config.row_norm!r} in the published MLLM, but "
                f"{unitok.quantizer.row_norm!r} in the visual tokenizer: give the tokenizer that the MLLM "
                "was trained with."
            )
        check_same_codebooks(model.visual_embedder.codebooks, unitok.quantizer.codebooks)  # pyright: ignore
        # loading compares this fingerprint with that of the tokenizer in the folder
        model.config.unitok_fingerprint = unitok.fingerprint()
        model.config.num_image_tokens = unitok.config.num_visual_tokens
        model.config.token_layout = unitok.config.token_layout
        image_size = unitok.config.image_size
    processor = UniTokProcessor.from_text_tokenizer(
        text_tokenizer or source,
        image_size=image_size,
        num_image_tokens=model.config.num_image_tokens,
        token_layout=model.config.token_layout,
        legacy=True,
    )
    # boi and eoi are byte tokens of LLaMA's vocabulary: another text tokenizer may have them at other ids.
    found = processor.boi_token_id, processor.eoi_token_id
    expected = model.config.boi_token_id, model.config.eoi_token_id
    if found != expected:
        raise UserError(
            f"The text tokenizer has <0x00> and <0x01> at {found[0]} and {found[1]}; the model expects "
            f"{expected[0]} and {expected[1]}: use the text tokenizer it was trained with."
        )
    model.config.vocabulary_fingerprint = processor.vocabulary_fingerprint()
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if unitok is not None:
            unitok.save_pretrained(folder / "unitok")
        for name in ("LICENSE", "NOTICE"):
            if (source / name).exists():
                shutil.copy(source / name, folder / name)


def to_published_folder(source: Path, target: Path) -> None:
    """Write the model folder `source` in the published layout, without the visual tokenizer."""
    model = UniTokForConditionalGeneration.from_pretrained(source)
    text_tokenizer = UniTokProcessor.from_pretrained(source).text_tokenizer
    with atomic_folder(target) as folder:
        save_published(model.config, model.state_dict(), text_tokenizer, folder)
