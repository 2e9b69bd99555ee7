"""Recomputed activations: less is kept in every network, and the gradients are the same."""

import pytest
import torch
from torch import Tensor

from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.layers import drop_path_stacks

VIT = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 48, "patch_size": 16}
CONVOLUTIONS = {"channels": 16, "norm_groups": 4, "multipliers": [1, 1, 2, 2, 2], "residual_blocks": 1}
QUERIES = {"token_layout": {"rows": 4, "columns": 4, "tokens": 5}, "encoder": "resampled"}
QUERIES |= {"decoder": "resampled", "encoder_options": {"query_layers": 2, "query_heads": 4}}
GAUSSIANS = {"encoder": "gaussian", "decoder": "gaussian", "quantizer": "gaussian", "projection": "none"}
GAUSSIANS |= {
    "token_layout": {"rows": 4, "columns": 4, "tokens": 6},
    "num_codebooks": 1,
    "codebook_dim": 13,
    "quantizer_options": {"inner": "nearest_ema"},
    "encoder_options": {"encoder": "vitamin"},
    "decoder_options": {"decoder": "vqgan", **CONVOLUTIONS},
}
NETWORKS = {
    "vitamin": {},
    "registers, linear": {"num_register_tokens": 2, "projection": "linear"},
    "adapters": {"adapter_layers": 2, "adapter_heads": 2},
    "merging": {"encoder_options": {"merge": {"method": "tome", "r": 1}}},
    "vqgan": {
        "encoder": "vqgan",
        "decoder": "vqgan",
        "encoder_options": {**CONVOLUTIONS, "attention_levels": [4]},
        "decoder_options": {**CONVOLUTIONS, "attention_levels": [4]},
    },
    "vision tower, vit": {"encoder": "hf_vision", "encoder_options": VIT, "decoder": "vit"},
    "queries": {**QUERIES, "decoder_options": {"query_layers": 2}},
    "gaussians": GAUSSIANS,
    "dual": {
        "encoder": "dual",
        "quantizer": "shared_index",
        "quantizer_options": {"block_widths": [2, 2]},
        "encoder_options": {"semantic": {"encoder": "hf_vision", **VIT}, "pixel": {"encoder": "vitamin"}},
    },
}


def build(config: UniTokConfig) -> UniTok:
    torch.manual_seed(0)
    return UniTok(config).train()


def run(model: UniTok, images: Tensor, ids: Tensor) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and the bytes that autograd keeps (inputs of recomputed parts left out)."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    torch.manual_seed(7)  # of drop path, and of quantisers with random numbers
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(images, ids)
    loss = out.reconstruction.square().mean() + sum(out.losses.values())
    loss = loss + (out.image_embeds * out.text_embeds).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "network",
    [name if name == "vitamin" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
)
def test_gradients_are_the_same(tiny_config, network):
    config = tiny_config(**{"drop_path_rate": 0.3, **NETWORKS[network]})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = torch.randint(1, 500, (2, 16), generator=torch.Generator().manual_seed(2))
    for autocast in (False, True):
        plain, other = build(config), build(config)
        other.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, kept = run(plain, images, ids)
            found, left = run(other, images, ids)
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name
        assert left < 0.35 * kept, f"{left} of {kept} bytes are kept"


def test_drop_path_noise_of_a_loop_is_used_again_in_the_recomputation(tiny_config):
    config = tiny_config(drop_path_rate=0.5)
    images, ids = torch.zeros(2, 3, 64, 64), torch.ones(2, 16, dtype=torch.int64)
    found = []
    for recomputes in (False, True):
        model = build(config)
        for blocks in drop_path_stacks(model).values():
            blocks.drop_path_noise = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(3))
        if recomputes:
            model.gradient_checkpointing_enable()
        found.append(run(model, images, ids)[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
