"""The run directory: resolved config, command, code version, data fingerprint, and whether it is finished."""

import contextlib
import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from open_unitok.core.distributed import is_main, world_size
from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, make_folder, write_atomic, write_json
from open_unitok.core.processes import FolderLock
from open_unitok.core.text_files import read_json

from .config import (
    CHANGEABLE_IN_STAGE,
    CHANGEABLE_KEYS,
    build_config,
    config_differences,
    read_yaml,
    to_dict,
    to_yaml,
)
from .options import RunConfig

# Packages whose version can change a result.
PACKAGES = (
    "open-unitok",
    "torch",
    "transformers",
    "deepspeed",
    "numpy",
    "pillow",
    "torchdata",
    "sentencepiece",
)


class RunDir:
    """Paths of a run, and the facts that a later call must agree with.

    config.yaml (resolved), run.json (command, code, versions, recorded facts), metrics.jsonl, tensorboard/,
    checkpoints/step-00000500/, model/ (final weights; it exists when the run is finished).
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self._facts = facts
        self._lock: FolderLock | None = None
        self._created: list[Path] = []  # by this call: files, then folders, the innermost first

    @classmethod
    def open(cls, config: RunConfig) -> "RunDir":
        """Create a run directory, or open an existing one; only rank 0 writes.

        Without a checkpoint there is nothing to resume: another config then overwrites the old one.

        Raises:
            UserError: the directory has a run with another config, is a file, or is in use.
        """
        path = Path(config.out)
        if path.exists() and not path.is_dir():
            raise UserError(f"out is {path}, which is a file: name a folder.")
        # `discard` may remove these
        folders = [p for p in (path, *path.parents) if not p.exists()]
        lock = FolderLock(make_folder(path), "training run") if is_main() else None
        try:
            return cls._open_locked(config, path, lock, folders)
        except BaseException:
            if lock:
                lock.close()
            raise

    @classmethod
    def _open_locked(
        cls, config: RunConfig, path: Path, lock: FolderLock | None, folders: list[Path]
    ) -> "RunDir":
        old = path / "config.yaml"
        # without a checkpoint or a model the run has produced nothing: its config may be overwritten
        begun = any(path.glob("checkpoints/step-*")) or (path / "model").exists()
        if old.exists() and begun:
            free = (*CHANGEABLE_KEYS, *CHANGEABLE_IN_STAGE.get(config.stage, ()))
            changed = config_differences(_resolved(old, config), to_dict(config), free)
            if changed:
                last = max(path.glob("checkpoints/step-*"), default=path / "model")
                remedy = f"init_from={last} starts from its weights"
                if hasattr(config, "resume_from") and all(c.startswith("data.workers:") for c in changed):
                    remedy = f"resume_from={last} continues at its step"
                raise UserError(
                    f"{path} has a run with another config ({'; '.join(changed)}). Use the old values to "
                    f"resume it, or another `out` for a new run ({remedy})."
                )
        facts = read_json(path / "run.json") if begun and (path / "run.json").exists() else {}
        if not isinstance(facts, dict) or not isinstance(facts.get("facts", {}), dict):
            raise UserError(f"{path / 'run.json'} is not the description of a run: restore or delete it.")
        run_dir = cls(path, facts)
        run_dir._lock = lock
        if not run_dir.finished and is_main():
            if not begun:
                run_dir._created = [old, path / "run.json", path / ".lock", *folders]
            # of writes that were killed; nobody else writes here
            for left in (*path.glob(".*.tmp"), *path.glob("checkpoints/.step-*.tmp")):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_atomic(old, to_yaml(config))
            earlier = {"facts": facts.get("facts", {}), "calls": [*_list(facts.get("calls")), _now()]}
            run_dir._facts = _environment() | earlier
            write_json(path / "run.json", run_dir._facts)
        return run_dir

    @property
    def finished(self) -> bool:
        """Whether the final model, or adapter, exists."""
        return any((self.model / name).exists() for name in ("config.json", "adapter_config.json"))

    def record_facts(self, **facts: Any) -> None:
        """Record facts that the result depends on (fingerprint of the data, ...).

        Raises:
            UserError: an earlier call of this run recorded another value.
        """
        recorded = self._facts.setdefault("facts", {})
        for name, value in facts.items():
            if name in recorded and recorded[name] != value:
                raise UserError(
                    f"{self.path} was started with {name} {recorded[name]}, but now it is {value}: "
                    "restore it, or choose another `out` for a new run."
                )
        recorded.update(facts)
        if is_main():
            write_json(self.path / "run.json", self._facts)

    def discard(self) -> None:
        """Remove what this call created, if an error stopped the run before its first metrics record."""
        if any(self.path.glob("checkpoints/step-*")) or (self.path / "metrics.jsonl").exists():
            return
        for path in self._created:
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                path.rmdir() if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Let other processes train in this directory."""
        if self._lock:
            self._lock.close()

    def finish(self, write_model: Callable[[Path], None]) -> None:
        """Write OUT/model atomically with `write_model`; call it on rank 0 only."""
        with atomic_folder(self.model) as temporary:
            write_model(temporary)


def _resolved(file: Path, config: RunConfig) -> dict[str, Any]:
    """The config of an earlier call; keys that it does not have yet get their defaults."""
    old = read_yaml(file)
    with contextlib.suppress(UserError):  # an older version's keys or values, invalid now
        return to_dict(build_config(type(config), old))
    return old


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _environment() -> dict[str, Any]:
    """Command, code version and machine of this call."""
    return {
        "command": shlex.join(sys.argv),
        "git": git_hash(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ranks": world_size(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def git_hash() -> str | None:
    """Commit of the checkout that this code runs from ("+": with changes); None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        # -uno: untracked files do not count as changes
        commit, changed = (
            subprocess.run(
                [*git, *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
        return commit + ("+" if changed else "")
    return None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
