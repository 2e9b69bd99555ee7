"""Only modules of the package are importable: from a checkout, an editable install and a wheel."""

import json
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("tokenizer", "mllm", "generation", "training", "eval", "configs")
# Run without site-packages, so that nothing else provides the package; these modules need nothing installed.
PROBE = """
import importlib, json, sys
if sys.argv[1:] == ["pth"]:
    import site
    site.addsitedir(sys.path[1])
found = {}
for name in ("open_unitok.core.errors", "open_unitok.cli.main", "open_unitok.training", "open_unitok.eval",
             "open_unitok.configs", "open_unitok.open_unitok", "open_unitok.open_unitok.core.errors",
             "open_unitok.tests", "open_unitok.benchmarks", "open_unitok.docs"):
    try:
        found[name] = importlib.import_module(name).__file__ or "namespace"
    except ModuleNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
PART_OF_IT = {
    "open_unitok.core.errors",
    "open_unitok.cli.main",
    "open_unitok.training",
    "open_unitok.eval",
    "open_unitok.configs",
}


def importable(place: pathlib.Path, cwd: pathlib.Path, *arguments: str) -> set[str]:
    """The names of PROBE that can be imported where `place` is the only entry that holds the package."""
    code = f"import sys; sys.path.insert(1, {str(place)!r})\n{PROBE}"
    command = [sys.executable, "-S", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=60)
    assert result.returncode == 0, result.stderr
    return {name for name, file in json.loads(result.stdout).items() if file is not None}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    """A copy of the tracked files, since a build writes into its folder."""
    target = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/golden", "docs/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def unpacked(source: pathlib.Path, kind: str, target: pathlib.Path) -> pathlib.Path:
    """What pip would put into site-packages: the contents of the wheel of this kind."""
    (target / "dist").mkdir()
    # In a process of its own: setuptools changes the working folder, and warns with private classes.
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target / 'dist')!r})"
    built = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=source, timeout=240
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (target / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target / "site")
    return target / "site"


def test_a_checkout(tmp_path):
    assert importable(ROOT, cwd=tmp_path) == PART_OF_IT
    assert importable(ROOT, cwd=ROOT) == PART_OF_IT


def test_a_wheel(source, tmp_path):
    site = unpacked(source, "wheel", tmp_path)
    assert importable(site, cwd=tmp_path) == PART_OF_IT
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"open_unitok"}
    for file in (
        "py.typed",
        "configs/demo/tokenizer.yaml",
        "configs/constraints.txt",
        "models/scenes/model.safetensors",
        "models/scenes/unitok/model.safetensors",
        "models/scenes/replay/codes-000000.tar.xz",
        "models/scenes/replay/replay.json",
        "models/emoji/model.safetensors",
        "models/emoji/unitok/model.safetensors",
        "models/emoji/licenses/CC-BY-4.0.txt",
        "generation/ui/page.css",
        "eval/core/data/imagenet_classes.json",
    ):
        assert (site / "open_unitok" / file).exists(), file
    assert list((site / "open_unitok" / "generation" / "backends").glob("*.cpp"))


def test_an_editable_install(source, tmp_path):
    site = unpacked(source, "editable", tmp_path)
    assert list(site.glob("*.pth"))
    assert importable(site, tmp_path, "pth") == PART_OF_IT


def test_pyproject_lists_every_package_folder():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {}
    for top in ("open_unitok", *PACKAGES):
        for init in (ROOT / top).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT)
            parts = folder.parts if top == "open_unitok" else ("open_unitok", *folder.parts)
            folders[".".join(parts)] = folder.as_posix()
    assert sorted(settings["packages"]) == sorted(folders)
    assert settings["package-dir"] == folders
