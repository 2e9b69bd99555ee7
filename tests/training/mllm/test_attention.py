"""The attention implementation of a run: what `auto` takes, and what is rejected."""

import itertools

import pytest
from transformers import AutoConfig, AutoModel

from open_unitok.core.errors import UserError
from open_unitok.mllm.attention import VARLEN
from open_unitok.training.mllm import model as run_model
from open_unitok.training.mllm.model import choose_attention

DTYPES = {  # engine.dtype, and whether bf16 is fast -> FlashAttention has a kernel
    ("fp32", True): False,
    ("fp32", False): False,
    ("bf16", True): True,
    ("bf16", False): True,  # emulated bf16 is bf16
    ("auto", True): True,
    ("auto", False): False,
}
SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20, "pad_token_id": None,
}  # fmt: skip


def decoder(family):
    return AutoModel.from_config(AutoConfig.for_model(family, **SIZES))


@pytest.mark.parametrize(
    ("cuda", "installed", "dtype", "fast"),
    [(*c, *d) for c, d in itertools.product(itertools.product((True, False), repeat=2), DTYPES)],
)
def test_flash_attention_is_taken_in_16_bits_only(monkeypatch, cuda, installed, dtype, fast):
    """FlashAttention needs a GPU, its package and bf16; `auto` falls back, the explicit name is rejected."""
    llama = decoder("llama")
    monkeypatch.setattr(run_model.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(run_model, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(run_model, "fast_bf16", lambda: fast)
    if cuda and installed and DTYPES[dtype, fast]:
        for name in ("auto", "flash_attention_2"):
            assert choose_attention(name, dtype, llama, 512) == "flash_attention_2"
    else:
        assert choose_attention("auto", dtype, llama, 0) == (VARLEN if cuda else "sdpa")
        assert choose_attention("auto", dtype, llama, 128) == (VARLEN if cuda else "sdpa")
        assert choose_attention("auto", dtype, llama, 512) == VARLEN
        missing = not (cuda and installed)
        with pytest.raises(UserError, match="needs a CUDA GPU" if missing else "needs bf16") as error:
            choose_attention("flash_attention_2", dtype, llama, 512)
        assert "\n" not in str(error.value)
    for name in ("sdpa", "eager"):
        assert choose_attention(name, dtype, llama, 512) == name


@pytest.mark.parametrize(
    ("family", "supported"),
    [("llama", True), ("qwen3", True), ("mistral", True), ("gemma3_text", True), ("gemma2", False)],
)
def test_varlen_is_taken_by_decoders_that_support_it(family, supported):
    """Gemma 2 caps its scores, which SDPA cannot: `auto` leaves it to transformers."""
    found = decoder(family)
    assert choose_attention("auto", "fp32", found, 2048) == (VARLEN if supported else "sdpa")
    assert choose_attention("auto", "fp32", found, 0) == "sdpa"  # on a CPU as without varlen
    if supported:
        assert choose_attention("varlen", "fp32", found, 0) == VARLEN
    else:
        with pytest.raises(UserError, match="not for a 'gemma2'") as error:
            choose_attention("varlen", "fp32", found, 2048)
        assert "\n" not in str(error.value)


def test_a_run_may_change_it_on_resume(mllm, mllm_reference):
    """`auto` was not always the default: runs that began with sdpa resume, in padded rows bit for bit."""
    mllm.train("attention", "attention=sdpa", "stop_at=3")
    found = mllm.train("attention")
    assert mllm.rows(found) == mllm.rows(mllm_reference)
    ours, theirs = mllm.weights(found), mllm.weights(mllm_reference)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
