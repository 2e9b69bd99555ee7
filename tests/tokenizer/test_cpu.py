"""Autotuned CPU operators: equal results, choice by measurement, caches neither saved nor copied."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from open_unitok.tokenizer import UniTok, cpu
from open_unitok.tokenizer.layers import Linear, Upsample


@pytest.fixture(autouse=True)
def no_choices(monkeypatch):
    """Autotune products of every size, starting without choices."""
    monkeypatch.setattr(cpu, "MIN_WORK", 1)
    monkeypatch.setattr(cpu, "_chosen", {})


@pytest.fixture
def model(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config(num_register_tokens=1)).eval()


def pixels(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prefer(monkeypatch, wanted: str) -> None:
    """Make the measurement report `wanted` as the fastest variant, where it exists."""
    measure = cpu._measure

    def pretend(variants, sample, options):
        return {name: 0.1 if name == wanted else 1.0 for name in measure(variants, sample, options)}

    monkeypatch.setattr(cpu, "_measure", pretend)


@pytest.mark.parametrize("operator", ["torch", "onednn"])
def test_golden_codes_with_every_variant(variant, monkeypatch, operator):
    prefer(monkeypatch, operator)
    case = variant("attn")
    assert torch.equal(case.model.encode(case.out["image"]), case.out["indices"].transpose(1, 2))
    raw = case.model.decode(case.out["indices"].transpose(1, 2))
    torch.testing.assert_close(raw, case.out["decoder_raw"].clamp(-1, 1), rtol=0, atol=2e-5)
    assert set(cpu.chosen().values()) == {operator}
    assert {key[0] for key in cpu.chosen()} == {"linear"}  # float32 convolutions have one variant


@pytest.mark.parametrize("operator", ["torch", "float32"])
def test_bfloat16_with_every_variant(model, monkeypatch, operator):
    prefer(monkeypatch, operator)
    codes, expected = model.encode(pixels()), model.decode(model.encode(pixels()))
    half = model.to(torch.bfloat16)
    cpu._chosen.clear()
    agreement = (half.encode(pixels().bfloat16()) == codes).float().mean()
    decoded = half.decode(codes)
    assert agreement > 0.6 and decoded.dtype == torch.bfloat16
    torch.testing.assert_close(decoded.float(), expected, rtol=0, atol=0.1)
    names = {(key[0], chosen) for key, chosen in cpu.chosen().items() if "bfloat16" in key[1]}
    assert names == {("linear", operator), ("conv2d", operator), ("conv_transpose2d", operator)}


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
        cpu._chosen.clear()
        prefer(monkeypatch, operator)
        latents[operator] = model.encode_latents(pixels(8))
        found[operator] = model.quantizer.encode(latents[operator])
        assert set(cpu.chosen().values()) == {operator}
    table = torch.nn.functional.normalize(model.quantizer.codebooks, dim=-1)
    features = torch.nn.functional.normalize(latents["torch"].unflatten(-1, (len(table), -1)), dim=-1)
    near = torch.einsum("bnkc,kvc->bnkv", features, table).topk(2).values
    sure = near[..., 0] - near[..., 1] > 1e-4
    assert 0.5 < sure.float().mean() < 1
    for operator, codes in found.items():
        assert torch.equal(codes[sure], found["torch"][sure]), operator


@pytest.mark.parametrize("noise", range(3))
def test_one_slow_round_does_not_change_the_choice(monkeypatch, noise):
    """Variants of equal speed: the default stays, whichever round is slow."""
    now, calls = [0.0], []

    def operator(name: str):
        def run(*_):
            calls.append(name)
            now[0] += 3.0 if len(calls) == 3 + noise else 1.0
            return name

        return run

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu, "LINEAR_FLOAT32", {"default": operator("default"), "other": operator("other")})
    with torch.no_grad():
        assert cpu.linear(torch.randn(4, 8), torch.randn(3, 8), None) == "default"


def test_the_faster_variant_is_chosen_once(monkeypatch):
    calls = {"slow": 0, "fast": 0, "broken": 0}

    def operator(name: str, seconds: float):
        def run(x, weight, bias):
            calls[name] += 1
            now[0] += seconds
            if name == "broken":
                raise RuntimeError("could not create a primitive descriptor")
            return name

        return run

    now = [0.0]
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    variants = {
        "slow": operator("slow", 1.0),
        "broken": operator("broken", 0.0),
        "fast": operator("fast", 0.5),
    }
    monkeypatch.setattr(cpu, "LINEAR_FLOAT32", variants)
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with torch.no_grad():
        assert [cpu.linear(x, weight, None) for _ in range(3)] == ["fast"] * 3
        assert calls == {"slow": 6, "broken": 1, "fast": 6 + 3}
        variants["fast"] = operator("fast", 0.95)  # only slightly faster: within the noise
        assert cpu.linear(x, torch.randn(5, 8), None) == "slow"


def test_errors_of_the_default_variant_are_raised():
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(torch.randn(4, 8), torch.randn(3, 7), None)


@pytest.mark.parametrize("why", ["gradients", "autocast", "switch", "small"])
def test_training_autocast_and_small_products_use_the_default(model, monkeypatch, why):
    layer, x = Linear(8, 8), torch.randn(2, 8)
    if why == "switch":
        monkeypatch.setenv("UNITOK_FAST_CPU", "0")
    if why == "small":
        monkeypatch.setattr(cpu, "MIN_WORK", 10**6)
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        result = layer(x)
    assert cpu.chosen() == {} and result.requires_grad == (why == "gradients")
    if why == "gradients":
        model.train()(pixels()).reconstruction.sum().backward()
        assert cpu.chosen() == {} and model.decoder.enter._kernel_cache._value is None


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
