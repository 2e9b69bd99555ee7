"""Every entry of QUANTIZERS: two ranks give the run of one process, and a stopped run resumes exactly.

All runs on two ranks share one launch.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from open_unitok.tokenizer import QUANTIZERS

from ....tokenizer.quantizers.kinds import ENTRIES, INSTALLED, KINDS, entry_of, overrides
from ...two_ranks import MODEL, STEPS, assert_resumed_exactly, assert_two_ranks_equal_one_process, train_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run_options(name: str) -> list[str]:
    """Overrides of the config of `data`; dead codes are reset where the kind allows it."""
    moves = QUANTIZERS[entry_of(name)].moves_rows
    codebooks = {"init_images": 16, **({} if moves else {"reset_after": 2, "reset_share": 1.0})}
    return [*STEPS, *overrides(name), f"codebooks={json.dumps(KINDS[name].codebooks or codebooks)}"]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    options = {name: (data / "config.yaml", run_options(name)) for name in INSTALLED}
    return train_all(tmp_path_factory.mktemp("every"), options, stop_at=2)


@pytest.mark.parametrize("name", ENTRIES)
def test_two_ranks_equal_one_process(runs, name):
    assert_two_ranks_equal_one_process(runs, name)


@pytest.mark.parametrize("ranks", ["", "-ranks"])
@pytest.mark.parametrize("name", ENTRIES)
def test_a_stopped_run_resumes_exactly(runs, name, ranks):
    """Losses, weights, and the quantiser's own state: moving averages, frequencies, the started flag."""
    whole = runs / f"{name}{ranks}"
    assert_resumed_exactly(whole, runs / f"{name}{ranks}-resumed")
    kept = {key.rpartition(".")[2] for key in load_file(whole / MODEL) if key.startswith("quantizer.")}
    assert {"usage", "calls"} <= kept and set(KINDS[name].state) <= kept
