"""What the harness itself costs."""

import json
import time

import pytest

from open_unitok.core.files import write_json
from open_unitok.eval.core.harness import AnswerStore
from open_unitok.eval.core.results import run_metadata
from open_unitok.eval.registry import find_benchmark
from open_unitok.eval.understanding import vqav2

from ..conftest import score_folder


@pytest.mark.slow
def test_scoring_100_000_vqav2_answers_takes_less_than_20_seconds(tmp_path):
    """From the files of the release and a run's answers to results.json, in seconds of one processor."""
    count, data, out = 100_000, tmp_path / "data", tmp_path / "out"
    data.mkdir()
    words = ["red", "two", "a dog", "yes", "no", "left", "surf board", "don't know", "3.5", "u.s.a."]
    questions = [{"question_id": i, "image_id": i // 5, "question": f"What is {i}?"} for i in range(count)]
    notes = [
        {
            "question_id": i, "question_type": f"type {i % 65}", "answer_type": "other",
            "answers": [{"answer": words[(i + k // 3) % 10]} for k in range(10)],
        }
        for i in range(count)
    ]  # fmt: skip
    head = {"data_subtype": "val2014"}
    path = data / "v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps(head | {"questions": questions}))
    (data / "v2_mscoco_val2014_annotations.json").write_text(json.dumps(head | {"annotations": notes}))
    settings, _ = find_benchmark("vqav2").resolve({})
    task = vqav2.load(data, settings)
    AnswerStore(out, "vqav2").append(
        task.samples, [{"text": f"{words[i % 7]}, {i % 900}"} for i in range(count)]
    )
    write_json(out / "run.json", run_metadata("vqav2", settings, {"fingerprint": "0"}, data))
    start = time.process_time()
    result = score_folder(out)
    assert time.process_time() - start < 20 and result["n"] == count
