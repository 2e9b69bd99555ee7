"""Runs that are killed, share a folder, or fill the disk: nothing is lost, doubled or left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from open_unitok.cli import train as train_command
from open_unitok.cli.main import main
from open_unitok.core.errors import StorageError, UserError
from open_unitok.training.core import checkpoint
from open_unitok.training.core.checkpoint import Checkpoints
from open_unitok.training.core.metric_logger import MetricLogger
from open_unitok.training.core.options import CheckpointOptions, RunConfig
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.data.prefetch import prefetch
from open_unitok.training.scenes import dataset
from open_unitok.training.scenes.config import SceneConfig


def run_config(out):
    return RunConfig(stage="tokenizer", out=str(out), steps=8, batch_size=12)


# ---- one run per folder ------------------------------------------------------------------------------------

HOLD = """
import sys, time
from open_unitok.training.core.options import RunConfig
from open_unitok.training.core.run_dir import RunDir
run_dir = RunDir.open(RunConfig(stage="tokenizer", out=sys.argv[1], steps=8, batch_size=12))
print("open", flush=True)
time.sleep(600)
"""


def test_a_second_run_in_a_folder_is_one_line_until_the_first_is_killed(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"open\n"
        with pytest.raises(UserError, match=f"Another training run runs in {out}"):
            RunDir.open(run_config(out))
        first.kill()
    RunDir.open(run_config(out)).close()


def test_leftovers_of_killed_writes_are_removed_at_start(tmp_path):
    out = tmp_path / "run"
    (out / ".model.123.tmp").mkdir(parents=True)
    (out / ".model.123.tmp" / "model.safetensors").write_bytes(b"x")
    (out / ".metrics.jsonl.123.tmp").write_bytes(b"x")
    (out / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    RunDir.open(run_config(out)).close()
    assert sorted(p.name for p in out.iterdir()) == [".lock", "checkpoints", "config.yaml", "run.json"]
    assert not list((out / "checkpoints").iterdir())
    (out / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    Checkpoints(out / "checkpoints").save(5, lambda path: None, {}, {})
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]


# ---- checkpoints by time -----------------------------------------------------------------------------------


def test_checkpoints_by_steps_and_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, CheckpointOptions(every=100, every_minutes=5))
    assert not checkpoints.due(1) and checkpoints.due(100)
    now[0] = 299.0
    assert not checkpoints.late()
    now[0] = 300.0
    assert checkpoints.late()
    checkpoints.save(102, lambda path: None, {}, {})
    assert not checkpoints.late()
    assert not Checkpoints(tmp_path, CheckpointOptions(every=100)).late()
    with pytest.raises(UserError, match="every_minutes must be above 0"):
        CheckpointOptions(every_minutes=0).check()


# ---- disk full ---------------------------------------------------------------------------------------------


def fill(number):
    def write(path):
        (path / "weights").write_bytes(b"x" * 1000)
        raise OSError(number, os.strerror(number))

    return write


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_names_the_last_step_and_the_space(tmp_path, number):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, lambda path: (path / "weights").write_bytes(b"x" * 3_000_000), {}, {})
    with pytest.raises(StorageError, match=r"needs about 3 MB, .* MB are free. Last good checkpoint: step 5"):
        checkpoints.save(10, fill(number), {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert StorageError.exit_code == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("PytorchStreamWriter failed writing file"), OSError(28, "full")]
)
def test_errors_of_torch_on_a_full_disk_are_recognised(tmp_path, monkeypatch, error):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    def fail(path):
        raise error

    with pytest.raises(StorageError, match="Last good checkpoint: none"):
        Checkpoints(tmp_path).save(10, fail, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_and_leave_nothing(tmp_path):
    def fail(path):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Checkpoints(tmp_path).save(10, fail, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_metrics_on_a_full_disk_end_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    config = run_config(tmp_path / "run")
    monkeypatch.setattr(train_command, "load_run_config", lambda *_: config)

    def stage(config, run_dir):
        (run_dir.path / "metrics.jsonl").write_text("{}\n")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(sys.modules, "open_unitok.training.full_disk", SimpleNamespace(main=stage))
    monkeypatch.setitem(train_command.TRAINING_STAGES, "tokenizer", ("", "", "full_disk"))
    with pytest.raises(SystemExit) as caught:
        main(["train", "x.yaml"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error and "to resume" in error


# ---- metrics -----------------------------------------------------------------------------------------------


def logger(tmp_path):
    run_dir = SimpleNamespace(path=tmp_path, checkpoints=tmp_path / "checkpoints")
    return MetricLogger(run_dir, 5, 2, 1, "test", quiet=True)


def steps(tmp_path):
    return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_kill_after_the_last_record_does_not_double_it(tmp_path):
    log = logger(tmp_path)
    log.start(0)
    for step in range(1, 6):
        log.add(step, {"loss": torch.tensor(float(step))})
    state = log.state_dict()  # the checkpoint of step 5; its metrics are recorded after it
    log.flush()
    log.close()
    assert steps(tmp_path) == [2, 4, 5]
    again = logger(tmp_path)
    again.load_state_dict(state)
    again.start(5)
    again.flush()
    again.close()
    assert steps(tmp_path) == [2, 4, 5]


def test_odd_lines_of_metrics_are_dropped(tmp_path):
    lines = [
        b'{"step": 2}',
        b"[]",
        b"3",
        b'{"step": "x"}',
        b"\xff\xfe",
        b'{"step": 9}',
        b'{"step": 3}',
        b'{"st',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    log = logger(tmp_path)
    log.start(4)
    log.close()
    assert steps(tmp_path) == [2, 3]


# ---- workers -----------------------------------------------------------------------------------------------

PARENT = """
import multiprocessing, sys, time
from open_unitok.core.processes import die_with_parent
from torch.utils.data import DataLoader, IterableDataset
class Endless(IterableDataset):
    def __iter__(self):
        import os
        while True:
            yield os.getpid()
loader = DataLoader(Endless(), batch_size=None, num_workers=2, worker_init_fn=die_with_parent,
                    multiprocessing_context="fork")
found = iter(loader)
print(next(found), next(found), flush=True)
time.sleep(600)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(number):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(set(workers)) == 2 and all(map(alive, workers))
        parent.send_signal(number)
        parent.wait(30)
        until = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < until:
            time.sleep(0.05)
    assert not any(map(alive, workers))


class Steps:
    """Steps whose worker ends at the third, as if the kernel had killed it."""

    seen = bad = number = 0
    counts = np.zeros(2)

    def build(self):
        self.number += 1
        if self.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    def skip(self):
        pass


def test_a_killed_worker_is_one_line():
    with pytest.raises(UserError, match=r"A data worker was killed .*: run the same command again"):
        for _ in zip(range(9), prefetch(Steps(), 1)):
            pass


# ---- scenes ------------------------------------------------------------------------------------------------


def test_scenes_killed_while_old_ones_are_removed(tmp_path, monkeypatch):
    out, old = tmp_path / "scenes", SceneConfig(train=6, test=4, text_lines=20, vocabulary=320)
    new = SceneConfig(train=6, test=4, text_lines=20, vocabulary=320, seed=5)
    assert dataset.write_scenes(old, out, progress=False)
    whole = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    remove = dataset.shutil.rmtree

    def killed(path, *args, **kwargs):
        remove(path, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_scenes(new, out, overwrite=True, progress=False)
    monkeypatch.setattr(dataset.shutil, "rmtree", remove)
    # the old settings again: what is missing is written anew
    assert dataset.write_scenes(old, out, progress=False)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == whole
