"""Release files in the layouts that people have: archives, clones, a file for its folder, and `all`."""

import json
import shutil

import pytest

from open_unitok.eval.core.release_files import RELEASES, release_patterns
from open_unitok.eval.registry import BENCHMARKS, detect_benchmarks, find_benchmark

from .test_end_to_end import BUILDERS, Scripted, releases, result_of, run, scripted

assert scripted  # the fixture that replaces Model by Scripted
# folders of LLaVA's archive, and where its instructions put the release
LLAVA_FOLDERS = {
    "mme": "MME/MME_Benchmark_release_version", "mmvet": "mm-vet", "seedbench": "seed_bench",
    "gqa": "gqa/data", "vizwiz": "vizwiz", "pope": "pope", "scienceqa": "scienceqa", "textvqa": "textvqa",
    "mmbench": "mmbench", "vqav2": "vqav2",
}  # fmt: skip


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The folder playground/data/eval of LLaVA: release files, question files above, answers beside."""
    root, expected, asked = tmp_path_factory.mktemp("archive") / "eval", {}, {}
    for name, place in LLAVA_FOLDERS.items():
        replies, expected[name] = BUILDERS[name](root / place, True)
        asked |= replies
        top = root / place.split("/")[0]
        for file in (root / place).glob("llava*"):
            # question files lie above the release, answers have their names
            (top / "answers" / file.name).mkdir(parents=True, exist_ok=True)
            (top / "answers" / file.name / "merge.jsonl").write_text("{}\n")
            shutil.copy(file, top / "answers" / file.name / file.name)
            if file.parent != top:
                file.rename(top / file.name)
    return root, expected, asked


def test_llavas_archive_is_read_as_a_whole(capsys, tmp_path, archive):
    root, expected, Scripted.replies = archive
    assert set(detect_benchmarks(root)) == set(LLAVA_FOLDERS)
    # from the folder above the archive too
    assert set(detect_benchmarks(root.parent)) == set(LLAVA_FOLDERS)
    (root / "geneval").mkdir()
    replay = ("--judge-replay", root / "mm-vet" / "replies.jsonl")
    code, _, err = run(capsys, "all", root, tmp_path / "o", *replay)
    (root / "geneval").rmdir()
    # the empty folder is named at the end, and the rest has run
    assert code == 2 and "1 benchmarks have no result. geneval:" in err and "has none of its files" in err
    for name, value in expected.items():
        assert result_of(tmp_path / "o", name)["value"] == pytest.approx(value), name


@pytest.mark.parametrize("name", [name for name in LLAVA_FOLDERS if name != "mmbench"])
def test_each_question_file_is_found_in_llavas_archive(capsys, tmp_path, archive, name):
    root, expected, Scripted.replies = archive
    place = root / "mm-vet" if name == "mmvet" else root  # `run` looks for the judge's replies there
    code, _, err = run(capsys, name, place, tmp_path / "o", "--layout", "llava")
    assert code == 0 and result_of(tmp_path / "o", name)["value"] == pytest.approx(expected[name]), err


# one or two folders above the files, in turn
@pytest.mark.parametrize(("name", "above"), [(name, ("v1", "a/b")[i % 2]) for i, name in enumerate(BUILDERS)])
def test_a_release_may_lie_some_folders_below(capsys, tmp_path, name, above):
    Scripted.replies, expected = BUILDERS[name](tmp_path / "x" / above, False)
    if name == "mmvet":
        shutil.copy(tmp_path / "x" / above / "replies.jsonl", tmp_path / "x")
    code, _, err = run(capsys, name, tmp_path / "x", tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", name)["value"] == pytest.approx(expected), err


FILES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json", "gqa": "testdev_balanced_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json", "pope": "coco/coco_pope_random.json",
    "mmvet": "mm-vet.json", "vizwiz": "val.json", "seedbench": "SEED-Bench.json",
    "scienceqa": "problems.json", "mmbench": "mmbench_dev_20230712.tsv",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FILES if name != "mmvet"])
def test_a_file_stands_for_its_folder(capsys, tmp_path, name):
    Scripted.replies, expected = BUILDERS[name](tmp_path / "x", False)
    code, _, err = run(capsys, name, tmp_path / "x" / FILES[name], tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", name)["value"] == pytest.approx(expected), err


def test_llavas_question_file_stands_for_its_folder(capsys, tmp_path):
    Scripted.replies, expected = BUILDERS["pope"](tmp_path / "x", True)
    code, _, err = run(capsys, "pope", tmp_path / "x" / "llava_pope_test.jsonl", tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", "pope")["value"] == pytest.approx(expected), err


def test_the_file_that_is_passed_is_taken_among_several(capsys, tmp_path):
    Scripted.replies, expected = BUILDERS["mmbench"](tmp_path, False)
    table = tmp_path / "mmbench_dev_20230712.tsv"
    shutil.copy(table, tmp_path / "MMBench_TEST_EN.tsv")
    table.write_text("")
    code, _, err = run(capsys, "mmbench", tmp_path / "MMBench_TEST_EN.tsv", tmp_path / "o")
    assert code == 0 and result_of(tmp_path / "o", "mmbench")["value"] == pytest.approx(expected), err


def test_a_wrong_place_says_what_was_looked_for_and_what_is_there(capsys, tmp_path):
    places = {}
    for place in ("empty", "zips", "parent/val2014", "other"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "zips" / "coco.zip").write_bytes(b"PK")
    BUILDERS["pope"](tmp_path / "parent", False)
    BUILDERS["seedbench"](tmp_path / "other", False)
    places = {
        "empty": "The folder is empty.",
        "zips": "There: coco.zip. Unpack coco.zip first.",
        "zips/coco.zip": "Unpack it first, and pass the folder.",
        "parent/coco/val2014": f"Pass {tmp_path / 'parent' / 'coco'} instead.",
        "other": "These are files of seedbench.",
        "other/SEED-Bench.json": "It is another file.",
        "parent/coco/val2014/COCO_val2014_000000000000.jpg": f"Pass {tmp_path / 'parent' / 'coco'} instead.",
    }
    for place, message in places.items():
        code, _, err = run(capsys, "pope", tmp_path / place, tmp_path / "o")
        assert code == 2 and err.count("\n") == 1 and message in err, err
        assert "neither *_pope_*.json (the release), nor *pope*.jsonl (LLaVA's" in err
    assert not (tmp_path / "o").exists()


def test_all_goes_on_after_an_incomplete_benchmark(capsys, tmp_path):
    """VizWiz has only LLaVA's question file, as in the archive; GQA lacks its questions."""
    Scripted.replies, _ = BUILDERS["vizwiz"](tmp_path / "vizwiz", False)
    rows = json.loads((tmp_path / "vizwiz" / "val.json").read_text())
    (tmp_path / "vizwiz" / "val.json").unlink()
    (tmp_path / "vizwiz" / "val").rename(tmp_path / "vizwiz" / "test")
    asked = [{"question_id": 0, "image": r["image"], "text": r["question"] + "\nx"} for r in rows]
    releases.lines(tmp_path / "vizwiz" / "llava_test.jsonl", asked)
    releases.lines(tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl", asked)
    replies, _ = BUILDERS["scienceqa"](tmp_path / "scienceqa", False)
    Scripted.replies |= replies
    code, out, err = run(capsys, "all", tmp_path, tmp_path / "o")
    assert code == 2 and "vizwiz  (5 samples" in out and "scienceqa  (5 samples" in out
    assert "1 benchmarks have no result. gqa:" in err and "expected one GQA question file" in err
    # the folder of an earlier run inside the data folder is no incomplete release
    shutil.copytree(tmp_path / "o" / "scienceqa", tmp_path / "o" / "textvqa")
    code, out, err = run(capsys, "all", tmp_path, tmp_path / "o")
    assert code == 2 and "1 benchmarks have no result. gqa:" in err
    # the same without `all`
    code, out, err = run(capsys, "gqa", tmp_path, tmp_path / "o2")
    assert code == 2 and "benchmarks have no result" not in err


@pytest.mark.parametrize("name", ["vqav2", "textvqa", "mme", "pope", "vizwiz", "seedbench"])
def test_suffixes_of_images_have_no_case(capsys, tmp_path, name):
    Scripted.replies, expected = BUILDERS[name](tmp_path / "x", False)
    for path in list((tmp_path / "x").rglob("*")):
        if path.is_file() and path.suffix in (".jpg", ".png"):
            path.rename(path.with_suffix({".jpg": ".JPG", ".png": ".Png"}[path.suffix]))
    code, _, err = run(capsys, name, tmp_path / "x", tmp_path / "o")
    result = result_of(tmp_path / "o", name)
    assert code == 0 and result["value"] == pytest.approx(expected) and result["failed"] == 0, err


def test_loaders_and_all_use_the_same_patterns():
    for name in RELEASES:
        assert set(release_patterns(name)) <= set(find_benchmark(name).files)
    assert set(RELEASES) <= set(BENCHMARKS)
