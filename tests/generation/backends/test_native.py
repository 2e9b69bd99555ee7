"""The native backend: equal to torch; int8 and bfloat16 close to float32; missing compilers."""

import base64
import copy
import ctypes
import io
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling, generate_image_codes
from open_unitok.generation.backends import BACKENDS, choose_backend, native_library
from open_unitok.generation.backends.int8 import quantize_model

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)

CPU_INFO = pathlib.Path("/proc/cpuinfo")
CPU_FLAGS = CPU_INFO.read_text(encoding="utf-8").split() if CPU_INFO.exists() else []
needs_compiler = pytest.mark.skipif(native_library.load_library() is None, reason="no C++ compiler")


@torch.no_grad()
def logits_along(model, codes, name="native"):
    """Logits (N, K, R, V) of both kinds of rows, teacher-forced on codes (B, N, K)."""
    backend = BACKENDS[name](model)
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
    "changes",
    [
        {},
        {"depth_config": {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 3}},
        {"visual_positions": "learned_2d"},
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_native_logits_equal_torch_logits(make_model, context, changes, threads):
    model = make_model(visual_context=context, **changes)
    assert choose_backend(model) == "native"
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    expected = logits_along(model, codes, name="torch")
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
    build, (rows, width) = native_library.StructBuilder(), x.shape

    def matrix(weight, bias=None):
        scale = torch.ones(len(weight)) if weight.dtype == torch.int8 else None
        return build.matrix(weight, bias, scale)

    matrices = [matrix(w) for w in weights[:-1]]
    output = matrix(weights[-1], torch.arange(len(weights[-1])) / 8)
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
    if dtype == torch.int8:  # with scales of 1
        found = [torch.randint(-127, 128, shape, generator=generator) for shape in shapes]
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
    eight = copy.deepcopy(full_model)
    quantize_model(eight)
    for found in (logits_along(eight, codes), logits_along(short, codes)):
        error = (found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
        assert 1e-4 < error < 0.1


@needs_compiler
def test_native_int8_logits_equal_torch_with_the_same_weights(make_model):
    model = make_model()
    quantize_model(model)
    codes = torch.randint(16, (3, 9, 3), generator=torch.Generator().manual_seed(2))
    found, expected = logits_along(model, codes), logits_along(model, codes, "torch")
    # processors with integer products round the inputs to 16 bits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_changed_parameters_change_the_codes(make_model):
    for int8 in (False, True):
        model = make_model()
        if int8:
            quantize_model(model)
        first = generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
        assert torch.equal(first, generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL))
        with torch.no_grad():
            model.depth_head.output.weight.neg_()
        changed = generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
        assert not torch.equal(first, changed)


def test_without_a_compiler_torch_generates_the_same_codes(full_model, monkeypatch):
    codes = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    monkeypatch.setattr(native_library, "load_library", lambda: None)
    assert choose_backend(full_model) == "torch"
    assert torch.equal(codes, generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL))
    with pytest.raises(UserError, match=r"backend = 'native' cannot run .* the C.. library could not be"):
        generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL, backend="native")


@needs_compiler
def test_int8_reaches_pipeline_answers_and_server(folder, serving, ask):
    pipe = Pipeline.from_pretrained(folder, quantization="int8")
    assert pipe.quantization == "int8" and pipe.model.dtype == torch.float32
    # the attention of the embedder reads its weight and stays in float32
    names = [n for n, m in pipe.model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == ["visual_embedder.projection.attention.qkv"]
    loaded = Pipeline.from_pretrained(folder)
    quantize_model(loaded.model)
    codes = pipe.generate_codes(["a star"])
    # quantised while it is read = quantised afterwards
    assert torch.equal(codes, loaded.generate_codes(["a star"]))
    image = Image.new("RGB", (48, 48), "red")
    assert pipe.answer([image], ["What?"], 8) == loaded.answer([image], ["What?"], 8)
    steps = list(pipe.stream(["a star"]))
    assert steps[-1][0].tobytes() == pipe.decode(codes)[0].tobytes()
    with serving(pipe) as (url, _):
        status, found = ask(url, {"prompt": "a star", "seed": 0}, "/v1/images/generations")
    assert status == 200
    png = base64.b64decode(found["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(png)).tobytes() == steps[-1][0].tobytes()


def test_int8_without_cpu_or_float32_is_rejected(folder):
    with pytest.raises(UserError, match="quantization = 'int8' needs device = cpu and dtype = float32"):
        Pipeline.from_pretrained(folder, quantization="int8", dtype="bfloat16")


# In a process of its own, as the peak of a process never falls; ru_maxrss would include the parent's.
PEAK = """
import re, sys, torch
from open_unitok.generation.pipeline import Pipeline
from open_unitok.generation import Sampling
torch.set_num_threads(1)
pipe = Pipeline.from_pretrained(sys.argv[1], quantization=sys.argv[2] or None)
pipe.generate_codes(["a star"], Sampling(guidance=2.0))
print(int(re.search("VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_with_int8_is_below_float32(make_model, folder, tmp_path):
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 512}
    config = make_model().config.text_config.to_dict() | text
    model = make_model(text_config=config)
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20  # MB in float32
    big = tmp_path / "big"
    shutil.copytree(folder, big)
    model.config.unitok_fingerprint = Pipeline.from_pretrained(folder).model.config.unitok_fingerprint
    model.save_pretrained(big)
    peaks = {}
    for quantization in ("", "int8"):
        command = [sys.executable, "-c", PEAK, str(big), quantization]
        peaks[quantization] = float(subprocess.check_output(command, text=True).split()[-1])
    assert peaks["int8"] < peaks[""] - 0.25 * weights, (peaks, weights)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif("avx512f" not in CPU_FLAGS, reason="the tests above ran without AVX-512")
def test_the_steps_of_processors_without_avx512_pass_the_same_tests():
    environment = os.environ | {"UNITOK_NATIVE_MARCH": "x86-64-v3"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0 and " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-3000:]
