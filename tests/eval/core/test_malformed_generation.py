"""Benchmarks that draw: a malformed prompt, finding or image is named and wrong; the run goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from ..generation.test_generated_images import (
    generator,
    judge,
    quick_net,
    result_of,
    run,
    write_dpg,
    write_genai,
    write_mjhq,
)

assert generator and judge and quick_net  # fixtures


def write_lines(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


TAGS = ("single_object", "single_object", "counting", "colors", "position", "color_attr")
CUP = {"include": [{"class": "cup", "count": 1}]}


@pytest.mark.parametrize("fault", ["{oops", {"tag": "x", "prompt": "p", **CUP}, {"tag": "counting"}])
def test_geneval_counts_a_malformed_prompt_and_malformed_findings(call, generator, tmp_path, fault):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"tag": t, "prompt": f"a cup {i}", **CUP} for i, t in enumerate(TAGS)]
    rows[2] = {"tag": "counting", "prompt": "x", **CUP}
    write_lines(data / "evaluation_metadata.jsonl", [*rows[:3], fault, *rows[3:]])
    words = (call, "geneval", data, tmp_path, "--images-per-prompt", 1)
    assert "have no detections" in run(*words)[2]
    seen = {"detections": {"cup": [[0, 0, 9, 9, 0.95]]}, "detector": "mmdet Mask2Former"}
    path = tmp_path / "geneval" / "detections.jsonl"
    write_lines(path, [{"index": i, **seen} for i in range(7)])
    code, out, err = run(*words)
    assert code == 0, err
    result = result_of(tmp_path, "geneval")
    # counting: one of two, the broken one taken for its neighbour's tag where it names none
    assert result["value"] == pytest.approx(4.5 / 5) and result["metrics"]["tag/counting"]["n"] == 2
    assert (result["malformed"] == 1 and "prompt 4" in out) or "line 4" in out
    assert "1 annotations are malformed" in result["not_comparable_reason"]
    boxes = {"cup": [[0, 0, 9]]}
    bad = [
        "{oops",
        {"index": 5, "detections": boxes},
        {"index": 77, **seen},
        {"index": 1, **seen},
        {"index": 6},
    ]
    write_lines(path, [{"index": i, **seen} for i in range(5)] + bad)
    code, out, err = run(*words)
    assert code == 0, err
    assert result_of(tmp_path, "geneval")["value"] == pytest.approx((1 + 0.5 + 1) / 5)
    assert "5 lines of detections.jsonl cannot be used, the first: " in out and "line 6" in out
    write_lines(path, bad[:2])
    code, _, err = run(*words)
    assert code == 2 and "has no usable line" in err and err.count("\n") == 1


def test_genai_bench_counts_malformed_prompts_skills_and_scores(call, generator, judge, tmp_path):
    data = tmp_path / "data"
    write_genai(data, ("a", "b", "c", "d", "", "f"))
    skills = {"counting": [1, 5], "advanced": [1, 3, 99], "scene": [2, "x"], "basic": [4]}
    (data / "genai_skills.json").write_text(json.dumps(skills))
    code, out, err = run(call, "genai_bench", data, tmp_path, "--vqa-model", tmp_path)
    assert code == 0, err
    result = result_of(tmp_path, "genai_bench")
    values = {k: m["value"] for k, m in result["metrics"].items()}
    assert values["advanced"] == pytest.approx(0.75 * 2 / 3) and values["counting"] == pytest.approx(0.375)
    assert values["scene"] == pytest.approx(0.375) and values["all"] == pytest.approx(0.75 * 4 / 7)
    assert result["malformed"] == 3 and "prompts.txt, line 5, is empty" in out
    folder = tmp_path / "genai_bench"
    bad = ["{oops", {"index": 0, "score": 7}, {"index": 50, "score": 1.0}, {"index": 2, "score": 1.0}]
    write_lines(folder / "vqascore.jsonl", [{"index": 2, "score": 0.9}, *bad])
    code, out, err = call("eval", "score", folder)
    assert code == 0 and "4 lines of vqascore.jsonl cannot be used" in out, err
    assert result_of(tmp_path, "genai_bench")["value"] == pytest.approx(0.3)
    (data / "prompts.txt").unlink()
    prompts = {str(i): {"prompt": "p" * i} for i in range(1, 5)} | {
        "six": {"prompt": "x"},
        "5": {"text": "x"},
    }
    (data / "genai_image.json").write_text(json.dumps(prompts))
    code, out, err = run(call, "genai_bench", data, tmp_path / "o", "--vqa-model", tmp_path)
    assert code == 0 and result_of(tmp_path / "o", "genai_bench")["malformed"] == 4, err
    assert result_of(tmp_path / "o", "genai_bench")["metrics"]["counting"]["value"] == pytest.approx(0.375)
    for content in ("[]", '{"advanced": 5}', "{oops"):
        (data / "genai_skills.json").write_text(content)
        code, _, err = run(call, "genai_bench", data, tmp_path / "p")
        assert code == 2 and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("old", "new", "message", "lost"),
    [
        ("item1,q,,1,", "item1,q,,one,", "line 6: proposition_id and dependency must", 1 / 3),
        ("item1,q,,2,1", "item1,q,,2,x", "line 7: proposition_id and dependency must", 0),
        ("item1,q,,1,", ",q,,1,", "line 6: item_id and question_natural_language must", 1 / 12),
        ("item1,q,,3,", "item1,q,,2,", "line 8: question 2 occurs twice", 0),
    ],
)
def test_dpg_bench_counts_malformed_questions_as_no(
    call, generator, judge, tmp_path, old, new, message, lost
):
    data = tmp_path / "data"
    write_dpg(data, ("p", "q", "r", "s", "t"))
    table = data / "dpg_bench.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    code, out, err = run(call, "dpg_bench", data, tmp_path, "--vqa-model", tmp_path, "--images-per-prompt", 1)
    assert code == 0, err
    # a third of each of five prompts: question 1 is yes, 2 is no, 3 has 2 for a parent
    result = result_of(tmp_path, "dpg_bench")
    assert message in out and "1 questions are malformed" in out
    if "item_id" in message:  # item0 gets a question more, item1 has lost its first, whose child is 0 then
        assert result["value"] == pytest.approx(100 * (3 / 3 + 1 / 4) / 5)
    else:
        assert result["value"] == pytest.approx(100 * (5 / 3 - lost) / 5)


def test_dpg_bench_counts_malformed_answers_and_an_empty_prompt(call, generator, judge, tmp_path):
    data = tmp_path / "data"
    write_dpg(data, ("p", "q", "", "s", "t"))
    words = (call, "dpg_bench", data, tmp_path, "--images-per-prompt", 1)
    code, out, err = run(*words, "--vqa-model", tmp_path)
    assert code == 0 and result_of(tmp_path, "dpg_bench")["value"] == pytest.approx(100 / 3 * 4 / 5), err
    assert "the prompt of 'item2' is empty" in out and result_of(tmp_path, "dpg_bench")["malformed"] == 1
    yes = {"answers": {"1": "yes", "2": "yes", "3": "yes"}, "model": "mPLUG-large"}
    bad = [{"index": 3, "answers": [1]}, {"index": 9, **yes}, "{oops"]
    write_lines(tmp_path / "dpg_bench" / "vqa_answers.jsonl", [{"index": i, **yes} for i in range(3)] + bad)
    code, out, err = call("eval", "score", tmp_path / "dpg_bench")
    assert code == 0 and result_of(tmp_path, "dpg_bench")["value"] == pytest.approx(40.0), err
    assert "3 lines of vqa_answers.jsonl cannot be used, the first: " in out


def test_mjhq_counts_malformed_prompts(call, generator, quick_net, tmp_path):
    write_mjhq(tmp_path / "data")
    path = tmp_path / "data" / "meta_data.json"
    meta = json.loads(path.read_text()) | {"odd": {"prompt": "x"}, "odder": 5}
    path.write_text(json.dumps(meta))
    code, out, err = run(call, "mjhq", tmp_path / "data", tmp_path, "--inception-weights", quick_net)
    assert code == 0, err
    assert "2 annotations are malformed" in out and "2 images are missing from the FID" in out
    result = result_of(tmp_path, "mjhq")
    assert result["metrics"]["fid"]["n"] == 5 and not result["comparable"]
    path.write_text("[]")
    code, _, err = run(call, "mjhq", tmp_path / "data", tmp_path / "o")
    assert code == 2 and "expected an object, got list" in err


def test_an_image_that_breaks_after_generation_is_counted(call, generator, judge, tmp_path):
    """A disk may fail between generation and judge pass: the pass names the image and continues."""
    write_genai(tmp_path / "data", ("a", "b", "c", "d", "e"))
    run(call, "genai_bench", tmp_path / "data", tmp_path)
    (tmp_path / "genai_bench" / "images" / "00001.jpg").write_bytes(b"broken")
    (tmp_path / "genai_bench" / "images" / "00003.jpg").unlink()
    code, out, err = run(call, "genai_bench", tmp_path / "data", tmp_path, "--vqa-model", tmp_path)
    assert code == 0, err
    assert result_of(tmp_path, "genai_bench")["value"] == pytest.approx(0.25)
    assert "2 images could not be judged, the first because " in out and "00001.jpg" in out
    assert "2 images have no score (counted as 0)" in out
    assert np.asarray(Image.open(tmp_path / "genai_bench" / "images" / "00002.jpg")).shape == (16, 16, 3)
