"""Checkpoints are complete or absent: pruning, kills during a save, damage, signals."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.training.core.checkpoint import Checkpoints, find_damage
from open_unitok.training.core.options import CheckpointOptions


class Engine:
    """Saves and loads a file as DeepSpeed does."""

    def __init__(self, value=0.0):
        self.value = torch.tensor(value)

    def save_checkpoint(self, folder, tag, save_latest):
        os.makedirs(f"{folder}/{tag}")
        torch.save(self.value, f"{folder}/{tag}/states.pt")

    def load_checkpoint(self, folder, tag):
        self.value = torch.load(f"{folder}/{tag}/states.pt")


def write_model(path):
    (path / "config.json").write_text("{}")


def save(folder, step, keep=2, value=1.0, **state):
    checkpoints = Checkpoints(folder, CheckpointOptions(keep=keep))
    return checkpoints.save(step, write_model, {"model": Engine(value)}, state)


def test_round_trip_and_pruning(tmp_path):
    torch.manual_seed(7)
    for step in (5, 10, 15):
        save(
            tmp_path,
            step,
            value=float(step),
            batches={"position": step, "rows": [1, 2]},
            weights=torch.ones(2),
        )
    sampled = torch.rand(3)
    assert sorted(os.listdir(tmp_path)) == ["step-00000010", "step-00000015"]
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None and latest.name == "step-00000015" and (latest / "config.json").exists()
    engine = Engine()
    state = Checkpoints(tmp_path).restore(latest, {"model": engine})
    assert state["step"] == 15 and state["batches"] == {"position": 15, "rows": [1, 2]}
    assert engine.value == 15.0 and torch.equal(torch.rand(3), sampled)


def test_a_new_run_has_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_temporary_folders_are_ignored(tmp_path):
    save(tmp_path, 5)
    (tmp_path / ".step-00000010.tmp" / "training_state").mkdir(parents=True)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None and latest.name == "step-00000005"
    save(tmp_path, 10)
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000010"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-3])


def flip_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: truncate(p / "training_state/model/states.pt"), "bytes instead of"),
        (lambda p: flip_byte(p / "training_state/rank-00000.pt"), "rank-00000.pt has changed"),
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "training_state/manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: truncate(p / "training_state/manifest.json"), "manifest.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_rejected(tmp_path, damage, words):
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    with pytest.raises(UserError, match=words) as error:
        Checkpoints(tmp_path).latest()
    assert "step-00000010 is broken" in str(error.value) and "resume from step-00000005" in str(error.value)
    assert find_damage(tmp_path / "step-00000005") is None


def test_another_number_of_ranks_is_rejected(tmp_path):
    path = save(tmp_path, 5)
    file = path / "training_state/rank-00000.pt"
    for rank in range(4):
        torch.save(torch.load(file, weights_only=True) | {"ranks": 4}, file.with_name(f"rank-{rank:05d}.pt"))
    with pytest.raises(UserError, match=r"written by 4 rank\(s\): resume it on 4"):
        Checkpoints(tmp_path).restore(path, {})


def test_an_error_during_a_save_keeps_the_last_checkpoint(tmp_path):
    save(tmp_path, 5)

    def fail(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Checkpoints(tmp_path).save(10, fail, {"model": Engine()}, {})
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None and latest.name == "step-00000005"


def test_kill_during_a_save(tmp_path):
    """kill -9 at four moments: the last complete checkpoint is found each time, and a new save succeeds."""
    save(tmp_path, 5)
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from open_unitok.training.core import checkpoint
        moment = sys.argv[2]
        kill = lambda *a, **k: os.kill(os.getpid(), 9)
        if moment == "write_manifest": checkpoint.write_manifest = kill
        if moment == "rename": checkpoint.os.replace = kill
        class Engine:
            def save_checkpoint(self, folder, tag, save_latest):
                os.makedirs(f"{folder}/{tag}"); open(f"{folder}/{tag}/x", "w").write("x")
                if moment == "engine": kill()
        write = kill if moment == "model" else (lambda path: (path / "config.json").write_text("{}"))
        checkpoint.Checkpoints(Path(sys.argv[1])).save(10, write, {"model": Engine()}, {})
    """)
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "x" / moment), moment])
        for moment in ("model", "engine", "write_manifest", "rename")
    ]
    for moment in ("model", "engine", "write_manifest", "rename"):
        save(tmp_path / "x" / moment, 5)
    for process, moment in zip(running, ("model", "engine", "write_manifest", "rename")):
        assert process.wait(120) == -signal.SIGKILL
        latest = Checkpoints(tmp_path / "x" / moment).latest()
        assert latest is not None and latest.name == "step-00000005", moment
        save(tmp_path / "x" / moment, 10)
        assert sorted(os.listdir(tmp_path / "x" / moment)) == ["step-00000005", "step-00000010"]
