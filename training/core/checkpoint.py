"""Atomic checkpoints: written to a temporary folder, listed in a manifest, then renamed.

checkpoints/step-00000500/ is a model folder (written by `write_model`) plus training_state/: DeepSpeed's
states, one file per rank for the rest, and manifest.json, written last, with size and sha256 of every file.
"""

import contextlib
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from open_unitok.core import distributed
from open_unitok.core.errors import STORAGE_ERRORS, StorageError, UserError
from open_unitok.core.files import sha256, write_json
from open_unitok.core.text_files import read_json

from . import reshard
from .options import CheckpointOptions

CHECKPOINT_MANIFEST = "training_state/manifest.json"


# Types in the files that DeepSpeed writes; any other name in a pickle may run code when it is loaded.
_DEEPSPEED_TYPES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


class Checkpoints:
    """The checkpoints of one run. Call every method on every rank.

    Args:
        options: how often they are saved, and how many are kept.
        trained_only: omit frozen parameters from the engines' states, because the run has them from elsewhere
            (the base model of adapters).
    """

    def __init__(self, folder: Path, options: CheckpointOptions | None = None, trained_only: bool = False):
        self.folder = folder
        self.options = options or CheckpointOptions()
        self.trained_only = trained_only
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`, by the number of steps."""
        return step % self.options.every == 0

    def late(self) -> bool:
        """Whether a checkpoint is to be saved by this rank's clock; `StopOnSignal` asks rank 0's."""
        minutes = self.options.every_minutes
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def steps(self) -> dict[int, Path]:
        """step -> folder, oldest first, without temporary folders of interrupted saves."""
        found = {}
        for path in self.folder.glob("step-*"):
            number = re.fullmatch(r"step-(\d+)", path.name)
            if number:
                found[int(number[1])] = path
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        """The newest checkpoint, verified; None if there is none.

        Raises:
            UserError: it is damaged; the message names the file and a remedy.
        """
        steps = self.steps()
        if not steps:
            return None
        path = steps[max(steps)]
        problem = None
        if distributed.is_main():  # hashing gigabytes once is enough
            problem = find_damage(path)
        if _from_main(problem is not None):
            others = [p.name for p in steps.values() if p != path]
            remedy = f"to resume from {others[-1]}" if others else "to start over"
            raise UserError(
                f"Checkpoint {path} is broken: {problem or 'see rank 0'}. Delete this folder {remedy}."
            )
        return path

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        engines: Mapping[str, Any],
        state: Mapping[str, Any],
        gather: bool = False,
    ) -> Path:
        """Write step-XXXXXXXX atomically and delete old checkpoints.

        Args:
            write_model: writes a loadable model folder into the given path.
            engines: name -> DeepSpeed engine.
            state: this rank's state for resuming: plain types and tensors.
            gather: call `write_model` on every rank, not only on rank 0: ZeRO 3 gathers weights in it.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        with self._storage_errors(temporary):
            self._write(path, temporary, write_model, engines, state, step, gather)
        self._saved = time.monotonic()
        return path

    @contextlib.contextmanager
    def _storage_errors(self, temporary: Path) -> Iterator[None]:
        """Remove an unfinished checkpoint; name what a full or read-only disk has left and needs."""
        try:
            yield
        except BaseException as error:
            needed = folder_bytes(temporary)
            shutil.rmtree(temporary, ignore_errors=True)
            steps = self.steps()
            if steps:
                needed = max(needed, folder_bytes(steps[max(steps)]))
            # torch and safetensors raise errors of their own, without the number
            free = shutil.disk_usage(_existing_parent(self.folder)).free
            full = free < max(needed, 2**20) and not isinstance(error, UserError | KeyboardInterrupt)
            if full or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS):
                reason = error.strerror if isinstance(error, OSError) else "the disk is full"
                last = f"step {max(steps)}" if steps else "none"
                raise StorageError(
                    f"Cannot write a checkpoint into {self.folder} ({reason}): it needs about "
                    f"{needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free. Last good checkpoint: {last}; "
                    "make room and run the same command again to resume."
                ) from error
            raise

    def _write(
        self,
        path: Path,
        temporary: Path,
        write_model: Callable[[Path], None],
        engines: Mapping[str, Any],
        state: Mapping[str, Any],
        step: int,
        gather: bool,
    ) -> None:
        if distributed.is_main():
            for left in self.folder.glob(".step-*.tmp"):  # of saves that were killed
                shutil.rmtree(left, ignore_errors=True)
            (temporary / "training_state").mkdir(parents=True)
        # the other ranks write into this folder
        distributed.barrier()
        if distributed.is_main() or gather:
            write_model(temporary)
        for name, engine in engines.items():
            options: dict[str, Any] = {"exclude_frozen_parameters": True} if self.trained_only else {}
            if hasattr(engine, "zero_optimization") and not engine.zero_optimization():
                options["client_state"] = {reshard.PARAMETER_NAMES: reshard.parameter_names(engine)}
            engine.save_checkpoint(str(temporary / "training_state"), tag=name, save_latest=False, **options)
        own = {**state, "step": step, "ranks": distributed.world_size(), "torch_rng": torch.get_rng_state()}
        torch.save(own, _rank_file(temporary))
        # the manifest must list the files of all ranks
        distributed.barrier()
        if distributed.is_main():
            write_manifest(temporary)
            # os.replace is atomic: after a kill the checkpoint is complete or absent
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            for old in list(self.steps().values())[: -self.options.keep]:
                shutil.rmtree(old)
        distributed.barrier()

    def restore(
        self,
        path: Path,
        engines: Mapping[str, Any],
        merge: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        always_merge: bool = False,
    ) -> dict[str, Any]:
        """Load the engines and torch's random state; on the ranks that wrote them, bit for bit.

        Engines that the checkpoint does not have keep their weights.

        Args:
            merge: the states of all ranks that wrote the checkpoint -> the state of this rank, called if
                their number differs, or `always_merge`.

        Returns:
            This rank's state, with `step`.

        Raises:
            UserError: the checkpoint is of another model, or of another number of ranks without `merge`.
        """
        check_pickles(path)
        states = path / "training_state"
        written_by = _load_rank_state(states / "rank-00000.pt")["ranks"]
        if (found := len(list(states.glob("rank-*.pt")))) != written_by:
            raise UserError(f"{path} has the states of {found} rank(s), not of {written_by}: restore it.")
        if written_by == distributed.world_size() and not always_merge:
            state = _load_rank_state(_rank_file(path))
        elif merge is None:
            raise UserError(f"{path} was written by {written_by} rank(s): resume it on {written_by}.")
        else:
            everyone = [_load_rank_state(states / f"rank-{rank:05d}.pt") for rank in range(written_by)]
            step, random = everyone[0]["step"], _random_state([own["torch_rng"] for own in everyone])
            state = {**merge(everyone), "step": step, "torch_rng": random}
        for name, engine in engines.items():
            # the earlier run may have had no discriminator
            if (states / name).is_dir():
                self._restore_engine(path, name, engine)
        torch.set_rng_state(state.pop("torch_rng"))
        return state

    def _restore_engine(self, path: Path, name: str, engine: Any) -> None:
        folder = path / "training_state"
        if hasattr(engine, "zero_optimization") and reshard.needs_resharding(engine, folder / name):
            reshard.load_resharded(engine, folder / name, self.trained_only)
            return
        # a strict load would reject the absence of the frozen parameters
        options = {"load_module_strict": False} if self.trained_only else {}
        try:
            engine.load_checkpoint(str(folder), tag=name, **options)
        except (RuntimeError, ValueError) as error:  # a teacher's head, a discriminator of other size
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path} holds other weights than this run ({name}): {reason}") from error


def check_complete(path: Path) -> None:
    """
    Raises:
        UserError: `path` is not a checkpoint, or it is damaged.
    """
    problem = find_damage(path) if path.is_dir() else "there is no such folder"
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
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - _DEEPSPEED_TYPES
        except (RuntimeError, ValueError, OSError, EOFError, LookupError, pickle.UnpicklingError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is not a file of a checkpoint: {reason}") from error
        if unsafe:
            raise UserError(
                f"{file} would run code when it is loaded ({', '.join(sorted(unsafe)[:3])}): this program "
                "did not write it. Delete the checkpoint."
            )


def _load_rank_state(file: Path) -> dict[str, Any]:
    """The state of one rank; raises UserError."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, LookupError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not readable: {reason}") from error
    if not isinstance(state, dict) or not {"step", "ranks", "torch_rng"} <= state.keys():
        raise UserError(f"{file} is not the state of a rank: it has no step, ranks and torch_rng.")
    return state


def _random_state(states: list[torch.Tensor]) -> torch.Tensor:
    """This rank's own random state, or another that follows from rank 0's."""
    if distributed.rank() < len(states):
        return states[distributed.rank()]
    generator = torch.Generator()
    generator.set_state(states[0])
    seed = int(torch.randint(2**62, (), generator=generator)) + distributed.rank()
    return generator.manual_seed(seed).get_state()


def _rank_file(path: Path) -> Path:
    return path / "training_state" / f"rank-{distributed.rank():05d}.pt"


def write_manifest(path: Path) -> None:
    """Flush every file to disk and list it with size and hash; a folder with a manifest is complete."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            # the rename that follows must not reach the disk before the contents
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(path / CHECKPOINT_MANIFEST, {"files": files})


def find_damage(path: Path) -> str | None:
    """A description of the first defect of a checkpoint; None if it is complete."""
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


def folder_bytes(folder: Path) -> int:
    """Total size of the files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing_parent(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _from_main(value: bool) -> bool:
    """Rank 0's value, on every rank."""
    return distributed.sum_over_ranks(torch.tensor(float(value and distributed.is_main()))).item() > 0
