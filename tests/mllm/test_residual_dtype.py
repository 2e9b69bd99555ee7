"""The dtype of the sums over layers under autocast."""

import torch

IDS = torch.tensor([[1, 8, 3, *[-200] * 4, 4, 2], [1, 21, 22, 3, *[-200] * 4, 2]])


def step(model, dtype):
    """Losses, gradients, and the dtypes that enter the layers."""
    codes = torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))
    seen = {}
    layers = {"decoder": model.language_model.layers, "depth": model.depth_head.layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, inputs, name=name: seen.setdefault(name, []).append(inputs[0])
        )
        for name, found in layers.items()
        for layer in found
    ]
    model.residual_dtype = dtype
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS, image_codes=codes, labels=IDS, return_logits=False)
    out.loss.backward()
    for handle in handles:
        handle.remove()
    found = {name: {state.dtype for state in states} for name, states in seen.items()}
    return out.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, found


def test_the_residual_stream_is_bf16(tiny):
    """In all layers of both parts, with losses and gradients to bf16's rounding."""
    model = tiny()
    loss, gradients, seen = step(model, None)
    assert seen == {"decoder": {torch.float32}, "depth": {torch.float32}}
    found, others, seen = step(model, torch.bfloat16)
    assert seen == {"decoder": {torch.bfloat16}, "depth": {torch.bfloat16}}
    torch.testing.assert_close(found, loss, rtol=1e-2, atol=0)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert others[name].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(others[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)
