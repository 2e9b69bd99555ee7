"""Configs: types, overrides, error messages, and the changes that a resumed run allows."""

import dataclasses
from typing import Any, Literal

import pytest
import yaml

from open_unitok.core.errors import UserError
from open_unitok.training.core import config as configs
from open_unitok.training.core.options import RunConfig, ShardOptions
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.run import load_run_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    size: int = 1
    kind: Literal["a", "bee"] = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    rate: float = 0.1
    pair: tuple[float, float] = (0.0, 1.0)
    some: list[int] = dataclasses.field(default_factory=list)
    part: Part = Part()
    parts: list[Part] = dataclasses.field(default_factory=list)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)
    either: str | list[str] | None = None
    flag: bool = False


def test_values_of_every_type_are_built():
    raw = yaml.load(
        "{name: x, rate: 2e-4, pair: [1, 2.5], some: [3], part: {size: 2, kind: bee}, parts: [{size: 5}],"
        " free: {a: {b: 1}}, either: [p, q], flag: true}",
        configs._Loader,
    )
    made = configs.build_config(Whole, raw)
    assert made == Whole(
        name="x",
        rate=2e-4,
        pair=(1.0, 2.5),
        some=[3],
        part=Part(size=2, kind="bee"),
        parts=[Part(size=5)],
        free={"a": {"b": 1}},
        either=["p", "q"],
        flag=True,
    )
    assert configs.build_config(Whole, yaml.safe_load(configs.to_yaml(made))) == made


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"nam": "x"}, ["'nam'", "Did you mean 'name'"]),
        ({}, ["'name' is missing", "a string"]),
        ({"name": 3}, ["name is 3", "a string"]),
        ({"name": "x", "rate": "fast"}, ["rate is 'fast'", "a number"]),
        ({"name": "x", "rate": True}, ["rate is True", "a number"]),
        ({"name": "x", "rate": float("nan")}, ["rate is nan", "finite"]),
        ({"name": "x", "flag": 1}, ["flag is 1", "true or false"]),
        ({"name": "x", "pair": [1]}, ["pair is [1]", "a list of 2 values"]),
        ({"name": "x", "some": [1, 2.5]}, ["some.1 is 2.5", "a whole number"]),
        ({"name": "x", "part": {"sice": 1}}, ["'part.sice'", "Did you mean 'size'"]),
        ({"name": "x", "part": {"kind": "be"}}, ["part.kind is 'be'", "Did you mean 'bee'"]),
        ({"name": "x", "parts": [{"size": "1"}]}, ["parts.0.size is '1'"]),
        ({"name": "x", "part": 3}, ["part is 3", "section"]),
        ({"name": "x", "either": 3}, ["either is 3", "a string or a list"]),
    ],
)
def test_config_error_messages(raw, words):
    with pytest.raises(UserError) as error:
        configs.build_config(Whole, raw)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_overrides(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: x\nparts: [{size: 1}]\n")
    raw = configs.read_yaml(file, ["rate=1e-3", "part.size=4", "parts.0.size=7", "either=[a,b]", "name=a=b"])
    made = configs.build_config(Whole, raw)
    assert (made.rate, made.part.size, made.parts[0].size, made.either) == (1e-3, 4, 7, ["a", "b"])
    assert made.name == "a=b"
    for bad, words in [
        ("rate", "key=value"),
        ("parts.3.size=1", "0 to 0"),
        ("name.sub=1", "not a section"),
        ("rate=[", "not valid YAML"),
    ]:
        with pytest.raises(UserError, match=words):
            configs.read_yaml(file, [bad])


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "not valid YAML"), ("- 1", "not a mapping"), ("a: 1\na: 2", "occurs twice")]
)
def test_broken_yaml(tmp_path, text, words):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        configs.read_yaml(file)
    assert "c.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_shipped_config(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nowhere.yaml does not exist"):
        configs.read_yaml("nowhere.yaml")
    with pytest.raises(UserError, match="folder"):
        configs.read_yaml(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_run_config("configs/demo/tokenizer.yaml", []).stage == "tokenizer"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage=tokeniser", "Did you mean 'tokenizer'"),
        ("steps=0", "steps and batch_size"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
        ("optimiser.lr=1", "Did you mean 'optimizer'"),
        ("schedule.kind=cosine", "Did you mean 'cos'"),
        ("data.sources=[]", "data.sources is empty"),
        ("losses.lpips=1.0", "lpips_with_vgg.pth"),
        ("caption_tokenizer=null", "losses.clip to 0"),
        ("engine.zero_stage=3", "0 to 2"),
        ("engine.zero_stage=5", "engine.zero_stage is 5"),
        ("images.crop_scale=[1.0, 0.5]", "low <= high"),
        ("freeze=[encoder]", "without init_from"),
        ("freeze=[encodr]", "Did you mean 'encoder'"),
    ],
)
def test_demo_config_error_messages(override, words):
    with pytest.raises(UserError, match=words):
        load_run_config("configs/demo/tokenizer.yaml", [override])


def run_config(out, **changes) -> RunConfig:
    return RunConfig(**{"stage": "tokenizer", "out": str(out), "steps": 8, "batch_size": 12, **changes})


def test_micro_batches_must_divide():
    config = configs.build_config(
        RunConfig, configs.to_dict(run_config("x")) | {"engine": {"accumulation": 2}}
    )
    assert config.micro_batch(3) == 2
    with pytest.raises(UserError, match="multiple of 10"):
        config.micro_batch(5)


def test_resume_with_another_config_shows_the_difference(tmp_path):
    out = tmp_path / "run"
    RunDir.open(run_config(out, seed=7))
    RunDir.open(run_config(out))  # no checkpoint yet: a corrected config starts over
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    RunDir.open(run_config(out, stop_at=4))  # allowed: stop_at does not change the results
    with pytest.raises(UserError) as error:
        RunDir.open(run_config(out, steps=9, seed=1))
    assert "steps: 8 -> 9" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)


def test_recorded_facts_must_not_change(tmp_path):
    run_dir = RunDir.open(run_config(tmp_path / "run"))
    run_dir.record_facts(data="abc")
    run_dir.close()
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    RunDir.open(run_config(tmp_path / "run")).record_facts(data="abc")
    with pytest.raises(UserError, match="data abc, but now it is xyz"):
        RunDir.open(run_config(tmp_path / "run")).record_facts(data="xyz")


def test_a_file_is_not_a_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunDir.open(run_config(tmp_path / "file"))


def test_shard_options_check():
    with pytest.raises(UserError, match="above 0"):
        configs.build_config(ShardOptions, {"sources": [{"path": "x", "weight": 0}]})


# ---- inheritance -----------------------------------------------------------------------------------------


def write_files(folder, **texts):
    """NAME.yaml below `folder` for every text; "__" in a name stands for a folder."""
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_child_overrides_key_by_key_and_overrides_come_last(tmp_path):
    write_files(
        tmp_path,
        base="name: b\nsteps: 3\nmodel: {width: 8, options: {a: 1, b: 2}, widths: [1, 2]}\nlosses: {l1: 1}\n",
        rows__middle="inherits: ../base.yaml\nname: middle\nmodel: {width: 16, options: {b: 3}}\n",
        rows__leaf="inherits: middle.yaml\nmodel: {widths: [5], options: {c: 4}}\nlosses: null\nz: {x: 1}\n",
    )
    raw = configs.read_yaml(tmp_path / "rows/leaf.yaml", ["model.options.a=9", "steps=1"])
    assert raw == {
        "name": "middle",
        "steps": 1,
        "model": {"width": 16, "options": {"a": 9, "b": 3, "c": 4}, "widths": [5]},
        "losses": None,  # a value replaces a section
        "z": {"x": 1},
    }
    # the parents are as before
    assert configs.read_yaml(tmp_path / "base.yaml")["model"]["options"] == {"a": 1, "b": 2}


def test_inheritance_is_relative_to_the_file_not_to_the_working_directory(tmp_path, monkeypatch):
    write_files(tmp_path, base="a: 1\n", study__base="a: 2\n", study__row="inherits: base.yaml\nb: 3\n")
    for folder, name in ((tmp_path, "study/row.yaml"), (tmp_path / "study", "row.yaml")):
        monkeypatch.chdir(folder)
        assert configs.read_yaml(name) == {"a": 2, "b": 3}
    # of an absolute path too
    (tmp_path / "own.yaml").write_text(f"inherits: {tmp_path}/study/row.yaml\nb: 4\n")
    assert configs.read_yaml(tmp_path / "own.yaml") == {"a": 2, "b": 4}


def test_shipped_configs_inherit_from_shipped_ones_and_own_ones_may(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child, base = (configs.read_yaml(f"configs/study/{name}.yaml") for name in ("quantizers/nearest", "base"))
    assert child["out"] != base["out"] and child["model"].pop("quantizer") == "nearest"
    assert {**child, "out": base["out"]} == base
    (tmp_path / "mine.yaml").write_text("inherits: configs/study/base.yaml\nsteps: 7\n")
    assert configs.read_yaml("mine.yaml") == base | {"steps": 7}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"a": "inherits: b.yaml\n", "b": "inherits: a.yaml\n"},
            "a circle: .*a.yaml -> .*b.yaml -> .*a.yaml",
        ),
        ({"a": "inherits: ./a.yaml\n"}, "a circle"),
        ({"a": "inherits: no.yaml\n"}, r"no.yaml, from which .*a.yaml inherits, does not exist"),
        ({"a": "inherits: [b.yaml]\n", "b": "x: 1\n"}, "must be the name of one YAML file"),
        ({"a": "inherits: null\n"}, "must be the name of one YAML file"),
        ({"a": "inherits: b.yaml\n", "b": "- 1\n"}, "b.yaml holds list"),
        ({"a": "inherits: b.yaml\n", "b": "x: [\n"}, "b.yaml is not valid YAML"),
        ({"a": "inherits: run/config.yaml\n", "run__config": "x: 1\n", "run__run": ""}, "a run directory"),
    ],
)
def test_wrong_inheritance_is_one_line(tmp_path, files, words):
    write_files(tmp_path, **files)
    if "run__run" in files:
        (tmp_path / "run/run.yaml").rename(tmp_path / "run/run.json")
    with pytest.raises(UserError, match=words) as caught:
        configs.read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_run_stores_the_resolved_config(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "inherits: configs/study/base.yaml\nsteps: 7\nmodel: {num_codebooks: 4}\n"
    )
    config = load_run_config(str(tmp_path / "mine.yaml"), ["seed=3"])
    stored = yaml.safe_load(configs.to_yaml(config))
    assert "inherits" not in stored and stored["steps"] == 7 and stored["seed"] == 3
    assert stored["model"]["num_codebooks"] == 4 and stored["model"]["image_size"] == 64
