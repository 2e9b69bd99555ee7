"""Every row of the shipped study at the scale of seconds, and that a repeated row gives the same numbers."""

import json
import sys

import numpy as np
import pytest
import yaml

from open_unitok.cli.main import main
from open_unitok.study import measure
from open_unitok.study.config import load_study, study_jobs
from open_unitok.study.run import job_commands, run_jobs
from open_unitok.study.table import MODEL_COLUMNS, SPLIT_COLUMNS, make_cells
from open_unitok.training.core.config import read_yaml

SHIPPED = "configs/study/tokenizers.yaml"
WORDS = {"words": ["face", "heart", "animal", "flag"], "modifiers": ["red", "big"], "heads": ["face", "dog"]}
# of times: other load changes them
TIMES = ("step_seconds", "encode_ms", "decode_ms")


@pytest.fixture(scope="module")
def study(emoji, tmp_path_factory):
    """The shipped study on the small emoji, two steps per row; rows of words have made-up vectors."""
    pytest.importorskip("efficientnet_lite_pytorch")
    folder = tmp_path_factory.mktemp("study")
    raw = read_yaml(SHIPPED)
    rows = {}
    for name, row in raw["rows"].items():
        own = {
            "inherits": f"configs/study/{row['config']}",
            "data": {"sources": [{"path": f"{emoji}/train/*.tar"}]},
        }
        config = read_yaml(own["inherits"])
        if config.get("caption_tokenizer"):
            own["caption_tokenizer"] = f"{emoji}/text/tokenizer.model"
        if "discriminator" in config:
            own["discriminator"] = {"start": 0}
        if "words" in config:
            own["words"] = make_words(folder, config["words"]["lists"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
        rows[name] = {**row, "config": f"{name}.yaml"}
    overrides = ["steps=2", "batch_size=4", "checkpoint.every=2", "log.every=1", "log.images_every=0"]
    changed = {"out": f"{folder}/runs", "data": str(emoji), "results": f"{folder}/results", "rows": rows}
    changed |= {"overrides": [*overrides, "data.shuffle=16"], "seeds": [0], "splits": ["pairs"]}
    (folder / "study.yaml").write_text(yaml.safe_dump({**raw, **changed}))
    return load_study(str(folder / "study.yaml"))


def make_words(folder, lists):
    chosen = [path.split("/")[-1].removesuffix(".txt") for path in lists]
    for name in chosen:
        (folder / f"{name}.txt").write_text("\n".join(WORDS[name]))
    count = len(dict.fromkeys(word for name in chosen for word in WORDS[name]))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32))
    (folder / "edges.txt").write_text("red\tface\nbig\tdog\n")
    edges = {"edges": f"{folder}/edges.txt"} if "heads" in chosen else {}
    return {"lists": [f"{folder}/{name}.txt" for name in chosen], "vectors": f"{folder}/vectors.npy", **edges}


def run_here(study, job):
    """The commands of a job in this process: imports are the larger part of a small one."""
    for module, *arguments in job_commands(study, job):
        if module == "open_unitok":
            main(arguments)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [module, *arguments])
                measure.main()
    return json.loads(job.result.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_trains_and_is_measured(study):
    results = {job.row: run_here(study, job) for job in study_jobs(study)}
    assert results.keys() == study.rows.keys()
    for name, result in results.items():
        columns, quality = result["columns"], result["splits"]["pairs"]
        assert columns["tokens"] > 0 and columns["parameters"] > 0 and columns["step_seconds"] > 0, name
        assert quality["psnr"] > 0 and 0 <= quality["emoji"] <= 1 and quality["frechet"] > 0, name
        assert {len(scores) for scores in result["images"]["pairs"].values()} == {3}, name
        continuous = name in ("continuous", "gaussian")
        assert continuous or (columns["bits"] > 0 and 0 < quality["usage"] <= 1), name
        captioned = name not in CAPTIONLESS
        assert ("retrieval" in quality) == ("zeroshot_category" in quality) == captioned, name
    base = results["base"]
    assert base["columns"]["tokens"] == 16 and base["columns"]["bits"] == 768
    for split in (None, "pairs"):
        columns = SPLIT_COLUMNS if split else MODEL_COLUMNS
        cells = dict(zip((c.key for c in columns), make_cells(study, split)["base"]))
        assert all(cell.value is not None for cell in cells.values()), cells


# rows that learn no captions
CAPTIONLESS = ("no_contrast", "coda", "gaussian", "gaussian_fsq", "vqkd", "two_encoders")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_study_goes_on_and_repeats_to_the_same_numbers(study, tmp_path, capsys):
    once = study_jobs(study, [0], ["base"])[0]
    if not once.result.exists():
        run_here(study, once)
    again = type(study)(**{**vars(study), "out": f"{tmp_path}/runs", "results": f"{tmp_path}/results"})
    job = study_jobs(again, [0], ["base"])[0]
    main(["train", job.config, *job.overrides, "stop_at=1"])  # what a kill leaves
    assert run_jobs(again, [job], 1) == []
    first, second = (json.loads(j.result.read_text()) for j in (once, job))
    for result in (first, second):
        for key in TIMES:
            result["columns"].pop(key)
        result.pop("date")
    assert first == second
    assert run_jobs(again, [job], 1) == [] and "training" in capsys.readouterr().out
    assert "training" not in capsys.readouterr().out
    assert run_jobs(again, [job], 1) == [] and "training" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_that_fails_is_named_and_the_others_are_run(study, tmp_path, capsys):
    broken = {**study.rows["base"].__dict__, "config": study.rows["base"].config}
    changed = type(study)(
        **{
            **vars(study),
            "out": f"{tmp_path}/runs",
            "results": f"{tmp_path}/results",
            "rows": {"base": study.rows["base"], "bad": type(study.rows["base"])(**broken)},
            "overrides": [*study.overrides, "data.sources.0.path=nowhere/*.tar"],
        }
    )
    failed = run_jobs(changed, study_jobs(changed), 2)
    assert len(failed) == 2 and all("failed with 2" in line and ".log" in line for line in failed)
    log = (tmp_path / "runs" / "logs" / "bad-0.log").read_text()
    assert "unitok: error:" in log and "nowhere" in log
