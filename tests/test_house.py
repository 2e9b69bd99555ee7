"""The layout holds: packages listed, imports point left, inference stays light, the front door is lazy."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ["tokenizer", "mllm", "generation", "training", "eval"]
# package -> the packages it may import from, beside open_unitok.core; configs is data
MAY_IMPORT = {
    "tokenizer": set(),
    "mllm": {"tokenizer"},
    "generation": {"tokenizer", "mllm"},
    "training": {"tokenizer", "mllm", "configs"},
    "eval": {"tokenizer", "mllm", "generation", "configs"},
}
# rooms of a package, from left to right: a room imports from itself, from rooms left of it
ROOMS = {
    "tokenizer": [],
    "mllm": [],
    "generation": [],
    "training": [{"core"}, {"data"}, {"tokenizer", "mllm", "scenes"}],
    "eval": [{"core"}, {"metrics", "judges"}, {"understanding", "generation", "tokenizer"}],
}


def imports_of(path: pathlib.Path) -> list[tuple[int, str]]:
    """(level, dotted module) of every import statement in the file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole = module in ("", "open_unitok")  # `from open_unitok import files` names the module last
            found += [(node.level, f"{module}.{a.name}" if whole else module) for a in node.names]
    return found


@pytest.mark.parametrize("room", PACKAGES)
def test_imports_point_left(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for level, module in imports_of(file):
            where = f"{file.relative_to(ROOT)} imports {module}"
            if level:
                assert level <= len(file.relative_to(ROOT / room).parts), f"{where}: out of the room"
            elif module.split(".")[0] == "open_unitok":
                target = module.split(".")[1] if "." in module else ""
                assert target == room or target in {"core", "__version__"} | MAY_IMPORT[room], where
            else:
                assert module.split(".")[0] not in [*PACKAGES, "configs"], f"{where}: a second copy"


def test_core_imports_nothing_of_ours():
    for file in sorted((ROOT / "open_unitok" / "core").glob("*.py")):
        for level, module in imports_of(file):
            assert level < 2 and not module.startswith("open_unitok"), f"{file.name} imports {module}"


def test_pyproject_lists_every_package_folder():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for top in ["open_unitok", *PACKAGES, "configs"]:
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            parts = folder.parts if top == "open_unitok" else ("open_unitok", *folder.parts)
            folders[".".join(parts)] = folder.as_posix()
    assert sorted(settings["packages"]) == sorted(folders)
    assert settings["package-dir"] == folders


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


def test_doctor_reports_versions_and_costs(capsys):
    from open_unitok import doctor
    from open_unitok.cli import doctor as doctor_command

    doctor_command.run(None)
    out = capsys.readouterr().out
    assert "free memory" in out and "torch" in out and "flash-attn" in out
    assert set(doctor.tested_versions()) >= {"torch", "deepspeed", "transformers"}


def test_doctor_says_what_each_missing_thing_costs(monkeypatch):
    import torch

    from open_unitok import doctor
    from open_unitok.core import devices

    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    find_spec = doctor.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(doctor.shutil, "which", lambda name: None)
        assert {c.name: c.cost for c in doctor.speed()}["deepspeed ops"].startswith("CPU offload")
        patch.setattr(doctor, "available_memory", lambda: 1.0e9)
        patch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3e8))
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        patch.setattr(devices, "bf16_in_hardware", lambda: False)
        patch.setattr(doctor, "importable", lambda name: False)
        patch.setattr(
            doctor.importlib.util, "find_spec", lambda n, *a: None if n == "deepspeed" else find_spec(n, *a)
        )
        patch.setattr(doctor.importlib.metadata, "version", absent)
        patch.delenv("GOMP_SPINCOUNT", raising=False)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        costs = {c.name: c.cost for c in (*doctor.versions(), *doctor.machine(), *doctor.speed())}
    said = {
        "free memory": "1.5 GB",
        "free disk": "0.4 GB",
        "gpu": "paper-scale training",
        "bf16": "fp32",
        "flash-attn": "SDPA",
        "deepspeed": "open-unitok[train]",
        "OpenMP waiting": "third of their speed",
        "torch": "tested with",
    }
    for name, words in said.items():
        assert words in costs[name], (name, costs[name])


def test_cached_files_are_free_memory_in_a_container(tmp_path):
    from open_unitok import doctor

    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("6000\n")
    used.write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 3500\nactive_file 600\n")
    assert doctor.left_in_container(limit, used, "inactive_file") == 4500
    limit.write_text("max\n")
    assert doctor.left_in_container(limit, used, "inactive_file") > 2**60


def test_no_file_names_a_path_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "pyproject.toml" in tracked
    for name in filter(None, tracked.split("\n")):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".yml", ""} and path.is_file():
            assert not re.search(r"(?<![\w.])/(?:work|root)/", path.read_text(errors="ignore")), name
