"""benchmarks/generation.py at toy scale: every part, equal codes, the tables."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FP32 = ("baseline_1", "llamagen_1", "eager_1", "fp32_1", "compiled_1", "tuned_1", "fp32_8", "tuned_8")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("benchmark_generation", BENCHMARKS / "generation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # parts change these for their own process; restored afterwards
    monkeypatch.setitem(module.BACKENDS, "torch", module.BACKENDS["torch"])
    monkeypatch.setattr(module, "tune_inductor", lambda images, weights: None)
    monkeypatch.setattr(module, "time_native_backend", lambda: {"decode_step": [1.0], "code_logits": [1.0]})
    return module


@pytest.mark.parametrize("part", FP32)
def test_every_loop_in_fp32_gives_the_codes_of_the_baseline(script, part, monkeypatch):
    # inductor takes a minute for one graph; dynamo shows that there is one graph for all steps
    compile = torch.compile
    monkeypatch.setattr("torch.compile", lambda step, **options: compile(step, backend="eager", **options))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored after
        found = script.measure_part(part, toy=True)
    assert found["same_codes"] == 1 and found["ms"] > 0 and len(found["ratio_quartiles"]) == 2
    short = part.startswith(("compiled", "tuned"))
    assert ("of_native" in found) == short and found["weights"]["decoder"] == 17408


@pytest.mark.slow
@pytest.mark.parametrize("part", ["compiled_1", "tuned_1"])
def test_compiled_steps_give_the_codes_of_the_baseline(script, part):
    assert script.measure_part(part, toy=True)["same_codes"] == 1


def test_answers_by_every_way_are_equal(script):
    for found in script.measure_part("answers", toy=True).values():
        assert len(found["same_ids"]) == 6 and set(found["same_ids"].values()) == {1.0}
        assert all(found[f"{way}_s"] > 0 for way in found["same_ids"])


def test_parts_that_fail_or_cannot_run_are_named_and_the_rest_is_kept(script, monkeypatch, tmp_path, capsys):
    def run_part(part, isa, limit, args):
        if part == "bf16_1":
            return script.__dict__["run_part_of_a_process"]("bf16_1", isa, 0.01, args)
        return script.measure_part(part, toy=True)

    script.run_part_of_a_process = script.run_part
    monkeypatch.setattr(script, "run_part", run_part)
    monkeypatch.setattr(script, "name_processor", lambda isa: "AMD EPYC")
    monkeypatch.setattr(script, "measure_machine", lambda: {"memory_gb_s": 40.0})
    monkeypatch.setattr(script, "torchao_obstacle", lambda: "torchao is not installed")
    parts = ["machine", "fp32_1", "bf16_1", "torchao_1", "prefix"]
    arguments = ["--parts", *parts, "--toy", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *arguments])
    script.main()
    out = capsys.readouterr().out
    assert "torchao_1: left out: torchao is not installed" in out and "bf16_1: left out: not finished" in out
    (file,) = tmp_path.glob("generation-*.json")
    results = json.loads(file.read_text())
    assert list(results) == parts and results["fp32_1"]["same_codes"] == 1
    assert "C++ steps: fp32, bf16, int8 weights | " in out and ", not measured, not measured |" in out
    # a run of some parts keeps the others, and no part begins after the time is over
    before = file.read_text()
    monkeypatch.setattr(sys, "argv", ["generation.py", *arguments, "--seconds", "0"])
    script.main()
    assert "prefix: left out: no time left" in capsys.readouterr().out and file.read_text() == before


def test_the_table_has_a_column_per_processor(script, tmp_path):
    for device in ("AMD-EPYC-family-25-model-17-AVX512", "AMD-EPYC-family-25-model-17-AVX2-emulated"):
        entry = {"ratio": 6.14 if "512" in device else 3.8, "ratio_quartiles": [3.7, 4]}
        noisy = {"ratio": 47.0, "ratio_quartiles": [34.0, 104.0]}
        answers = {"one_by_one_s": 8.0, "batched_s": 2.0, "transformers_batched_s": 4.0}
        content = {
            "fp32_1": entry,
            "bf16_1": noisy,
            "tuned_1": {"of_native": 0.874},
            "answers": {"photos": answers, "dialogues": answers},
        }
        (tmp_path / f"generation-{device}.json").write_text(json.dumps(content))
    (tmp_path / "serving-AMD-EPYC-family-25-model-1-AVX2.json").write_text('{"ratio": 4.84}')
    lines, unsettled = script.readme_table(tmp_path).splitlines(), "not settled (34.0 to 104.0)"
    assert lines[0] == "|  | AVX2 (Zen 4, emulated) | AVX-512 (Zen 4) |"
    assert lines[2].endswith(f"| 3.8x, {unsettled}, not measured | 6.1x, {unsettled}, not measured |")
    assert sum("| 87 %, not measured, not measured |" in line for line in lines) == 1
    assert any(line.endswith("| 4.0x; 4.0x | 4.0x; 4.0x |") for line in lines)
    assert any(line.endswith("| 2.0x; 2.0x | 2.0x; 2.0x |") for line in lines)
    assert lines[-1].endswith("4.8x on AVX2 (Zen 3)")


def test_the_instructions_can_be_held_to_avx2(script, monkeypatch):
    from open_unitok.generation.backends import native_build

    plain = native_build._key()
    monkeypatch.setenv("UNITOK_NATIVE_MARCH", script.ISAS["avx2"]["UNITOK_NATIVE_MARCH"])
    assert "-march=x86-64-v3" in native_build._flags() and native_build._key() != plain
    if script.processor_name().endswith("AVX512"):
        assert script.name_processor("avx2").endswith("AVX2 emulated")
