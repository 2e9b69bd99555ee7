"""Measures in tables: POPE's, MME's totals and ScienceQA's published groups, printed and in results."""

import json
from pathlib import Path

import pytest

from open_unitok.eval.report.tables import arrange_metrics, result_table

from ..core import releases

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def metric(value, n=4, unit="fraction"):
    return {"value": value, "n": n, "interval": None, "unit": unit}


def test_measures_of_the_same_groups_are_one_table():
    metrics = {
        "f1": metric(0.5), "f1/a": metric(0.25), "f1/b": metric(0.75), "recall/a": metric(0.5),
        "recall/b": metric(1), "type/a": metric(0.125), "lone/x": metric(0.5), "other/x": metric(0.5),
    }  # fmt: skip
    found = arrange_metrics(metrics)
    assert list(found.single) == ["f1"] and list(found.lists) == ["type", "lone", "other"]
    (table,) = found.tables
    assert table.measures == ["f1", "recall"] and table.groups == ["a", "b"]
    assert table.cells["recall", "b"]["value"] == 1
    result = {"benchmark": "x", "n": 4, "missing": 0, "value": 0.5, "metrics": metrics, "comparable": True}
    text = result_table(result | {"problems": []})
    assert "     f1   recall  n\n  a  25.0 %   50.0 %  4\n  b  75.0 %  100.0 %  4" in text
    assert "type/a" in text and "f1/a" not in text


def test_pope_has_its_five_measures_by_category(call, tmp_path):
    vectors = json.loads((GOLDEN / "pope.json").read_text())
    for name, rows in vectors["annotation_files"].items():
        releases.lines(tmp_path / "coco" / name, rows)
    releases.lines(tmp_path / "llava_pope_test.jsonl", vectors["llava_question_file"])
    releases.lines(tmp_path / "a.jsonl", vectors["llava_answers"])
    words = ("--answers", tmp_path / "a.jsonl", "--data", tmp_path, "--out", tmp_path / "out")
    _, text, _ = call("eval", "score", "pope", *words)
    metrics = json.loads((tmp_path / "out" / "pope" / "results.json").read_text())["metrics"]
    expected = vectors["expected_per_category"]
    for measure in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        values = {category: ratios[measure] for category, ratios in expected.items()}
        name = measure.replace("_", " ")
        for category, value in values.items():
            assert metrics[f"{name}/{category}"]["value"] == pytest.approx(value, abs=1e-9)
        assert metrics[name]["value"] == pytest.approx(sum(values.values()) / 3, abs=1e-9)
    line = next(x for x in text.splitlines() if x.strip().startswith("adversarial"))
    ratios = [expected["adversarial"][m] for m in ("f1", "accuracy", "precision", "recall", "yes_ratio")]
    assert line.split() == ["adversarial", *(x for r in ratios for x in (f"{100 * r:.1f}", "%")), "36"]


def test_scienceqa_has_the_groups_of_the_published_tables(call, tmp_path):
    vectors = json.loads((GOLDEN / "scienceqa.json").read_text())
    problems = vectors["problems.json"]
    subjects = ("natural science", "social science", "language science")
    for i, row in enumerate(problems.values()):
        row |= {
            "subject": subjects[i % 3],
            "grade": f"grade{1 + i % 12}",
            "hint": " A hint." if i % 5 else " ",
        }
    releases.write(tmp_path / "problems.json", problems)
    releases.write(tmp_path / "pid_splits.json", vectors["pid_splits.json"])
    releases.write(tmp_path / "a.json", vectors["expected"])
    words = ("--answers", tmp_path / "a.json", "--data", tmp_path, "--out", tmp_path / "out")
    _, text, _ = call("eval", "score", "scienceqa", *words)
    metrics = json.loads((tmp_path / "out" / "scienceqa" / "results.json").read_text())["metrics"]
    right = {n: row["answer"] == vectors["expected"]["results"][n] for n, row in problems.items()}
    groups = {
        "NAT": lambda r: r["subject"] == "natural science", "SOC": lambda r: r["subject"] == "social science",
        "LAN": lambda r: r["subject"] == "language science", "TXT": lambda r: r["hint"].strip() != "",
        "IMG": lambda r: bool(r["image"]), "NO": lambda r: not r["hint"].strip() and not r["image"],
        "G1-6": lambda r: int(r["grade"][5:]) <= 6, "G7-12": lambda r: int(r["grade"][5:]) >= 7,
    }  # fmt: skip
    for name, member in groups.items():
        hits = [right[n] for n, row in problems.items() if member(row)]
        assert hits and metrics[name]["value"] == pytest.approx(sum(hits) / len(hits)), name
        assert metrics[name]["n"] == len(hits) and f"  {name} " in text
    assert metrics["accuracy"]["value"] == pytest.approx(0.62)


def test_images_inside_tables_do_not_land_in_result_files(call, tmp_path):
    releases.mmbench(tmp_path / "mmbench", False)
    path = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    data = "A" * 5000
    rows[1][9] = data  # not an image: it is never saved as a file
    path.write_text("\n".join("\t".join(row) for row in rows))
    upload = "index\tprediction\n" + "".join(f"{row[0]}\tA\n" for row in rows[1:])
    releases.write(tmp_path / "a.tsv", upload)
    words = ("--answers", tmp_path / "a.tsv", "--data", tmp_path / "mmbench", "--out", tmp_path / "out")
    assert call("eval", "score", "mmbench", *words)[0] == 0
    for file in (tmp_path / "out" / "mmbench").glob("*.json*"):
        assert data not in file.read_text(), file
    first = json.loads((tmp_path / "out" / "mmbench" / "scores.jsonl").read_text().splitlines()[0])
    assert first["image"] == "0.jpg"
