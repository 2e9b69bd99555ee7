"""The scorers of TextVQA, VizWiz, GQA, MME, SEED-Bench, ScienceQA and MMBench against the golden vectors."""

import json
from pathlib import Path

import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.core.answer_normalisation import normalise_m4c
from open_unitok.eval.core.bootstrap import question_pair_columns, question_pair_statistic
from open_unitok.eval.core.multiple_choice import ChoiceQuestion, lettered_options
from open_unitok.eval.core.open_answers import m4c_accuracy
from open_unitok.eval.understanding import gqa, mmbench, mme, scienceqa, seedbench, textvqa

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def test_textvqa_and_vizwiz_scores_submissions_and_prompts():
    vectors = golden("textvqa")
    rows = {row["image_id"]: row for row in vectors["annotation_file"]["data"]}
    values = []
    for result, item in zip(vectors["llava_results"], vectors["expected_items"]):
        answers = rows[result["question_id"]]["answers"]
        values.append(m4c_accuracy(result["text"], answers))
        assert values[-1] == pytest.approx(item["m4c"], abs=1e-9), result
        assert values[-1] == pytest.approx(item["lmms_eval"], abs=1e-9)
        assert values[-1] == pytest.approx(item["lmms_vizwiz_exact_match"], abs=1e-9)
        assert normalise_m4c(result["text"]) == item["lmms_submission_answer"]
        assert normalise_m4c(result["text"]) == item["vizwiz_submission"]["answer"]
        assert textvqa.question_in_prompt(result["prompt"], "") == item["parsed_question"]
    assert sum(values) / len(values) == pytest.approx(vectors["expected_accuracy"], abs=1e-9)
    with pytest.raises(UserError, match="none of the known layouts"):
        textvqa.question_in_prompt("a\nb\nc\nd", "line 1")


def test_gqa_official_measures_and_lenient_items():
    vectors = golden("gqa")
    questions = vectors["questions"]
    texts = {row["question_id"]: row["text"] for row in vectors["llava_answers"]}
    predictions = {name: gqa.convert_answer(text) for name, text in texts.items()}
    assert predictions == {r["questionId"]: r["prediction"] for r in vectors["converted_predictions"]}
    for name, expected in vectors["expected_items_official"].items():
        assert gqa.is_gqa_right(texts[name], questions[name]["answer"]) == bool(expected)
    for name, expected in vectors["lmms_eval_items"].items():
        assert gqa.is_gqa_right(texts[name], questions[name]["answer"], "lenient") == bool(expected)
    found = gqa.gqa_measures(questions, predictions, vectors["choices"])
    expected = vectors["expected_official_with_choices_and_consistency"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert found[name].keys() == value.keys()
            for group, pair in value.items():
                assert found[name][group] == pytest.approx(pair, abs=1e-9), (name, group)
        else:
            assert found[name] == pytest.approx(value, abs=1e-9), name
    plain = gqa.gqa_measures(questions, predictions)
    assert plain["validity"] is None and plain["accuracy"] == found["accuracy"]


def test_gqa_steps_and_consistency_of_what_the_vectors_lack():
    steps = [
        ("select", "dog"),
        ("choose name", "cat|dog"),
        ("query", "name"),
        ("exist", "?"),
        ("filter", "red"),
    ]
    question = {"semantic": [{"operation": o, "argument": a} for o, a in steps]}
    assert gqa.reasoning_steps(question) == 2  # "query: name", "choose name" and "exist" do not count
    shape = {"isBalanced": True, "answer": "yes"}
    questions = {"1": shape | {"entailed": ["1", "2"]}, "2": shape | {"entailed": [], "isBalanced": False}}
    assert gqa.gqa_consistency(questions, {"1": "yes", "2": "no"}) == 0.0
    assert gqa.gqa_consistency(questions, {"1": "yes", "2": "yes"}) == 100.0
    assert gqa.gqa_consistency(questions, {"1": "yes"}) is None  # it cannot be known
    assert gqa._without_punctuation("top ") == "top " and not gqa.is_gqa_right("yes .", "yes", "lenient")


def test_mme_parses_and_totals():
    vectors = golden("mme")
    rows = []
    for item in vectors["expected_items"]:
        label = item["gt"].lower()
        for scorer, key in (("official", "official_parsed"), ("lmms", "lmms_parsed")):
            assert mme.parse_mme(item["prediction"], scorer) == item[key], item
        task, _, image = item["question_id"].partition("/")
        rows.append({"group": task, "cluster": image, "label": label, "text": item["prediction"]})
    for scorer, totals in (
        ("official", [vectors["expected"][k]["total"] for k in ("Perception", "Cognition")]),
        ("lmms", list(vectors["lmms_eval_expected"].values())),
    ):
        for row in rows:
            row["parsed"] = mme.parse_mme(row["text"], scorer)
            row["score"] = float(row["parsed"] == row["label"])
        for row in rows:
            same = [r["score"] for r in rows if (r["group"], r["cluster"]) == (row["group"], row["cluster"])]
            row["pair"] = min(same)
        for names, expected in zip((mme.PERCEPTION_TASKS, mme.COGNITION_TASKS), totals):
            chosen = [row for row in rows if row["group"] in names]
            assert question_pair_statistic(question_pair_columns(chosen).sum(axis=0)) == pytest.approx(
                expected, abs=1e-6
            )
        if scorer == "official":
            tasks = mme.mme_tasks(rows)
            for half in vectors["expected"].values():
                for name, expected in half["tasks"].items():
                    assert tasks[name] == pytest.approx(expected, abs=1e-6), name


def test_mme_question_with_two_blanks_before_its_call():
    assert mme.without_yes_no_request("Is it red?  Please answer yes or no.") == "Is it red?"
    assert mme.without_yes_no_request("Is it red? Please answer yes or no.") == "Is it red?"
    texts = ["   no", "i think yes", "nope", "snow", "yesterday", "", "NO"]
    assert [mme.parse_mme(t) for t in texts] == ["other", "other", "no", "no", "yes", "other", "no"]


def test_seedbench_items_and_totals():
    vectors = golden("seedbench")
    kinds = {number: name for name, number in vectors["SEED-Bench.json"]["question_type"].items()}
    find_image = {"image": Path, "video": Path}
    questions = {
        row["question_id"]: seedbench.read_seedbench_question(row, "", kinds, find_image)[0]
        for row in vectors["SEED-Bench.json"]["questions"]
    }
    texts = {str(row["question_id"]): row["text"] for row in vectors["llava_answers"]}
    for item in vectors["expected_items"]:
        question, text = questions[item["question_id"]], texts[item["question_id"]]
        assert seedbench.is_seedbench_right(text, question.answer) == item["llava_correct"]
        assert seedbench.is_seedbench_right(text, question.answer, "lmms") == item["lmms_correct"]
    lines = dict(line.split(": ") for line in vectors["official_stdout"].split("\n") if line)
    for label, keep in [
        ("Total accuracy", lambda q: True),
        *((f"{m} accuracy", lambda q, m=m: q.medium == m) for m in ("image", "video")),
        *((name, lambda q, name=name: q.kind == name) for name in kinds.values()),
    ]:
        chosen = [q for q in questions.values() if keep(q)]
        right = sum(seedbench.is_seedbench_right(texts.get(q.question_id, "-"), q.answer) for q in chosen)
        assert f"{100 * right / len(chosen):.2f}%" == lines[label], label


def test_scienceqa_parser_items_and_totals():
    vectors = golden("scienceqa")
    problems = vectors["problems.json"]
    questions = {
        n: scienceqa.read_scienceqa_problem(problems, n, Path("problems.json"), "test", [Path()])[0]
        for n in problems
    }
    texts = {row["question_id"]: row["text"] for row in vectors["llava_answers"]}
    for name, letter in vectors["expected_parsed"].items():
        assert scienceqa.parse_scienceqa(texts.get(name, "")) == letter, texts.get(name)
    right = {n: n in texts and scienceqa.is_scienceqa_right(texts[n], q) for n, q in questions.items()}
    assert (
        sum(right.values()) == vectors["expected"]["correct"] and len(right) == vectors["expected"]["count"]
    )
    imaged = [right[n] for n, q in questions.items() if q.medium == "image"]
    assert f"IMG-Accuracy: {100 * sum(imaged) / len(imaged):.2f}%" in vectors["official_stdout"]
    for name, expected in vectors["lmms_eval_items"].items():
        assert scienceqa.is_scienceqa_right(texts[name], questions[name], "lmms") == bool(expected), texts[
            name
        ]
    prompt = next(r["prompt"] for r in vectors["llava_answers"] if r["question_id"] == "5100")
    assert lettered_options(questions["5100"].question, questions["5100"].options) in prompt


def test_scienceqa_letter_beyond_the_options_is_wrong():
    question = ChoiceQuestion("1", "?", ("a", "b"), "B", "", "text")
    assert not scienceqa.is_scienceqa_right("E", question) and scienceqa.is_scienceqa_right("B. b", question)
    assert scienceqa.is_scienceqa_right("The answer is B.", question)


def test_mmbench_letters_and_circular_scores():
    vectors = golden("mmbench")
    right, plain, group = {}, {}, {}
    for row, item in zip(vectors["rows"], vectors["expected_items"]):
        options = {k: row[k] for k in "ABCDE" if row[k] is not None}
        text = row["prediction"]
        assert (mmbench.named_letter(text) or None) == (item["can_infer_option"] or None), text
        inferred = mmbench.named_letter(text) or mmbench.letter_by_text(text, options)
        assert (inferred or None) == (item["can_infer"] or None), text
        assert mmbench.first_option_letter(text, options) == item["mcq_extract"] or inferred, text
        base = row["index"] % mmbench.ROTATION_STEP
        hit = mmbench.chosen_letter(text, options) == row["answer"]
        right[base] = right.get(base, True) and hit
        if base == row["index"]:
            plain[base], group[base] = hit, (row["category"], row["L2-category"])
    for expected, hits in (("expected_circular", right), ("expected_vanilla", plain)):
        assert sum(hits.values()) / len(hits) == pytest.approx(vectors[expected]["overall"])
        for place, key in ((0, "category"), (1, "l2")):
            for name, value in vectors[expected][key].items():
                chosen = [hit for base, hit in hits.items() if group[base][place] == name]
                assert sum(chosen) / len(chosen) == pytest.approx(value), name
