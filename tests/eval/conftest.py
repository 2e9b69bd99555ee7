"""Shared by the tests of this folder: golden Inception weights, and commands run in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.eval.core.harness import read_run_metadata, run_benchmark, score_run
from open_unitok.eval.metrics import inception_weights
from open_unitok.eval.registry import find_benchmark

GOLDEN = Path(__file__).parents[1] / "golden" / "eval"


def run_named(name, model, data, out, options=None, **more):
    """`run_benchmark` of a benchmark by name."""
    return run_benchmark(find_benchmark(name), model, data, out, options or {}, **more)


def score_folder(folder, options=None, partial=False):
    """`score_run` of the benchmark that `run.json` names."""
    benchmark = find_benchmark(read_run_metadata(folder)["benchmark"])
    return score_run(benchmark, folder, options or {}, partial)


def formula(state):
    """The weights that the golden features were made with, by the formula of inception.json."""
    result = {}
    for k, (name, shape) in enumerate(state):
        n = int(np.prod(shape))
        wave = np.sin(np.arange(n) * 0.731 + k * 1.37)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(n)
        elif name.endswith("running_var"):
            value = 1 + 0.25 * wave
        elif name.endswith("bn.weight"):
            value = 1 + 0.1 * wave
        elif name.endswith(("bn.bias", "running_mean", "fc.bias")):
            value = 0.05 * wave
        elif name.endswith("conv.weight"):
            value = wave * np.sqrt(4 / np.prod(shape[1:]))
        else:
            value = 0.02 * wave
        result[name] = torch.from_numpy(value.astype(np.float32).reshape(shape))
    return result


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """A file with torch-fidelity's name and keys."""
    path = tmp_path_factory.mktemp("inception") / inception_weights.TORCH_FIDELITY_FILE
    torch.save(formula(json.loads((GOLDEN / "inception.json").read_text())["state_dict"]), path)
    return path


@pytest.fixture
def call(capsys):
    """A command -> exit code, stdout, stderr."""

    def run(*words):
        try:
            main([str(word) for word in words])
            code = 0
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return code, output.out, output.err

    return run
