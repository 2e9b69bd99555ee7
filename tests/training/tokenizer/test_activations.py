"""The plan's activations against what a CPU keeps and allocates in a step."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from open_unitok.cli import main
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.layers import Block
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.activations import Recorder, measure_activations
from open_unitok.training.tokenizer.model import recompute_activations
from open_unitok.training.tokenizer.plan import loss_networks, model_on_meta

IMAGES = 8
SIZES = "image_size: 64, num_hidden_layers: 3, num_attention_heads: 4, num_codebooks: 4, codebook_size: 64"
SIZES += ", codebook_dim: 4, embed_dim: 32, text_hidden_size: 64, text_num_layers: 2, text_num_heads: 2"
SIZES += ", text_vocab_size: 512, text_context_length: 16"


def tiny_run(width: int, *overrides: str):
    """unitok_base.yaml in small, in float32 and without networks for losses."""
    own = f"stem_width: {width}, stage_widths: [{width}, {2 * width}], hidden_size: {4 * width}"
    model = f"model={{{SIZES}, {own}, decoder_widths: [{2 * width}, {width}]}}"
    losses = ("losses.lpips=0", "losses.lpips_weights=null", "losses.adversarial=0", "engine.dtype=fp32")
    return load_run_config("configs/tokenizer/unitok_base.yaml", [model, *losses, *overrides])


def step(model: UniTok, hooks: contextlib.AbstractContextManager) -> None:
    pixels = torch.zeros(IMAGES, 3, 64, 64)
    with hooks:
        out = model(pixels, torch.ones(IMAGES, 16, dtype=torch.int64))
        loss = out.reconstruction.square().mean() + sum(out.losses.values())
        loss = loss + (out.image_embeds * out.text_embeds).sum()
    del out
    loss.backward()


def kept_bytes(model: UniTok) -> int:
    """What autograd keeps of a forward pass, each storage once, without weights."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    step(model, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
    return sum(storage.nbytes() for storage in found.values())


def allocated_bytes(model: UniTok) -> int:
    """The most that a step allocates at a time."""
    step(model, contextlib.nullcontext())  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, contextlib.nullcontext())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("width", "recompute"),
    [
        (8, "all"),
        pytest.param(8, None, marks=pytest.mark.slow),
        pytest.param(16, None, marks=pytest.mark.slow),
        pytest.param(16, "all", marks=pytest.mark.slow),
        pytest.param(16, "convolutions", marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_a_cpu_keeps_and_allocates(width, recompute):
    config = tiny_run(width, f"recompute={recompute or 'all'}")
    model, _ = model_on_meta(config)
    found = measure_activations(model, {}, config)[recompute is not None]
    kept = sum(part.kept for part in found.parts.values()) * IMAGES
    torch.manual_seed(0)
    real = UniTok(model.config).train()
    if recompute:
        recompute_activations(real, recompute)
    fixed = found.peaks[-1][1]  # kernels derived from weights
    assert kept + fixed == pytest.approx(kept_bytes(real), rel=0.15)
    assert found.of_batch(IMAGES, IMAGES) == pytest.approx(allocated_bytes(real), rel=0.15)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_keeps_no_square_of_the_tokens(dtype):
    """As the kernels of a GPU, whatever the dtype."""
    sizes = []
    for tokens in (256, 512):
        with torch.device("meta"):
            block = Block(32, 2, 2.0)
            recorder = Recorder(block)
            with recorder.recording("block", dtype != "fp32"):
                block(torch.zeros(1, tokens, 32, requires_grad=True))
        sizes.append(recorder.total)
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)


@pytest.mark.slow
def test_parts_of_a_run_with_all_losses():
    """LPIPS and the discriminator by themselves; fewer decoded images keep less."""
    more = ("losses.lpips=1", "losses.lpips_weights=x", "losses.adversarial=0.4", "discriminator.kind=patch")
    config = tiny_run(16, *more, "discriminator.weights=null")
    model, _ = model_on_meta(config)
    found = measure_activations(model, loss_networks(config, model.config.image_shape), config)
    names = {
        "encoder convolutions",
        "encoder blocks",
        "decoder blocks",
        "decoder convolutions",
        "projections",
    }
    names |= {"text tower", "LPIPS", "discriminator", "discriminator's step"}
    for activations in found.values():
        assert names <= activations.parts.keys()
        assert all(activations.parts[name].kept > 0 for name in names)
        assert activations.of_batch(8, 4) < activations.of_batch(8, 8) < activations.of_batch(16, 16)
    assert found[True].of_batch(64, 64) < found[False].of_batch(64, 64)
    # the adaptive weight's passes come one after the other; recomputation also sees a few images at a time
    assert not found[False].adds_losses and found[True].pieces == 8 and found[False].pieces is None


@pytest.mark.slow
def test_bf16_halves_convolutions_but_not_norms():
    sizes = []
    for dtype in ("fp32", "bf16"):
        config = tiny_run(16, f"engine.dtype={dtype}")
        model, _ = model_on_meta(config)
        sizes.append(measure_activations(model, {}, config)[False].parts)
    for name, low, high in (("encoder convolutions", 0.5, 0.8), ("projections", 0.95, 1.3)):
        assert low <= sizes[1][name].kept / sizes[0][name].kept <= high, name


@pytest.mark.parametrize(
    ("memory", "verdict"),
    [("0.001", "does not fit"), pytest.param("79", "fits", marks=pytest.mark.slow)],
)
def test_the_plan_says_whether_a_run_fits(memory, verdict, capsys):
    main.run(["plan", "configs/demo/tokenizer.yaml", "--gpus", "1", "--gpu-memory", memory])
    out = capsys.readouterr().out
    assert f"{verdict} --gpu-memory: " in out and f" of {memory} GiB" in out
    assert "MiB of activations per image" in out and "decoder convolutions" in out
