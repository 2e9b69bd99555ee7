"""Files of a checkpoint: the manifest with their hashes, damage, and pickles that would run code."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256, write_json
from open_unitok.core.text_files import read_json

CHECKPOINT_MANIFEST = "training_state/manifest.json"
HASHES = ".hashes"  # of the files of each rank, while a checkpoint is written in the background

# Types in the files that DeepSpeed writes; any other name in a pickle may run code when it is loaded.
DEEPSPEED_TYPES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def hash_files(path: Path, rank: int = 0, ranks: int = 1) -> dict[str, dict[str, Any]]:
    """Flush this rank's files to disk; their names -> size and hash.

    A rank hashes the files that it has written: with 64 ranks nobody reads hundreds of gigabytes.
    """
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or name.startswith(HASHES) or _writer(name) % ranks != rank:
            continue
        # the rename that follows must not reach the disk before the contents
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
        files[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return files


def write_manifest(path: Path, files: dict[str, dict[str, Any]] | None = None) -> None:
    """List every file with size and hash (None: hash them here); a folder with a manifest is complete."""
    files = hash_files(path) if files is None else files
    write_json(path / CHECKPOINT_MANIFEST, {"files": dict(sorted(files.items()))})


def find_damage(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """A description of the first defect of a checkpoint; None if it is complete.

    Args:
        rank: of `ranks` that share the reading of the files.
    """
    if not (path / CHECKPOINT_MANIFEST).exists():
        return f"{CHECKPOINT_MANIFEST} is missing"
    try:
        files = read_json(path / CHECKPOINT_MANIFEST)["files"]
        listed = {name: (int(known["bytes"]), str(known["sha256"])) for name, known in files.items()}
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return f"{CHECKPOINT_MANIFEST} is not readable"
    present = {f.relative_to(path).as_posix() for f in (path / "training_state").rglob("*") if f.is_file()}
    if extra := present - listed.keys() - {CHECKPOINT_MANIFEST}:
        return f"{min(extra)} is not listed in {CHECKPOINT_MANIFEST}"
    for name, (size, digest) in listed.items():
        if _writer(name) % ranks != rank:
            continue
        file = path / name
        # a name that leaves the folder could be a device that never ends
        if not file.resolve().is_relative_to(path.resolve()):
            return f"{name} is outside the folder"
        if not file.exists():
            return f"{name} is missing"
        if not file.is_file():
            return f"{name} is not a file"
        # the size first: a truncated file needs no hashing
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256(file) != digest:
            return f"{name} has changed since it was written"
    return None


def find_damage_together(path: Path) -> str | None:
    """`find_damage` of all ranks, each of which reads a share of the files; the same answer on each."""
    found = from_all(find_damage(path, distributed.rank(), distributed.world_size()))
    return next((problem for problem in found if problem is not None), None)


def from_all(value: Any) -> list[Any]:
    """The values of all ranks."""
    if distributed.world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(values, value)
    return values


def check_complete(path: Path) -> None:
    """
    Raises:
        UserError: `path` is not a checkpoint, or it is damaged.
    """
    problem = find_damage_together(path) if path.is_dir() else "there is no such folder"
    if problem:
        raise UserError(
            f"{path} is not a complete checkpoint ({problem}): name a folder OUT/checkpoints/step-*."
        )


def check_pickles(path: Path) -> None:
    """Reject a checkpoint whose files could run code: DeepSpeed loads them by unpickling.

    Raises:
        UserError: a file names a type that neither torch nor DeepSpeed writes, or is in another format.
    """
    state = path / "training_state"
    # the files behind a linked folder are listed nowhere, and DeepSpeed would read them
    if link := next((file for file in (state, *sorted(state.rglob("*"))) if file.is_symlink()), None):
        raise UserError(f"{link} is a link, and checkpoints hold none: delete the checkpoint.")
    for file in sorted(state.rglob("*.pt")):
        try:
            # lists the names in the pickle without executing it; only the zip format can be listed
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - DEEPSPEED_TYPES
        except (RuntimeError, ValueError, OSError, EOFError, LookupError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is not a file of a checkpoint: {reason}") from error
        if unsafe:
            raise UserError(
                f"{file} would run code when it is loaded ({', '.join(sorted(unsafe)[:3])}): this program "
                "did not write it. Delete the checkpoint."
            )


def _writer(name: str) -> int:
    """The rank that writes this file of a checkpoint."""
    found = re.search(r"zero_pp_rank_(\d+)_|rank-(\d+)\.pt$", name)
    return int(found[1] or found[2]) if found else 0
