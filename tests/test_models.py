"""Models by name: a shipped one is found unless a model of that name lies in the current folder."""

import pathlib

import pytest

from open_unitok.cli.main import main
from open_unitok.core import files


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A models folder with the model "small", and an empty folder to be in."""
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


def test_a_model_of_the_same_name_here_comes_first_but_another_folder_does_not(shipped):
    pathlib.Path("small").mkdir()
    assert files.model_path("small") == shipped
    pathlib.Path("small/config.json").write_text("{}")
    assert files.model_path("small") == files.tokenizer_path("small") == pathlib.Path("small")


@pytest.mark.parametrize("folder_here", [False, True])
def test_the_default_model_says_what_to_do_where_a_copy_lacks_it(shipped, capsys, folder_here):
    if folder_here:
        pathlib.Path("scenes").mkdir()  # data, for instance
    pathlib.Path("x.png").touch()
    for command in (["generate", "a star"], ["reconstruct", "x.png"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--out", "drawings"])
        told = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and "\n" not in told
        assert "make model" in told and "--model runs/scenes/model" in told
    assert not pathlib.Path("drawings").exists()
