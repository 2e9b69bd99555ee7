"""The emulated CUDA device: scenarios run in a subprocess, because the device must be there before torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import guard

HERE = Path(__file__).resolve().parent


def install_flash_attn(folder: Path) -> Path:
    """What `pip` leaves of flash-attn 2 beside its modules: transformers looks for it."""
    info = folder / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    return folder


@pytest.fixture(scope="session")
def run_scenarios(tmp_path_factory):
    """run_scenarios(file, *names, devices=1, flash_attn=False) -> {name: result}; skipped without a C++
    compiler. `flash_attn` adds a stand-in for that package."""

    def run(file: str, *names: str, devices: int = 1, flash_attn: bool = False) -> dict:
        try:
            environment = guard.environment(devices)
        except guard.NoCompilerError as error:
            pytest.skip(str(error))
        if flash_attn:
            installed = install_flash_attn(tmp_path_factory.mktemp("site-packages"))
            environment["PYTHONPATH"] += f":{HERE / 'stand_ins'}:{installed}"
        command = [sys.executable, str(HERE / "run.py"), file, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"scenario"')]
        assert lines, done.stderr[-3000:]
        return {line.pop("scenario"): line for line in lines}

    return run
