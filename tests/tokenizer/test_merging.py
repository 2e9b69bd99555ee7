"""Token merging against the golden vectors, and the properties of each method."""

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.tokenizer.encoders.merging import (
    combine,
    density_peaks,
    match_pairs,
    merge_schedule,
    spatial_density_peaks,
    unmerge,
)
from open_unitok.tokenizer.encoders.merging_blocks import MergeOptions, MergingTransformer, State

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "merging"
DTYPES = (torch.float64, torch.float32)
# our names of the weights of a block
WEIGHTS = {
    "norm1": "norm1",
    "qkv": "attention.qkv",
    "proj": "attention.out",
    "norm2": "norm2",
    "mlp_norm": "mlp.norm",
    "w0": "mlp.gate",
    "w1": "mlp.up",
    "w2": "mlp.down",
}


def golden(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    tensors = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
    return tensors, json.loads((GOLDEN / f"{name}.meta.json").read_text())


def close(found: torch.Tensor, expected: torch.Tensor, float32: float) -> None:
    tolerance = 1e-12 if expected.dtype == torch.float64 else float32
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert float((found - expected).detach().abs().max()) <= tolerance


def test_schedules_are_the_published_ones():
    expected = golden("tome", torch.float64)[1]["schedule"]
    assert merge_schedule(4, 12) == expected["4"]
    assert merge_schedule([3, 2], 12) == expected["[3, 2]"]
    for slope in (-1, 1, 0.5):
        assert merge_schedule(8, 12, slope) == expected[f"(8, {slope})"]
    assert merge_schedule(8, 12, -1) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("protected", [0, 2])
def test_matching_equals_the_golden(dtype, protected):
    tensors, meta = golden("tome", dtype)
    tokens, size = tensors["match.tokens"], tensors["match.size_in"]
    assign, kept = match_pairs(tensors["match.metric"], meta["match"]["r"], protected)
    name = f"match.p{protected}"
    assert torch.equal(assign, tensors[f"{name}.assign"]) and torch.equal(kept, tensors[f"{name}.kept"])
    merged, new_size = combine(tokens, size, assign, kept, "mean")
    close(merged, tensors[f"{name}.merged"], 1e-6)
    close(new_size, tensors[f"{name}.size"], 1e-6)
    close(unmerge(merged, assign, kept), tensors[f"{name}.unmerged"], 1e-6)
    if not protected:
        same, published = match_pairs(tensors["match.metric"], meta["match"]["r"], order="published")
        assert torch.equal(same, assign)
        assert torch.equal(published, tensors[f"{name}.published_order"])
        # only the order of the tokens differs, not what they stand for
        again, _ = combine(tokens, size, assign, published, "mean")
        assert torch.equal(unmerge(again, assign, published), unmerge(merged, assign, kept))


def transformer(tensors: dict[str, torch.Tensor], heads: int, options: MergeOptions) -> MergingTransformer:
    tokens = tensors["blocks.tokens"]
    blocks = MergingTransformer(tokens.shape[-1], 3, heads, 2.0, 0.0, options).to(tokens.dtype).eval()
    for index, block in enumerate(blocks):
        for theirs, ours in WEIGHTS.items():
            for kind in ("weight", "bias"):
                weight = block.get_submodule(ours).get_parameter(kind)
                weight.data.copy_(tensors[f"blocks.{index}.{theirs}.{kind}"])
    return blocks


def check_blocks(
    tensors: dict[str, torch.Tensor], name: str, blocks: MergingTransformer, float32: float
) -> State:
    with torch.no_grad():
        hidden, state = blocks.merged(tensors["blocks.tokens"], (4, 5))
    size, assign, kept = state
    order = kept.argsort(dim=1)  # results are stored by ascending position
    assert torch.equal(assign, tensors[f"{name}.assign"])
    assert torch.equal(kept.gather(1, order), tensors[f"{name}.kept"])
    close(size.gather(1, order), tensors[f"{name}.size"], 1e-6)
    close(hidden.gather(1, order[..., None].expand_as(hidden)), tensors[f"{name}.tokens_out"], float32)
    with torch.no_grad():
        close(blocks(tensors["blocks.tokens"], (4, 5)), tensors[f"{name}.unmerged"], float32)
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["raster", "published", "registers"])
def test_three_blocks_with_tome_equal_the_golden(dtype, run):
    tensors, meta = golden("tome", dtype)
    sizes = meta["blocks"]
    options = MergeOptions(
        registers=sizes["registers_protected"] if run == "registers" else 0,
        r=sizes["r"],
        order="published" if run == "published" else "raster",
        how=["mean"] * 3,
    )
    state = check_blocks(tensors, f"blocks.{run}", transformer(tensors, sizes["heads"], options), 1e-4)
    assert torch.equal(state[0].sum(dim=1), torch.full((2,), 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_three_blocks_without_merging_equal_the_golden_and_the_plain_transformer(dtype):
    tensors, meta = golden("tome", dtype)
    blocks = transformer(tensors, meta["blocks"]["heads"], MergeOptions(r=[0, 0, 0], how=["mean"] * 3))
    with torch.no_grad():
        out = blocks(tensors["blocks.tokens"], (4, 5))
        close(out, tensors["blocks.plain.tokens_out"], 1e-4)
        plain = blocks.__class__.__base__(32, 3, meta["blocks"]["heads"], 2.0).to(dtype).eval()
        plain.load_state_dict(blocks.state_dict())
        assert torch.equal(plain(tensors["blocks.tokens"]), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mean", "mlerp", "prune"])
def test_tofu_equals_the_golden_with_gradients(dtype, how):
    tensors, meta = golden("tofu", dtype)
    tokens = tensors["op.tokens"].requires_grad_()
    assign, kept = match_pairs(tensors["op.metric"], meta["op"]["r"])
    assert torch.equal(assign, tensors["op.assign"]) and torch.equal(kept, tensors["op.kept"])
    merged, size = combine(tokens, tensors["op.size_in"], assign, kept, how)
    (merged * tensors["op.probe"]).sum().backward()
    close(merged, tensors[f"op.{how}.merged"], 1e-5)
    close(size, tensors["op.size"], 1e-6)
    close(unmerge(merged, assign, kept), tensors[f"op.{how}.unmerged"], 1e-5)
    assert tokens.grad is not None
    close(tokens.grad, tensors[f"op.{how}.grad_tokens"], 1e-5)
    assert float(merged.detach().norm(dim=-1).mean()) == pytest.approx(meta[f"mean_norm_{how}"], rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["proportional", "plain_attention"])
def test_three_blocks_with_tofu_equal_the_golden(dtype, run):
    tensors, meta = golden("tofu", dtype)
    sizes = meta["blocks"]
    how: list[Any] = ["prune"] * sizes["prune_until"] + ["mlerp"] * (3 - sizes["prune_until"])
    options = MergeOptions(r=sizes["r"], how=how, proportional_attention=run == "proportional")
    check_blocks(tensors, f"blocks.{run}", transformer(tensors, sizes["heads"], options), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["dpc", "dpc_noise", "spatial", "flat", "flat_spatial"])
def test_clusters_equal_the_golden(dtype, run):
    tensors, meta = golden("cluster", dtype)
    flat = run.startswith("flat")
    tokens, keep = (tensors["flat.tokens"], meta["flat_keep"]) if flat else (tensors["tokens"], meta["keep"])
    if "spatial" in run:
        grid = tuple(meta["grid"])
        found = spatial_density_peaks(tokens, grid, keep, meta["k"], meta["alpha"])
    else:
        noise = tensors["noise"] if run == "dpc_noise" else None
        found = density_peaks(tokens, keep, meta["k"], noise)
    for name in ("rho", "delta", "score"):
        close(found[name], tensors[f"{run}.{name}"], 1e-5)
    assign, kept = found["assign"], found["kept"]
    assert torch.equal(kept, tensors[f"{run}.anchors"]) and torch.equal(assign, tensors[f"{run}.assign"])
    merged, size = combine(tokens, torch.ones_like(tokens[..., 0]), assign, kept, "mean")
    close(merged, tensors[f"{run}.merged"], 1e-5)
    close(size, tensors[f"{run}.size"], 1e-6)
    close(unmerge(merged, assign, kept), tensors[f"{run}.unmerged"], 1e-5)
