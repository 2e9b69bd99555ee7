"""The folder of one run: what was asked for, with which code and data, and whether it is finished."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from open_unitok.core.errors import UserError
from open_unitok.core.files import atomic_folder, read_json, write_atomic, write_json

from .config import CHANGEABLE_IN_STAGE, CHANGEABLE_KEYS, build_config, config_differences, to_dict, to_yaml
from .options import RunConfig

# Packages whose version can change a number.
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
    """Paths of a run, and the record that a later call is compared with.

    config.yaml (resolved), run.json (command, code, versions, noted facts), metrics.jsonl, tensorboard/,
    checkpoints/step-00000500/, model/ (final weights; its presence says that the run is finished).
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path = path
        self.model = path / "model"
        self.checkpoints = path / "checkpoints"
        self._facts = facts
        self._new: list[Path] = []  # files, then folders, that this call began the run with

    @classmethod
    def open(cls, config: RunConfig) -> "RunDir":
        """Begin a run or come back to one; rank 0 writes, the other ranks look.

        A folder without a checkpoint holds nothing to protect: another configuration begins there anew.

        Raises:
            UserError: the folder holds a run with another configuration, or is a file.
        """
        path = Path(config.out)
        if path.exists() and not path.is_dir():
            raise UserError(f"out is {path}, which is a file: name a folder.")
        old = path / "config.yaml"
        begun = any(path.glob("checkpoints/step-*")) or (path / "model").exists()
        if old.exists() and begun:
            free = (*CHANGEABLE_KEYS, *CHANGEABLE_IN_STAGE.get(config.stage, ()))
            changed = config_differences(_resolved(old, config), to_dict(config), free)
            if changed:
                last = max(path.glob("checkpoints/step-*"), default=path / "model")
                remedy = f"init_from={last} begins with its weights"
                if hasattr(config, "resume_from") and all(c.startswith("data.workers:") for c in changed):
                    remedy = f"resume_from={last} goes on at its step with tars that it had not begun"
                raise UserError(
                    f"{path} holds a run with another configuration ({'; '.join(changed)}). "
                    f"Give the old values to go on, or another `out` for a new run ({remedy})."
                )
        facts = read_json(path / "run.json") if begun and (path / "run.json").exists() else {}
        folder = cls(path, facts)
        if not folder.finished and _is_main():
            if not begun:
                folders = [p for p in (path, *path.parents) if not p.exists()]
                folder._new = [old, path / "run.json", *folders]
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(old, to_yaml(config))
            again = {"facts": facts.get("facts", {}), "calls": [*facts.get("calls", []), _now()]}
            folder._facts = _circumstances() | again
            write_json(path / "run.json", folder._facts)
        return folder

    @property
    def finished(self) -> bool:
        """True once the final model, or adapter, stands."""
        return any((self.model / name).exists() for name in ("config.json", "adapter_config.json"))

    def record_facts(self, **facts: Any) -> None:
        """Record facts that the result depends on (fingerprint of the data, ...).

        Raises:
            UserError: an earlier call of this run noted something else.
        """
        noted = self._facts.setdefault("facts", {})
        for name, value in facts.items():
            if name in noted and noted[name] != value:
                raise UserError(
                    f"{self.path} was begun with {name} {noted[name]}, but now it is {value}: "
                    "give back what it was, or choose another `out` for a new run."
                )
        noted.update(facts)
        if _is_main():
            write_json(self.path / "run.json", self._facts)

    def discard(self) -> None:
        """After a mistake that stopped a new run before its first row: leave nothing of it behind."""
        if any(self.path.glob("checkpoints/step-*")) or (self.path / "metrics.jsonl").exists():
            return
        for path in self._new:
            with contextlib.suppress(OSError):  # a folder that holds something else by now stays
                path.rmdir() if path.is_dir() else path.unlink()

    def finish(self, write_model: Callable[[Path], None]) -> None:
        """Write OUT/model in one go; call on rank 0 alone, with what writes the final weights."""
        with atomic_folder(self.model) as temporary:
            write_model(temporary)


def _resolved(file: Path, config: RunConfig) -> dict[str, Any]:
    """The config of an earlier call; keys that came with a later version have their defaults."""
    old = yaml.safe_load(file.read_text(encoding="utf-8"))
    with contextlib.suppress(UserError):  # it has keys that are gone, or values that are refused now
        return to_dict(build_config(type(config), old))
    return old


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _circumstances() -> dict[str, Any]:
    """The command, the code and the machine of this call."""
    return {
        "command": shlex.join(sys.argv),
        "git": git_hash(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ranks": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def git_hash() -> str | None:
    """The commit of the checkout this code runs from ("+": files were changed); None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit, changed = (
            subprocess.run(
                [*git, *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
        return commit + ("+" if changed else "")
    return None
