"""`unitok study`: its YAML, plan, table and page, from results that are made up here."""

import csv
import io
import json
import re

import numpy as np
import pytest
import yaml

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.study.config import load_study, settings_digest, study_jobs
from open_unitok.study.page import scatter_svg, study_page
from open_unitok.study.run import is_finished, part_minutes, plan_parts, run_jobs
from open_unitok.study.table import csv_table, make_cells, markdown_table

SHIPPED = "configs/study/tokenizers.yaml"


def write_study(folder, **changes):
    study = {
        "out": str(folder / "runs"),
        "data": str(folder / "emoji"),
        "results": str(folder / "results"),
        "baseline": "base",
        "splits": ["pairs"],
        "rows": {
            "base": {"config": "configs/study/base.yaml", "title": "UniTok"},
            "ibq": {"config": "configs/study/quantizers/ibq.yaml", "title": "IBQ", "minutes": 70},
            "continuous": {"config": "configs/study/encoders/continuous.yaml", "title": "KL", "minutes": 60},
            "coda": {"config": "configs/study/encoders/coda.yaml", "title": "CODA", "after": "continuous"},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}))
    return str(path)


def write_result(study, row, seed, psnr, **columns):
    """A result whose images have the given PSNR each."""
    job = next(job for job in study_jobs(study) if (job.row, job.seed) == (row, seed))
    quality = {"psnr": float(np.mean(psnr)), **columns}
    result = {
        "row": row, "seed": seed, "settings": settings_digest(job), "limit": study.limit, "processor": "P",
        "columns": {"tokens": 16, "bits": 768.0 if row == "base" else 144.0},
        "splits": {"pairs": quality}, "images": {"pairs": {"psnr": list(psnr)}},
    }  # fmt: skip
    job.result.parent.mkdir(exist_ok=True)
    job.result.write_text(json.dumps(result))
    return job


def test_the_shipped_study_is_planned_in_parts_of_two_hours(capsys):
    main(["study", SHIPPED, "--plan", "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    minutes = [int(m.group(1)) for line in lines if (m := re.match(r"part \d+: (\d+) minutes", line))]
    assert minutes and max(minutes) <= 120
    hours = float(re.search(r"([\d.]+) hours on 2 cores", lines[-1]).group(1))
    assert hours == pytest.approx(sum(minutes) / 60, abs=0.1) and hours <= 12
    study = load_study(SHIPPED)
    named = [name for line in lines if line.startswith("  ") for name in line.split()]
    assert sorted(named) == sorted(f"{row}-{seed}" for row in study.rows for seed in study.seeds)


def test_every_config_of_the_study_folder_is_a_row():
    study = load_study(SHIPPED)
    used = {row.config.split("configs/study/")[-1] for row in study.rows.values()}
    from importlib.resources import files

    folder = files("open_unitok.configs.study")
    shipped = {
        f"{room}/{path.name}"
        for room in ("unitok", "quantizers", "encoders")
        for path in folder.joinpath(room).iterdir()
        if path.name.endswith(".yaml")
    }
    assert used == shipped | {"base.yaml"}


def test_a_row_starts_after_the_one_that_it_needs(tmp_path):
    study = load_study(write_study(tmp_path))
    jobs = study_jobs(study)
    names = [job.name for job in jobs]
    assert names.index("continuous-0") < names.index("coda-0")
    coda = next(job for job in jobs if job.name == "coda-1")
    assert f"init_from={tmp_path}/runs/continuous-1/model" in coda.overrides and "seed=1" in coda.overrides
    parts = plan_parts(jobs, 1)
    assert [job for part in parts for job in part] == jobs and len(parts) > 1
    assert all(part_minutes(part, 1) <= 120 for part in parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "bse"}, "baseline is 'bse'. Did you mean 'base'?"),
        ({"rows": {"A b": {"config": "configs/study/base.yaml", "title": "x"}}}, "lower-case letters"),
        (
            {"rows": {"base": {"config": "configs/study/bsae.yaml", "title": "x"}}},
            "row base: .*does not exist",
        ),
        ({"rows": {"base": {"config": "configs/study/base.yaml"}}}, "rows.base.title"),
        ({"seeds": [0, 0]}, "different values"),
        ({"overrides": ["optimizer.lrr=3"]}, "row base: .*lrr"),
        ({"colums": 3}, "colums"),
    ],
)
def test_errors_of_the_yaml_are_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        load_study(write_study(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_row_that_waits_for_itself_is_rejected(tmp_path):
    row = {"config": "configs/study/base.yaml", "title": "x", "after": "base"}
    with pytest.raises(UserError, match=r"rows\.base\.after is 'base'"):
        load_study(write_study(tmp_path, rows={"base": row}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "bas"], "--only bas: the study has no such row. Did you mean 'base'?"),
        (["--seeds", "7"], "--seeds 7: the study has seeds 0, 1"),
        (["--part", "9"], "--part 9: the plan has parts 1 to"),
        ([], "`unitok data emoji --out"),
    ],
)
def test_errors_of_the_command_come_before_any_run(tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        main(["study", write_study(tmp_path), *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_row_alone_needs_the_model_that_it_starts_from(tmp_path):
    study = load_study(write_study(tmp_path))
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "emoji.json").write_text("{}")
    with pytest.raises(UserError, match=r"Row coda starts from .*continuous-0/model, which does not exist"):
        run_jobs(study, study_jobs(study, [0], ["coda"]), 1)


def test_results_of_other_settings_are_no_results(tmp_path):
    study = load_study(write_study(tmp_path))
    job = write_result(study, "ibq", 0, [16.0] * 5)
    assert is_finished(study, job)
    changed = load_study(write_study(tmp_path, overrides=["steps=7"]))
    with pytest.raises(UserError, match=r"ibq-0\.json was measured with other settings \(settings\)"):
        is_finished(changed, next(j for j in study_jobs(changed) if j.name == "ibq-0"))
    limited = load_study(write_study(tmp_path, limit=3))
    with pytest.raises(UserError, match=r"other settings \(limit\)"):
        is_finished(limited, next(j for j in study_jobs(limited) if j.name == "ibq-0"))


@pytest.fixture
def measured(tmp_path):
    """base and ibq with two seeds, continuous with one, coda with none."""
    study, rng = load_study(write_study(tmp_path)), np.random.default_rng(0)
    images = rng.normal(20, 2, 60)
    for seed in (0, 1):
        write_result(study, "base", seed, images + 0.1 * seed, usage=1.0)
        write_result(study, "ibq", seed, images - 1 + rng.normal(0, 0.5, 60), usage=0.42)
    write_result(study, "continuous", 0, images + rng.normal(0, 2, 60))
    return study


def test_cells_have_means_spreads_and_significant_differences(measured):
    cells = {row: dict(zip(("psnr", "ssim"), found)) for row, found in make_cells(measured, "pairs").items()}
    base, ibq = cells["base"]["psnr"], cells["ibq"]["psnr"]
    assert base.value - ibq.value == pytest.approx(1.05, abs=0.2)
    assert base.spread == pytest.approx(0.05) and not base.significant and ibq.significant
    same = cells["continuous"]["psnr"]
    assert same.spread is None and not same.significant
    assert cells["base"]["ssim"].reason == "n/a" and cells["coda"]["psnr"].reason == "not run"


def test_the_tables_show_every_row(measured):
    text = markdown_table(measured)
    lines = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(lines) == {"base", "ibq", "continuous", "coda"}
    assert lines["ibq"].split(" | ")[1].startswith("**") and "± 0.05" in lines["base"]
    assert "not run" in lines["coda"] and "n/a" in lines["continuous"] and "42" in lines["ibq"]
    rows = list(csv.DictReader(io.StringIO(csv_table(measured))))
    assert len(rows) == 5 and {row["row"] for row in rows} == {"base", "ibq", "continuous"}
    assert float(rows[0]["psnr"]) == pytest.approx(20, abs=1) and rows[0]["usage"] == "1.0"


def test_the_page_shows_rows_and_points(measured, tmp_path, capsys):
    page = study_page(measured, "Study")
    assert page.count("<h2>") >= 3 and "not run" in page and "IBQ" in page
    assert page.count('class="dot"') >= 2  # base and ibq: continuous has no bits here
    main(["study", str(tmp_path / "study.yaml"), "--table"])
    assert {p.name for p in (tmp_path / "runs").iterdir()} >= {"table.md", "table.csv", "index.html"}


def test_points_of_the_scatter_are_in_order():
    svg = scatter_svg([("few", 144, 17.0), ("many", 768, 20.0)])
    points = [
        tuple(map(float, m)) for m in re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]
    assert points[0][0] < points[1][0] and points[0][1] > points[1][1]  # more bits right, more dB up
