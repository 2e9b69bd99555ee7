"""The code on an emulated CUDA device: no mix of devices, captured = eager, host waits within a budget."""

import pytest

slow = pytest.mark.slow

# Host synchronisations that a scenario may have. Lower a number with every change that removes one.
BUDGETS = {
    "generation": 12,  # of a batch, whatever the number of visual tokens
    "answer": 17,  # of a captured step; after its first 16 tokens one for every 8 tokens
    "encode": 2,
    "tokenizer step": 0,
    "tokenizer step that resets dead codes": 8,  # in the first step; 7 in later ones
    "mllm step": {"packed, sdpa": 1, "packed, eager": 1, "padded, ZeRO 3": 6},  # others: 0
}


def results(found: dict) -> dict:
    """The results of scenarios that raised nothing."""
    for name, line in found.items():
        assert "error" not in line, f"{name}: {line['error']}\n{line['trace']}"
    return {name: line["result"] for name, line in found.items()}


@pytest.fixture(scope="module")
def generation(run_scenarios):
    return results(run_scenarios("generation"))


def test_the_device_behaves_as_cuda(run_scenarios):
    """What the other tests rely on."""
    found = results(run_scenarios("device"))
    assert found["modules"] == {"device": "cuda:0", "dtype": "torch.bfloat16", "kind": "CUDATensor"}
    assert found["copies"] == {
        "pinned, non_blocking=False": 1,
        "pinned, non_blocking=True": 0,
        "pageable, non_blocking=False": 1,
        "pageable, non_blocking=True": 1,
    }
    refused = found["refusals"]
    assert refused.pop("scalar") == ""  # CUDA takes 0-d tensors of the CPU in pointwise operators
    said = {
        "operands": "cuda:0 and cpu!",
        "linear": "cuda:0 and cpu!",
        "numpy": "Tensor.cpu()",
        "generator": "for generator but found 'cpu'",
        "ordinal": "invalid device ordinal",
        "devices": "cuda:0 and cuda:1!",
    }
    for name, words in said.items():
        assert words in refused[name], (name, refused[name])
    graphs = found["graphs"]
    assert graphs["cuda:1"] == [[0, 0], [2, 2], [2, 2], False]
    # on the wrong device nothing is recorded: the step runs once, and a replay does nothing
    assert graphs["cuda:0"] == [[1, 1], [1, 1], [1, 1], True]
    assert "not permitted when stream is capturing" in graphs["item"]
    assert "due to a previous error during capture" in graphs["end"]


@slow
def test_captured_generation_equals_eager(generation):
    for name, report in generation["samplings"].items():
        assert report["equal"] and report["equal_to_cpu"], name
        # one replay checks that the capture is not empty
        assert report["replays"] == 9 and not report["refused"], (name, report)
        assert report["waits"] <= BUDGETS["generation"], (name, report["syncs"])


@slow
def test_a_planted_cpu_index_is_found(generation):
    error = generation["planted_cpu_arange"]
    assert "at least two devices, cuda:0 and cpu" in error and "scenarios/generation.py" in error


@slow
def test_a_planted_cpu_generator_is_found(generation):
    error = generation["planted_cpu_generator"]
    assert "Expected a 'cuda' device type for generator but found 'cpu'" in error
    assert "generation/sampling.py" in error


@slow
def test_a_planted_wait_in_the_captured_step_is_found(generation):
    found = generation["planted_item"]
    assert found["equal"] and found["stream"] == 0 and found["replays"] == 0
    (refused,) = found["refused"]
    assert refused.startswith("item at tests/device/scenarios/generation.py")


@pytest.fixture(scope="module")
def training(run_scenarios):
    return results(run_scenarios("training"))


@slow
def test_a_tokenizer_step_with_every_loss_stays_within_its_budget(training):
    found = training["tokenizer"]
    *earlier, last = found["waits_by_step"]  # dead codes are reset in the first half
    assert last <= BUDGETS["tokenizer step"], found["syncs"]
    assert max(earlier) <= BUDGETS["tokenizer step that resets dead codes"], found["waits_by_step"]
    for name in ("l1", "lpips", "vq", "entropy", "clip", "adversarial", "discriminator", "consistency"):
        assert all(value != 0 for value in found["metrics"][name]), name


@slow
def test_an_mllm_step_stays_within_its_budget(training):
    runs = training["mllm"] | {"LoRA": training["mllm_lora"]}
    for name, found in runs.items():
        assert found["waits"] <= BUDGETS["mllm step"].get(name, 0), (name, found["syncs"])
    losses = {name: found["metrics"]["loss"] for name, found in training["mllm"].items()}
    for name, values in losses.items():  # the same samples, however they are batched and attended
        assert values == pytest.approx(losses["padded"], rel=1e-3), name


@pytest.fixture(scope="module")
def pipeline(run_scenarios):
    return results(run_scenarios("pipeline"))


@slow
def test_the_pipeline_does_on_the_device_what_it_does_on_the_cpu(pipeline):
    found = pipeline["pipeline"]
    assert not found["differs"] and found["previews"] == 3 and not found["refused"]
    codes = pipeline["extract_codes"]
    assert codes["cuda"] == codes["cpu"]


@slow
def test_an_answer_waits_rarely(pipeline):
    short, long = (pipeline["answers"][f"{length} tokens"] for length in (20, 36))
    assert short["replays"] >= 16 and not short["refused"]
    assert max(short["waits"], long["waits"]) <= BUDGETS["answer"], long["syncs"]


@slow
def test_the_tokenizer_encodes_and_decodes_as_on_the_cpu(pipeline):
    found = pipeline["tokenizer"]
    for dtype, tolerance in (("torch.float32", 1e-4), ("torch.bfloat16", 0.05)):
        assert found[dtype]["equal"] and found[dtype]["error"] < tolerance
        assert found[dtype]["waits"] <= BUDGETS["encode"], found[dtype]["syncs"]


@pytest.fixture(scope="module")
def evaluation(run_scenarios):
    return results(run_scenarios("evaluation"))


@slow
@pytest.mark.parametrize("scenario", ["features", "judges"])
def test_models_of_the_evaluation_run_on_the_device(evaluation, scenario):
    found = evaluation[scenario]
    assert found["operators"] > 100
    for name, error in found["error"].items():
        # a VQA model runs in bf16 there, and pixels may be rounded to their neighbours
        assert error <= {"probabilities": 0.05, "reconstruction": 1}.get(name, 1e-3), (name, error)


@slow
def test_class_conditional_generation_is_captured(evaluation):
    found = evaluation["classes"]
    assert found["equal"] and found["equal_to_cpu"] and found["replays"] > 8 and not found["refused"]
