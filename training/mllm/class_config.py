"""The config of the MLLM stage with `conditioner: class`: a class-conditional model; imports no torch."""

import dataclasses
from typing import Any, ClassVar, Literal

from open_unitok.core.errors import UserError

from ..core.options import RunConfig
from ..data.mixture_options import MixtureOptions
from .config import LossOptions, check_conditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassModelOptions:
    """A new class-conditional model on the codes of a visual tokenizer.

    unitok: folder of the visual tokenizer. num_classes: classes are the integers below it. size: B, L, XL,
    XXL, XXXL or 3B; null = the sizes in `fields`. fields: further fields of ClassConditionalConfig; its
    class_dropout is data.unconditional.
    """

    unitok: str
    num_classes: int
    size: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassRunConfig(RunConfig):
    """The MLLM stage on classes, with either `model` (a new one) or `init_from` (a class-conditional folder).

    data.unconditional is the share of the samples that see no class; with 0 the model has no null class, so
    that it generates without guidance only.
    """

    # what the loop reads of the config, beside the fields: plain cross entropy of the codes, no adapters
    loss: ClassVar[LossOptions] = LossOptions(text=None)
    lora: ClassVar[None] = None

    conditioner: Literal["class"]
    data: MixtureOptions
    model: ClassModelOptions | None = None

    def check(self) -> None:
        super().check()
        if (self.model is None) == (self.init_from is None):
            raise UserError(
                "Give either `model` (a new class-conditional model) or `init_from` (the folder of one), not "
                f"{'both' if self.model else 'neither'}."
            )
        check_conditioner(self.data, self.conditioner)
        self.data.check_replay(self.init_from)
        if self.data.pack_to:
            raise UserError(
                f"data.pack_to is {self.data.pack_to}, but all samples of conditioner: class have the same "
                "length: omit it, and data.batch_by."
            )

    def prefix_factors(self) -> list[tuple[str, float]]:
        """No part has a learning rate of its own."""
        return []
