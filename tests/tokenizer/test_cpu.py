"""The fast path on a CPU: same results by every way, chosen by measurement, and nothing left behind."""

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
def fresh(monkeypatch):
    """Every operator counts as large, and none has been chosen."""
    monkeypatch.setattr(cpu, "MIN_WORK", 1)
    monkeypatch.setattr(cpu, "_chosen", {})


@pytest.fixture
def model(tiny_config) -> UniTok:
    torch.manual_seed(0)
    return UniTok(tiny_config(num_register_tokens=1)).eval()


def pixels(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prefer(monkeypatch, wanted: str) -> None:
    """Let the measurement find that `wanted` is the fastest way, where it exists."""
    measure = cpu._measure

    def pretend(ways, sample, options):
        return {name: 0.1 if name == wanted else 1.0 for name in measure(ways, sample, options)}

    monkeypatch.setattr(cpu, "_measure", pretend)


@pytest.mark.parametrize("way", ["torch", "onednn"])
def test_golden_codes_by_every_way(variant, monkeypatch, way):
    prefer(monkeypatch, way)
    case = variant("attn")
    assert torch.equal(case.model.encode(case.out["image"]), case.out["indices"].transpose(1, 2))
    raw = case.model.decode(case.out["indices"].transpose(1, 2))
    torch.testing.assert_close(raw, case.out["decoder_raw"].clamp(-1, 1), rtol=0, atol=2e-5)
    assert set(cpu.chosen().values()) == {way}
    assert {key[0] for key in cpu.chosen()} == {"linear"}  # float32 maps have one way only


@pytest.mark.parametrize("way", ["torch", "float32"])
def test_bfloat16_by_every_way(model, monkeypatch, way):
    prefer(monkeypatch, way)
    codes, expected = model.encode(pixels()), model.decode(model.encode(pixels()))
    half = model.to(torch.bfloat16)
    cpu._chosen.clear()
    agreement = (half.encode(pixels().bfloat16()) == codes).float().mean()
    copies = half.decode(codes)
    assert agreement > 0.6 and copies.dtype == torch.bfloat16
    torch.testing.assert_close(copies.float(), expected, rtol=0, atol=0.1)
    names = {(key[0], chosen) for key, chosen in cpu.chosen().items() if "bfloat16" in key[1]}
    assert names == {("linear", way), ("conv2d", way), ("conv_transpose2d", way)}


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
def test_codes_are_the_same_by_every_way_wherever_they_are_sure(tiny_config, monkeypatch):
    """Many entries, so that some are nearly as near: only there may the way that was chosen decide."""
    torch.manual_seed(0)
    model = UniTok(tiny_config(codebook_size=4096)).eval()
    torch.nn.init.normal_(model.quantizer.codebooks)
    found, latents = {}, {}
    for way in cpu.LINEAR_FLOAT32:
        cpu._chosen.clear()
        prefer(monkeypatch, way)
        latents[way] = model.encode_latents(pixels(8))
        found[way] = model.quantizer.encode(latents[way])
        assert set(cpu.chosen().values()) == {way}
    table = torch.nn.functional.normalize(model.quantizer.codebooks, dim=-1)
    features = torch.nn.functional.normalize(latents["torch"].unflatten(-1, (len(table), -1)), dim=-1)
    near = torch.einsum("bnkc,kvc->bnkv", features, table).topk(2).values
    sure = near[..., 0] - near[..., 1] > 1e-4
    assert 0.5 < sure.float().mean() < 1
    for way, codes in found.items():
        assert torch.equal(codes[sure], found["torch"][sure]), way


@pytest.mark.parametrize("noise", range(3))
def test_one_slow_moment_does_not_choose(monkeypatch, noise):
    """Ways that are alike: whichever turn is disturbed, the usual one stays."""
    now, calls = [0.0], []

    def way(name: str):
        def run(*_):
            calls.append(name)
            now[0] += 3.0 if len(calls) == 3 + noise else 1.0
            return name

        return run

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(cpu, "LINEAR_FLOAT32", {"usual": way("usual"), "other": way("other")})
    with torch.no_grad():
        assert cpu.linear(torch.randn(4, 8), torch.randn(3, 8), None) == "usual"


def test_the_faster_way_is_taken_and_measured_once(monkeypatch):
    calls = {"slow": 0, "fast": 0, "broken": 0}

    def way(name: str, seconds: float):
        def run(x, weight, bias):
            calls[name] += 1
            now[0] += seconds
            if name == "broken":
                raise RuntimeError("could not create a primitive descriptor")
            return name

        return run

    now = [0.0]
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
    ways = {"slow": way("slow", 1.0), "broken": way("broken", 0.0), "fast": way("fast", 0.5)}
    monkeypatch.setattr(cpu, "LINEAR_FLOAT32", ways)
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    with torch.no_grad():
        assert [cpu.linear(x, weight, None) for _ in range(3)] == ["fast"] * 3
        assert calls == {"slow": 6, "broken": 1, "fast": 6 + 3}
        ways["fast"] = way("fast", 0.95)  # hardly faster: chance must not choose
        assert cpu.linear(x, torch.randn(5, 8), None) == "slow"


def test_a_usual_way_that_fails_says_why():
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cpu.linear(torch.randn(4, 8), torch.randn(3, 7), None)


@pytest.mark.parametrize("why", ["gradients", "autocast", "switch", "small"])
def test_where_nothing_is_chosen(model, monkeypatch, why):
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


def test_gelu_takes_the_maps_own_memory_in_inference_alone():
    map = torch.randn(1, 8, 4, 4)
    expected, kept = torch.nn.functional.gelu(map), map.clone()
    assert torch.equal(cpu.gelu(map), expected) and torch.equal(map, kept)  # gradients may be wanted
    with torch.no_grad():
        result = cpu.gelu(map)
    assert torch.equal(result, expected) and result.data_ptr() == map.data_ptr()


def test_training_after_inference_is_as_without(model):
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
def test_the_kept_kernel_follows_its_weight(change):
    torch.manual_seed(0)
    layer, map = Upsample(40, 40).eval(), torch.randn(1, 40, 3, 5)
    layer.conv.bias.zero_()
    before = layer(map)
    kept = layer._kernel_cache._value
    assert torch.equal(layer(map), before) and layer._kernel_cache._value is kept
    CHANGES[change](layer)
    after = layer(map.to(layer.conv.weight.dtype)).float()
    torch.testing.assert_close(after, 2 * before, rtol=0, atol=0.05 if change == "half" else 1e-5)


def test_the_kept_kernel_stays_out_of_copies_and_files(model, tmp_path):
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


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer, map = Upsample(4, 4).eval(), torch.randn(1, 4, 3, 3)
        assert torch.equal(layer(map), layer(map))
