"""`unitok eval score NAME --answers FILE`: files of other programs give the official numbers, or one line."""

import json
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest

from open_unitok.eval.generation.geneval import summarise_verdicts

from ..core import releases
from ..understanding import test_hub_tables as hub_tables

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def score(call, name, answers, data, *more, out=None):
    """The result of the command, which must succeed."""
    out = out or answers.parent / "out"
    code, text, err = call("eval", "score", name, "--answers", answers, "--data", data, "--out", out, *more)
    assert code == 0, err
    return json.loads((out / name / "results.json").read_text()) | {"printed": text}


def test_vqa_results_file_gives_the_public_totals(call, tmp_path):
    vectors = golden("vqav2")
    releases.write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", vectors["questions"])
    releases.write(tmp_path / "v2_mscoco_val2014_annotations.json", vectors["annotations"])
    releases.write(tmp_path / "a" / "results.json", vectors["results"])
    releases.lines(
        tmp_path / "a" / "answers.jsonl",
        [{"question_id": r["question_id"], "text": r["answer"]} for r in vectors["results"]],
    )
    totals = vectors["expected_total"]
    for scorer, key in (
        ("lmms", "lmms_eval_vqav2"),
        ("official", "vqa_official_gated"),
        ("official-2018", "vqa_official_c4e6a0e"),
    ):
        for file in ("results.json", "answers.jsonl"):
            result = score(
                call,
                "vqav2",
                tmp_path / "a" / file,
                tmp_path,
                "--scorer",
                scorer,
                out=tmp_path / scorer / file,
            )
            assert result["value"] == pytest.approx(totals[key], abs=1e-9)
            assert result["comparable"] and len(result["problems"]) == 1  # an empty answer
            assert result["prompt_template"] == "of another program" and result["model"]["kind"] == "answers"


def test_gqa_predictions_and_llava_answers(call, tmp_path):
    vectors = golden("gqa")
    releases.write(tmp_path / "testdev_balanced_questions.json", vectors["questions"])
    releases.write(tmp_path / "testdev_choices.json", vectors["choices"])
    releases.write(tmp_path / "a" / "testdev_balanced_predictions.json", vectors["converted_predictions"])
    releases.lines(tmp_path / "a" / "merge.jsonl", vectors["llava_answers"])
    expected = vectors["expected_official_with_choices_and_consistency"]
    for file in ("testdev_balanced_predictions.json", "merge.jsonl"):
        result = score(call, "gqa", tmp_path / "a" / file, tmp_path, out=tmp_path / file.split(".")[0])
        assert 100 * result["value"] == pytest.approx(expected["accuracy"], abs=1e-9)
        assert result["details"]["official"]["consistency"] == pytest.approx(
            expected["consistency"], abs=1e-9
        )


def test_textvqa_answers_are_joined_by_image_and_question(call, tmp_path):
    vectors = golden("textvqa")
    releases.write(tmp_path / "TextVQA_0.5.1_val.json", vectors["annotation_file"])
    releases.lines(tmp_path / "a" / "answers.jsonl", vectors["llava_results"])
    result = score(call, "textvqa", tmp_path / "a" / "answers.jsonl", tmp_path)
    assert result["value"] == pytest.approx(vectors["expected_accuracy"], abs=1e-9)
    # two questions about one image: the prompt tells them apart
    releases.textvqa(tmp_path / "two", True)
    asked = [
        json.loads(x)
        for x in (tmp_path / "two" / "llava_textvqa_val_v051_ocr.jsonl").read_text().splitlines()
    ]
    rows = [
        row | {"prompt": row["text"], "text": word}
        for row, word in zip(asked, ["nokia", "stop", "x", "10", "y"])
    ]
    releases.lines(tmp_path / "b" / "answers.jsonl", rows[::-1])
    assert score(call, "textvqa", tmp_path / "b" / "answers.jsonl", tmp_path / "two")[
        "value"
    ] == pytest.approx(3 / 5)


def test_pope_answers_in_the_numbers_of_llavas_question_file(call, tmp_path):
    vectors = golden("pope")
    for name, rows in vectors["annotation_files"].items():
        releases.lines(tmp_path / "coco" / name, rows)
    releases.lines(tmp_path / "llava_pope_test.jsonl", vectors["llava_question_file"])
    releases.lines(tmp_path / "a" / "answers.jsonl", vectors["llava_answers"])
    result = score(call, "pope", tmp_path / "a" / "answers.jsonl", tmp_path)
    assert result["value"] == pytest.approx(vectors["expected_mean_f1_over_categories"], abs=1e-9)
    for category, expected in vectors["expected_per_category"].items():
        assert result["details"]["per_category"][category] == pytest.approx(expected, abs=1e-9)


def test_mme_folder_of_the_official_tool_and_llavas_answers(call, tmp_path):
    vectors = golden("mme")
    for task, files in vectors["ground_truth_txt"].items():
        for name, lines in files.items():
            releases.write(tmp_path / "mme" / task / name, "\n".join(lines) + "\n")
    for task, lines in vectors["official_result_lines"].items():
        releases.write(tmp_path / "Your_Results" / f"{task}.txt", "\n".join(lines) + "\n")
    releases.lines(tmp_path / "a" / "answers.jsonl", vectors["llava_answers"])
    for answers in (tmp_path / "Your_Results", tmp_path / "a" / "answers.jsonl"):
        result = score(call, "mme", answers, tmp_path / "mme", out=tmp_path / "out" / answers.name)
        for name in ("Perception", "Cognition"):
            total = vectors["expected"][name]["total"]
            assert result["metrics"][name.lower()]["value"] == pytest.approx(total, abs=1e-9)
        assert result["comparable"]


def test_scienceqa_answers_and_result_files(call, tmp_path):
    vectors = golden("scienceqa")
    for name in ("problems.json", "pid_splits.json"):
        releases.write(tmp_path / name, vectors[name])
    releases.lines(tmp_path / "a" / "answers.jsonl", vectors["llava_answers"])
    result = score(call, "scienceqa", tmp_path / "a" / "answers.jsonl", tmp_path, out=tmp_path / "1")
    # one of fifty is missing: wrong, as in the official script, and said
    assert 100 * result["value"] == pytest.approx(62.0) and result["missing"] == 1
    assert not result["comparable"] and "1 answers are missing" in result["not_comparable_reason"]
    for i, keys in enumerate((("results", "outputs"), ("results",))):
        releases.write(tmp_path / "a" / f"{i}.json", {key: vectors["expected"][key] for key in keys})
        result = score(call, "scienceqa", tmp_path / "a" / f"{i}.json", tmp_path, out=tmp_path / f"out{i}")
        assert 100 * result["value"] == pytest.approx(62.0)


def test_seedbench_answers_and_upload(call, tmp_path):
    vectors = golden("seedbench")
    releases.write(tmp_path / "SEED-Bench.json", vectors["SEED-Bench.json"])
    releases.lines(tmp_path / "a" / "answers.jsonl", vectors["llava_answers"])
    rows = [{"question_id": r["question_id"], "prediction": r["text"]} for r in vectors["llava_answers"]]
    releases.lines(tmp_path / "a" / "upload.jsonl", rows)
    total = float(
        next(x for x in vectors["official_stdout"].splitlines() if "otal" in x).split(":")[1].strip(" %")
    )
    for file in ("answers.jsonl", "upload.jsonl"):
        result = score(call, "seedbench", tmp_path / "a" / file, tmp_path, out=tmp_path / file.split(".")[0])
        assert 100 * result["value"] == pytest.approx(total, abs=0.006)


def test_mmbench_upload(call, tmp_path):
    vectors, columns = (
        golden("mmbench"),
        ["index", "question", "hint", *"ABCDE", "answer", "category", "image"],
    )
    cells = [
        [str(row.get(c) if row.get(c) is not None else "nan") for c in columns] for row in vectors["rows"]
    ]
    releases.write(
        tmp_path / "mmbench_dev_20230712.tsv", "\n".join("\t".join(row) for row in [columns, *cells])
    )
    book = openpyxl.Workbook()
    book.active.append(["index", "question", "A", "answer", "prediction"])
    for row in vectors["rows"]:
        book.active.append([row["index"], row["question"], row["A"], row["answer"], row["prediction"]])
    (tmp_path / "a").mkdir()
    book.save(tmp_path / "a" / "upload.xlsx")
    result = score(call, "mmbench", tmp_path / "a" / "upload.xlsx", tmp_path)
    assert result["value"] == pytest.approx(vectors["expected_circular"]["overall"])
    assert result["metrics"]["vanilla"]["value"] == pytest.approx(vectors["expected_vanilla"]["overall"])


def test_mmvet_results_with_the_official_grade_file(call, tmp_path):
    vectors = golden("mmvet")
    releases.write(tmp_path / "mm-vet.json", vectors["mm-vet.json"])
    releases.write(tmp_path / "a" / "results.json", vectors["results"])
    releases.write(tmp_path / "a" / "gpt-4-grade-2runs.json", vectors["grade_file"])
    grades, expected = tmp_path / "a" / "gpt-4-grade-2runs.json", vectors["expected"]
    found = [
        score(
            call,
            "mmvet",
            tmp_path / "a" / "results.json",
            tmp_path,
            "--judge-replay",
            grades,
            out=tmp_path / "1",
        ),
        score(call, "mmvet", grades, tmp_path, out=tmp_path / "2"),
    ]
    for result in found:
        assert 100 * result["value"] == pytest.approx(expected["per_capability_mean_over_runs"]["total"])
        assert result["details"]["run_totals"] == expected["total_runs_round1"]
        assert result["details"]["std_over_runs"] == expected["total_std_over_runs_round1"]
        assert result["details"]["judge"] == "gpt-4-0613" and result["comparable"]
    wrong = call("eval", "score", "mmvet", "--answers", grades, "--data", tmp_path, "--judge", "gpt-4o")
    assert wrong[0] == 2 and "holds grades of gpt-4-0613, not of gpt-4o" in wrong[2]
    # a name without a date may be of any version: not the published judge, unless the user says so
    releases.write(grades, {k: v | {"model": ["gpt-4"]} for k, v in vectors["grade_file"].items()})
    assert (
        "the judge is gpt-4,"
        in score(call, "mmvet", grades, tmp_path, out=tmp_path / "3")["not_comparable_reason"]
    )
    assert score(call, "mmvet", grades, tmp_path, "--judge", "gpt-4-0613", out=tmp_path / "4")["comparable"]


def test_vizwiz_results_and_answers_by_the_numbers_of_llavas_file(call, tmp_path):
    releases.vizwiz(tmp_path / "vizwiz", True)
    names = [row["image"] for row in json.loads((tmp_path / "vizwiz" / "val.json").read_text())]
    texts = [f"soup {i}" if i else "no" for i in range(5)]
    releases.write(tmp_path / "a" / "results.json", [{"image": n, "answer": t} for n, t in zip(names, texts)])
    releases.lines(
        tmp_path / "a" / "llava.jsonl",
        [{"question_id": i, "text": texts[i], "prompt": f"What is can {i}?\nx"} for i in range(5)],
    )
    for file in ("results.json", "llava.jsonl"):
        result = score(
            call, "vizwiz", tmp_path / "a" / file, tmp_path / "vizwiz", out=tmp_path / file.split(".")[0]
        )
        assert result["value"] == pytest.approx(4 / 5) and result["comparable"]


def test_geneval_results_of_the_published_script(call, tmp_path):
    prompts, rows, verdicts = {}, [], []
    for item in golden("geneval")["items"]:
        if item["options"]:
            continue
        key = json.dumps(item["metadata"])
        prompts.setdefault(key, []).append(item)
    whole = {key: items for key, items in prompts.items() if len(items) == 4}
    for i, (key, items) in enumerate(whole.items()):
        for j, item in enumerate(items):
            rows.append({
                "filename": f"/x/{i:05d}/samples/{j:04d}.png", "tag": item["metadata"]["tag"],
                "prompt": item["metadata"]["prompt"], "correct": item["expected_correct"],
                "reason": item["expected_reason"], "metadata": key, "details": "{}",
            })  # fmt: skip
            verdicts.append((json.loads(key), item["expected_correct"], i))
    releases.lines(tmp_path / "evaluation_metadata.jsonl", map(json.loads, whole))
    releases.lines(tmp_path / "a" / "results.jsonl", rows)
    result = score(call, "geneval", tmp_path / "a" / "results.jsonl", tmp_path)
    expected = summarise_verdicts(*map(list, zip(*verdicts)))
    assert len(rows) > 200 and result["value"] == pytest.approx(expected["overall"]) and result["comparable"]
    for tag, value in expected["per_tag"].items():
        assert result["metrics"][f"tag/{tag}"]["value"] == pytest.approx(value["value"])
    releases.lines(tmp_path / "a" / "two.jsonl", [r for r in rows if r["filename"][-5] in "01"])
    result = score(call, "geneval", tmp_path / "a" / "two.jsonl", tmp_path, out=tmp_path / "two")
    assert result["not_comparable_reason"] == "2 images per prompt instead of 4" and result["missing"] == 0
    releases.lines(tmp_path / "a" / "other.jsonl", [r | {"prompt": "a photo of nothing"} for r in rows])
    code, _, err = call(
        "eval", "score", "geneval", "--answers", tmp_path / "a" / "other.jsonl", "--data", tmp_path
    )
    assert code == 2 and "belong to no question" in err and "which is another question" in err


# ------------------------------------------------------------------------------------ answers that do not fit


@pytest.fixture
def vqa(tmp_path):
    """Data of vqav2, and the rows of a complete results file."""
    replies, _ = releases.vqav2(tmp_path / "data", False)
    return tmp_path / "data", [{"question_id": 10 + i, "answer": r} for i, r in enumerate(replies.values())]


def test_missing_unknown_and_duplicate_answers_are_counted(call, vqa, tmp_path):
    data, rows = vqa
    rows = [*rows[:4], rows[0] | {"answer": "other"}, {"question_id": 999, "answer": "x"}, {"question_id": 1}]
    releases.write(tmp_path / "a.json", rows)
    result = score(call, "vqav2", tmp_path / "a.json", data)
    assert result["value"] == pytest.approx(3 / 5) and result["missing"] == 1 and not result["comparable"]
    for line in (
        "1 answers of a.json belong to no question (not counted), the first: ",
        "id 999: there is no such id.",
        "1 entries of a.json are malformed (not counted), the first: ",
        "1 questions are answered twice (the first answer counts)",
        "1 of 5 samples have no answer",
    ):
        assert any(line in problem for problem in result["problems"]), line
        assert line in result["printed"]
    assert (
        "1 answers are missing; 1 answers of a.json belong to no question" in result["not_comparable_reason"]
    )
    # the same from the kept run, and another file is another run
    assert json.loads((tmp_path / "out" / "vqav2" / "run.json").read_text())["model"]["path"].endswith(
        "a.json"
    )
    code, out, _ = call("eval", "score", tmp_path / "out", "--partial")
    assert code == 0 and out == result["printed"]
    releases.write(tmp_path / "b.json", rows[:4])
    words = (
        "eval",
        "score",
        "vqav2",
        "--answers",
        tmp_path / "b.json",
        "--data",
        data,
        "--out",
        tmp_path / "out",
    )
    code, _, err = call(*words)
    assert code == 2 and "holds answers made with model fingerprint" in err


def test_answers_to_other_questions_never_become_a_number(call, vqa, tmp_path):
    data, rows = vqa
    llava = [{"question_id": r["question_id"], "text": "x", "prompt": "How many cats?"} for r in rows]
    for content, message in (
        ([r | {"question_id": r["question_id"] + 900} for r in rows], "5 of 5 answers belong to no question"),
        (llava, "asks 'How many cats?', which is another question"),
        (rows[:2], "answers 2 of the 5 questions of vqav2"),
        ([], "holds no answer that can be read. It is empty."),
        ([{"filename": "0/0/0.png", "correct": True}], "holds verdicts of GenEval, which only geneval has"),
        ([{"score": 1}], "expected an id under one of question_id"),
    ):
        releases.write(tmp_path / "a.json", content)
        words = ("eval", "score", "vqav2", "--answers", tmp_path / "a.json", "--data", data)
        code, out, err = call(*words, "--out", tmp_path / "out")
        assert code == 2 and message in err and err.count("\n") == 1 and not out, (message, err)
        assert not (tmp_path / "out").exists()
    releases.write(tmp_path / "a.json", rows[:2])
    assert score(call, "vqav2", tmp_path / "a.json", data, "--partial")["missing"] == 3
    releases.pope(tmp_path / "pope", False)
    # three questions of the number 1, of which the file does not say which
    releases.lines(tmp_path / "p.jsonl", [{"question_id": i, "text": "yes"} for i in (1, 2, 3)])
    code, _, err = call(
        "eval", "score", "pope", "--answers", tmp_path / "p.jsonl", "--data", tmp_path / "pope"
    )
    assert code == 2 and "3 questions have it. The file that numbers them (LLaVA's question file)" in err


def test_a_question_of_all_three_categories_of_pope_has_one_answer(call, tmp_path):
    for category in ("random", "popular", "adversarial"):
        rows = [
            {"question_id": 1, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "yes"},
            {"question_id": 2, "image": "a.jpg", "text": f"Is there a {category} dog?", "label": "no"},
        ]
        releases.lines(tmp_path / "pope" / "coco" / f"coco_pope_{category}.json", rows)
    releases.lines(
        tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "Is there a cup in the image?", "text": "Yes"}]
    )
    result = score(call, "pope", tmp_path / "a.jsonl", tmp_path / "pope")
    assert result["missing"] == 3 and result["value"] == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_the_command_says_what_it_needs(call, vqa, tmp_path):
    data, rows = vqa
    releases.lines(tmp_path / "answers.jsonl", rows)
    for words, message in (
        ((tmp_path / "answers.jsonl",), "unitok eval score NAME --answers FILE --data DIR"),
        (("vqav2",), "unitok eval score vqav2 --answers FILE --data DIR"),
        (("vqav2", "--answers", tmp_path / "answers.jsonl"), "--answers needs --data DIR"),
        ((tmp_path, "--data", data), "--data is for the answers of another program"),
        (("vqa", "--answers", tmp_path / "answers.jsonl", "--data", data), "Did you mean 'vqav2'"),
        (("vqav2", "--answers", tmp_path / "nothing", "--data", data), "does not exist"),
        (
            ("vqav2", "--answers", data / "val2014", "--data", data),
            "a folder without the files of MME's tool",
        ),
    ):
        code, _, err = call("eval", "score", *words)
        assert code == 2 and message in err and err.count("\n") == 1, err
    code, out, _ = call("eval", "score", "vqav2", "--answers", tmp_path / "answers.jsonl", "--data", data)
    assert code == 0 and "accuracy" in out and "submission" not in out


def test_scoring_loads_no_torch(vqa, tmp_path):
    data, rows = vqa
    releases.lines(tmp_path / "answers.jsonl", rows)
    words = ["eval", "score", "vqav2", "--answers", str(tmp_path / "answers.jsonl"), "--data", str(data)]
    program = (
        "import sys\n"
        "from open_unitok.cli.main import main\n"
        "from open_unitok.eval.registry import BENCHMARKS\n"
        "for name, benchmark in BENCHMARKS.items():\n"
        "    if name not in ('reconstruction', 'linear_probe', 'image_set'):  # they hold networks\n"
        "        benchmark.code\n"
        f"main({words!r})\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_id_that_occurs_twice_is_told_apart_by_the_question_or_the_order(call, tmp_path):
    releases.seedbench(tmp_path / "data", False)
    path = tmp_path / "data" / "SEED-Bench.json"
    content = json.loads(path.read_text())
    content["questions"][1]["question_id"] = content["questions"][0]["question_id"]  # as 49914 in the release
    path.write_text(json.dumps(content))
    rows = [
        {"question_id": q["question_id"], "text": q["answer"], "prompt": f"{q['question']}\nA. w"}
        for q in content["questions"]
    ]
    releases.lines(tmp_path / "prompts.jsonl", rows[::-1])
    releases.lines(
        tmp_path / "order.jsonl", [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    )
    for name in ("prompts", "order"):
        result = score(call, "seedbench", tmp_path / f"{name}.jsonl", tmp_path / "data", out=tmp_path / name)
        assert result["value"] == 1.0 and result["missing"] == 0 and result["comparable"], name


def test_answers_are_scored_on_a_data_set_of_the_hub(call, tmp_path):
    releases.pope(tmp_path / "release", False)
    hub_tables.pope(tmp_path / "release", tmp_path / "hub")
    rows = [
        {
            "question_id": i + 1,
            "prompt": f"Is there {category} thing {i} in the image?",
            "text": ("yes", "no")[i % 2],
        }
        for category in ("random", "popular", "adversarial")
        for i in range(5)
    ]
    releases.lines(tmp_path / "a.jsonl", rows)
    result = score(call, "pope", tmp_path / "a.jsonl", tmp_path / "hub")
    assert result["value"] == 1.0 and result["comparable"] and result["missing"] == 0
