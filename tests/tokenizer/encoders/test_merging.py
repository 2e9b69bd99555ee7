"""Token merging against the golden vectors, and the properties of each method."""

import json
import pathlib
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer.encoders.merging import (
    combine,
    density_peaks,
    match_pairs,
    merge_schedule,
    spatial_density_peaks,
    unmerge,
)
from open_unitok.tokenizer.encoders.merging_blocks import (
    MergeOptions,
    MergeState,
    MergingTransformer,
    check_merge,
)
from open_unitok.tokenizer.token_layout import TokenLayout

LAYOUTS = {256: TokenLayout(16, 16, 0), 1024: TokenLayout(32, 32, 0)}
GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "merging"
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
) -> MergeState:
    with torch.no_grad():
        *_, (hidden, state) = blocks.merged_outputs(tensors["blocks.tokens"], (4, 5))
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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_twins_come_back_exactly():
    tokens = random(2, 8, 12).repeat_interleave(2, dim=1)  # 8 pairs side by side
    size = torch.ones(2, 16)
    assign, kept = match_pairs(tokens, 8)
    for how in ("mean", "prune"):
        merged, new_size = combine(tokens, size, assign, kept, how)
        assert merged.shape == (2, 8, 12) and torch.equal(new_size, torch.full((2, 8), 2.0))
        assert torch.equal(unmerge(merged, assign, kept), tokens)
    merged, _ = combine(tokens, size, assign, kept, "mlerp")  # equal vectors are unchanged but for rounding
    torch.testing.assert_close(unmerge(merged, assign, kept), tokens, rtol=0, atol=1e-6)


def test_the_mean_keeps_the_mean_and_mlerp_does_not():
    tokens, size = random(2, 30, 12) + 1, torch.ones(2, 30)
    assign, kept = match_pairs(tokens, 15)
    means = {}
    for how in ("mean", "mlerp"):
        merged, new_size = combine(tokens, size, assign, kept, how)
        assert torch.equal(new_size.sum(dim=1), size.sum(dim=1))
        means[how] = unmerge(merged, assign, kept).mean(dim=1)
    torch.testing.assert_close(means["mean"], tokens.mean(dim=1), rtol=0, atol=1e-6)
    assert (means["mlerp"] - tokens.mean(dim=1)).abs().max() > 0.05


def test_opposite_vectors_under_mlerp_give_zero_and_finite_gradients():
    tokens = torch.tensor([[[3.0, 4.0], [-3.0, -4.0], [1.0, 0.0], [0.0, 9.0]]], requires_grad=True)
    assign, kept = torch.tensor([[1, 1, 2, 3]]), torch.tensor([[1, 2, 3]])
    merged, _ = combine(tokens, torch.ones(1, 4), assign, kept, "mlerp")
    assert torch.equal(merged[0, 0], torch.zeros(2)) and torch.equal(merged[0, 1:], tokens[0, 2:])
    merged.sum().backward()
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_a_group_of_one_is_unchanged_bit_for_bit():
    tokens, size = random(1, 9, 7), torch.tensor([[3.0, 7, 1, 5, 3, 9, 11, 13, 3]])
    assign, kept = match_pairs(tokens, 2)
    alone = [position for position in kept[0].tolist() if (assign[0] == position).sum() == 1]
    assert len(alone) >= 5
    for how in ("mean", "mlerp", "prune"):
        merged, _ = combine(tokens, size, assign, kept, how)
        back = unmerge(merged, assign, kept)
        assert torch.equal(back[:, alone], tokens[:, alone])


def test_ties_go_to_the_first_and_zero_keys_are_finite():
    assign, kept = match_pairs(torch.ones(1, 8, 4), 2)
    assert assign.tolist() == [[1, 1, 1, 3, 4, 5, 6, 7]] and kept.tolist() == [[1, 3, 4, 5, 6, 7]]
    assign, _ = match_pairs(torch.zeros(1, 8, 4), 2)
    assert assign.tolist() == [[1, 1, 1, 3, 4, 5, 6, 7]]
    assert match_pairs(random(1, 9, 4), 100)[1].shape == (1, 5)  # at most half of them
    assert match_pairs(random(1, 9, 4), 100, protected=7)[1].shape == (1, 8)
    for registers in range(7):
        for order in ("raster", "published") if registers < 2 else ("raster",):
            assign, kept = match_pairs(torch.ones(1, 9, 4), 100, registers, order)
            assert assign[0, :registers].tolist() == kept[0, :registers].tolist() == list(range(registers))
            assert (assign[0, registers:] >= registers).all()


def test_attention_with_sizes_is_attention_over_copies():
    """A token that stands for n gives the result of n equal tokens (float64)."""
    torch.manual_seed(0)
    blocks = MergingTransformer(16, 1, 2, 2.0, 0.0, MergeOptions(r=[0], how=["mean"])).double().eval()
    attention, tokens = blocks[0].attention, random(1, 5, 16).double()
    sizes = torch.tensor([1, 3, 1, 2, 1])
    with torch.no_grad():
        once, _ = attention.mix(tokens, sizes.double().log()[None, None, None])
        copies = attention(tokens.repeat_interleave(sizes, dim=1))
    assert (once - copies[:, [0, 1, 4, 5, 7]]).abs().max() < 1e-14


def test_equal_tokens_have_no_distance_and_all_kept_is_the_identity():
    tokens = random(1, 8, 64).repeat(1, 8, 1)  # cdist's default gives up to .008 here
    flat = density_peaks(tokens, 8, 5)
    assert torch.equal(tokens.gather(1, flat["assign"][..., None].expand_as(tokens)), tokens)
    tokens = random(2, 36, 8)
    for found in (density_peaks(tokens, 36, 5), spatial_density_peaks(tokens, (6, 6), 36, 5, 0.3)):
        assert torch.equal(found["assign"], torch.arange(36).expand(2, -1))
        assert torch.equal(found["kept"], found["assign"])


def test_the_spatial_reach_matters():
    """Two equal blobs far apart on the grid: density peaks join them, ranks 1 to k do not see each other."""
    tokens = random(1, 64, 8)
    wide = spatial_density_peaks(tokens, (8, 8), 10, 5, 0.3)
    assert not torch.equal(wide["kept"], density_peaks(tokens, 10, 5)["kept"])
    assert not torch.equal(wide["rho"], spatial_density_peaks(tokens, (8, 8), 10, 5, 1.0)["rho"])
    assert not torch.equal(wide["rho"], spatial_density_peaks(tokens, (4, 16), 10, 5, 0.3)["rho"])


def test_each_image_of_a_batch_is_merged_on_its_own():
    tokens, size = random(3, 24, 8), torch.ones(3, 24)
    for choose in (
        lambda x: match_pairs(x, 7),
        lambda x: tuple(density_peaks(x, 9)[name] for name in ("assign", "kept")),
    ):
        assign, kept = choose(tokens)
        together, _ = combine(tokens, size, assign, kept, "mlerp")
        for image in range(3):
            one = slice(image, image + 1)
            alone, _ = combine(tokens[one], size[one], *choose(tokens[one]), "mlerp")
            torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "merge", "saved"), [
    (256, {"r": 2}, 0.126), (256, {"r": 4}, 0.251), (256, {"r": 8}, 0.495), (1024, {"r": 8}, 0.138),
    (256, {"at": 2, "keep": 0.5}, 0.479), (256, {"at": 2, "keep": 0.25}, 0.710),
])  # fmt: skip
def test_products_saved_in_the_blocks_of_unitok_large(tokens, merge, saved):
    """Against the arithmetic: 31 blocks, and half a block runs before its merge."""
    with torch.device("meta"):
        options = check_merge({"method": "tome" if "r" in merge else "cluster", **merge}, 31, LAYOUTS[tokens])
        blocks = MergingTransformer(1024, 31, 16, 2.0, 0.0, options).eval()
        hidden = torch.zeros(1, tokens, 1024)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            blocks(hidden, LAYOUTS[tokens].grid)
    per_token, per_pair = 10 * 1024**2, 2 * 1024
    total = 2 * 31 * (tokens * per_token + tokens**2 * per_pair)
    # keys for the clusters and the matching itself are counted as well
    assert 1 - counter.get_total_flops() / total == pytest.approx(saved, abs=0.02)
