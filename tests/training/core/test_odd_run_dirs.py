"""Run directories with damaged files: one line, or the damaged records are dropped."""

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.core.metric_logger import MetricLogger
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.run import load_run_config


@pytest.fixture
def run_dir(tmp_path):
    """(config, folder) of a run with a checkpoint."""
    config = load_run_config("configs/demo/tokenizer.yaml", [f"out={tmp_path / 'run'}"])
    RunDir.open(config)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return config, tmp_path / "run"


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe\0", b"[1, 2]", b"{", b"null", b"3", b"!!python/object/apply:os.system [touch ran]"],
)
def test_odd_files_end_in_one_line(name, data, run_dir, monkeypatch):
    config, folder = run_dir
    monkeypatch.chdir(folder.parent)
    (folder / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        RunDir.open(config)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert not (folder.parent / "ran").exists()


def test_odd_metrics_are_dropped(run_dir):
    config, folder = run_dir
    good = b'{"step": 1, "loss": 2.0}\n'
    odd = [
        b"\xff\xfe\n",
        b"[1]\n",
        b"3\n",
        b"{}\n",
        b'{"step": null}\n',
        b'{"step": "x"}\n',
        b'{"step": [1]}\n',
        b'{"st',
    ]
    (folder / "metrics.jsonl").write_bytes(good + b"".join(odd))
    logger = MetricLogger(RunDir.open(config), 10, 1, 1, "test", quiet=True)
    logger.start(1)
    assert (folder / "metrics.jsonl").read_bytes() == good
