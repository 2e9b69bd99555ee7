"""CPU operators: equal results, a fixed choice per processor, caches neither saved nor copied."""

import copy
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from open_unitok.tokenizer import UniTok, cpu
from open_unitok.tokenizer.layers import Linear, Upsample


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch):
    """Apply the rule to products of every size."""
    monkeypatch.setattr(cpu, "MIN_WORK", 1)


@pytest.fixture
def model(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config(num_register_tokens=1)).eval()


def pixels(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prefer(monkeypatch, wanted: str) -> set[str]:
    """Make the rule take the operator `wanted`; returns a set that records its use."""
    used = set()
    for name, table in (("float32_operator", cpu.LINEAR_FLOAT32), ("bfloat16_operator", cpu.LINEAR_BFLOAT16)):
        if wanted in table:
            monkeypatch.setattr(cpu, name, lambda: used.add(wanted) or wanted)
    return used


@pytest.mark.parametrize("operator", ["torch", "onednn"])
def test_golden_codes_with_every_variant(variant, monkeypatch, operator):
    used = prefer(monkeypatch, operator)
    case = variant("attn")
    assert torch.equal(case.model.encode(case.out["image"]), case.out["indices"].transpose(1, 2))
    raw = case.model.decode(case.out["indices"].transpose(1, 2))
    torch.testing.assert_close(raw, case.out["decoder_raw"].clamp(-1, 1), rtol=0, atol=2e-5)
    assert used == {operator}


@pytest.mark.parametrize("operator", ["torch", "float32"])
def test_bfloat16_with_every_variant(model, monkeypatch, operator):
    used = prefer(monkeypatch, operator)
    codes, expected = model.encode(pixels()), model.decode(model.encode(pixels()))
    half = model.to(torch.bfloat16)
    agreement = (half.encode(pixels().bfloat16()) == codes).float().mean()
    decoded = half.decode(codes)
    assert agreement > 0.6 and decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=0.1)
    assert used == {operator}


def test_equals_the_baseline_of_the_benchmark(model, monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "tokenizer.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("benchmark_tokenizer", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    codes = model.encode(pixels())
    assert torch.equal(benchmark.baseline_encode(model, pixels()), codes)
    expected = benchmark.baseline_decode(model, codes, (4, 4))
    torch.testing.assert_close(model.decode(codes), expected, rtol=0, atol=2e-5)
    flops = benchmark.count_operations(model.config, 64)
    assert 1e6 < flops["encode"] < flops["decode"] < 1e9


@torch.no_grad()
def test_variants_give_equal_codes_except_at_near_ties(tiny_config, monkeypatch):
    """With many entries some are almost equally close: only there may rounding change the code."""
    torch.manual_seed(0)
    model = UniTok(tiny_config(codebook_size=4096)).eval()
    torch.nn.init.normal_(model.quantizer.codebooks)
    found, latents = {}, {}
    for operator in cpu.LINEAR_FLOAT32:
        used = prefer(monkeypatch, operator)
        latents[operator] = model.encode_latents(pixels(8))
        found[operator] = model.quantizer.encode(latents[operator])
        assert used == {operator}
    table = torch.nn.functional.normalize(model.quantizer.codebooks, dim=-1)
    features = torch.nn.functional.normalize(latents["torch"].unflatten(-1, (len(table), -1)), dim=-1)
    near = torch.einsum("bnkc,kvc->bnkv", features, table).topk(2).values
    sure = near[..., 0] - near[..., 1] > 1e-4
    assert 0.5 < sure.float().mean() < 1
    for operator, codes in found.items():
        assert torch.equal(codes[sure], found["torch"][sure]), operator


CPUINFO = "processor\t: 0\nvendor_id\t: {}\nmodel name\t: some\n"


@pytest.mark.parametrize(
    "vendor, has_bf16, float32, bfloat16",
    [
        ("AuthenticAMD", True, "onednn", "torch"),
        ("AuthenticAMD", False, "onednn", "float32"),
        ("GenuineIntel", True, "torch", "torch"),
        ("GenuineIntel", False, "torch", "float32"),
        (None, False, "torch", "torch"),
    ],
)
def test_the_rule_reads_the_processor_alone(monkeypatch, tmp_path, vendor, has_bf16, float32, bfloat16):
    info = tmp_path / "cpuinfo"
    info.write_text(CPUINFO.format(vendor) if vendor else "CPU implementer\t: 0x41\n")
    monkeypatch.setattr(cpu, "Path", lambda _: info)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu.float32_operator.__wrapped__() == float32
    assert cpu.bfloat16_operator.__wrapped__() == bfloat16


# two processes, the second one with the machine busy: codes must not depend on speed
RUN = """
import hashlib, sys, threading, torch
from open_unitok.tokenizer import UniTok, UniTokConfig
torch.set_num_threads(1)
ones, stop = torch.ones(300, 300), threading.Event()
def work():
    while not stop.is_set():
        ones @ ones
busy = threading.Thread(target=work)
if sys.argv[1] == "busy":
    busy.start()
torch.manual_seed(0)
config = UniTokConfig(
    image_size=64, stem_width=32, stage_widths=(32, 64), stage_depths=(1, 1), hidden_size=256,
    num_hidden_layers=1, num_attention_heads=4, decoder_widths=(64, 32), decoder_depths=(1, 1),
    codebook_size=4096, text_hidden_size=32, text_num_layers=1, text_num_heads=2, text_vocab_size=32,
)
model = UniTok(config).eval()
torch.nn.init.normal_(model.quantizer.codebooks)
image = torch.rand(2, 3, 64, 64) * 2 - 1
latents = model.encode_latents(image)
print(hashlib.sha256(model.encode(image).numpy().tobytes() + latents.detach().numpy().tobytes()).hexdigest())
stop.set()
"""


def test_two_runs_on_one_machine_give_the_same_codes():
    runs = [subprocess.check_output([sys.executable, "-c", RUN, how], text=True) for how in ("quiet", "busy")]
    assert runs[0] == runs[1] and len(runs[0].split()[-1]) == 64


def test_errors_of_the_default_variant_are_raised():
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(torch.randn(4, 8), torch.randn(3, 7), None)


@pytest.mark.parametrize("why", ["gradients", "autocast", "switch", "small"])
def test_training_autocast_and_small_products_use_the_default(model, monkeypatch, why):
    layer, x, used = Linear(8, 8), torch.randn(2, 8), prefer(monkeypatch, "onednn")
    if why == "switch":
        monkeypatch.setenv("UNITOK_FAST_CPU", "0")
    if why == "small":
        monkeypatch.setattr(cpu, "MIN_WORK", 10**6)
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        result = layer(x)
    assert not used and result.requires_grad == (why == "gradients")
    if why == "gradients":
        model.train()(pixels()).reconstruction.sum().backward()
        assert not used and model.decoder.enter._kernel_cache._value is None


def test_gelu_is_in_place_at_inference_only():
    map = torch.randn(1, 8, 4, 4)
    expected, kept = torch.nn.functional.gelu(map), map.clone()
    assert torch.equal(cpu.gelu(map), expected) and torch.equal(map, kept)  # not in place
    with torch.no_grad():
        result = cpu.gelu(map)
    assert torch.equal(result, expected) and result.data_ptr() == map.data_ptr()


def test_inference_does_not_change_training(model):
    untouched = copy.deepcopy(model)
    model.decode(model.encode(pixels()))

    def gradient(of: UniTok) -> torch.Tensor:
        of.train()(pixels()).reconstruction.square().mean().backward()
        return of.decoder.enter.conv.weight.grad

    assert torch.equal(gradient(model), gradient(untouched))


CHANGES = {
    "in place": lambda layer: layer.conv.weight.mul_(2),
    "data": lambda layer: layer.conv.weight.data.mul_(2),
    "other data": lambda layer: setattr(layer.conv.weight, "data", layer.conv.weight.data * 2),
    "load": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "parameter": lambda layer: setattr(layer.conv, "weight", nn.Parameter(layer.conv.weight * 2)),
    "double": lambda layer: layer.double().conv.weight.mul_(2),
    "half": lambda layer: layer.to(torch.bfloat16).conv.weight.mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_the_cached_kernel_follows_its_weight(change):
    torch.manual_seed(0)
    layer, map = Upsample(40, 40).eval(), torch.randn(1, 40, 3, 5)
    layer.conv.bias.zero_()
    before = layer(map)
    cached = layer._kernel_cache._value
    assert torch.equal(layer(map), before) and layer._kernel_cache._value is cached
    CHANGES[change](layer)
    after = layer(map.to(layer.conv.weight.dtype)).float()
    torch.testing.assert_close(after, 2 * before, rtol=0, atol=0.05 if change == "half" else 1e-5)


def test_the_cached_kernel_is_neither_copied_nor_saved(model, tmp_path):
    names = set(model.state_dict())
    model.decode(model.encode(pixels()))
    assert model.decoder.enter._kernel_cache._value is not None and set(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.decoder.enter._kernel_cache._value is None
        assert torch.equal(other.encode(pixels()), model.encode(pixels()))
    model.save_pretrained(tmp_path)
    assert torch.equal(UniTok.from_pretrained(tmp_path).encode(pixels()), model.encode(pixels()))
    with torch.no_grad():
        model.train().decoder.enter(torch.randn(1, 64, 2, 2))
    assert model.decoder.enter._kernel_cache._value is None


def test_weights_created_in_inference_mode():
    with torch.inference_mode():
        layer, map = Upsample(4, 4).eval(), torch.randn(1, 4, 3, 3)
        assert torch.equal(layer(map), layer(map))
