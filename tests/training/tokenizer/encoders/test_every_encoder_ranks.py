"""Every case of `coders`: two ranks give the run of one process, and a stopped run resumes exactly.

All runs on two ranks share one launch.
"""

from pathlib import Path

import pytest

from ...two_ranks import STEPS, assert_resumed_exactly, assert_two_ranks_equal_one_process, train_all
from .coders import CASES, overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def runs(data, clip_folder, tmp_path_factory) -> Path:
    """Runs are named by the number of their case: names of cases are no names of folders."""
    options = {
        str(number): (data / "config.yaml", [*STEPS, "losses.entropy=0", *overrides(name, clip_folder)])
        for number, name in enumerate(CASES)
    }
    return train_all(tmp_path_factory.mktemp("encoders"), options, stop_at=2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(runs, name):
    assert_two_ranks_equal_one_process(runs, str(list(CASES).index(name)))


@pytest.mark.parametrize("ranks", ["", "-ranks"])
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_resumes_exactly(runs, name, ranks):
    run = f"{list(CASES).index(name)}{ranks}"
    assert_resumed_exactly(runs / run, runs / f"{run}-resumed")
