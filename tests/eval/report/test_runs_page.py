"""The page of many runs: rows of one height, published numbers beside ours, images of tables."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from open_unitok.eval.report.published import PAPER, PUBLISHED_SCORES, PUBLISHED_UNITS
from open_unitok.eval.report.runs import read_runs, runs_page

from ..core.test_parquet import IMAGE, png


def write_run(folder, benchmark, values, rows=(), unit="fraction"):
    """A scored run with these metrics; the first is the main one."""
    metrics = {
        name: {"value": value, "n": 4, "interval": [value, value], "unit": unit}
        for name, value in values.items()
    }
    main = next(iter(values))
    result = {
        "benchmark": benchmark, "metric": main, "value": values[main], "n": 4, "missing": 0,
        "metrics": metrics, "problems": [], "comparable": True, "model": {"path": "m"},
        "versions": {}, "scorer": "official",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(result))
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_nine_runs_keep_rows_low_and_stay_closed(tmp_path):
    for i in range(9):
        values = {"perception": 1000 + i, "cognition": 200 + i, "task/commonsense_reasoning": 120}
        write_run(tmp_path / f"run{i}" / "mme", "mme", values, unit="points")
    page = runs_page(read_runs([tmp_path / f"run{i}" for i in range(9)]), "Evaluation")
    # no cell lists other systems: it is squeezed to a word per line beside nine runs
    cells = [re.sub("<[^>]*>", " ", cell).split() for cell in re.findall(r"<td[^>]*>(.*?)</td>", page)]
    assert cells and max(map(len, cells)) <= 5
    assert page.count("<details") == 9 and '<details class="card" open' not in page
    # cognition stands beside perception, a row per run
    assert "<span>cognition</span>" in page and "<b>208.0</b>" in page
    best, paper = (page.index(words) for words in ("best of this report", ">UniTok (paper)</td>"))
    assert best < paper and ">1008.0<" in page[best:] and ">1448.0</td>" in page[paper:]


@pytest.mark.parametrize(
    ("benchmark", "metric", "ours", "unit", "expected"),
    [
        ("geneval", "overall", 0.5, "fraction", ("50.0 %", "80.0 %", "Janus-Pro 7B")),
        ("genai_bench", "advanced", 0.5, "score", ("0.50", "0.67", PAPER)),
        ("mjhq", "fid", 9.25, "fid", ("9.25", "5.47", "Liquid 7B")),
        ("reconstruction", "rfid", 1.5, "fid", ("1.50", "0.41", PAPER)),
        ("zeroshot", "top1", 0.25, "fraction", ("25.0 %", "70.8 %", PAPER)),
    ],
)
def test_published_numbers_stand_beside_ours(tmp_path, benchmark, metric, ours, unit, expected):
    for name, worse in (("a", 0), ("b", 1)):
        value = ours + worse if unit == "fid" else ours - worse / 8  # FID: lower is better
        write_run(tmp_path / name / benchmark, benchmark, {metric: value}, unit=unit)
    page = runs_page(read_runs([tmp_path / "a", tmp_path / "b"]), "Evaluation")
    table = page[page.index("Published numbers") :]
    assert f'<b class="best">{expected[0]}</b>' in table and f">{expected[1]}</td>" in table
    assert expected[2] in table


def test_every_published_value_has_a_plausible_unit():
    for benchmark, metrics in PUBLISHED_SCORES.items():
        for metric, models in metrics.items():
            fraction = (benchmark, metric) not in PUBLISHED_UNITS
            assert all(0 < value < 1 if fraction else value > 0 for value in models.values()), (
                benchmark,
                metric,
            )
    for benchmark, metric in PUBLISHED_UNITS:
        assert metric in PUBLISHED_SCORES[benchmark]


def test_images_inside_parquet_files_are_shown(tmp_path):
    table = pyarrow.table({"image": pyarrow.array([{"bytes": png(9), "path": None}], IMAGE)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    row = {
        "index": 0,
        "image": f"{tmp_path / 'x.parquet'}#0/image/0",
        "question": "q",
        "answer": "a",
        "score": 0.0,
    }
    lost = row | {"image": f"{tmp_path / 'x.parquet'}#5/image/0"}
    write_run(tmp_path / "run" / "vqav2", "vqav2", {"accuracy": 0.5}, [row, lost])
    page = runs_page(read_runs([tmp_path / "run"]), "Evaluation")
    assert "data:image/png;base64," in page and "cannot be read" in page
    assert "<details" not in page  # a single run lies open


def test_a_bar_of_points_is_full_at_its_own_maximum(tmp_path):
    write_run(tmp_path / "r" / "dpg_bench", "dpg_bench", {"dpg": 75.0, "L1/entity": 50.0}, unit="points")
    write_run(tmp_path / "r" / "mme", "mme", {"perception": 1000, "task/OCR": 50.0}, unit="points")
    page = runs_page(read_runs([tmp_path / "r"]), "Evaluation")
    assert "of 100 points" in page and "of 200 points" in page
    assert page.count("width:50.0%") == 1 and page.count('class="fill" style="width:25.0%"') == 1
