"""Odd environments: variables that a scheduler left, no home, a deleted working folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.core import distributed
from open_unitok.core.errors import UserError

ROOT = Path(__file__).parents[1]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables) sets exactly these of a launcher's."""
    monkeypatch.setattr(distributed, "process_group", lambda: None)

    def change(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3"}, (0, 1)),  # no launch
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"WORLD_SIZE": "8"}, "RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, (3, 8)),
        ({"RANK": "8", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "from 0 to 7"),
        ({"RANK": "a", "WORLD_SIZE": "8", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ],
)
def test_ranks(environment, variables, expected):
    environment(**variables)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            distributed.rank()
        return
    assert (distributed.rank(), distributed.world_size()) == expected
    assert distributed.under_launcher() == (expected[1] > 1)


def test_a_command_outside_a_launch_does_all_or_nothing(environment, tmp_path, capsys):
    command = ["generate", "a red circle", "--model", "scenes", "--out", str(tmp_path)]
    environment(RANK="3", WORLD_SIZE="8")
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    environment(RANK="3")
    main(command)
    assert len(list(tmp_path.glob("0*.png"))) == 1


PROGRAM = "import sys; sys.path[:0] = [sys.argv.pop(1)]; from open_unitok.cli.main import main; main()"
# what the standard library finds for a user without an entry in /etc/passwd
NAMELESS = """
import os, pwd

def getpwuid(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = getpwuid
"""


def test_without_home_and_passwd_entry(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    # a command that compiles nothing: there is no cache to keep it in
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    command = [sys.executable, "-c", NAMELESS + PROGRAM, str(ROOT), "reconstruct", "a.png", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out"]


def test_in_a_deleted_working_folder(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = ["sh", "-c", 'cd "$1" && rmdir "$1" && shift && exec "$@"', "sh", str(gone)]
    command += [sys.executable, "-c", PROGRAM, str(ROOT), "generate", "a star", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "The working folder does not exist any more" in done.stderr
