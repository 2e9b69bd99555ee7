"""Models by name: a shipped one is found unless a model of that name lies in the current folder."""

import pathlib

import pytest

from open_unitok import files


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A models folder with the model "small", and an empty folder to be in."""
    for folder in ("small", "small/unitok"):
        (tmp_path / "models" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / folder / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "MODELS", tmp_path / "models")
    return tmp_path / "models" / "small"


def test_a_shipped_model_is_found_by_its_name(shipped):
    assert files.model_path("small") == shipped
    assert files.tokenizer_path("small") == shipped / "unitok"
    assert files.model_path("large") == pathlib.Path("large")
    assert files.model_path("owner/small") == pathlib.Path("owner/small")
    assert files.model_path("..") == pathlib.Path("..") and files.model_path("") == pathlib.Path("")


def test_a_model_of_the_same_name_here_comes_first_but_another_folder_does_not(shipped):
    pathlib.Path("small").mkdir()
    assert files.model_path("small") == shipped
    pathlib.Path("small/config.json").write_text("{}")
    assert files.model_path("small") == files.tokenizer_path("small") == pathlib.Path("small")
