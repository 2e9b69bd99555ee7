"""Malformed annotations: one entry is named, counted and wrong, and the run goes on; a whole file is not."""

import json

import pytest

from open_unitok.eval.understanding.vqav2 import all_test_ids

from .test_end_to_end import BUILDERS, Scripted, call, releases, result_of, run, scripted

assert scripted  # the fixture that replaces Model by Scripted

GQA, SEED = "testdev_balanced_questions.json", "SEED-Bench.json"
TEXT = "TextVQA_0.5.1_val.json"
VQA, NOTES = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
CHANGES = [
    ("vqav2", VQA, lambda c: c["questions"][0].pop("image_id"), "[0]: the key 'image_id'", 2 / 5),
    ("vqav2", VQA, lambda c: c["questions"].__setitem__(1, "?"), "[1]: the key 'question_id'", 2 / 6),
    ("vqav2", VQA, lambda c: c["questions"][1].update(question_id=10), "10 occurs twice", 2 / 6),
    ("vqav2", NOTES, lambda c: c["annotations"].pop(0), "question_id 10 has no annotation", 2 / 5),
    ("vqav2", NOTES, lambda c: c["annotations"][0].update(answers=[None]), "answers is None", 2 / 5),
    ("vqav2", NOTES, lambda c: c["annotations"][4].update(question_id=77), "14 has no annotation", 3 / 6),
    ("gqa", GQA, lambda c: c["01"].pop("answer"), "01: the key 'answer'", 1 / 4),
    ("gqa", GQA, lambda c: c["01"].update(question=""), "question is ''", 1 / 4),
    ("gqa", GQA, lambda c: c["00"].update(types=[]), "00, types: expected an object, got list", 1 / 4),
    ("textvqa", TEXT, lambda c: c["data"][2].update(answers=[]), "answers is []", 2.6 / 5),
    ("textvqa", TEXT, lambda c: c["data"][2].pop("answers"), "key 'answers'", 2.6 / 5),
    ("textvqa", TEXT, lambda c: c["data"].__setitem__(2, 5), "'question_id' is", 2.6 / 5),
    ("mmvet", "mm-vet.json", lambda c: c["v1_1"].update(capability=["x"]), "capability is ['x']", 2.25 / 5),
    ("mmvet", "mm-vet.json", lambda c: c["v1_4"].update(imagename=7), "imagename is 7", 1.5 / 5),
    ("vizwiz", "val.json", lambda c: c[3].pop("image"), "entry 4: the key 'image' is missing", 3 / 5),
    ("vizwiz", "val.json", lambda c: c[3].pop("answers"), "entry 4: the key 'answers' is missing", 3 / 5),
    ("seedbench", SEED, lambda c: c["questions"][1].update(answer="E"), "answer is 'E'", 2 / 5),
    ("seedbench", SEED, lambda c: c["questions"][0].update(question_type_id=7), "type lacks", 2 / 5),
    ("scienceqa", "problems.json", lambda c: c["2"].update(answer=5), "answer is 5", 2 / 5),
    ("scienceqa", "problems.json", lambda c: c["2"].update(image=[5]), "image is [5]", 2 / 5),
    ("scienceqa", "pid_splits.json", lambda c: c["test"].append("77"), "the key '77' is missing", 3 / 6),
]  # fmt: skip


def check(tmp_path, out, name, message, expected, malformed=1):
    """The entry counts as wrong in the score, and the result reports it."""
    result = result_of(tmp_path / "o", name)
    assert result["value"] == pytest.approx(expected, abs=1e-9) and result["malformed"] == malformed
    assert message in out and f"{malformed} annotations are malformed, the first: " in out
    why = result["not_comparable_reason"]
    assert not result["comparable"] and ("annotations are malformed" in why or name == "mmvet")
    rows = [json.loads(line) for line in (tmp_path / "o" / name / "scores.jsonl").read_text().splitlines()]
    assert sum(message in row.get("error", "") for row in rows) >= 1
    assert all(row["score"] in (0.0, None) for row in rows if row.get("error"))


@pytest.mark.parametrize(("name", "file", "change", "message", "expected"), CHANGES)
def test_a_malformed_entry_is_named_and_wrong(capsys, tmp_path, name, file, change, message, expected):
    Scripted.replies, _ = BUILDERS[name](tmp_path / "d", False)
    content = json.loads((tmp_path / "d" / file).read_text())
    change(content)
    releases.write(tmp_path / "d" / file, content)
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
    assert code == 0, err
    count = 2 if "has no annotation" in message and expected == 3 / 6 else 1 + (expected == 2 / 6)
    check(tmp_path, out, name, message, expected, count)
    # scoring needs the files only; once the entry is repaired, its question is answered
    words = ["--judge-replay", tmp_path / "d" / "replies.jsonl"] if name == "mmvet" else []
    assert call(capsys, "eval", "score", tmp_path / "o" / name, *words)[1] == out
    _, expected = BUILDERS[name](tmp_path / "d", False)
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", name)["value"] == pytest.approx(expected), err


LLAVA = {
    "vqav2": ("llava_vqav2_mscoco_val2014.jsonl", 0, 2 / 5),
    "gqa": ("llava_gqa_testdev_balanced.jsonl", 0, 1 / 4),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", 0, 2.6 / 5),
    "pope": ("llava_pope_test.jsonl", 2, (2 * 1 * (1 / 3) / (1 + 1 / 3) + 1 + 1) / 3),
    "mme": ("llava_mme.jsonl", 2, 10 * 100 * (3 / 4 + 1 / 2) - 100 * (1 / 4 + 1 / 2)),
    "mmvet": ("llava-mm-vet.jsonl", 4, 1.5 / 5),
    "vizwiz": ("llava_val.jsonl", 0, 3 / 5),
    "seedbench": ("llava-seed-bench.jsonl", 0, 2 / 5),
}


@pytest.mark.parametrize("fault", ["{oops", "[]", '{"question_id": 10}', '{"question_id": [], "text": "x"}'])
@pytest.mark.parametrize("name", LLAVA)
def test_a_malformed_line_of_llavas_file_is_named_and_wrong(capsys, tmp_path, name, fault):
    Scripted.replies, _ = BUILDERS[name](tmp_path / "d", True)
    file, place, expected = LLAVA[name]
    lines = (tmp_path / "d" / file).read_text().splitlines()
    lines[place] = fault
    (tmp_path / "d" / file).write_text("\n".join(lines) + "\n")
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o", "--layout", "llava")
    assert code == 0, err
    check(tmp_path, out, name, f"{file}, line {place + 1}", expected)


UNKNOWN = {"question_id": 999, "image": "n9.jpg", "text": "What?\nHm", "category": "random"}


@pytest.mark.parametrize("name", LLAVA)
def test_an_unknown_question_id_of_llavas_file_is_named_and_wrong(capsys, tmp_path, name):
    Scripted.replies, _ = BUILDERS[name](tmp_path / "d", True)
    file, place, expected = LLAVA[name]
    lines = (tmp_path / "d" / file).read_text().splitlines()
    lines[place] = json.dumps(UNKNOWN)
    (tmp_path / "d" / file).write_text("\n".join(lines) + "\n")
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o", "--layout", "llava")
    assert code == 0, err
    check(tmp_path, out, name, f"{file}, line {place + 1}", expected)


def test_a_problem_that_llavas_scienceqa_lacks_is_wrong(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["scienceqa"](tmp_path / "d", True)
    path = tmp_path / "d" / "llava_test_CQM-A.json"
    rows = json.loads(path.read_text())
    rows[0]["conversations"] = []
    path.write_text(json.dumps(rows))
    code, out, err = run(capsys, "scienceqa", tmp_path / "d", tmp_path / "o", "--layout", "llava")
    assert code == 0, err
    check(tmp_path, out, "scienceqa", "problem 0 of split test is missing or malformed", 2 / 5)


def test_malformed_lines_of_pope_mme_and_mmbench(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["pope"](tmp_path / "p", False)
    path = tmp_path / "p" / "coco" / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"label": "no"', '"label": "maybe"', 1))
    code, out, err = run(capsys, "pope", tmp_path / "p", tmp_path / "o")
    assert code == 0, err
    f1 = 2 * 2 / (2 * 2 + 2)  # of three yes, one was missed, and one no became a yes that nothing finds
    check(tmp_path, out, "pope", "question 2: label is 'maybe'", (f1 + 1 + 1) / 3)

    whole = 10 * 100 * (3 / 4 + 1 / 2)
    for number, (content, message, lost, count) in enumerate((
        # image 0000 had one right of two; 0001 both
        ("Is {} right?\tMaybe\nIs {} wrong?\tNo\n", "0001.txt, line 1: expected a question", 1, 1),
        ("Is {} right?\tYes\n", "expected two questions, found 1", 1, 1),
        ("Is {} right?\tYes\nIs {} wrong?\tNo\nMore?\tNo\n", "expected two questions, found 3", None, 1),
        ("oops\n", "0001.txt, line 1: expected a question", 2, 2),
    )):  # fmt: skip
        Scripted.replies, _ = BUILDERS["mme"](tmp_path / "m", False)
        (tmp_path / "m" / "count" / "0001.txt").write_text(content.replace("{}", "count image 1"))
        out_folder = tmp_path / f"o{number}"
        code, out, err = run(capsys, "mme", tmp_path / "m", out_folder)
        assert code == 0, err
        result = result_of(out_folder, "mme")
        # accuracy of 4 questions, accuracy+ of 2 images; with a third line of 5 questions
        task = 100 * ((3 - lost) / 4 + 0) if lost else 100 * (3 / 5 + 0)
        assert result["value"] == pytest.approx(whole - 125 + task) and message in out
        assert f"{count} annotations are malformed" in out

    for number, (old, new, message, expected) in enumerate((
        ("\tA\tcat\t", "\tE\tcat\t", "row 1: answer is 'E'", 2 / 5),
        ("\tA\tcat\t", "\tnan\tcat\t", "row 1: it has no answer, but other rows do", 2 / 5),
        ("\n0\t", "\nzero\t", "row 1: index is 'zero'", 2 / 5),
        ("\n1000000\t", "\nmillion\t", "row 2: index is 'million'", 2 / 6),
        ("\tWhich image 2?\t", "\t\t", "row 7: a question and its options", 2 / 5),
    )):  # fmt: skip
        Scripted.replies, _ = BUILDERS["mmbench"](tmp_path / "b", False)
        table = tmp_path / "b" / "mmbench_dev_20230712.tsv"
        assert old in table.read_text()
        table.write_text(table.read_text().replace(old, new, 1))
        code, out, err = run(capsys, "mmbench", tmp_path / "b", tmp_path / f"b{number}")
        assert code == 0, err
        result = result_of(tmp_path / f"b{number}", "mmbench")
        assert result["value"] == pytest.approx(expected) and message in out and result["malformed"] == 1


def test_ocr_words_that_are_malformed_or_missing_are_counted(capsys, tmp_path):
    Scripted.replies, expected = BUILDERS["textvqa"](tmp_path / "d", False)
    path = tmp_path / "d" / "TextVQA_Rosetta_OCR_v0.2_val.json"
    rows = json.loads(path.read_text())["data"]
    rows[4] = {"image_id": rows[4]["image_id"]}
    path.write_text(json.dumps({"data": rows}))
    code, out, err = run(capsys, "textvqa", tmp_path / "d", tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", "textvqa")["value"] == pytest.approx(expected), err
    assert "1 entries of OCR words TextVQA_Rosetta_OCR_v0.2_val.json are malformed" in out
    assert "1 questions have no words" in out


FILES = {
    "vqav2": VQA, "gqa": GQA, "textvqa": TEXT, "mmvet": "mm-vet.json",
    "vizwiz": "val.json", "seedbench": SEED, "scienceqa": "problems.json",
    "pope": "coco/coco_pope_popular.json", "mmbench": "mmbench_dev_20230712.tsv",
}  # fmt: skip


@pytest.mark.parametrize("content", ["{oops", "5", "[[]]", "{}", "", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_one_line(capsys, tmp_path, name, content):
    BUILDERS[name](tmp_path / "d", False)
    for path in tmp_path.rglob(FILES[name].replace("popular", "*")):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    asked = Scripted.asked
    code, _, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
    assert code == 2 and err.count("\n") == 1, err
    assert Scripted.asked == asked and not (tmp_path / "o").exists()


def test_more_malformed_than_sound_entries_are_refused(capsys, tmp_path):
    BUILDERS["gqa"](tmp_path / "d", False)
    content = json.loads((tmp_path / "d" / GQA).read_text())
    for name in list(content)[:3]:
        content[name].pop("answer")
    releases.write(tmp_path / "d" / GQA, content)
    code, _, err = run(capsys, "gqa", tmp_path / "d", tmp_path / "o")
    assert code == 2 and "3 of 5 entries are malformed" in err and "the key 'answer' is missing" in err


def test_the_list_of_all_test_ids_passes_over_what_is_no_question(tmp_path):
    path = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    path.write_text(json.dumps({"questions": [{"question_id": 3}, 5, {"question": "?"}, {"question_id": 4}]}))
    assert all_test_ids(tmp_path) == [3, 4]
