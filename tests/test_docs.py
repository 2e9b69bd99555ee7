"""The documentation site builds without a warning and has every public name of the six packages."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys
import zlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("tokenizer", "mllm", "generation", "training", "eval")


def public_names() -> set[str]:
    """Dotted names of all public functions, classes and constants of the package."""
    found = set()
    for folder in ("open_unitok", *PACKAGES):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if folder == "open_unitok" else ("open_unitok", *parts)
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if module == "open_unitok.__main__":
                continue
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                names = [getattr(node, "name", None)]
                if isinstance(node, ast.Assign):
                    names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                found |= {f"{module}.{name}" for name in names if name and not name.startswith("_")}
    return found


def test_every_package_has_a_page():
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    listed = {line.removeprefix("::: ") for page in pages for line in page.splitlines() if line[:4] == "::: "}
    front = {
        f"open_unitok.{file.stem}" for file in (ROOT / "open_unitok").glob("*.py") if file.stem[0] != "_"
    }
    front |= {f"open_unitok.{file.parent.name}" for file in (ROOT / "open_unitok").glob("*/__init__.py")}
    assert front | {f"open_unitok.{name}" for name in PACKAGES} <= listed | {"open_unitok.models"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_has_every_public_name(tmp_path):
    layout = tmp_path / "layout" / "open_unitok"
    layout.mkdir(parents=True)
    for source in (*(ROOT / "open_unitok").iterdir(), *(ROOT / name for name in (*PACKAGES, "configs"))):
        (layout / source.name).symlink_to(source)
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("build/layout", str(layout.parent)).replace(
        "docs_dir: docs", f"docs_dir: {ROOT}/docs"
    )
    (tmp_path / "mkdocs.yml").write_text(
        config.replace("build/docs", str(tmp_path / "site")), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "-f",
        str(tmp_path / "mkdocs.yml"),
    ]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=quiet, timeout=600)
    assert built.returncode == 0, built.stderr
    inventory = (tmp_path / "site" / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory.split(b"zlib.\n", 1)[1]).decode()
    names = {line.split(" ")[0] for line in listed.splitlines()}
    assert not public_names() - names
