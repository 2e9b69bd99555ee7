"""A part of a release is no silent number: question files that ask less, twice or of another version."""

import json

import pytest

from open_unitok.eval.core.annotations import part_asked

from .test_end_to_end import BUILDERS, Scripted, result_of, run, scripted

assert scripted  # the fixture that replaces Model by Scripted
# question file, and the number of released questions
QUESTION_FILES = {
    "gqa": ("llava_gqa_testdev_balanced.jsonl", 4),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", 5),
    "mme": ("llava_mme.jsonl", 56),
    "mmvet": ("llava-mm-vet.jsonl", 5),
    "vizwiz": ("llava_val.jsonl", 5),
    "seedbench": ("llava-seed-bench.jsonl", 5),
}


def reason_of(capsys, name, folder, out, *flags):
    code, _, err = run(capsys, name, folder, out, *flags)
    assert code == 0, err
    return result_of(out, name).get("not_comparable_reason", "")


@pytest.mark.parametrize("name", QUESTION_FILES)
def test_a_question_file_that_asks_less_or_twice_is_not_comparable(capsys, tmp_path, name):
    Scripted.replies, _ = BUILDERS[name](tmp_path / "x", True)
    file, count = QUESTION_FILES[name]
    path = tmp_path / "x" / file
    lines = path.read_text().splitlines(keepends=True)
    flags = ("--layout", "llava")
    assert "released questions" not in reason_of(capsys, name, tmp_path / "x", tmp_path / "o", *flags)
    path.write_text("".join(lines[1:]))
    reason = reason_of(capsys, name, tmp_path / "x", tmp_path / "p", *flags)
    assert f"1 of {count} released questions are not in {file}" in reason
    path.write_text("".join([*lines, lines[0]]))
    reason = reason_of(capsys, name, tmp_path / "x", tmp_path / "q", *flags)
    # TextVQA's ids are images, which several questions share; SEED-Bench has one id twice, and no third
    if name not in ("textvqa", "seedbench"):
        assert f"1 of {count} released questions are asked twice in {file}" in reason


def test_an_id_that_the_release_has_twice_is_asked_twice(tmp_path):
    file = tmp_path / "q.jsonl"
    assert part_asked("aab", "baa", file) == "" and part_asked("ab", "aab", file)
    assert part_asked("aabb", "aab", file) == "1 of 3 released questions are asked twice in q.jsonl"


def test_images_of_mme_without_questions_are_counted(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["mme"](tmp_path / "x", False)
    (tmp_path / "x" / "count" / "0000.txt").unlink()
    (tmp_path / "x" / "scene" / "questions_answers_YN" / "0001.txt").unlink()
    reason = reason_of(capsys, "mme", tmp_path / "x", tmp_path / "o")
    assert reason.startswith("2 images have no questions (") and "count/0000.jpg" in reason


def test_annotations_of_val_are_not_optional(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["vqav2"](tmp_path / "x", False)
    (tmp_path / "x" / "v2_mscoco_val2014_annotations.json").unlink()
    code, _, err = run(capsys, "vqav2", tmp_path / "x", tmp_path / "o")
    assert code == 2 and "v2_mscoco_val2014_annotations.json does not exist" in err
    # those of test-dev are not public
    questions = tmp_path / "x" / "v2_OpenEnded_mscoco_val2014_questions.json"
    content = json.loads(questions.read_text()) | {"data_subtype": "test-dev2015"}
    questions.unlink()
    (tmp_path / "x" / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(content))
    (tmp_path / "x" / "val2014").rename(tmp_path / "x" / "test2015")
    for path in (tmp_path / "x" / "test2015").iterdir():
        path.rename(path.with_name(path.name.replace("val2014", "test2015")))
    assert run(capsys, "vqav2", tmp_path / "x", tmp_path / "o")[0] == 0
    assert result_of(tmp_path / "o", "vqav2")["value"] is None
