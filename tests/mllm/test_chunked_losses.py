"""Losses in chunks: those of all logits at once, their gradients, and the memory that they take."""

import pytest
import torch
import torch.nn.functional as F

from open_unitok.mllm import losses
from open_unitok.mllm.losses import image_loss, text_loss

TEXT, IMAGE = (37, 50), (23, 3, 16)  # shapes of logits
WHOLE = 10**9


@pytest.fixture
def set_chunk(monkeypatch):
    """set_chunk(number of logits); WHOLE = no chunks."""

    def set_to(count):
        monkeypatch.setattr(losses, "WHOLE_LOGITS", count)
        monkeypatch.setattr(losses, "CHUNK_LOGITS", count)

    return set_to


def case(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape[0], 8, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[1:].numel(), 8, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return hidden, weight, targets


def run(loss, shape, dtype, z_weight, keep_logits):
    """The loss of a linear head, its other sums, and the gradients of hidden states and weight."""
    hidden, weight, targets = case(torch.Size(shape), dtype)
    logits = F.linear(hidden, weight).view(shape)
    found = loss(logits, targets, z_weight, keep_logits)
    total, *rest = found if isinstance(found, tuple) else (found,)
    (0.3 * total).backward()
    return [total.detach(), *rest], [hidden.grad, weight.grad], logits


@pytest.mark.parametrize("chunk", [1, 100, 400, WHOLE])  # rows of one, ragged chunks, all at once
@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("loss", "shape"), [(text_loss, TEXT), (image_loss, IMAGE)])
def test_chunks_add_up(set_chunk, loss, shape, dtype, z_weight, keep_logits, chunk):
    """Also for sums that a chunk of its own gives: the z-loss and the number of correct codes."""
    set_chunk(WHOLE)
    expected, gradients, whole = run(loss, shape, dtype, z_weight, keep_logits)
    set_chunk(chunk)
    found, others, logits = run(loss, shape, dtype, z_weight, keep_logits)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-5)
    # a gradient in bf16 is rounded before it is scaled, too
    tolerance = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(others, gradients, **tolerance)
    if keep_logits:
        assert torch.equal(logits, whole)
    if chunk == WHOLE:  # as without chunks, bit for bit
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(a, b) for a, b in zip(others, gradients))


def test_logits_are_kept_without_a_gradient(set_chunk):
    set_chunk(100)
    hidden, weight, targets = case(torch.Size(IMAGE), torch.float32)
    with torch.no_grad():
        logits = F.linear(hidden, weight).view(IMAGE)
        before = logits.clone()
        total, _, correct = image_loss(logits, targets, 0.0, keep_logits=False)
    assert torch.equal(logits, before)
    assert torch.equal(correct, (logits.argmax(dim=-1) == targets).sum(dim=0))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.item() == pytest.approx(expected.item())


def test_a_second_backward_pass_is_rejected(set_chunk):
    """It would scale the gradient, which has taken the memory of the logits, once more."""
    set_chunk(100)
    hidden, weight, targets = case(torch.Size(TEXT), torch.float32)
    total = text_loss(F.linear(hidden, weight), targets, keep_logits=False)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_saved_for_backward(set_chunk):
    """Without chunks log-probabilities are saved in float32, with chunks nothing larger than the logits."""

    def largest_saved(chunk):
        set_chunk(chunk)
        logits = torch.randn(40, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        sizes = []

        def pack(tensor):
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = image_loss(logits * 1, torch.zeros(40, 8, dtype=torch.int64), 0.0, keep_logits=False)[0]
        assert total.requires_grad
        return max(sizes)

    logits = 40 * 8 * 64 * 2
    assert largest_saved(WHOLE) == 2 * logits
    assert largest_saved(1000) == logits


@pytest.mark.parametrize("depth", [{}, {"outputs": "own", "output_bias": True}])
def test_a_model_trains_the_same_in_chunks(tiny, set_chunk, depth):
    """Text and image losses of one forward pass, and the gradients of all parameters."""
    ids = torch.tensor([[1, 8, 3, *[-200] * 4, 4, 2], [1, 21, 22, 3, *[-200] * 4, 2]])
    labels = ids.clone()
    codes = torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))
    model = tiny(depth_options=depth).train()

    def gradients(chunk):
        set_chunk(chunk)
        model.zero_grad()
        out = model(ids, image_codes=codes, labels=labels, return_logits=False)
        assert out.logits is None and out.image_logits is None
        out.loss.backward()
        return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, whole = gradients(WHOLE)
    found, chunked = gradients(64)
    for name in ("loss", "text_loss", "image_loss", "image_z_loss", "image_correct"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=0)
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)
