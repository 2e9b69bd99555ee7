"""GenEval's scorer against the golden vectors: verdicts, reasons, kept boxes, relations, summary."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.generation import geneval
from open_unitok.eval.judges import detections

GOLDEN = Path(__file__).parents[2] / "golden" / "eval" / "geneval.json"
OPTIONS = {"NMS_THRESHOLD": "max_overlap", "POSITION_THRESHOLD": "position_threshold"}


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


def test_every_verdict_reason_and_kept_count_is_equal(golden):
    for item in golden["items"]:
        settings = geneval.Rules(**{OPTIONS[k]: v for k, v in item["options"].items()})
        verdict = geneval.judge_image(item["metadata"], item, settings)
        assert (verdict.correct, verdict.reason) == (item["expected_correct"], item["expected_reason"]), item[
            "id"
        ]
        assert verdict.kept == item["expected_kept"], item["id"]


def test_relations_and_overlaps_are_equal(golden):
    for pair in golden["position_pairs"]:
        a, b = np.asarray(pair["a"], np.float32), np.asarray(pair["b"], np.float32)
        assert sorted(geneval.box_relations(a, b)) == pair["relation_of_a_to_b"]
        assert geneval.box_iou(np.asarray(pair["a"]), np.asarray(pair["b"])) == pytest.approx(
            pair["iou"], abs=1e-6
        )


def test_summary_equals_the_published_script(golden):
    items = [i for i in golden["items"] if not i["options"]]
    names: dict[str, int] = {}
    prompts = [names.setdefault(json.dumps(i["metadata"], sort_keys=True), len(names)) for i in items]
    result = geneval.summarise_verdicts(
        [i["metadata"] for i in items], [i["expected_correct"] for i in items], prompts
    )
    text = golden["summary_stdout_default_options_only"]
    assert f"Total prompts: {len(names)}\n" in text
    assert f"% correct images: {result['images']:.2%}" in text
    assert f"% correct prompts: {result['prompts']:.2%}" in text
    assert f"Overall score (avg. over tasks): {result['overall']:.5f}" in text
    for tag, value in result["per_tag"].items():
        assert f"{tag:<16} = {value['value']:.2%}" in text


def test_equal_scores_keep_a_stable_choice():
    row = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"}
    boxes = [[0, 0, 9, 9, 0.8], [20, 20, 29, 29, 0.8]]
    once = geneval.judge_image(row, {"detections": {"cup": boxes}, "colors": {"cup": ["red", "blue"]}})
    twice = geneval.judge_image(row, {"detections": {"cup": boxes}, "colors": {"cup": ["red", "blue"]}})
    assert once == twice


def test_malformed_metadata_names_the_line(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    good = {"tag": "position", "prompt": "x", "include": [{"class": "a", "count": 1}]}
    with pytest.raises(UserError, match=r"evaluation_metadata\.jsonl\), found nothing .*The folder is empty"):
        geneval.read_prompts(tmp_path)
    for change, message in (
        ({"tag": "size"}, "prompt 2: tag is 'size'"),
        ({"include": [{"count": 1}]}, r"prompt 2, include\[0\]: the key 'class' is missing"),
        ({"include": [{"class": "a", "count": "1"}]}, "count is '1'"),
        ({"include": [{"class": "a", "count": 1, "position": ["above", 0]}]}, "must be an earlier one"),
        ({"include": [{"class": "a", "count": 1, "position": "above"}]}, "expected .relation, clause"),
        ({"include": []}, "include is empty"),
        ({"exclude": [{"class": "a"}]}, r"exclude\[0\]: the key 'count' is missing"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        first, second = geneval.read_prompts(tmp_path)
        assert first == good and re.search(message, second["malformed"]) and second["tag"] == "position"
        path.write_text(json.dumps(good | change) + "\n")
        with pytest.raises(UserError, match=message.replace("prompt 2", "prompt 1")):
            geneval.read_prompts(tmp_path)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        geneval.read_prompts(tmp_path)
    for found, message in (
        ({"detections": {"a": [[0, 0, 1, 1, 1.0]] * 2}, "colors": {"a": ["red"]}}, "2 boxes, but 1 colours"),
        ({"detections": {"a": [[0, 0, 1]]}}, "boxes of 'a' must be"),
        ({"detections": {"a": 5}, "colors": []}, "colors: expected an object, got list"),
        ({"detections": []}, "detections: expected an object, got list"),
    ):
        with pytest.raises(UserError, match=message):
            detections.check_detections(found, "line 1")
    with pytest.raises(UserError, match="2 boxes, but 1 colours"):
        geneval.judge_image(good, {"detections": {"a": [[0, 0, 1, 1, 1.0]] * 2}, "colors": {"a": ["red"]}})
