"""The attention implementation of a run: what `auto` takes, and what is rejected."""

import itertools

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.mllm import model as run_model
from open_unitok.training.mllm.model import choose_attention

DTYPES = {  # engine.dtype, and bf16 in hardware -> FlashAttention has a kernel
    ("fp32", True): False,
    ("fp32", False): False,
    ("bf16", True): True,
    ("bf16", False): True,  # emulated bf16 is bf16
    ("auto", True): True,
    ("auto", False): False,
}


@pytest.mark.parametrize(
    ("cuda", "installed", "dtype", "hardware"),
    [(*c, *d) for c, d in itertools.product(itertools.product((True, False), repeat=2), DTYPES)],
)
def test_flash_attention_is_taken_in_16_bits_only(monkeypatch, cuda, installed, dtype, hardware):
    """FlashAttention needs a GPU, its package and bf16; `auto` falls back, the explicit name is rejected."""
    monkeypatch.setattr(run_model.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(run_model, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setattr(run_model, "bf16_in_hardware", lambda: hardware)
    if cuda and installed and DTYPES[dtype, hardware]:
        for name in ("auto", "flash_attention_2"):
            assert choose_attention(name, dtype) == "flash_attention_2"
    else:
        assert choose_attention("auto", dtype) == "sdpa"
        missing = not (cuda and installed)
        with pytest.raises(UserError, match="needs a CUDA GPU" if missing else "needs bf16") as error:
            choose_attention("flash_attention_2", dtype)
        assert "\n" not in str(error.value)
    for name in ("sdpa", "eager"):
        assert choose_attention(name, dtype) == name
