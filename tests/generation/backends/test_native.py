"""The C++ steps: what torch's operators give, rounded weights near it, and life without a compiler."""

import copy
import ctypes

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling, generate_image_codes
from open_unitok.generation.backends import eager as engine
from open_unitok.generation.backends import native_library
from open_unitok.generation.serving import worker

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
FREE = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)

needs_compiler = pytest.mark.skipif(native_library.library() is None, reason="no C++ compiler")


def logits_along(model, codes, weights=None, eager=False, monkeypatch=None):
    """Logits (N, K, R, V) of both kinds of rows, teacher-forced on codes (B, N, K)."""
    if eager:
        monkeypatch.setattr(engine, "native_can", lambda model: False)
    run = engine.start(model, [*PROMPTS, *[FREE] * 3], codes[:, :0], weights)
    if eager:
        monkeypatch.undo()
    found = []
    with torch.no_grad():
        for t in range(codes.shape[1]):
            if t:
                run.decode_step(codes[:, t - 1])
            for k in range(codes.shape[2]):
                found.append(run.logits(k, None if k == 0 else codes[:, t, k - 1]).float().clone())
    return type(run), torch.stack(found)


@needs_compiler
@pytest.mark.parametrize("context", ["full", "last"])
@pytest.mark.parametrize(
    "changes", [{}, {"depth_config": {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3}}]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_both_engines_give_the_same_logits(make_model, context, changes, threads, monkeypatch):
    model = make_model(visual_context=context, **changes)
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    kind, expected = logits_along(model, codes, eager=True, monkeypatch=monkeypatch)
    assert kind is engine.Eager
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind, found = logits_along(model, codes)
    finally:
        torch.set_num_threads(before)
    assert kind is engine.Native
    # sums in another order: 2.8e-5 on plain x86-64, 1.6e-5 with AVX-512
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=4e-5)


def through_a_stack(x, weights, depth, threads):
    """Logits of rows x (R, n) behind `depth` layers; weights: of a layer of one head, then the output's."""
    keep, (rows, width) = native_library.Keeper(weights[0].dtype == torch.int8), x.shape
    matrices = [keep.matrix(w.float() if keep.int8 else w) for w in weights[:-1]]
    output = keep.matrix(
        weights[-1].float() if keep.int8 else weights[-1], torch.arange(len(weights[-1])) / 8
    )
    norm = native_library.Norm(keep.floats(torch.ones(width)), None, 0)
    cache = [keep.pointer(torch.empty(rows, 1, 1, width)) for _ in range(2)]
    layers = (native_library.Layer * 1)(native_library.Layer(norm, norm, *matrices, *cache))
    turn = [keep.floats(torch.full((1, width), f)) for f in (1.0, 0.0)]
    stack = native_library.Stack(ctypes.addressof(layers), norm, *turn, depth, width, 1, 1, width, 1)
    entry, logits = x.clone(), torch.empty(rows, len(weights[-1]))
    native_library.library().logits_step(
        ctypes.addressof(stack), ctypes.addressof(output), rows, 0, None, None, entry.data_ptr(),
        logits.data_ptr(), threads,
    )  # fmt: skip
    return logits


def random_weights(width, inner, outputs, dtype):
    generator = torch.Generator().manual_seed(width)
    shapes = [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner), (outputs, width)]
    if dtype == torch.int8:  # already what rounding makes of them: a scale of 1
        found = [torch.randint(-127, 128, shape, generator=generator) for shape in shapes]
        for weight in found:
            weight[:, 0] = 127
    else:
        found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [w.to(dtype) for w in found], torch.randn(17, width, generator=generator)


# neither whole steps of inputs nor whole tiles of outputs
@needs_compiler
@pytest.mark.parametrize("dtype", native_library.KINDS)
@pytest.mark.parametrize("width, outputs", [(4, 3), (16, 16), (46, 37), (96, 12), (130, 70)])
def test_products_of_all_sizes_are_near_float64(dtype, width, outputs):
    weights, x = random_weights(width, 2 * width + 1, outputs, dtype)
    x[3] *= 1e4
    exact = x.double() / x.double().pow(2).mean(dim=1, keepdim=True).sqrt()
    weight = weights[-1].double()
    each = torch.zeros_like(exact)  # by how much an input may be rounded
    if dtype == torch.bfloat16:
        each = 2**-8 * exact.abs()
    elif dtype == torch.int8:
        each = 2**-16 * exact.abs().amax(dim=1, keepdim=True).expand_as(exact)
    bound = (each + 2e-6 * exact.abs()) @ weight.abs().T + 1e-5
    exact = exact @ weight.T + torch.arange(outputs) / 8
    for rows in range(1, 18):
        found = through_a_stack(x[:rows], weights, depth=0, threads=1 + rows % 3)
        assert ((found - exact[:rows]).abs() <= bound[:rows]).all(), rows


@needs_compiler
def test_long_rows_do_not_overflow_int8_sums():
    weights, _ = random_weights(9000, 8, 3, torch.int8)
    weights[-1][:] = 127
    found = through_a_stack(torch.ones(2, 9000), weights, depth=0, threads=1)
    expected = 127.0 * 9000 + torch.arange(3) / 8
    torch.testing.assert_close(found, expected.expand(2, 3), rtol=1e-4, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", native_library.KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(dtype, wrong):
    weights, x = random_weights(46, 8, 5, dtype)
    x[1, 7], x[2, 45] = wrong, wrong  # in a whole step and in the rest
    finite = through_a_stack(x[:4], weights, depth=0, threads=1).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


@needs_compiler
@pytest.mark.parametrize("dtype", native_library.KINDS)
@pytest.mark.parametrize("width, inner", [(20, 33), (64, 176)])
def test_a_row_does_not_depend_on_its_neighbours(dtype, width, inner):
    weights, x = random_weights(width, inner, 50, dtype)
    alone = torch.cat([through_a_stack(row[None], weights, depth=1, threads=1) for row in x])
    assert alone.isfinite().all() and alone.std() > 0.1
    for rows in range(2, 18):
        assert torch.equal(through_a_stack(x[:rows], weights, depth=1, threads=2), alone[:rows])


@needs_compiler
def test_rounded_weights_stay_near(full_model, monkeypatch):
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    _, exact = logits_along(full_model, codes)
    short = copy.deepcopy(full_model).to(torch.bfloat16)
    for found in (logits_along(full_model, codes, "int8")[1], logits_along(short, codes)[1]):
        error = (found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
        assert 1e-4 < error < 0.1


@needs_compiler
def test_int8_follows_weights_that_change(make_model):
    model = make_model()
    first = generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], FREE, weights="int8")
    assert torch.equal(first, generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], FREE, weights="int8"))
    with torch.no_grad():
        model.depth_head.output.weight.neg_()
    assert not torch.equal(
        first, generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], FREE, weights="int8")
    )


def test_without_a_compiler_torch_draws_the_same(full_model, monkeypatch):
    codes = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], FREE)
    monkeypatch.setattr(native_library, "library", lambda: None)
    assert not engine.native_can(full_model)
    assert torch.equal(codes, generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], FREE))
    with pytest.raises(UserError, match=r"a C.. compiler"):
        generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], FREE, weights="int8")


def test_a_broken_compiler_is_no_error(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("UNITOK_NATIVE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert native_library.library.__wrapped__() is None
    assert "could not be built" in caplog.text
    monkeypatch.setenv("UNITOK_NATIVE", "0")
    assert native_library.library.__wrapped__() is None


@needs_compiler
def test_int8_is_a_dtype_of_the_pipeline_and_of_the_server(folder, monkeypatch, serving, ask):
    pipe = Pipeline.from_pretrained(folder, dtype="int8")
    assert pipe.weights == "int8" and pipe.model.dtype == torch.float32
    drawn = pipe.generate_codes(["a star"], Sampling(guidance=2.0))
    ids, unconditional_ids = pipe.prompt_ids(["a star"]), pipe.processor.unconditional_ids()
    expected = generate_image_codes(
        pipe.model, ids, Sampling(guidance=2.0), [0], unconditional_ids, weights="int8"
    )
    assert torch.equal(drawn, expected)
    steps = list(pipe.stream(["a star"], Sampling(guidance=2.0)))
    assert steps[-1][0].tobytes() == pipe.decode(drawn)[0].tobytes()
    taken, whole = [], worker.iter_image_codes
    monkeypatch.setattr(
        worker,
        "iter_image_codes",
        lambda *a, weights=None: taken.append(weights) or whole(*a, weights=weights),
    )
    with serving(pipe) as (url, _):
        assert ask(url, {"prompt": "a star"}, "/v1/images/generations")[0] == 200
    assert taken == ["int8"]
