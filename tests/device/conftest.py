"""The emulated CUDA device: scenarios run in a subprocess, because the device must be there before torch."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.device import guard

HERE = Path(__file__).resolve().parent
LIMIT = 900  # seconds for one file of scenarios


def install_flash_attn(folder: Path) -> Path:
    """What `pip` leaves of flash-attn 2 beside its modules: transformers looks for it."""
    info = folder / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (info / "top_level.txt").write_text("flash_attn\n")
    return folder


@pytest.fixture(scope="session")
def run_scenarios(tmp_path_factory):
    """run_scenarios(file, flash_attn=False) -> {name: result}; skipped without a C++ compiler.

    `flash_attn` adds a stand-in for that package. All files share a process with two devices, as most of
    their time would go into importing the same packages.
    """
    with contextlib.ExitStack() as stack:
        started: dict[bool, Callable[[str], dict]] = {}

        def run(file: str, flash_attn: bool = False) -> dict:
            if flash_attn not in started:
                started[flash_attn] = _start(stack, tmp_path_factory, flash_attn)
            return started[flash_attn](file)

        yield run


def _start(stack: contextlib.ExitStack, folders: pytest.TempPathFactory, flash_attn: bool):
    """Start run.py; returns the function that runs one file of scenarios in it."""
    try:
        environment = guard.environment(devices=2)
    except guard.NoCompilerError as error:
        pytest.skip(str(error))
    if flash_attn:
        installed = install_flash_attn(folders.mktemp("site-packages"))
        environment["PYTHONPATH"] += f":{HERE / 'stand_ins'}:{installed}"
    errors = folders.mktemp("device") / "stderr"
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stack.enter_context(errors.open("w")),
        text=True,
    )
    stack.enter_context(process)
    stack.callback(process.kill)

    def run(file: str) -> dict:
        assert process.stdin is not None and process.stdout is not None
        found, watchdog = {}, threading.Timer(LIMIT, process.kill)
        watchdog.start()
        with contextlib.suppress(BrokenPipeError):
            print(file, file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith('{"done"'):
                break
            if line.startswith('{"scenario"'):
                record = json.loads(line)
                found[record.pop("scenario")] = record
        else:
            pytest.fail(f"scenarios/{file}.py: the process ended: {errors.read_text()[-3000:]}")
        watchdog.cancel()
        assert found, errors.read_text()[-3000:]
        return found

    return run
