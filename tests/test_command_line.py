"""The front door and the `unitok` command: light imports, public names, help and unknown commands."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run_command(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=240)


def run_python(code: str, cwd: pathlib.Path = ROOT) -> str:
    result = run_command("-c", code, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_front_door_imports_nothing_heavy():
    loaded = json.loads(
        run_python(
            "import json, sys, open_unitok, open_unitok.cli.main; print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert not {"torch", "transformers", "numpy"} & set(loaded)


def test_public_names_resolve_and_unknown_ones_do_not():
    import open_unitok

    for name in open_unitok.__all__:
        assert getattr(open_unitok, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = open_unitok.no_such_name


def test_help_of_every_command_loads_no_torch():
    """It would take seconds; all in one process, as a new one per command would too."""
    code = """
import sys
from open_unitok.cli.main import COMMANDS, main
for name in COMMANDS:
    try:
        main([*name.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    print(name, sorted({"torch", "torchvision", "transformers", "deepspeed", "pandas"} & sys.modules.keys()))
"""
    from open_unitok.cli.main import COMMANDS

    lines = run_python(code).splitlines()
    for name, line in COMMANDS.items():
        assert f"{name} []" in lines, f"{name} --help loads a heavy package"
        assert any(found.startswith(f"usage: unitok {name} ") for found in lines)
        assert len(line) < 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tran", "x.yaml"], "Did you mean 'train'"),
        (["eval", "rum"], "Did you mean 'run'"),
        (["data", "x"], "scenes"),
    ],
)
def test_unknown_commands_are_one_line_and_exit_2(arguments, words):
    result = run_command("-m", "open_unitok", *arguments)
    assert result.returncode == 2
    assert words in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


def test_help_lists_every_command_with_one_line():
    from open_unitok.cli.main import COMMANDS

    result = run_command("-m", "open_unitok", "--help")
    assert result.returncode == 0
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name}\s+{re.escape(line)}$", result.stdout, re.MULTILINE)
