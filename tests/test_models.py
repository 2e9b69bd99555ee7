"""Model names: a shipped model is found unless the current folder has a model of that name."""

import pathlib

import pytest

from open_unitok.cli.main import main
from open_unitok.core import files


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A models folder with the model "small"; the current folder is empty."""
    for folder in ("small", "small/unitok"):
        (tmp_path / "models" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / folder / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "SHIPPED_MODELS", tmp_path / "models")
    return tmp_path / "models" / "small"


def test_a_shipped_model_is_found_by_its_name(shipped):
    assert files.model_path("small") == shipped
    assert files.tokenizer_path("small") == shipped / "unitok"
    assert files.model_path("large") == pathlib.Path("large")
    assert files.model_path("owner/small") == pathlib.Path("owner/small")
    assert files.model_path("..") == pathlib.Path("..") and files.model_path("") == pathlib.Path("")


def test_a_local_model_wins_over_a_shipped_one_but_another_folder_does_not(shipped):
    pathlib.Path("small").mkdir()
    assert files.model_path("small") == shipped
    pathlib.Path("small/config.json").write_text("{}")
    assert files.model_path("small") == files.tokenizer_path("small") == pathlib.Path("small")


@pytest.mark.parametrize("folder_here", [False, True])
def test_a_missing_default_model_says_what_to_do(shipped, capsys, folder_here):
    if folder_here:
        pathlib.Path("scenes").mkdir()  # e.g. data
    pathlib.Path("x.png").touch()
    for command in (["generate", "a star"], ["reconstruct", "x.png"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--out", "images"])
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in error
        assert "make model" in error and "--model runs/scenes/model" in error
    assert not pathlib.Path("images").exists()
