"""Checkpoints and run directories from elsewhere: no code runs, and each fault is one line."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256
from open_unitok.training.core.checkpoint import Checkpoints
from open_unitok.training.core.options import RunConfig
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.core.saving.integrity import (
    CHECKPOINT_MANIFEST,
    check_complete,
    check_pickles,
    find_damage,
    write_manifest,
)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Engine:
    """Loads every file of its folder by unpickling, as DeepSpeed does."""

    def load_checkpoint(self, folder, tag, **_):
        for file in sorted(os.listdir(f"{folder}/{tag}")):
            torch.load(f"{folder}/{tag}/{file}", weights_only=False)


def run_config(out):
    return RunConfig(stage="tokenizer", out=str(out), steps=8, batch_size=12)


@pytest.fixture
def checkpoint(tmp_path):
    """A complete checkpoint with one file of an engine."""
    path = tmp_path / "run" / "checkpoints" / "step-00000010"
    (path / "training_state" / "model").mkdir(parents=True)
    torch.save({"module": torch.ones(2)}, path / "training_state" / "model" / "mp_rank_00_model_states.pt")
    state = {"step": 10, "ranks": 1, "torch_rng": torch.get_rng_state()}
    torch.save(state, path / "training_state" / "rank-00000.pt")
    write_manifest(path)
    return path


def replace(checkpoint, name, write):
    """Replace one file and seal the manifest anew, as whoever wrote the checkpoint can."""
    file = checkpoint / "training_state" / name
    write(file)
    manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
    entry = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest["files"][f"training_state/{name}"] = entry
    (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))


def double_zip(file, evil):
    """A zip archive with two members data.pkl."""
    whole = io.BytesIO()
    torch.save({"x": torch.ones(1)}, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(next(n for n in old.namelist() if n.endswith("data.pkl")), pickle.dumps(evil))


WAYS = {
    "zip": lambda file, evil: torch.save({"x": evil}, file),
    "legacy format": lambda file, evil: torch.save({"x": evil}, file, _use_new_zipfile_serialization=False),
    "plain pickle": lambda file, evil: file.write_bytes(pickle.dumps(evil)),
    "two members": double_zip,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["model/mp_rank_00_model_states.pt", "model/other_optim_states.pt", "rank-00000.pt"]
)
def test_a_planted_pickle_is_refused_and_does_not_run(checkpoint, tmp_path, way, name):
    touched = tmp_path / "PWNED"
    replace(checkpoint, name, lambda file: WAYS[way](file, Evil(touched)))
    assert find_damage(checkpoint) is None  # the manifest is no protection
    engines = {"model": Engine()}
    for load in (
        lambda: Checkpoints(checkpoint.parent).restore(checkpoint, engines),
        lambda: Checkpoints(checkpoint.parent).restore(checkpoint, engines, lambda states: {}, True),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)
        assert not touched.exists()


@pytest.mark.parametrize("linked", ["training_state/model", "training_state"])
def test_a_linked_folder_is_refused(checkpoint, tmp_path, linked):
    """Its files are neither listed in the manifest nor found by a search that does not follow links."""
    touched = tmp_path / "PWNED"
    WAYS["zip"](checkpoint / "training_state" / "model" / "mp_rank_00_model_states.pt", Evil(touched))
    (checkpoint / linked).rename(checkpoint / "elsewhere")
    (checkpoint / linked).symlink_to(checkpoint / "elsewhere")
    (checkpoint / CHECKPOINT_MANIFEST).unlink()
    write_manifest(checkpoint)
    with pytest.raises(UserError, match="is a link"):
        Checkpoints(checkpoint.parent).restore(checkpoint, {"model": Engine()})
    with pytest.raises(UserError, match=r"is a link|is not listed"):
        check_complete(checkpoint)
        Checkpoints(checkpoint.parent).restore(checkpoint, {"model": Engine()}, lambda states: {}, True)
    assert not touched.exists()


def test_the_fake_engine_would_have_run_it(checkpoint, tmp_path):
    touched = tmp_path / "PWNED"
    WAYS["zip"](checkpoint / "training_state" / "model" / "x.pt", Evil(touched))
    Engine().load_checkpoint(checkpoint / "training_state", "model")
    assert touched.exists()


def test_a_file_that_is_not_listed_is_damage(checkpoint):
    (checkpoint / "training_state" / "model" / "more.pt").write_bytes(b"x")
    assert find_damage(checkpoint) == f"training_state/model/more.pt is not listed in {CHECKPOINT_MANIFEST}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": 3}}',
        '{"files": {"a": {"bytes": "x", "sha256": 1}}}',
        "\udcff",
    ],
)
def test_odd_manifests_are_damage(checkpoint, text):
    (checkpoint / CHECKPOINT_MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    assert f"{CHECKPOINT_MANIFEST} is not readable" in find_damage(checkpoint) or "listed" in find_damage(
        checkpoint
    )


@pytest.mark.parametrize("name", ["/dev/zero", "../../../../../../dev/zero", "training_state"])
def test_names_that_are_not_files_of_the_folder_are_not_read(checkpoint, name):
    manifest = json.loads((checkpoint / CHECKPOINT_MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0"}
    (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    assert find_damage(checkpoint) in (f"{name} is outside the folder", f"{name} is not a file")


@pytest.mark.parametrize("state", [[], {"step": 3}, {"ranks": 1}])
def test_odd_states_of_a_rank_are_one_line(checkpoint, state):
    replace(checkpoint, "rank-00000.pt", lambda file: torch.save(state, file))
    with pytest.raises(UserError, match="is not the state of a rank"):
        Checkpoints(checkpoint.parent).restore(checkpoint, {})


@pytest.mark.parametrize("ranks", [0, -1, 10**12, "1", None])
def test_odd_numbers_of_ranks_are_one_line(checkpoint, ranks):
    file = checkpoint / "training_state" / "rank-00000.pt"
    state = torch.load(file, weights_only=True)
    replace(checkpoint, "rank-00000.pt", lambda file: torch.save(state | {"ranks": ranks}, file))
    with pytest.raises(UserError, match=r"has the states of 1 rank\(s\)"):
        Checkpoints(checkpoint.parent).restore(checkpoint, {}, lambda states: {})


def test_real_files_of_deepspeed_pass(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    folder = tmp_path / "training_state" / "model"
    folder.mkdir(parents=True)
    torch.save({"zero_stage": ZeroStageEnum(2), "loss_scaler": LossScaler(1.0)}, folder / "x_optim_states.pt")
    check_pickles(tmp_path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("config.yaml", "[1, 2]", "config.yaml holds list, not a mapping"),
        ("config.yaml", "a: {", "config.yaml is not valid YAML"),
        ("config.yaml", "a: \udcff", "config.yaml"),
        ("run.json", "[1]", "run.json is not the description of a run"),
        ("run.json", '{"facts": 3}', "run.json is not the description of a run"),
        ("run.json", "{", "run.json"),
    ],
)
def test_odd_files_of_a_run_directory_are_one_line(checkpoint, name, text, message):
    run = checkpoint.parents[1]
    RunDir.open(run_config(run)).close()
    (run / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        RunDir.open(run_config(run))
    assert message in str(caught.value) and "\n" not in str(caught.value)
