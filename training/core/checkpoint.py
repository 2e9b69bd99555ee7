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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from open_unitok.core import distributed
from open_unitok.core.errors import STORAGE_ERRORS, StorageError, UserError
from open_unitok.core.files import write_json

from .options import CheckpointOptions
from .saving import reshard
from .saving.background import BackgroundWrites, Writes, await_files, deferred_saves, to_host
from .saving.integrity import (
    HASHES,
    check_pickles,
    find_damage_together,
    from_all,
    hash_files,
    write_manifest,
)


class Checkpoints:
    """The checkpoints of one run. Call every method on every rank; as a context it ends with `wait`.

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
        self._writing: BackgroundWrites | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after `step`, by the number of steps; call it at every step.

        Raises:
            StorageError: the last checkpoint could not be written in the background.
        """
        if self._writing is not None:
            self._writing.check()
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
        if problem := find_damage_together(path):
            others = [p.name for p in steps.values() if p != path]
            remedy = f"to resume from {others[-1]}" if others else "to start over"
            raise UserError(f"Checkpoint {path} is broken: {problem}. Delete this folder {remedy}.")
        return path

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        engines: Mapping[str, Any],
        state: Mapping[str, Any],
        gather: bool = False,
        snapshot_model: Callable[[Path], Callable[[], Any]] | None = None,
    ) -> Path:
        """Write step-XXXXXXXX atomically and delete old checkpoints.

        With `options.background` the call returns when everything is copied to the host. The folder then has
        a temporary name until it is complete, and older checkpoints stay valid. A second call waits for the
        first.

        Args:
            write_model: writes a loadable model folder into the given path.
            engines: name -> DeepSpeed engine.
            state: this rank's state for resuming: plain types and tensors.
            gather: call `write_model` on every rank, not only on rank 0: ZeRO 3 gathers weights in it.
            snapshot_model: in the background, in place of `write_model`: copies the weights, and returns the
                function that writes them.
        """
        self.wait()
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        background = self.options.background
        with self._storage_errors(temporary):
            model = (write_model, snapshot_model if background else None)
            writes = self._snapshot(temporary, *model, engines, state, step, gather)
            if not background:
                files = from_all(hash_files(temporary, distributed.rank(), distributed.world_size()))
                if distributed.is_main():
                    self._publish(path, temporary, {k: v for own in files for k, v in own.items()})
        if background:
            self._writing = BackgroundWrites(partial(self._write, path, temporary, writes))
        else:
            distributed.barrier()
        self._saved = time.monotonic()
        return path

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            StorageError: it could not be written.
        """
        if self._writing is not None:
            self._writing.wait()
            self._writing = None
            # rank 0 publishes it
            distributed.barrier()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        """Wait for the last checkpoint, also after a signal and an error."""
        if kind is None or issubclass(kind, SystemExit | KeyboardInterrupt):
            self.wait()
        elif self._writing is not None:
            # no barrier: the error may be this rank's alone. Its own message counts
            with contextlib.suppress(Exception):
                self._writing.wait()

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

    def _snapshot(
        self,
        temporary: Path,
        write_model: Callable[[Path], None],
        snapshot_model: Callable[[Path], Callable[[], Any]] | None,
        engines: Mapping[str, Any],
        state: Mapping[str, Any],
        step: int,
        gather: bool,
    ) -> Writes:
        """Write everything, or in the background return what is to be written."""
        if distributed.is_main():
            for left in self.folder.glob(".step-*.tmp"):  # of saves that were killed
                shutil.rmtree(left, ignore_errors=True)
            (temporary / "training_state").mkdir(parents=True)
        # the other ranks write into this folder
        distributed.barrier()
        background, writes = self.options.background, []
        if distributed.is_main() or gather:
            if snapshot_model:
                writes.append(snapshot_model(temporary))
            else:
                write_model(temporary)
        for name, engine in engines.items():
            options: dict[str, Any] = {"exclude_frozen_parameters": True} if self.trained_only else {}
            if hasattr(engine, "zero_optimization") and not engine.zero_optimization():
                options["client_state"] = {reshard.PARAMETER_NAMES: reshard.parameter_names(engine)}
            with deferred_saves(engine, writes) if background else contextlib.nullcontext():
                folder = str(temporary / "training_state")
                engine.save_checkpoint(folder, tag=name, save_latest=False, **options)
        own = {**state, "step": step, "ranks": distributed.world_size(), "torch_rng": torch.get_rng_state()}
        writes.append(partial(torch.save, to_host(own) if background else own, _rank_file(temporary)))
        if not background:
            for write in writes:
                write()
        # of the folders too: the manifest must list the files of all ranks
        distributed.barrier()
        return writes

    def _write(self, path: Path, temporary: Path, writes: Writes) -> None:
        """In the background: write and hash this rank's files; rank 0 publishes the checkpoint."""
        rank, ranks = distributed.rank(), distributed.world_size()
        with self._storage_errors(temporary):
            for write in writes:
                write()
            writes.clear()  # frees the copies
            write_json(temporary / HASHES / f"{rank:05d}.json", hash_files(temporary, rank, ranks))
            if rank == 0:
                files = await_files(temporary / HASHES, ranks)
                shutil.rmtree(temporary / HASHES)
                self._publish(path, temporary, files)

    def _publish(self, path: Path, temporary: Path, files: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, give the folder its name, delete old checkpoints; on rank 0."""
        write_manifest(temporary, files)
        # os.replace is atomic: after a kill the checkpoint is complete or absent
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        for old in list(self.steps().values())[: -self.options.keep]:
            shutil.rmtree(old)

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


def folder_bytes(folder: Path) -> int:
    """Total size of the files in a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing_parent(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
