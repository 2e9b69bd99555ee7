"""Captured steps on the emulated CUDA device: codes and ids of eager decoding, few captures, few waits."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(run_scenarios):
    lines = run_scenarios("captured_steps")
    for name, line in lines.items():
        assert "error" not in line, f"{name}: {line['error']}\n{line['trace']}"
    return {name: line["result"] for name, line in lines.items()}


def test_a_model_on_the_second_device_generates_what_the_cpu_does(found):
    second = found["second_device"]
    assert second["replays"] > 40 and second["current"] == 0
    assert all(second[name] for name in ("images", "classes", "greedy", "sampled")), second


def test_a_capture_on_the_current_device_is_refused(found):
    assert found["planted_current_device"].startswith(
        "EmptyGraphError: The CUDA graph captured on cuda:1 is empty"
    )


def test_a_shape_is_captured_once(found):
    assert all(found["reuse"]["equal"]), found["reuse"]
    assert found["reuse"]["counts"] == {
        "same shape": 1,
        "other guidance": 1,
        "other top-k": 2,
        "answers of 3, 4 and 4 prompts": 3,
        "other model": 4,
    }


def test_captures_follow_the_weights_and_are_released(found):
    release = found["release"]
    assert release["in place"] == [True, True, 1]
    assert release["replaced"] == [True, True, 2]
    assert release["adapter"] == ["torch", True, 0]
    assert release["merged"] == [True, True, 3]
    assert release["kept"] == 1 and release["kept without the model"] == 0


def test_captured_answers_equal_eager_ones_with_few_waits(found):
    for name, report in found["answers"].items():
        what, _, length = name.split(", ")
        tokens = int(length)
        assert report["equal"] and not report["refused"], (name, report)
        assert report["replays"] == tokens - 1, (name, report)
        # of the batch, whatever its length; and per group of 8 ids, or per id of a stream
        per_batch, reads = 13, -(-(tokens - 1) // 8) if what == "answers" else tokens - 1
        assert report["waits"] <= per_batch + reads, (name, report)


def test_threads_share_a_model(found):
    threads = found["threads"]
    assert not threads["errors"] and all(threads["equal"]), threads
    # each thread that finds none free captures its own; later batches capture none
    assert 1 <= threads["captures"] <= 4 and threads["one more"] == 0


def test_images_and_answers_of_a_server_take_turns(found):
    served = found["interleaved"]
    assert served == {"images": [True, True], "answers": [True, True], "captures": 2}
