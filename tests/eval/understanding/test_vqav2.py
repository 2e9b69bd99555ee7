"""VQAv2 normalisation and accuracy against golden vectors, and errors of malformed files."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.core import answer_normalisation, open_answers
from open_unitok.eval.understanding import vqav2

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"
NAMES = {
    "lmms": "lmms_eval_vqav2",
    "official": "vqa_official_gated",  # the public tool since 2021-03-11
    "official-2018": "vqa_official_c4e6a0e",
}


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "vqav2.json").read_text())


@pytest.fixture
def folder(tmp_path, golden):
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(golden["questions"]))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(golden["annotations"]))
    return tmp_path


def test_normalisation_stages_equal_the_golden_strings():
    for row in json.loads((GOLDEN / "vqa_normalization.json").read_text())["strings"]:
        text = row["input"]
        assert answer_normalisation.normalise(text) == row["official_punct_digit_article"], text
        assert answer_normalisation.strip_punctuation(text) == row["official_punct"], text
        assert answer_normalisation.normalise_m4c(text) == row["m4c"], text
        assert answer_normalisation.word_tokenize(text) == row["m4c_word_tokenize"], text
        assert answer_normalisation.strip_punctuation(text, "m4c") == row["m4c_punct"], text
        assert answer_normalisation.unify_words(text) == row["m4c_digit_article"], text


def test_contractions_are_the_public_table():
    table = answer_normalisation.contractions()
    assert len(table) == 120 and table["somebody'd"] == "somebodyd"
    assert (
        hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest().startswith("52771f672b95913f")
    )


@pytest.mark.parametrize("scorer", open_answers.VQAV2_SCORERS)
def test_scores_equal_the_golden_vectors(folder, golden, scorer):
    questions = vqav2.read_vqav2(folder)
    result = vqav2.vqav2_accuracies(
        questions, {r["question_id"]: r["answer"] for r in golden["results"]}, scorer
    )
    name = NAMES[scorer]
    assert result["per_question"] == pytest.approx([e[name] for e in golden["expected"]], abs=1e-9)
    assert result["overall"] == pytest.approx(golden["expected_total"][name], abs=1e-9)
    expected = golden["expected_per_answer_type"][name]
    assert {k: 100 * v for k, v in result["per_answer_type"].items()} == pytest.approx(expected, abs=0.0101)


def test_reader_finds_coco_names(folder):
    first = vqav2.read_vqav2(folder, "mscoco_val2014")[0]
    assert first.image.name == "COCO_val2014_000000010000.jpg"
    assert first.answer_type == "other" and len(first.answers) == 10


def test_constant_answer_is_the_most_frequent_of_its_type():
    def question(i, kind, answer):
        return vqav2.VqaQuestion(i, i, "?", Path("x"), (answer,) * 10, kind, "other", answer)

    questions = [question(0, "colour", "red"), question(1, "colour", "red"), question(2, "colour", "blue")]
    questions += [question(3, "count", "2"), question(4, "count", "1")]
    result = vqav2.vqav2_accuracies(questions, {0: "Red.", 1: "blue", 2: "blue", 3: "two"})
    assert result["constant"]["colour"] == {"answer": "red", "accuracy": pytest.approx(2 / 3)}
    assert result["constant"]["count"]["answer"] == "1"
    assert result["per_question_type"] == {"colour": pytest.approx(2 / 3), "count": 0.5}
    assert result["overall"] == pytest.approx(3 / 5)  # the missing answer counts as wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, a: q["questions"][3].pop("image_id"), r"questions\[3\]: the key 'image_id' is missing"),
        (lambda q, a: a["annotations"][2].pop("answers"), r"annotations\[2\]: the key 'answers' is missing"),
        (lambda q, a: a["annotations"].pop(5), "has no annotation"),
        (lambda q, a: q["questions"].pop(5), "is not a question of v2_OpenEnded"),
        (lambda q, a: q["questions"].append(q["questions"][0]), "occurs twice"),
    ],
)
def test_malformed_files_name_file_and_key(folder, golden, change, message):
    questions, annotations = json.loads(json.dumps([golden["questions"], golden["annotations"]]))
    change(questions, annotations)
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(annotations))
    found = vqav2.read_vqav2(folder)
    broken = [(i, q) for i, q in enumerate(found) if q.malformed]
    assert len(broken) == 1 and re.search(message, broken[0][1].malformed)
    answers = {q.question_id: q.answers[0] for q in found if not q.malformed}
    values = vqav2.vqav2_accuracies(found, answers)["per_question"]
    assert values[broken[0][0]] == 0.0 and sum(v > 0 for v in values) == len(found) - 1


def test_missing_files_and_unknown_ids_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found nothing"):
        vqav2.read_vqav2(tmp_path / "empty")
    with pytest.raises(UserError, match="belong to no question"):
        vqav2.vqav2_accuracies(vqav2.read_vqav2(folder), {7: "yes"})
    with pytest.raises(UserError, match="Did you mean 'official'"):
        open_answers.vqa_accuracy("a", ["a"], "oficial")


def test_the_official_scorer_is_the_public_tool_of_today():
    """Since March 2021 both sides are normalised where the ten answers differ."""
    answers = ["two"] * 9 + ["three"]
    scores = {
        scorer: open_answers.vqa_accuracy("2", answers, scorer) for scorer in open_answers.VQAV2_SCORERS
    }
    assert scores == {"lmms": 1.0, "official": 1.0, "official-2018": 0.0}
    # ten equal answers are compared as they are
    assert open_answers.vqa_accuracy("2", ["two"] * 10, "official") == 0.0
