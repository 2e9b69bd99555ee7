"""POPE against the golden vectors, and the cases that those do not cover."""

import json
from pathlib import Path

import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.understanding import pope

GOLDEN = Path(__file__).parents[2] / "golden" / "eval" / "pope.json"


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture
def folder(tmp_path, golden):
    for name, rows in golden["annotation_files"].items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def answers(folder, golden):
    """Place in our order -> text; the golden answers are joined by category and image order."""
    places = {c: [] for c in pope.POPE_SUBSETS}
    for i, question in enumerate(pope.read_pope(folder)):
        places[question.category].append(i)
    texts = {a["question_id"]: a["text"] for a in golden["llava_answers"]}
    result = {}
    for row in golden["llava_question_file"]:
        result[places[row["category"]].pop(0)] = texts[row["question_id"]]
    return result


def test_parsed_labels_and_metrics_equal_the_golden_vectors(folder, golden, answers):
    questions = pope.read_pope(folder)
    result = pope.pope_metrics(questions, answers)
    parsed = {row["question_id"]: row["parsed"] for row in golden["expected_parsed"]}
    for row in golden["llava_answers"]:
        assert pope.parse_yes_no(row["text"]) == parsed[row["question_id"]], row["text"]
    for category, expected in golden["expected_per_category"].items():
        assert result["per_category"][category] == pytest.approx(expected, abs=1e-9)
    assert result["f1"] == pytest.approx(golden["expected_mean_f1_over_categories"], abs=1e-9)
    assert result["accuracy"] == pytest.approx(golden["expected_mean_accuracy_over_categories"], abs=1e-9)


def test_strict_scorer_equals_the_other_harness(folder, golden, answers):
    result = pope.pope_metrics(pope.read_pope(folder), answers, "strict")["per_category"]
    for category in pope.POPE_SUBSETS:
        expected, found = golden["lmms_eval_expected"][category], result[category]
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
        assert found["f1"] == pytest.approx(expected["f1_score"], abs=1e-9)


def test_a_model_that_always_says_no_gets_zero_not_an_error(folder):
    questions = pope.read_pope(folder)
    result = pope.pope_metrics(questions, dict.fromkeys(range(len(questions)), "No."))
    assert result["f1"] == 0.0 and result["per_category"]["random"]["precision"] == 0.0


def test_a_missing_answer_never_helps(folder):
    questions = pope.read_pope(folder)
    right = {i: q.label for i, q in enumerate(questions)}
    assert pope.pope_metrics(questions, right)["f1"] == 1.0
    without = {i: a for i, a in right.items() if i}
    assert pope.pope_metrics(questions, without)["accuracy"] < 1.0
    reordered = dict(reversed(right.items()))
    assert pope.pope_metrics(questions, reordered)["f1"] == 1.0


def test_malformed_files_name_the_place(folder):
    path = folder / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["label"] = "maybe"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pope.read_pope(folder)
    assert "coco_pope_random.json, question 5: label is 'maybe'" in found[4].malformed
    right = {i: q.label for i, q in enumerate(found) if not q.malformed}
    assert pope.pope_metrics(found, right)["per_category"]["random"]["FN"] == 1
    path.write_text('{"question_id": 1}\n{oops\n')
    first, second = [q.malformed for q in pope.read_pope(folder) if q.category == "random"]
    assert "question 1: the key 'label' is missing" in first and "line 2, is not valid JSON" in second
    path.unlink()
    with pytest.raises(UserError, match="found nothing"):
        pope.read_pope(folder)
    with pytest.raises(UserError, match="belong to no question"):
        pope.pope_metrics([], {3: "yes"})
