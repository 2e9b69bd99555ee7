"""flash_attention_2 through transformers with a stand-in for flash-attn: all but its kernels is tried."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flash(run_scenarios):
    found = run_scenarios("flash", flash_attn=True)
    for name, line in found.items():
        assert "error" not in line, f"{name}: {line['error']}\n{line['trace']}"
    return {name: line["result"] for name, line in found.items()}


def test_the_stand_in_equals_sdpa_and_refuses_what_the_package_refuses(flash):
    for name, error in flash["stand_in"].items():
        assert error < 1e-2, (name, error)  # bf16 rounds to 3 decimal digits
    refused = flash["refusals"]
    assert "only support fp16 and bf16" in refused["dtype"]
    assert "dtype int32" in refused["bounds"]
    assert "at most 3 each" in refused["longest"] and "must be an int" in refused["tensor"]


@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_training_equals_sdpa(flash, rows):
    found, expected = (flash["training"][f"{rows}, {attention}"] for attention in ("auto", "sdpa"))
    assert found["calls"].keys() == {"flash_attn_varlen_func"} and not expected["calls"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    # transformers looks once per forward pass whether rows are packed
    assert sum(found["syncs"].values()) <= 1, found["syncs"]


def test_generation_equals_sdpa(flash):
    found, expected = flash["generation"]["flash_attention_2"], flash["generation"]["sdpa"]
    assert found["calls"].keys() == {"flash_attn_func", "flash_attn_varlen_func"} and not expected["calls"]
    # captured steps need a mask of fixed shape
    assert found["replays"] == 0 < expected["replays"]
    scale = np.abs(expected["logits"]).max()
    assert np.abs(np.subtract(found["logits"], expected["logits"])).max() < 2e-2 * scale
    assert found["text"] == expected["text"] and found["codes"] == expected["codes"]
