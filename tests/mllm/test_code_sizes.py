"""Sub-codebooks of unequal size in the MLLM: the depth head's mask, checks, files and configs."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation.sampling import Sampling, apply_guidance, sample_code
from open_unitok.mllm import DepthHead, UniTokMLLMConfig
from open_unitok.mllm.convert import save_published
from open_unitok.mllm.losses import image_loss

SIZES = [5, 8, 3]


def test_equal_sizes_change_no_config(tiny_config):
    plain, given = tiny_config(), tiny_config(code_sizes=[8, 8, 8])
    assert given.code_sizes is None and given.book_sizes == [8, 8, 8]
    assert plain.to_diff_dict() == given.to_diff_dict()


@pytest.mark.parametrize("sizes", [[5, 8], [5, 8, 9], [5, 7, 3], [0, 8, 3]])
def test_wrong_sizes_are_named(tiny_config, sizes):
    with pytest.raises(UserError, match=r"code_sizes = .*expected num_codebooks = 3 sizes"):
        tiny_config(code_sizes=sizes)


def test_sizes_survive_saving(tiny, tmp_path):
    tiny(code_sizes=SIZES).save_pretrained(tmp_path)
    assert UniTokMLLMConfig.from_pretrained(tmp_path).book_sizes == SIZES


def test_logits_above_a_size_have_no_share(tiny_config):
    torch.manual_seed(0)
    masked = DepthHead(tiny_config(code_sizes=SIZES), 32)
    plain = DepthHead(tiny_config(), 32)
    plain.load_state_dict(masked.state_dict())
    codes = torch.stack([torch.randint(size, (6,)) for size in SIZES], dim=-1)
    hidden = torch.randn(6, 32)
    logits, whole = masked(hidden, codes), plain(hidden, codes)
    cache = masked.new_cache()
    steps = [masked.step(k, hidden if k == 0 else codes[:, k - 1], cache) for k in range(3)]
    for k, size in enumerate(SIZES):
        assert torch.equal(logits[:, k, :size], whole[:, k, :size])
        assert (logits[:, k].softmax(dim=-1)[:, size:] == 0).all()
        torch.testing.assert_close(steps[k], logits[:, k])
    # the loss is that of the smaller softmax, and its gradients are finite
    loss = image_loss(logits, codes, 0.1)[0]
    expected = sum(
        torch.nn.functional.cross_entropy(whole[:, k, :size], codes[:, k], reduction="sum")
        + 0.1 * whole[:, k, :size].max(dim=-1).values.square().sum()
        for k, size in enumerate(SIZES)
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert masked.output.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{"greedy": True}, {"top_k": 8}, {"top_p": 0.9}, {"temperature": 0.01}, {}]
)
def test_codes_above_a_size_are_never_sampled(tiny_config, settings, dtype):
    head = DepthHead(tiny_config(code_sizes=SIZES), 32).to(dtype)
    head.output.bias.data[3:] = 50.0  # the model prefers what does not exist
    hidden = torch.randn(2 * 64, 32, dtype=dtype)
    cache, code = head.new_cache(), None
    for k, size in enumerate(SIZES):
        logits = head.step(k, hidden if k == 0 else code.repeat(2), cache).float()
        guided = apply_guidance(logits, 7.5)
        assert not guided.isnan().any()
        noise = -torch.empty(64, 8).exponential_().log()
        code = sample_code(guided, Sampling(**settings), noise)
        assert (code < size).all()


def test_codes_above_a_size_are_rejected(tiny):
    embedder = tiny(code_sizes=SIZES).visual_embedder
    good = torch.tensor([[[4, 7, 2]]])
    embedder.check_codes(good)
    for book in (0, 2):
        wrong = good.clone()
        wrong[..., book] += 1
        with pytest.raises(UserError, match=r"image_codes go up to .* allowed: less than \[5, 8, 3\]"):
            embedder.check_codes(wrong)


def test_rows_are_added(tiny):
    embedder = tiny(sums_rows=True, row_norm="none", projection_heads=1).visual_embedder
    codes = torch.randint(8, (2, 4, 3))
    rows = sum(embedder.codebooks[k][codes[..., k]] for k in range(3))
    torch.testing.assert_close(embedder.embed(codes), rows)


def test_the_published_format_has_equal_sizes(tiny, tmp_path):
    model = tiny(code_sizes=SIZES)
    with pytest.raises(UserError, match="sub-codebooks of equal size"):
        save_published(model.config, model.state_dict(), None, tmp_path)
