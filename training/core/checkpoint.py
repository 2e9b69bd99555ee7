"""Checkpoints that are whole or absent: written beside, sealed with a list of their files, then renamed.

checkpoints/step-00000500/ is a model folder (what `write_model` writes) plus training_state/: DeepSpeed's
states, one file per rank for the rest, and manifest.json, written last, with size and sha256 of every file.
"""

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, sha256, write_json

CHECKPOINT_MANIFEST = "training_state/manifest.json"


class Checkpoints:
    """The checkpoints of one run; `keep` of them stay. Every method is called on every rank.

    trained_alone: parameters without gradient are left out of the engines' states; the run has them from
        elsewhere (the model that adapters sit on).
    """

    def __init__(self, folder: Path, keep: int = 2, trained_alone: bool = False):
        self.folder = folder
        self.keep = keep
        self.trained_alone = trained_alone

    def steps(self) -> dict[int, Path]:
        """step -> folder, oldest first; half-written temporary folders are not among them."""
        found = {}
        for path in self.folder.glob("step-*"):
            number = re.fullmatch(r"step-(\d+)", path.name)
            if number:
                found[int(number[1])] = path
        return dict(sorted(found.items()))

    def latest(self) -> Path | None:
        """The newest checkpoint, checked; None if there is none.

        Raises:
            UserError: it is broken; the message names the file and what to do.
        """
        steps = self.steps()
        if not steps:
            return None
        path = steps[max(steps)]
        problem = None
        if distributed.is_main():
            problem = damage(path)
        if _from_main(problem is not None):
            others = [p.name for p in steps.values() if p != path]
            goes_on = f"to go on from {others[-1]}" if others else "to begin again"
            raise UserError(
                f"Checkpoint {path} is broken: {problem or 'see rank 0'}. Delete this folder {goes_on}."
            )
        return path

    def save(
        self,
        step: int,
        write_model: Callable[[Path], None],
        engines: Mapping[str, Any],
        state: Mapping[str, Any],
        gathers: bool = False,
    ) -> Path:
        """Write step-XXXXXXXX in one go and prune old ones.

        Args:
            write_model: writes a loadable model folder into the path it is given; called on rank 0, or on
                every rank (where it writes on rank 0 only) if `gathers`, as ZeRO 3 needs.
            engines: name -> DeepSpeed engine.
            state: what this rank needs to go on: plain types and tensors.
        """
        path = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{path.name}.tmp"
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "training_state").mkdir(parents=True)
        distributed.barrier()
        if distributed.is_main() or gathers:
            write_model(temporary)
        for name, engine in engines.items():
            what = {"exclude_frozen_parameters": True} if self.trained_alone else {}
            engine.save_checkpoint(str(temporary / "training_state"), tag=name, save_latest=False, **what)
        own = {**state, "step": step, "ranks": distributed.world_size(), "torch_rng": torch.get_rng_state()}
        torch.save(own, _rank_file(temporary))
        distributed.barrier()
        if distributed.is_main():
            seal(temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            for old in list(self.steps().values())[: -self.keep]:
                shutil.rmtree(old)
        distributed.barrier()
        return path

    def restore(self, path: Path, engines: Mapping[str, Any], key: str = "init_from") -> dict[str, Any]:
        """Load engines and torch's RNG; returns this rank's state, with `step`.

        Args:
            key: the config key that begins a new run from this checkpoint, for the message.

        Raises:
            UserError: the checkpoint was written by another number of ranks.
        """
        first = path / "training_state" / "rank-00000.pt"
        written_by = torch.load(first, map_location="cpu", weights_only=True)["ranks"]
        if written_by != distributed.world_size():
            raise UserError(
                f"{path} was written by {written_by} rank(s), this is a run of {distributed.world_size()}: "
                f"start {written_by}, or begin a new run from its weights ({key}={path} and another out)."
            )
        state = torch.load(_rank_file(path), map_location="cpu", weights_only=True)
        for name, engine in engines.items():
            what = {"load_module_strict": False} if self.trained_alone else {}
            engine.load_checkpoint(str(path / "training_state"), tag=name, **what)
        torch.set_rng_state(state.pop("torch_rng"))
        return state


def load_weights_only(path: Path, engines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load what any number of ranks trained, but not the moments of their optimisers.

    Engines that the checkpoint does not have stay as they are.

    Returns:
        Every rank's state.

    Raises:
        UserError: `path` is no checkpoint, or a broken one.
    """
    problem = damage(path) if path.is_dir() else "there is no such folder"
    if problem:
        raise UserError(f"{path} is no whole checkpoint ({problem}): name a folder OUT/checkpoints/step-*.")
    for name, engine in engines.items():
        if (path / "training_state" / name).is_dir():
            engine.load_checkpoint(
                str(path / "training_state"), tag=name, load_module_only=True, load_optimizer_states=False
            )
    files = sorted((path / "training_state").glob("rank-*.pt"))
    return [torch.load(file, map_location="cpu", weights_only=True) for file in files]


def _rank_file(path: Path) -> Path:
    return path / "training_state" / f"rank-{distributed.rank():05d}.pt"


def seal(path: Path) -> None:
    """List every file with size and hash, flushed to disk; what is sealed is whole."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            files[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(path / CHECKPOINT_MANIFEST, {"files": files})


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    if not (path / CHECKPOINT_MANIFEST).exists():
        return f"{CHECKPOINT_MANIFEST} is missing"
    try:
        files = read_json(path / CHECKPOINT_MANIFEST)["files"]
    except (UserError, KeyError, TypeError):
        return f"{CHECKPOINT_MANIFEST} is not readable"
    for name, known in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {known['bytes']}"
        if sha256(file) != known["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _from_main(value: bool) -> bool:
    """Rank 0's value on every rank."""
    return distributed.sum_over_ranks(torch.tensor(float(value and distributed.is_main()))).item() > 0


class StopOnSignal:
    """Turns SIGTERM and Ctrl-C into a question that the training loop asks between steps.

    Within `with StopOnSignal() as stop:`, `stop()` is True once a signal has arrived on any rank: call it on
    every rank at the same step. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        # signals can be caught in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: Any) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def __call__(self) -> bool:
        if distributed.world_size() > 1:
            # ranks receive a signal at different times: the largest number decides for all of them
            received = torch.tensor(self.signal or 0)
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
            self.signal = int(received.item()) or None
        return self.signal is not None

    def exit_if_signalled(self) -> None:
        """Exit with the code of the signal; call it after saving."""
        if self.signal is None:
            return
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if distributed.is_main():
            print("unitok: stopped by SIGTERM; run the same command again to resume.", file=sys.stderr)
        sys.exit(128 + self.signal)
