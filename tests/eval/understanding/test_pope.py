"""POPE against the golden vectors, and the cases that those do not cover."""

import json
from pathlib import Path

import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.core.benchmark import Options
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


def write_versions(folder, released, asked):
    """The three released files with (image, object, label) rows, and LLaVA's file of (image, object) rows."""
    for category in pope.POPE_SUBSETS:
        rows = [
            {
                "question_id": i,
                "image": f"{image}.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": x,
            }
            for i, (image, thing, x) in enumerate(released)
        ]
        path = folder / f"coco_pope_{category}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = "\nAnswer the question using a single word or phrase."
    lines = [
        {"question_id": i, "image": f"{image}.jpg", "category": category,
         "text": f"Is there a {thing} in the image?{short}"}
        for i, (category, (image, thing)) in enumerate((c, row) for c in pope.POPE_SUBSETS for row in asked)
    ]  # fmt: skip
    path = folder / "llava_pope_test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_llavas_questions_are_joined_by_category_image_and_question(tmp_path):
    """The files are of two versions: another order, and questions that LLaVA's file does not ask."""
    released = [("a", "cup", "yes"), ("a", "dog", "no"), ("b", "car", "yes"), ("b", "hat", "no")]
    write_versions(tmp_path, released, [("b", "hat"), ("a", "dog"), ("a", "cup")])
    task = pope.load(
        tmp_path, Options(layout="llava", split=None, limit=None, max_new_tokens=None, prompt_template=None)
    )
    assert [(q.text.split()[3], q.label) for q in task.truth[:3]] == [
        ("hat", "no"),
        ("dog", "no"),
        ("cup", "yes"),
    ]
    assert len(task.samples) == 9 and not any(s.malformed for s in task.samples)
    for sample, question in zip(task.samples, task.truth):
        assert question.text in sample.prompt and sample.image.name == question.image.name
    assert task.problems == ["3 released questions are not in llava_pope_test.jsonl (not asked)"]
    # a question that no version has is named, and wrong
    write_versions(tmp_path, released, [("a", "cup"), ("a", "dog"), ("b", "cow")])
    task = pope.load(
        tmp_path, Options(layout="llava", split=None, limit=None, max_new_tokens=None, prompt_template=None)
    )
    assert [bool(s.malformed) for s in task.samples] == [False, False, True] * 3
    assert "has no question 'Is there a cow in the image?' about b.jpg" in task.samples[2].malformed


def test_an_empty_answer_is_yes_by_the_official_rule_and_neither_by_the_strict_one(folder):
    assert pope.parse_yes_no("") == "yes" and pope.parse_yes_no("", "strict") == ""
    text = (Path(__file__).parents[3] / "eval" / "README.md").read_text()
    assert "POPE's official rule reads an empty answer as yes" in " ".join(text.split())


def write_sets(folder):
    """The output folder of POPE's repository: three sets of two questions per category."""
    for name, thing in (("coco", "cup"), ("aokvqa", "dog"), ("gqa", "car")):
        for category in pope.POPE_SUBSETS:
            path = folder / name / f"{name}_pope_{category}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"question_id": i, "image": f"{i}.jpg", "text": f"Is there a {thing} here?", "label": label}
                for i, label in enumerate(("yes", "no"), 1)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(data, split=None):
    options = {"layout": None, "limit": None, "max_new_tokens": None, "prompt_template": None}
    task = pope.load(data, Options(**options, split=split))
    scored = pope.score(task, {i: {"text": "yes"} for i in range(6)}, data, {}, Options(scorer="official"))
    return {q.text.split()[3] for q in task.truth}, scored.not_comparable, task.problems


def test_one_of_the_three_sets_of_the_repository_is_asked_and_named(tmp_path):
    write_sets(tmp_path)
    line = "only the questions of coco are asked; for those of aokvqa or gqa see --split"
    assert load(tmp_path) == ({"cup"}, "", [line])
    things, reason, problems = load(tmp_path, "gqa")
    assert things == {"car"} and "only the questions of gqa" in problems[0]
    assert reason == "the questions are those of gqa, the published ones of coco"
    # the folder or a file of one set
    assert load(tmp_path / "aokvqa") == ({"dog"}, reason.replace("gqa", "aokvqa"), [])
    for path in (tmp_path / "gqa").iterdir():
        path.rename(tmp_path / "aokvqa" / path.name)
    assert load(tmp_path / "aokvqa" / "gqa_pope_popular.json")[:2] == ({"car"}, reason)
    with pytest.raises(UserError, match=r"expected one \*_pope_random.json .*, found .*aokvqa.*, .*gqa"):
        load(tmp_path / "aokvqa")
    with pytest.raises(UserError, match=r"expected one vqa_pope_random.json .*, found .*coco_pope_random"):
        load(tmp_path, "vqa")
    # a category of another set does not fill a gap
    (tmp_path / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match=r"expected one coco_pope_popular.json"):
        load(tmp_path)


@pytest.mark.parametrize("layout", [None, "llava"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no questions of the category popular"),
        ("{}", "1 of 1 questions of the category popular are mal"),
    ],
)
def test_a_category_without_questions_is_no_mean_over_two(tmp_path, text, message, layout):
    write_versions(tmp_path, [("a", "cup", "yes"), ("a", "dog", "no")], [("a", "cup")])
    (tmp_path / "coco_pope_popular.json").write_text(text)
    options = {"split": None, "limit": None, "max_new_tokens": None, "prompt_template": None}
    with pytest.raises(UserError, match=message):
        pope.load(tmp_path, Options(layout=layout, **options))
