"""Skipped tests: only those of tests/gpu are, and a run that skips most of its tests fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from . import conftest
from .gpu import conftest as gpu_conftest


class Item:
    def __init__(self, path: Path):
        self.path, self.marks = path, []

    def add_marker(self, mark):
        self.marks.append(mark)


def test_only_gpu_tests_are_skipped_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = Path(__file__).parent
    items = [
        Item(here / "gpu" / "test_codes.py"),
        Item(here / "test_skipped.py"),
        Item(here / "mllm" / "x.py"),
    ]
    gpu_conftest.pytest_collection_modifyitems(items)
    assert [len(item.marks) for item in items] == [1, 0, 0]


@pytest.mark.parametrize(
    ("skipped", "passed", "fails"), [(4922, 0, True), (61, 60, True), (43, 0, False), (61, 62, False)]
)
def test_a_run_that_skips_most_of_its_tests_fails(skipped, passed, fails, capsys):
    reporter = SimpleNamespace(stats={"skipped": [None] * skipped, "passed": [None] * passed})
    plugins = SimpleNamespace(get_plugin=lambda name: reporter)
    session = SimpleNamespace(config=SimpleNamespace(pluginmanager=plugins), exitstatus=0)
    conftest.pytest_sessionfinish(session)
    assert (session.exitstatus == 1) == fails
    assert (f"{skipped} tests were skipped" in capsys.readouterr().out) == fails
