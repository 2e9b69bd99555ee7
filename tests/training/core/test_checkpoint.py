"""Checkpoints are complete or absent: pruning, kills during a save, damage, signals."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict

import pytest
import torch

from open_unitok.core.errors import StorageError, UserError
from open_unitok.training.core.checkpoint import Checkpoints
from open_unitok.training.core.options import CheckpointOptions
from open_unitok.training.core.saving import integrity
from open_unitok.training.core.saving.background import to_host
from open_unitok.training.core.saving.integrity import find_damage


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


@pytest.mark.parametrize("background", [False, True])
def test_kill_during_a_save(tmp_path, background):
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
        options = checkpoint.CheckpointOptions(background=sys.argv[3] == "True")
        with checkpoint.Checkpoints(Path(sys.argv[1]), options) as checkpoints:
            later = lambda path: lambda: write(path)
            checkpoints.save(10, write, {"model": Engine()}, {}, snapshot_model=later)
    """)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "x" / moment), moment, str(background)]
        )
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


# ---- in the background -------------------------------------------------------------------------------------

BACKGROUND = CheckpointOptions(background=True)


class SlowEngine:
    """Hands its state to `checkpoint_engine.save`, as DeepSpeed does; that waits for `go`."""

    def __init__(self):
        self.checkpoint_engine = self
        self.go, self.value, self.saving = threading.Event(), torch.zeros(3), 0

    def save_checkpoint(self, folder, tag, save_latest, **_):
        os.makedirs(f"{folder}/{tag}")
        self.checkpoint_engine.save({"value": self.value}, f"{folder}/{tag}/states.pt")

    def save(self, state, path):
        self.saving += 1
        assert self.saving == 1, "two saves at a time"
        assert self.go.wait(60)
        torch.save(state, path)
        self.saving -= 1


def test_a_background_save_keeps_the_values_of_its_step(tmp_path):
    """Training goes on while it is written; until it is whole, the earlier checkpoint is the latest."""
    save(tmp_path, 5)
    engine, weights = SlowEngine(), torch.zeros(2)
    checkpoints = Checkpoints(tmp_path, BACKGROUND)

    def snapshot(path):
        kept = to_host(weights)
        return lambda: torch.save(kept, path / "weights.pt")

    path = checkpoints.save(10, fail, {"model": engine}, {"numbers": weights}, snapshot_model=snapshot)
    engine.value += 1
    weights += 1
    assert not path.exists() and Checkpoints(tmp_path).latest().name == "step-00000005"
    assert not checkpoints.due(11)
    engine.go.set()
    checkpoints.wait()
    assert Checkpoints(tmp_path).latest() == path and sorted(os.listdir(tmp_path)) == [
        "step-00000005",
        "step-00000010",
    ]
    for name in ("weights.pt", "training_state/model/states.pt", "training_state/rank-00000.pt"):
        state = torch.load(path / name, weights_only=True)
        values = state if name == "weights.pt" else state.get("value", state.get("numbers"))
        assert not values.any(), name
    assert not (path / ".hashes").exists()


def fail(path):
    raise AssertionError("not in the background")


def test_a_second_save_waits_for_the_first(tmp_path):
    engine = SlowEngine()
    with Checkpoints(tmp_path, BACKGROUND) as checkpoints:
        checkpoints.save(1, lambda path: None, {"model": engine}, {})
        threading.Timer(0.3, engine.go.set).start()
        checkpoints.save(2, lambda path: None, {"model": engine}, {})
        assert checkpoints.latest().name == "step-00000001"
    # the end of the context waits for the second
    assert Checkpoints(tmp_path).latest().name == "step-00000002"


@pytest.mark.parametrize("at", ["due", "save", "end"])
def test_errors_in_the_background_are_raised_in_training(tmp_path, at, monkeypatch):
    save(tmp_path, 5)
    engine = SlowEngine()

    def full(state, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.save = full
    checkpoints = Checkpoints(tmp_path, BACKGROUND)
    checkpoints.save(10, lambda path: None, {"model": engine}, {})
    checkpoints._writing._thread.join()
    with pytest.raises(StorageError, match=r"No space left .*Last good checkpoint: step 5") as error:
        if at == "due":
            checkpoints.due(11)
        elif at == "save":
            checkpoints.save(12, lambda path: None, {}, {})
        else:
            with checkpoints:
                pass
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["step-00000005"]


def test_an_error_of_training_waits_for_the_checkpoint_and_stays(tmp_path):
    engine = SlowEngine()
    with pytest.raises(UserError, match="not finite"), Checkpoints(tmp_path, BACKGROUND) as checkpoints:
        checkpoints.save(1, lambda path: None, {"model": engine}, {})
        threading.Timer(0.2, engine.go.set).start()
        raise UserError("Step 2 is not finite")
    assert Checkpoints(tmp_path).latest().name == "step-00000001"


def test_copies_on_the_host():
    tied, other = torch.arange(4.0), torch.arange(6).view(2, 3).T
    state = OrderedDict(a=tied, b=[tied, {"c": other}], n=(1, "x"), empty=torch.empty(0))
    state._metadata = {"": {"version": 1}}
    copied = to_host(state)
    tied += 1
    assert copied["a"].equal(torch.arange(4.0)) and copied["b"][0] is copied["a"]
    assert copied["b"][1]["c"].equal(other) and copied["n"] == (1, "x")
    assert copied._metadata == {"": {"version": 1}} and type(copied) is OrderedDict
    assert copied["b"][1]["c"].stride() == other.stride()


# ---- shares of ranks ---------------------------------------------------------------------------------------


@pytest.fixture
def of_three(tmp_path):
    """A checkpoint as three ranks would write it."""
    for name in ("model.safetensors", "training_state/mllm/mp_rank_00_model_states.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for rank in range(3):
        for name in (f"rank-{rank:05d}.pt", f"mllm/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"):
            (tmp_path / "training_state" / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_file_is_hashed_by_one_rank(of_three, ranks, monkeypatch):
    """At saving by the one that wrote it; at resume on other numbers of ranks the files are divided too."""
    read = []
    original = integrity.sha256
    monkeypatch.setattr(integrity, "sha256", lambda file: read.append(file.name) or original(file))
    shares = [integrity.hash_files(of_three, rank, ranks) for rank in range(ranks)]
    assert len(read) == sum(map(len, shares)) == 8
    if ranks == 3:
        for rank in (1, 2):
            assert set(shares[rank]) == {
                f"training_state/rank-{rank:05d}.pt",
                f"training_state/mllm/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            }
    files = {name: facts for share in shares for name, facts in share.items()}
    integrity.write_manifest(of_three, files)
    read.clear()
    assert [find_damage(of_three, rank, ranks) for rank in range(ranks)] == [None] * ranks
    assert sorted(read) == sorted(name.rpartition("/")[2] for name in files)
    # a tampered file of any rank is found by one of them, and named
    for name in files:
        whole = (of_three / name).read_bytes()
        flip_byte(of_three / name)
        found = [find_damage(of_three, rank, ranks) for rank in range(ranks)]
        assert [problem for problem in found if problem] == [f"{name} has changed since it was written"]
        (of_three / name).write_bytes(whole)
