"""`unitok plan`: published sizes, values computed by hand, errors; test_ranks.py measures memory."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.cli import main
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.tokenizer import UniTokConfig
from open_unitok.training import run
from open_unitok.training.core import plan as core_plan
from open_unitok.training.core.flops import MLLMFlops, TokenCounts
from open_unitok.training.mllm import plan

CONFIGS = ["configs/mllm/pretrain_7b.yaml", "configs/mllm/finetune_7b.yaml"]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_published_7b(config, capsys):
    main.run(["plan", config, "--gpus", "8"])
    out = capsys.readouterr().out
    assert "parameters 7,508.7 M, of which 7,508.4 M are trained" in out
    assert "is not here: the published sizes are assumed" in out
    cells = [line.lstrip("* ").split() for line in out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row and row[0].isdigit()}
    assert rows["0"][:3] == ["27.97", "27.97", "55.94"]  # 4, 4 and 8 bytes for each of 7.5 G parameters
    assert rows["2"][:3] == ["27.97", "3.50", "10.49"]
    assert "GPU-hours" in out


def test_hours_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(core_plan, "cpu_tflops", lambda dtype: 0.5)
    main.run(["plan", "configs/demo/pretrain.yaml", "--device", "cpu", "--mfu", "0.5"])
    out = capsys.readouterr().out
    config = run.load_run_config("configs/demo/pretrain.yaml", [])
    hours = plan.plan_run(config, 1).flops / 0.25e12 * config.steps / 3600
    assert "GiB per rank on 1" in out and "50 % of the 0.5 TFLOP/s of this CPU" in out
    shown = float(out.split("steps take ")[1].split(" h")[0])
    assert shown == pytest.approx(hours, rel=0.05) and "GPU-hours" not in out
    monkeypatch.undo()
    assert core_plan.cpu_tflops("fp32") > 0


def test_lora_on_the_7b_needs_little_more_than_the_weights():
    config = run.load_run_config(CONFIGS[1], ["lora={rank: 64, base: bf16}", "engine.zero_stage=0"])
    found = plan.plan_run(config, 8)
    trained = sum(count for _, count in found.parameters.values())
    total = sum(count for count, _ in found.parameters.values())
    assert 0.15e9 < trained < 0.2e9
    assert found.memory[0].parameters == pytest.approx(2 * (total - trained) + 4 * trained, rel=0.01)
    assert found.memory[0].optimizer == 8 * trained


def test_flops_are_those_that_torch_counts(mllm_reference):
    """A forward pass of one generated image and one answered question, against torch's own count."""
    model = UniTokForConditionalGeneration.from_pretrained(mllm_reference / "model").train()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 7, 3, -200, -200, -200, -200, 4, 2], [1, -200, -200, -200, -200, 9, 8, 7, 2]])
    labels = torch.where(ids == -200, -100, ids)
    labels[0], labels[:, :5] = ids[0], torch.tensor([[-100, -100, 3, -200, -200], [-100] * 5])
    codes = torch.zeros(2, 4, 3, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        out = model(ids, image_codes=codes, labels=labels)
    work = TokenCounts(
        tokens=18,
        attention_pairs=2 * 9 * 9,
        text_targets=int(out.text_tokens),
        image_tokens=8,
        image_targets=4,
    )
    cost = MLLMFlops(model)
    forward = cost.flops(work, backward=False)
    # torch also counts masked pairs, so all of them here, and the projection's attention
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.03)
    assert cost.flops(work) == pytest.approx(3 * forward, rel=1e-6)
    model.language_model.requires_grad_(False)
    model.visual_embedder.requires_grad_(False)
    less = MLLMFlops(model).flops(work)
    assert forward < less < 3 * forward


def test_a_frozen_part_that_no_trained_part_precedes_has_no_backward_pass(mllm_reference):
    model = UniTokForConditionalGeneration.from_pretrained(mllm_reference / "model").train()
    work = TokenCounts(tokens=18, attention_pairs=2 * 9 * 9, text_targets=5, image_tokens=8, image_targets=4)
    all_trained, weights = MLLMFlops(model).flops(work), MLLMFlops(model).weights["visual_embedder"]
    model.visual_embedder.requires_grad_(False)
    assert MLLMFlops(model).flops(work) == pytest.approx(all_trained - 4 * work.image_tokens * weights)


def test_documents_are_planned_as_generated():
    mixture = "data.mixture=[{kind: KIND, path: data/docs, weight: 1}]"
    work = {
        kind: plan.plan_run(run.load_run_config(CONFIGS[0], [mixture.replace("KIND", kind)]), 8).counts
        for kind in ("document", "reading")
    }
    assert work["document"].image_targets == work["document"].image_tokens == work["reading"].image_tokens > 0
    assert work["reading"].image_targets == 0 and work["document"].text_targets > work["reading"].text_targets


def test_a_pyramid_is_planned_for_reading_alone(tmp_path):
    pyramid = {"inner": "nearest", "scales": [1, 2, 4]}
    UniTokConfig(image_size=64, quantizer="residual", quantizer_options=pyramid).save_pretrained(tmp_path)
    mixture = "data.mixture=[{kind: KIND, path: data/x, weight: 1}]"

    def planned(kind: str) -> plan.Plan:
        changes = [f"model.unitok={tmp_path}", mixture.replace("KIND", kind)]
        return plan.plan_run(run.load_run_config(CONFIGS[0], changes), 8)

    assert planned("captioning").counts.image_tokens > 0
    with pytest.raises(UserError, match="but generates one grid"):
        planned("text_to_image")


def test_added_place_vectors_are_planned(tmp_path):
    given, key = [f"init_from={tmp_path}", "steps=1"], "visual_positions=learned_2d"

    def embedder(*overrides: str) -> int:
        return plan.plan_run(run.load_run_config(CONFIGS[1], [*given, *overrides]), 8).parameters[
            "visual_embedder"
        ][1]

    UniTokMLLMConfig.named("unitok_mllm_7b").save_pretrained(tmp_path)
    assert embedder(key) - embedder() == 2 * 16 * 4096
    layout = {"rows": 32, "columns": 32, "tokens": 256}
    UniTokMLLMConfig.named("unitok_mllm_7b", token_layout=layout).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a set of tokens: omit the key"):
        embedder(key)


def test_a_shipped_model_to_start_from_is_read():
    """Its name is resolved to its folder: 4 M parameters, not the published 7 B."""
    model, assumed = plan.model_on_meta(run.load_run_config(CONFIGS[1], ["init_from=scenes", "steps=1"]))
    assert not any("scenes" in text for text in assumed)
    assert sum(p.numel() for p in model.parameters()) < 1e7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([CONFIGS[0], "--gpus", "7"], "is not divisible"),
        ([CONFIGS[0], "--gpus", "0"], "--gpus-per-node and"),
        ([CONFIGS[0], "--gpu", "H1000"], "must be one of"),
        ([CONFIGS[0], "engine.offload=parameters"], "needs engine.zero_stage 3"),
    ],
)
def test_error_messages(arguments, words):
    with pytest.raises(UserError, match=words):
        main.run(["plan", *arguments])


def test_the_benchmark_runs(tmp_path, monkeypatch):
    folder = Path(__file__).parents[3] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    script = runpy.run_path(str(folder / "mllm_training.py"))
    out = tmp_path / "results.json"
    size = ["--rows", "1", "--length", "100", "--steps", "1", "--warmup", "0"]
    arguments = ["--case", "tiny", "tiny_lora", *size, "--peak-tflops", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["mllm_training.py", *arguments])
    script["main"]()
    whole, lora = json.loads(out.read_text())["results"]
    assert lora["trained"] < lora["parameters"] / 5 and whole["trained"] == 335_872 - 4 * 64 * 8
    for row in (whole, lora):
        speed = row["tokens_per_second"] * row["seconds_per_step"]
        assert speed == pytest.approx(100) and row["mfu"] == row["tflops_per_second"] > 0
