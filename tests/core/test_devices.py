"""Entry points and threads that run a model make its GPU the current one; bf16 where it is fast."""

import argparse
import contextlib
import types

import pytest
import torch
from PIL import Image

from open_unitok.cli.main import COMMANDS, command_module, main
from open_unitok.core import devices
from open_unitok.core.devices import current_device, set_device
from open_unitok.core.errors import UserError
from open_unitok.core.files import SHIPPED_MODELS
from open_unitok.eval.core.model import Model
from open_unitok.eval.lmms_eval.adapter import load_lmms_pipeline
from open_unitok.generation import Pipeline
from open_unitok.generation.loading import load_unitok
from open_unitok.generation.serving.worker import ModelWorker
from open_unitok.generation.ui import page
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions

SECOND = torch.device("cuda", 1)
SCENES = str(SHIPPED_MODELS / "scenes")
# what each command with --device needs besides
COMMAND_LINES = {
    "generate": "a --out {out}/new",
    "ask": "{out}/a.png what",
    "chat": "",
    "serve": "",
    "ui": "",
    "reconstruct": "{out}/a.png --out {out}/new --model {scenes}/unitok",
    "extract-codes": "--tokenizer {scenes}/unitok --data {out}/a.tar --out {out}/new",
    "eval run": "reconstruction --model {scenes} --data {out} --out {out}/new",
}
ELSEWHERE = {"plan"}  # --device names a kind of GPU, whose memory is planned


class Reached(BaseException):
    """Raised instead of touching a GPU."""


@pytest.fixture
def two_gpus(monkeypatch):
    def reach(device):
        raise Reached(torch.device(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", reach)


def device_reached(work):
    with pytest.raises(Reached) as found:
        work()
    return found.value.args[0]


def has_device_option(command):
    parser = argparse.ArgumentParser()
    command_module(command).add_arguments(parser)
    return "--device" in parser._option_string_actions


def test_every_command_with_a_device_is_listed():
    assert {name for name in COMMANDS if has_device_option(name)} - ELSEWHERE == COMMAND_LINES.keys()


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_commands_set_their_device(command, two_gpus, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.tar").touch()
    line = COMMAND_LINES[command].format(out=tmp_path, scenes=SCENES).split()
    assert device_reached(lambda: main([*command.split(), *line, "--device", "cuda:1"])) == SECOND


@pytest.mark.parametrize("command", ["generate", "extract-codes", "eval run"])
def test_every_rank_takes_its_own_device(command, two_gpus, tmp_path, monkeypatch):
    (tmp_path / "a.tar").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    # the ranks of `eval run` are joined before; that they are is not the question here
    module = command_module("eval run")
    monkeypatch.setattr(module.distributed, "world_size", lambda: 2)
    store = types.SimpleNamespace(close=lambda: None, section=contextlib.nullcontext)
    monkeypatch.setattr(module.distributed, "RankGuard", lambda *arguments: store)
    monkeypatch.setattr("torch.distributed.rendezvous", lambda url: iter([(None, 1, 2)]))
    device = "auto" if command == "generate" else "cuda"
    line = COMMAND_LINES[command].format(out=tmp_path, scenes=SCENES).split()
    assert device_reached(lambda: main([*command.split(), *line, "--device", device])) == SECOND


@pytest.mark.parametrize(
    "load",
    [
        lambda: Pipeline.from_pretrained("scenes", "cuda:1"),
        lambda: load_unitok("scenes", "cuda:1"),
        lambda: Model("scenes", "cuda:1"),
        lambda: load_lmms_pipeline("scenes", None, None, local_rank=1),
    ],
    ids=["Pipeline", "load_unitok", "eval's Model", "lmms-eval"],
)
def test_what_loads_a_model_sets_its_device(load, two_gpus):
    assert device_reached(load) == SECOND


def test_training_sets_its_device(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(deepspeed_engine, "_import_deepspeed", lambda: None)
    work = lambda: deepspeed_engine.init_distributed(EngineOptions(threads=0), seed=0)  # noqa: E731
    assert device_reached(work) == SECOND


PIPE = types.SimpleNamespace(device=SECOND, layout=None)


def page_handler(kind):
    handler = object.__new__(kind)
    handler.pipe, handler.unitok = PIPE, PIPE
    return handler


@pytest.mark.parametrize(
    "work",
    [
        lambda: ModelWorker(PIPE)([]),
        lambda: next(page_handler(page.ImageHandler)("", "", 1, 0, False)),
        lambda: next(page_handler(page.AnswerHandler)(None, "a", [], 8, 0)),
        lambda: page_handler(page.ReconstructionHandler)("a.png"),
    ],
    ids=["the server's worker", "images of the page", "answers of the page", "codes of the page"],
)
def test_threads_that_run_a_model_set_its_device(work, two_gpus):
    assert device_reached(work) == SECOND


def test_no_other_module_parses_devices():
    """`set_device` alone calls `check_device`: no entry can check a device without setting it."""
    root = SHIPPED_MODELS.parents[1]
    folders = ("open_unitok", "tokenizer", "mllm", "generation", "training", "eval", "benchmarks")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    assert len(files) > 200
    callers = [str(file.relative_to(root)) for file in files if "check_device" in file.read_text()]
    assert callers == ["open_unitok/core/devices.py"]


def test_devices_that_are_not_there(monkeypatch):
    assert set_device("cpu").type == "cpu"
    with current_device(torch.device("cpu")):
        pass
    with pytest.raises(UserError, match="device is 'cuda:1', which this machine does not have"):
        set_device("cuda:1")


@pytest.mark.parametrize(
    ("vendor", "flags", "limit", "fast"),
    [
        ("AuthenticAMD", "avx512f avx512_bf16", "DEFAULT", True),
        ("AuthenticAMD", "avx512f avx512_bf16", "avx512_core", False),
        ("AuthenticAMD", "avx512f", "DEFAULT", False),
        ("GenuineIntel", "avx512f avx512_bf16", "DEFAULT", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "DEFAULT", True),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "AVX512_CORE_AMX", True),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "AVX512_CORE_BF16", False),
    ],
)
def test_bf16_is_fast_with_amx_and_on_amd(vendor, flags, limit, fast, tmp_path, monkeypatch):
    """Intel's cores without AMX take nearly twice as long in bf16 as in fp32."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path / "cpuinfo")
    assert devices.fast_bf16() is fast
