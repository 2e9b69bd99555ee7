"""The emulated CUDA device: scenarios run in a subprocess, because the device must be there before torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import guard

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def run_scenarios():
    """run_scenarios(file, *names, devices=1) -> {name: result}; skipped without a C++ compiler."""

    def run(file: str, *names: str, devices: int = 1) -> dict:
        try:
            environment = guard.environment(devices)
        except guard.NoCompilerError as error:
            pytest.skip(str(error))
        command = [sys.executable, str(HERE / "run.py"), file, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"scenario"')]
        assert lines, done.stderr[-3000:]
        return {line.pop("scenario"): line for line in lines}

    return run
