"""Commands over several runs: one that is damaged or incomplete does not hide the others."""

import json

import pytest

from open_unitok.eval.report.runs import read_runs, runs_page

from ..report.test_runs_page import write_run
from .test_end_to_end import BUILDERS, Scripted, call, run, scripted

assert scripted  # the fixture that replaces Model by Scripted


@pytest.fixture
def three(capsys, tmp_path):
    """The output folder of gqa, scienceqa and vizwiz."""
    Scripted.replies = {}
    for name in ("gqa", "scienceqa", "vizwiz"):
        Scripted.replies |= BUILDERS[name](tmp_path / name, False)[0]
        assert run(capsys, name, tmp_path / name, tmp_path / "o")[0] == 0
    return tmp_path / "o"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("answers-00000.jsonl", "", "not one of 5 samples|5 of 5 samples have no answer"),
        ("answers-00000.jsonl", '{"a": 1}\n', "line 1 is not a valid answer record"),
        ("run.json", "{}", "run.json: the key 'benchmark' is missing"),
        ("run.json", '{"benchmark": "gqa", "settings": 3, "model": {}}', "settings: expected an object"),
        ("run.json", "[]", "run.json: expected an object, got list"),
        ("run.json", '{"benchmark": "vqa"', "run.json"),
    ],
)
def test_score_goes_on_and_names_what_has_no_result(capsys, three, file, text, message):
    (three / "scienceqa" / file).write_text(text)
    code, out, err = call(capsys, "eval", "score", three)
    assert code == 2 and err.count("\n") == 1 and "1 of 3 runs have no result. scienceqa: " in err, err
    assert any(part in err for part in message.split("|")), err
    assert "gqa  (5 samples" in out and "vizwiz  (5 samples" in out and "scienceqa  (" not in out
    # alone: the same reason
    code, out, err = call(capsys, "eval", "score", three / "scienceqa")
    assert code == 2 and any(part in err for part in message.split("|")) and "runs have no" not in err, err


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"benchmark": "gqa"}', '{"benchmark": "gqa", "metrics": {"accuracy": 1}}', "{"]
)
@pytest.mark.parametrize("command", ["compare", "report"])
def test_damaged_results_are_one_line(capsys, three, text, command):
    (three / "gqa" / "results.json").write_text(text)
    code, _, err = call(capsys, "eval", command, three / "gqa", three)
    assert code == 2 and err.count("\n") == 1 and "results.json" in err, err


def test_compare_names_what_else_differs(capsys, three, tmp_path):
    flags = ("--prompt-template", "plain", "--limit", 5)
    assert run(capsys, "gqa", tmp_path / "gqa", tmp_path / "p", *flags)[0] == 0
    code, out, _ = call(capsys, "eval", "compare", three, tmp_path / "p")
    assert code == 0 and "! prompt template of A is 'short', of B 'plain'" in out
    assert "! B: only the first 5 samples" in out and "! A:" not in out
    code, out, _ = call(capsys, "eval", "compare", three, three)
    assert code == 0 and "!" not in out


def test_the_best_of_a_report_is_a_comparable_run(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.9)):
        write_run(tmp_path / name / "gqa", "gqa", {"accuracy": value})
    path = tmp_path / "b" / "gqa" / "results.json"
    limited = json.loads(path.read_text()) | {"comparable": False, "not_comparable_reason": "a part"}
    path.write_text(json.dumps(limited))
    page = runs_page(read_runs([tmp_path / "a", tmp_path / "b"]), "Evaluation")
    assert '<b class="best">50.0 %</b>' in page
    page = runs_page(read_runs([tmp_path / "b"]), "Evaluation")
    assert '<b class="best">90.0 % ✗</b>' in page
