"""The native backend: equal to the eager one; int8 and bfloat16 close to float32; missing compilers."""

import copy
import ctypes

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling, generate_image_codes
from open_unitok.generation.backends import BACKENDS, choose_backend, native, native_library
from open_unitok.generation.serving import worker

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)

needs_compiler = pytest.mark.skipif(native_library.load_library() is None, reason="no C++ compiler")


@torch.no_grad()
def logits_along(model, codes, quantization=None, name="native"):
    """Logits (N, K, R, V) of both kinds of rows, teacher-forced on codes (B, N, K)."""
    backend = BACKENDS[name](model, quantization)
    backend.prefill([*PROMPTS, *[UNCONDITIONAL] * 3], codes[:, :0])
    found = []
    for t in range(codes.shape[1]):
        if t:
            backend.decode_step(codes[:, t - 1])
        for k in range(codes.shape[2]):
            found.append(backend.code_logits(k, None if k == 0 else codes[:, t, k - 1]).float().clone())
    return torch.stack(found)


@needs_compiler
@pytest.mark.parametrize("context", ["full", "last"])
@pytest.mark.parametrize(
    "changes", [{}, {"depth_config": {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3}}]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_native_logits_equal_eager_logits(make_model, context, changes, threads):
    model = make_model(visual_context=context, **changes)
    assert choose_backend(model) == "native"
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    expected = logits_along(model, codes, name="eager")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = logits_along(model, codes)
    finally:
        torch.set_num_threads(before)
    # another order of summation: 2.8e-5 on plain x86-64, 1.6e-5 with AVX-512
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=4e-5)


def run_layers(x, weights, depth, threads):
    """Logits of rows x (R, n) after `depth` layers; `weights`: of a one-head layer, then the output's."""
    build, (rows, width) = native_library.StructBuilder(weights[0].dtype == torch.int8), x.shape
    matrices = [build.matrix(w.float() if build.int8 else w) for w in weights[:-1]]
    output = build.matrix(
        weights[-1].float() if build.int8 else weights[-1], torch.arange(len(weights[-1])) / 8
    )
    norm = native_library.Norm(build.floats(torch.ones(width)), None, 0)
    cache = [build.pointer(torch.empty(rows, 1, 1, width)) for _ in range(2)]
    layers = (native_library.Layer * 1)(native_library.Layer(norm, norm, *matrices, *cache))
    rope = [build.floats(torch.full((1, width), f)) for f in (1.0, 0.0)]
    stack = native_library.Stack(ctypes.addressof(layers), norm, *rope, depth, width, 1, 1, width, 1)
    entry, logits = x.clone(), torch.empty(rows, len(weights[-1]))
    native_library.load_library().logits_step(
        ctypes.addressof(stack), ctypes.addressof(output), rows, 0, None, None, entry.data_ptr(),
        logits.data_ptr(), threads,
    )  # fmt: skip
    return logits


def random_weights(width, inner, outputs, dtype):
    generator = torch.Generator().manual_seed(width)
    shapes = [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner), (outputs, width)]
    if dtype == torch.int8:  # integers up to 127: the scale is 1 and rounding is exact
        found = [torch.randint(-127, 128, shape, generator=generator) for shape in shapes]
        for weight in found:
            weight[:, 0] = 127
    else:
        found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [w.to(dtype) for w in found], torch.randn(17, width, generator=generator)


# sizes that are not multiples of the steps of inputs and the tiles of outputs
@needs_compiler
@pytest.mark.parametrize("dtype", native_library.NATIVE_DTYPES)
@pytest.mark.parametrize("width, outputs", [(4, 3), (16, 16), (46, 37), (96, 12), (130, 70)])
def test_matrix_products_of_all_sizes_are_near_float64(dtype, width, outputs):
    weights, x = random_weights(width, 2 * width + 1, outputs, dtype)
    x[3] *= 1e4
    exact = x.double() / x.double().pow(2).mean(dim=1, keepdim=True).sqrt()
    weight = weights[-1].double()
    each = torch.zeros_like(exact)  # bound on the rounding of the inputs
    if dtype == torch.bfloat16:
        each = 2**-8 * exact.abs()
    elif dtype == torch.int8:
        each = 2**-16 * exact.abs().amax(dim=1, keepdim=True).expand_as(exact)
    bound = (each + 2e-6 * exact.abs()) @ weight.abs().T + 1e-5
    exact = exact @ weight.T + torch.arange(outputs) / 8
    for rows in range(1, 18):
        found = run_layers(x[:rows], weights, depth=0, threads=1 + rows % 3)
        assert ((found - exact[:rows]).abs() <= bound[:rows]).all(), rows


@needs_compiler
def test_long_rows_do_not_overflow_int8_sums():
    weights, _ = random_weights(9000, 8, 3, torch.int8)
    weights[-1][:] = 127
    found = run_layers(torch.ones(2, 9000), weights, depth=0, threads=1)
    expected = 127.0 * 9000 + torch.arange(3) / 8
    torch.testing.assert_close(found, expected.expand(2, 3), rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", native_library.NATIVE_DTYPES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(dtype, wrong):
    weights, x = random_weights(46, 8, 5, dtype)
    x[1, 7], x[2, 45] = wrong, wrong  # in a full step and in the remainder
    finite = run_layers(x[:4], weights, depth=0, threads=1).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


@needs_compiler
@pytest.mark.parametrize("dtype", native_library.NATIVE_DTYPES)
@pytest.mark.parametrize("width, inner", [(20, 33), (64, 176)])
def test_a_row_does_not_depend_on_other_rows(dtype, width, inner):
    weights, x = random_weights(width, inner, 50, dtype)
    alone = torch.cat([run_layers(row[None], weights, depth=1, threads=1) for row in x])
    assert alone.isfinite().all() and alone.std() > 0.1
    for rows in range(2, 18):
        assert torch.equal(run_layers(x[:rows], weights, depth=1, threads=2), alone[:rows])


@needs_compiler
def test_int8_and_bf16_logits_are_close_to_fp32(full_model):
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    exact = logits_along(full_model, codes)
    short = copy.deepcopy(full_model).to(torch.bfloat16)
    for found in (logits_along(full_model, codes, "int8"), logits_along(short, codes)):
        error = (found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
        assert 1e-4 < error < 0.1


@needs_compiler
def test_int8_weights_are_updated_when_parameters_change(make_model):
    model = make_model()

    def generate():
        seeds = [1, 2, 3]
        return generate_image_codes(model, PROMPTS, SAMPLED, seeds, UNCONDITIONAL, quantization="int8")

    first = generate()
    assert torch.equal(first, generate())
    with torch.no_grad():
        model.depth_head.output.weight.neg_()
    assert not torch.equal(first, generate())


def test_without_a_compiler_the_eager_backend_generates_the_same_codes(full_model, monkeypatch):
    codes = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    monkeypatch.setattr(native_library, "load_library", lambda: None)
    assert not native.supports_native(full_model) and choose_backend(full_model) == "eager"
    assert torch.equal(codes, generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL))
    with pytest.raises(UserError, match=r"a C.. compiler"):
        generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL, quantization="int8")


def test_a_failing_compiler_is_not_an_error(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("UNITOK_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert native_library.load_library.__wrapped__() is None
    assert "could not be built" in caplog.text
    monkeypatch.setenv("UNITOK_NATIVE", "0")
    assert native_library.load_library.__wrapped__() is None


@needs_compiler
def test_int8_quantization_reaches_pipeline_and_server(folder, monkeypatch, serving, ask):
    pipe = Pipeline.from_pretrained(folder, quantization="int8")
    assert pipe.quantization == "int8" and pipe.model.dtype == torch.float32
    codes = pipe.generate_codes(["a star"], Sampling(guidance=2.0))
    ids, unconditional_ids = pipe.prompt_ids(["a star"]), pipe.processor.unconditional_ids()
    expected = generate_image_codes(
        pipe.model, ids, Sampling(guidance=2.0), [0], unconditional_ids, quantization="int8"
    )
    assert torch.equal(codes, expected)
    steps = list(pipe.stream(["a star"], Sampling(guidance=2.0)))
    assert steps[-1][0].tobytes() == pipe.decode(codes)[0].tobytes()
    taken, whole = [], worker.iter_image_codes
    monkeypatch.setattr(
        worker,
        "iter_image_codes",
        lambda *a, quantization=None: taken.append(quantization) or whole(*a, quantization=quantization),
    )
    with serving(pipe) as (url, _):
        assert ask(url, {"prompt": "a star"}, "/v1/images/generations")[0] == 200
    assert taken == ["int8"]
