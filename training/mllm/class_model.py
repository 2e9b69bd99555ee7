"""The model and the data of an MLLM run with `conditioner: class`."""

from pathlib import Path
from typing import Any

import torch

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import SAMPLING_FILE, existing
from open_unitok.mllm.class_conditional import (
    CLASS_CONDITIONAL_SIZES,
    ClassConditionalConfig,
    ClassConditionalModel,
)
from open_unitok.mllm.config import IMAGE_TOKEN_ID
from open_unitok.mllm.loading import check_class_folder
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.loading import check_tokenizer_folder

from ..core import deepspeed_engine
from ..core.replicas import build_on_main
from ..data import seeding
from ..data.code_shards import CodeFolder
from ..data.records import find_label
from ..data.sequences import SequenceBuilder
from ..data.tar_index import BadSample
from .class_config import ClassModelOptions, ClassRunConfig
from .model import MLLMParts, load_tokenizer


class ClassPrompts:
    """What a `SequenceBuilder` reads of a processor: a sequence is [class, image]."""

    text_tokenizer = feature_token_id = sep_token_id = None
    pad_token_id = 0
    image_token_id = IMAGE_TOKEN_ID
    visual_input = "discrete"

    def __init__(self, null_class: int | None) -> None:
        self.null_class = null_class

    def image_ids(self, num_codes: int, read: bool = False) -> list[int]:
        """The placeholders of an image."""
        return [self.image_token_id] * num_codes


def build_class_parts(config: ClassRunConfig) -> MLLMParts:
    """The model that is trained: new or loaded.

    Raises:
        UserError: a folder of another type, an unknown field, sizes that do not fit.
    """
    parts = _new_parts(config) if config.model else _load_parts(str(config.init_from))
    if config.data.unconditional and parts.model.config.null_class is None:
        raise UserError(
            f"data.unconditional is {config.data.unconditional}, but the model of {config.init_from} has no "
            "null class: set it to 0."
        )
    if config.engine.gradient_checkpointing:
        deepspeed_engine.enable_activation_checkpointing(parts.model)
    return parts


def class_config(options: ClassModelOptions, unitok: Any, unconditional: float) -> ClassConditionalConfig:
    """The config of a new model on the codes of a tokenizer with the config `unitok`.

    Raises:
        UserError: an unknown size or field, or codes that do not form one grid.
    """
    known = set(ClassConditionalConfig().to_dict()) - {"class_dropout", "num_classes"}
    for key in options.fields:
        if key not in known:
            raise UserError(f"Unknown config key 'model.fields.{key}'.{did_you_mean(key, known)}")
    if options.size is not None and options.size not in CLASS_CONDITIONAL_SIZES:
        raise UserError(
            f"model.size is {options.size!r}.{did_you_mean(options.size, CLASS_CONDITIONAL_SIZES)}"
        )
    fields: dict[str, Any] = {**CLASS_CONDITIONAL_SIZES.get(options.size or "", {}), **options.fields}
    if fields.get("drop_path"):  # published: it takes the place of the dropouts
        fields.setdefault("dropout", 0.0)
    return ClassConditionalConfig.for_tokenizer(
        unitok, num_classes=options.num_classes, class_dropout=unconditional, **fields
    )


def class_sequences(sizes: ClassConditionalConfig) -> SequenceBuilder:
    """Builds [class, image] for the samples of kind class_conditional."""
    return SequenceBuilder(ClassPrompts(sizes.null_class), 1 + sizes.num_image_tokens)


def class_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ClassConditionalModel.forward` in a collated batch."""
    return {"classes": inputs["input_ids"][:, 0], "image_codes": inputs["image_codes"]}


def check_labels(codes: CodeFolder, num_classes: int) -> None:
    """Check that the samples of a code folder have labels of the model's classes.

    Raises:
        UserError: they have none, or one that is out of range.
    """
    labels = codes.manifest.get("labels")
    samples, highest = sum(codes.sizes), -1
    if labels is None:  # a folder from before labels were counted: look at one sample of every tar
        for shard in (number for number, size in enumerate(codes.sizes) if size):
            try:
                label = find_label(codes.read(shard, 0).info)
            except BadSample:
                continue
            if label is None:
                raise UserError(_no_labels(codes, "the first of a tar has none"))
            highest = max(highest, label)
    else:
        highest = labels["highest"]
        if labels["samples"] < samples:
            raise UserError(_no_labels(codes, f"{samples - labels['samples']} of {samples} have none"))
    if highest >= num_classes:
        raise UserError(
            f"{codes.folder} has labels up to {highest}, but the model has {num_classes} classes (0 to "
            f"{num_classes - 1}): set model.num_classes to the data's number of classes."
        )


def _no_labels(codes: CodeFolder, what: str) -> str:
    return (
        f"{codes.folder}: samples need an integer `label` in their .json (or a .cls file) before "
        f"`unitok extract-codes`, but {what}."
    )


def _new_parts(config: ClassRunConfig) -> MLLMParts:
    options = config.model
    assert options is not None
    folder = existing(options.unitok, "model.unitok must be the folder of a trained visual tokenizer.")
    check_tokenizer_folder(folder)

    def build() -> ClassConditionalModel:
        unitok = UniTok.from_pretrained(folder, dtype=torch.float32)
        sizes = class_config(options, unitok.config, config.data.unconditional)
        sizes.unitok_fingerprint = unitok.fingerprint()
        torch.manual_seed(seeding.derive_seed(config.seed, "model"))
        return ClassConditionalModel(sizes)

    return MLLMParts(build_on_main(build, ClassConditionalModel), None, folder)


def _load_parts(name: str) -> MLLMParts:
    folder = existing(name, "init_from must be the folder of a class-conditional model.")
    check_class_folder(folder)
    model = build_on_main(
        lambda: ClassConditionalModel.from_pretrained(folder, dtype=torch.float32), ClassConditionalModel
    )
    unitok = existing(folder / "unitok", "The visual tokenizer of a model must be in that folder.")
    load_tokenizer(unitok)  # a broken one would only be found after training, in the copy
    sampling = Path(folder) / SAMPLING_FILE
    return MLLMParts(model, None, unitok, sampling if sampling.exists() else None)
