"""`engine.compile`: losses and names of weights as without it, with checkpointing, LoRA, EMA, accumulation,
GAN, resuming from and to a run without it; errors."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training.core import compilation
from open_unitok.training.core.compilation import compile_blocks
from open_unitok.training.core.options import EngineOptions
from open_unitok.training.tokenizer.train import compile_tokenizer

COMPILED = "engine.compile=true"


@pytest.fixture
def traced(monkeypatch):
    """The graphs: traced and differentiated as for inductor, which takes a minute, but run by torch."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(graph, inputs, **options):
        graphs.append(graph)
        return aot_eager(graph, inputs, **options)

    monkeypatch.setattr(compilation, "BACKEND", backend)
    yield graphs
    torch.compiler.reset()


def assert_same_weights(one, other) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4


def test_blocks_are_compiled_in_place(mllm_reference):
    model = UniTokForConditionalGeneration.from_pretrained(mllm_reference / "model")
    names = list(model.state_dict())
    depth, layers = len(model.depth_head.layers), len(model.language_model.layers)
    assert compile_blocks(model, GradientCheckpointingLayer) == layers + depth == 3
    assert list(model.state_dict()) == names
    sizes = {"stem_width": 8, "stage_widths": [8, 8], "stage_depths": [1, 1], "hidden_size": 16}
    sizes |= {"decoder_widths": [8, 8], "decoder_depths": [1, 1], "num_hidden_layers": 2}
    unitok = UniTok(UniTokConfig(image_size=32, num_attention_heads=2, text_num_layers=1, **sizes))
    names = list(unitok.state_dict())
    compile_tokenizer(unitok, None, None)
    compiled = [type(m).__name__ for m in unitok.modules() if m._compiled_call_impl is not None]
    # transformers of encoder and decoder, convolution stages of both, the text tower
    assert {name: compiled.count(name) for name in set(compiled)} == {
        "Block": 4,
        "ConvBlock": 4,
        "TextBlock": 1,
    }
    assert list(unitok.state_dict()) == names


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_mllm_trains_as_without(mllm, mllm_reference, traced, checkpointing):
    options = [COMPILED, f"engine.gradient_checkpointing={checkpointing}"]
    found = mllm.train(f"compiled-{checkpointing}", *options)
    assert len(traced) >= 2  # decoder and depth head
    mllm.same_rows(mllm.rows(found), mllm.rows(mllm_reference), 1e-5)
    assert_same_weights(*(folder / "model" / "model.safetensors" for folder in (found, mllm_reference)))


@pytest.mark.slow
def test_adapters_train_as_without(mllm, mllm_reference, traced):
    options = [
        "lora={rank: 4, alpha: 8, dropout: 0.1}",
        "model=null",
        f"init_from={mllm_reference / 'model'}",
    ]
    plain = mllm.train("lora-plain", *options)
    found = mllm.train("lora-compiled", *options, COMPILED)
    assert traced
    mllm.same_rows(mllm.rows(found), mllm.rows(plain), 1e-5)
    assert_same_weights(*(folder / "model" / "adapter_model.safetensors" for folder in (found, plain)))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("true", "false"), ("false", "true")])
def test_resume_from_and_to_a_run_without(mllm, mllm_reference, traced, first, then):
    name = f"resumed-compiled-{first}"
    mllm.train(name, f"engine.compile={first}", "stop_at=3")
    found = mllm.train(name, f"engine.compile={then}")
    mllm.same_rows(mllm.rows(found), mllm.rows(mllm_reference), 1e-5)
    assert_same_weights(*(folder / "model" / "model.safetensors" for folder in (found, mllm_reference)))


@pytest.mark.slow
def test_the_tokenizer_trains_as_without(data, traced, tmp_path):
    """With EMA, contrastive loss, accumulation, drop path, GAN and its adaptive weight, and checkpointing."""
    gan = ["losses.adversarial=0.4", "discriminator={kind: patch, width: 8, layers: 1, start: 1, warmup: 1}"]
    options = [*gan, "engine.accumulation=2", "engine.gradient_checkpointing=true", "steps=4"]
    for name, given in (("plain", []), ("compiled", [COMPILED])):
        main(["train", str(data / "config.yaml"), f"out={tmp_path / name}", *options, *given])
    assert len(traced) >= 3
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    ]
    for plain, compiled in zip(*rows, strict=True):
        assert plain.keys() == compiled.keys()
        for key in ("loss", "l1", "clip", "adversarial", "grad_norm"):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-5, abs=1e-7), key
    assert_same_weights(*(tmp_path / name / "model" / "model.safetensors" for name in ("plain", "compiled")))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_trains_the_mllm_as_without(mllm, mllm_reference):
    """The real compiler, with its C++ kernels."""
    found = mllm.train("inductor", COMPILED)
    mllm.same_rows(mllm.rows(found), mllm.rows(mllm_reference), 1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inductor_trains_the_tokenizer_as_without(data, tmp_path):
    """Convolution stages have maps of several sizes, on which inductor fails if they share a graph."""
    losses = []
    for name, given in (("plain", []), ("compiled", [COMPILED])):
        main(["train", str(data / "config.yaml"), f"out={tmp_path / name}", "steps=2", *given])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.compiler.reset()


def test_without_a_compiler_one_line(mllm_reference, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"engine\.compile needs a C\+\+ compiler on a CPU"):
        compile_blocks(model, torch.nn.Linear)
    with pytest.raises(UserError, match=r"needs engine\.zero_stage 0, 1 or 2, not 3"):
        EngineOptions(compile=True, zero_stage=3).check()
