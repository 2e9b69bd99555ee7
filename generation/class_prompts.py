"""Class-conditional models in a pipeline: their parts, and classes in the place of prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.errors import UserError
from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.tokenizer import UniTok


class ClassProcessor:
    """Takes the place of a `UniTokProcessor`; every use of a text is rejected.

    Raises:
        UserError: any method of a `UniTokProcessor` is used.
    """

    def __init__(self, config: ClassConditionalConfig):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "config":
            raise AttributeError(name)
        raise UserError(
            "This is a class-conditional model, which reads neither text nor images: generate(classes=[...]) "
            "generates images of its classes."
        )

    def class_rows(self, classes: Any, num_images: int) -> tuple[list[list[int]], list[list[int]] | None]:
        """The rows of ids of conditional and unconditional (None without a null class) images.

        Raises:
            UserError: not a list of classes of the model.
        """
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise UserError(f"classes is {classes!r}; it must be a list of whole numbers.")
        rows = [[self.config.check_class(value)] for value in classes for _ in range(num_images)]
        null = self.config.null_class
        return rows, None if null is None else [[null]] * len(rows)


def load_class_parts(
    folder: Path, dtype: torch.dtype, adapter: Any, quantization: Any
) -> tuple[ClassConditionalModel, ClassProcessor, UniTok]:
    """Model, processor and float32 tokenizer of a class-conditional folder.

    Raises:
        UserError: an adapter or quantization is requested; the parts do not match.
    """
    for name, value in (("adapter", adapter), ("quantization", quantization)):
        if value is not None:
            raise UserError(f"{name} is {str(value)!r}, but {folder} is a class-conditional model: omit it.")
    unitok = UniTok.from_pretrained(folder / "unitok", dtype=torch.float32)
    model = ClassConditionalModel.from_pretrained(folder, dtype=dtype)
    model.config.check_tokenizer(unitok, folder)
    return model, ClassProcessor(model.config), unitok
