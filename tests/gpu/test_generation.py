"""Generation on a GPU: captured steps give the codes of the steps they capture, on every device."""

import contextlib
import warnings

import pytest
import torch

from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids, iter_text_ids
from open_unitok.generation.backends import captured_step, choose_backend, cuda_graph, graph_capture

pytestmark = pytest.mark.gpu
PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL, SEEDS = [1, 90, 91, 3], [1, 2, 3]
SAMPLINGS = {
    "sampled": Sampling(guidance=3.0),
    "greedy": Sampling(guidance=3.0, greedy=True),
    "top-k and top-p": Sampling(guidance=2.0, temperature=0.8, top_k=6, top_p=0.9),
    "unguided": Sampling(guidance=1.0),
    "scheduled": Sampling(guidance=3.0, guidance_schedule="cosine"),
}


@contextlib.contextmanager
def replaced_capture(replacement):
    """Another function in the place of `capture_step`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (graph_capture, captured_step):
            if hasattr(module, "capture_step"):
                patch.setattr(module, "capture_step", replacement)
        yield


def generate(model, sampling, prefix=None, backend="auto", prompts=PROMPTS, seeds=SEEDS):
    return generate_image_codes(model, prompts, sampling, seeds, UNCONDITIONAL, prefix, backend).cpu()


@pytest.mark.parametrize(
    ("name", "given"), [*((name, 0) for name in SAMPLINGS), ("sampled", 3), ("scheduled", 3)]
)
def test_a_captured_graph_equals_eager(mllm, name, given):
    model, sampling = mllm().cuda(), SAMPLINGS[name]
    expected = generate(model, sampling, backend="torch")
    prefix = expected[:, :given] if given else None
    assert choose_backend(model, num_steps=11 - given) == "cuda_graph"
    assert choose_backend(model, num_steps=cuda_graph.MIN_STEPS - 1) == "torch"
    assert torch.equal(generate(model, sampling, prefix), expected)
    # and again, by the capture that was kept
    assert torch.equal(generate(model, sampling, prefix), expected)


@pytest.mark.parametrize("context", ["full", "last"])
@pytest.mark.parametrize("name", ["sampled", "greedy"])
def test_a_captured_graph_in_bf16_equals_its_own_step(mllm, name, context):
    """Not the eager backend: without a mask that takes other kernels, which round differently."""
    model = mllm(visual_context=context).cuda().to(torch.bfloat16)
    found = generate(model, SAMPLINGS[name])
    with replaced_capture(lambda step, *_, **__: step):
        # a fresh model: captures are kept
        other = mllm(visual_context=context).cuda().to(torch.bfloat16)
        assert torch.equal(generate(other, SAMPLINGS[name]), found)


def test_one_capture_per_batch_and_no_warning(mllm, caplog):
    """An empty graph is a warning of torch's, and a capture that failed one line in the log."""
    captures, original = [], captured_step.capture_step

    def counted(*args, **kwargs):
        captures.append(args)
        return original(*args, **kwargs)

    model = mllm().cuda()
    with replaced_capture(counted), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA Graph is empty.*")
        generate(model, SAMPLINGS["sampled"])
        assert len(captures) == 1
        generate(model, SAMPLINGS["sampled"])
    assert len(captures) == 1  # kept for batches of this shape
    assert "without a CUDA graph" not in caplog.text


def test_an_image_depends_on_its_own_seed_alone(mllm):
    model, sampling = mllm().cuda(), SAMPLINGS["sampled"]
    together = generate(model, sampling)
    alone = [
        generate(model, sampling, prompts=[prompt], seeds=[seed]) for prompt, seed in zip(PROMPTS, SEEDS)
    ]
    assert torch.equal(torch.cat(alone), together)
    assert not torch.equal(generate(model, sampling, seeds=[4, 5, 6]), together)


def test_greedy_codes_equal_those_of_the_cpu(mllm):
    expected = generate(mllm(), SAMPLINGS["greedy"], backend="torch")
    assert torch.equal(generate(mllm().cuda(), SAMPLINGS["greedy"]), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_answers_equal_those_of_transformers_and_of_the_cpu(mllm, count):
    model = mllm()
    expected = generate_text_ids(model, *questions(model, count), 12, backend="torch")
    model = model.cuda()
    for backend in ("torch", "auto"):
        assert generate_text_ids(model, *questions(model, count), 12, backend=backend) == expected, backend


def questions(model, count=3):
    """Prompts of several lengths with one image each."""
    image, shape = [model.config.image_token_id] * 12, (1, 12, 3)
    prompts = [[1, 7, *image, 13, *range(20, 24 + i)] for i in range(count)]
    codes = [torch.randint(16, shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    return prompts, codes


@pytest.mark.parametrize("options", [{"top_k": 20, "top_p": 0.9, "temperature": 1.3}, {}], ids=["warped", ""])
def test_sampled_answers_equal_those_of_transformers(mllm, options):
    """The captured step takes its random numbers as torch.multinomial does."""
    model = mllm().cuda()
    expected = generate_text_ids(
        model, *questions(model), 20, backend="torch", seed=3, do_sample=True, **options
    )
    for _ in range(2):  # captured, and kept
        found = generate_text_ids(model, *questions(model), 20, seed=3, do_sample=True, **options)
        assert found == expected


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 20, "seed": 3}], ids=["greedy", "sampled"]
)
def test_streams_equal_eager_decoding(mllm, options):
    model = mllm().cuda()
    found = [
        list(iter_text_ids(model, *questions(model), 20, backend=backend, **options))
        for backend in ("torch", "auto")
    ]
    assert found[0] == found[1]


def test_a_kept_step_follows_the_weights(mllm):
    model, sampling = mllm().cuda(), SAMPLINGS["sampled"]
    before = generate(model, sampling)
    layer = model.language_model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.weight.mul_(-1)  # in place
    assert not torch.equal(generate(model, sampling), before)
    layer.weight = torch.nn.Parameter(-layer.weight.detach())  # at another address
    assert torch.equal(generate(model, sampling), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["sampled", "greedy"])
def test_a_model_on_the_second_device_generates_the_same_codes(mllm, name):
    """The current device stays the first one, as in a process that uses both."""
    torch.cuda.set_device(0)
    expected = generate(mllm().to("cuda:0"), SAMPLINGS[name])
    assert torch.equal(generate(mllm().to("cuda:1"), SAMPLINGS[name]), expected)
    assert torch.cuda.current_device() == 0
