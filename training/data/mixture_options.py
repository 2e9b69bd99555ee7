"""Config of the mixture of data sets; imports no torch.

Replay: a share of a fine-tuning run's samples come from the data that its base was trained on. `replay/` in a
model folder has `replay.json`, {"format", "mixture": entries like those of `data.mixture`, with paths inside
the folder}; `unitok data replay` writes it.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from open_unitok.core.errors import UserError
from open_unitok.core.files import REPLAY_FOLDER, model_path
from open_unitok.core.text_files import read_json

from ..core.config import build_config
from .sample_kinds import CODE_FOLDER, CONVERSATION_FILE, TEXT_FILE, DropOptions, find_sample_kind

REPLAY_FILE = "replay.json"
REPLAY_FORMAT = "open-unitok replay 1"


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
    of unusable samples that stops the run. replay: share of the samples that come from what the model of
    `init_from` was trained on; the others follow `mixture`. replay_path: folder of these data; null =
    `replay/` of that model.
    """

    mixture: list[MixtureEntry]
    max_length: int = 2048
    pack_to: int = 0
    batch_by: Literal["samples", "rows"] = "samples"
    group_by_length: bool = False
    workers: int = 0
    max_bad_share: float = 0.05
    replay: float = 0.0
    replay_path: str | None = None

    def check(self) -> None:
        if not self.mixture:
            raise UserError("data.mixture is empty: give at least one {kind, path, weight}.")
        for name in ("unconditional", "short_captions", "text_to_image_share", "max_bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.{name} is {getattr(self, name)}, must be between 0 and 1.")
        if not 0 <= self.replay < 1:
            raise UserError(f"data.replay is {self.replay:g}, must be a share from 0 (none) to below 1.")
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

    def check_replay(self, init_from: str | None) -> None:
        """Raises UserError if data of a base are to be replayed, but there is none."""
        if self.replay and init_from is None:
            raise UserError(
                f"data.replay is {self.replay:g}, but a new model has no base whose data to replay: give "
                "init_from, or name all data in data.mixture."
            )


def with_replay(data: MixtureOptions, init_from: str | None) -> MixtureOptions:
    """The data of a run, with what is replayed as further entries of the mixture.

    Raises:
        UserError: the model of `init_from` has no replay data, or `data.replay_path` holds none.
    """
    if not data.replay:
        return data
    given = data.replay_path
    folder = Path(given) if given else model_path(str(init_from)) / REPLAY_FOLDER
    if not (folder / REPLAY_FILE).exists():
        where = (
            f"{given} holds no {REPLAY_FILE}" if given else f"the model {init_from} has no {REPLAY_FOLDER}/"
        )
        raise UserError(
            f"data.replay is {data.replay:g}, but {where}: make it with `unitok data replay`, set "
            "data.replay_path to another folder of replay data, or data.replay to 0."
        )
    own, replayed = data.mixture, read_replay(folder)
    entries = [
        dataclasses.replace(entry, weight=share * entry.weight / sum(e.weight for e in entries))
        for entries, share in ((own, 1 - data.replay), (replayed, data.replay))
        for entry in entries
    ]
    return dataclasses.replace(data, mixture=entries)


def read_replay(folder: Path) -> list[MixtureEntry]:
    """The entries of a replay folder.

    Raises:
        UserError: `replay.json` is malformed, or names a path outside of the folder.
    """
    path = folder / REPLAY_FILE
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != REPLAY_FORMAT or not found.get("mixture"):
        raise UserError(
            f"{path} is not replay data (format {REPLAY_FORMAT!r}): run `unitok data replay` again."
        )
    try:
        entries = build_config(MixtureOptions, {"mixture": found["mixture"]}).mixture
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    # a model may be somebody else's: its data lie in its folder
    for name in (name for entry in entries for name in (entry.path, entry.codes) if name is not None):
        if Path(name).is_absolute() or ".." in Path(name).parts or any(c in name for c in "*?[{"):
            raise UserError(f"{path}: {name} is not a path inside of {folder}.")
    return [
        dataclasses.replace(
            entry,
            path=str(folder / entry.path),
            codes=None if entry.codes is None else str(folder / entry.codes),
        )
        for entry in entries
    ]
