"""Config of the mixture of data sets; imports no torch."""

import dataclasses
from typing import Literal

from open_unitok.core.errors import UserError

from .sample_kinds import CODE_FOLDER, CONVERSATION_FILE, TEXT_FILE, DropOptions, find_sample_kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """A data set and the kind of samples that are made of it; `weight` is its share.

    kind: a name in SAMPLE_KINDS. path: a code folder; for text a .txt or .jsonl file or a glob of them; for
    conversation and alignment also LLaVA's .json or .jsonl, whose images are looked up by name in the code
    folder `codes`.
    """

    kind: str
    path: str
    weight: float = 1.0
    codes: str | None = None

    @property
    def dataset(self) -> str:
        """The type of data set at `path`: by the kind, and by the extension if the kind reads several."""
        reads = find_sample_kind(self.kind).reads
        # a .jsonl may hold texts or conversations: the kind decides
        is_file = self.path.endswith((".json", ".jsonl"))
        if CONVERSATION_FILE in reads and is_file:
            return CONVERSATION_FILE
        return TEXT_FILE if TEXT_FILE in reads else CODE_FOLDER

    def check(self) -> None:
        dataset = self.dataset
        if not self.weight > 0:
            raise UserError(
                f"data.mixture: weight of {self.kind} from {self.path} is {self.weight}, must be above 0."
            )
        # the likely mistake: a file that is still to be converted and extracted
        if dataset == CODE_FOLDER and self.path.endswith((".json", ".jsonl")):
            raise UserError(
                f"data.mixture: {self.path} is not a code folder, as kind {self.kind} needs: see `unitok "
                "data convert` and `unitok extract-codes`."
            )
        if self.codes and dataset != CONVERSATION_FILE:
            raise UserError(
                f"data.mixture: codes = {self.codes} is allowed only with conversations in a .json or .jsonl."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOptions(DropOptions):
    """The data of an MLLM run.

    max_length: longest sample in tokens, visual ones included. pack_to: rows of this many tokens hold as many
    samples as fit, without attending to each other; 0 = one sample per row. batch_by: what batch_size counts;
    "rows" = a step has batch_size rows of pack_to tokens, each filled with as many samples as fit (every rank
    then builds all samples of a step, and every worker those of all steps). group_by_length: micro-batches of
    one step hold samples of similar length (every rank then builds all samples of a step). workers: processes
    per rank that prefetch steps, 0 = none; it changes no batch and may differ on resume. max_bad_share: share
    of unusable samples that stops the run.
    """

    mixture: list[MixtureEntry]
    max_length: int = 2048
    pack_to: int = 0
    batch_by: Literal["samples", "rows"] = "samples"
    group_by_length: bool = False
    workers: int = 0
    max_bad_share: float = 0.05

    def check(self) -> None:
        if not self.mixture:
            raise UserError("data.mixture is empty: give at least one {kind, path, weight}.")
        for name in ("unconditional", "short_captions", "text_to_image_share", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} is {getattr(self, name)}, must be between 0 and 1.")
        if self.max_length < 2 or self.pack_to < 0 or self.workers < 0:
            raise UserError(
                "data.max_length must be 2 or more, data.pack_to and data.workers 0 (none) or more."
            )
        if self.batch_by == "rows":
            if not self.pack_to or self.max_length > self.pack_to:
                raise UserError(
                    f"data.batch_by: rows needs a data.pack_to of at least data.max_length = "
                    f"{self.max_length} tokens, got {self.pack_to}: raise it, or lower max_length."
                )
            if self.group_by_length:
                raise UserError(
                    "data.batch_by: rows fills rows in the order of the samples: omit data.group_by_length."
                )
