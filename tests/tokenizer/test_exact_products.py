"""`exact_products`: float32 products are exact whatever the caller's TF32 setting, which is restored."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.precision import exact_float32, exact_products, float32_projections, tf32_products

get, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
BACKENDS = {"cuda": ("all", "matmul", "conv", "rnn"), "mkldnn": ("all", "matmul", "conv", "rnn")}
SLOTS = [("generic", "all"), *((backend, name) for backend, names in BACKENDS.items() for name in names)]
LEGACY = {
    "matmul precision": torch.get_float32_matmul_precision,
    "cublas": torch._C._get_cublas_allow_tf32,
    "cudnn": torch._C._get_cudnn_allow_tf32,
}


def assign(target: object, **values: object) -> Callable[[], None]:
    return lambda: [setattr(target, name, value) for name, value in values.items()] and None


backends = torch.backends
# what a caller may have set, by the older and the newer switches and by mixtures of both
SETTINGS: dict[str, list[Callable[[], None]]] = {
    "default": [],
    "high": [lambda: torch.set_float32_matmul_precision("high")],
    "medium": [lambda: torch.set_float32_matmul_precision("medium")],
    "allow_tf32": [assign(backends.cuda.matmul, allow_tf32=True), assign(backends.cudnn, allow_tf32=True)],
    "cudnn off": [assign(backends.cudnn, allow_tf32=False)],
    "generic tf32": [assign(backends, fp32_precision="tf32")],
    "generic ieee": [assign(backends, fp32_precision="ieee")],
    "generic bf16": [assign(backends, fp32_precision="bf16")],
    "cuda tf32": [assign(backends.cudnn, fp32_precision="tf32")],
    "new matmul tf32": [assign(backends.cuda.matmul, fp32_precision="tf32")],
    "new conv ieee": [assign(backends.cudnn.conv, fp32_precision="ieee")],
    "mkldnn bf16": [
        assign(backends.mkldnn.matmul, fp32_precision="bf16"),
        assign(backends.mkldnn.conv, fp32_precision="bf16"),
    ],
    "high, then generic tf32": [
        lambda: torch.set_float32_matmul_precision("high"),
        assign(backends, fp32_precision="tf32"),
    ],
    "high, then matmul ieee": [
        lambda: torch.set_float32_matmul_precision("high"),
        assign(backends.cuda.matmul, fp32_precision="ieee"),
    ],
    "empty slots under tf32": [
        assign(backends.cudnn, allow_tf32=False),
        assign(backends.cudnn, fp32_precision="tf32"),
    ],
}


def state() -> dict[str, str]:
    """Every slot, every older getter (or that it raises), and the slots under other outer values."""
    found = {}
    for name, getter in LEGACY.items():
        try:
            found[name] = str(getter())
        except RuntimeError:
            found[name] = "raises"
    found |= {str(slot): get(*slot) for slot in SLOTS}
    for outer in ("generic", "cuda", "mkldnn"):  # which slots inherit
        own = get(outer, "all")
        inherits = outer != "generic" and own == get("generic", "all")
        for value in ("ieee", "tf32"):
            set_(outer, "all", value)
            found |= {f"{slot} under {outer} {value}": get(*slot) for slot in SLOTS}
        set_(outer, "all", "none" if inherits else own)
    return found


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    """torch's defaults before and after, whatever a test leaves."""

    def reset() -> None:
        for slot in SLOTS:
            set_(*slot, "none")
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(True)
        for name in ("cuda", "mkldnn"):
            set_(name, "matmul", "none")

    reset()
    yield
    reset()


def check_exact() -> None:
    assert all(
        get(*slot) in ("none", "ieee") for slot in SLOTS if slot[1] not in ("all",) and slot[0] == "cuda"
    )
    assert all(get("mkldnn", name) in ("none", "ieee") for name in ("matmul", "conv"))
    # Inductor reads the older getters: none of them may raise
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch._C._get_cublas_allow_tf32() and not torch._C._get_cudnn_allow_tf32()
    assert not backends.cuda.matmul.allow_tf32 and not backends.cudnn.allow_tf32


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fails", [False, True])
def test_products_are_exact_inside_and_the_setting_is_restored(setting, fails):
    for change in SETTINGS[setting]:
        change()
    before = state()
    with exact_products(), exact_float32(torch.device("cpu")):
        check_exact()
    if fails:
        with pytest.raises(ZeroDivisionError), exact_float32(torch.device("cpu")):
            raise ZeroDivisionError
    assert state() == before


class Products(TorchDispatchMode):
    """Records the precision under which products and convolutions run on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "conv" in name:
            self.found.append(("conv", get("cuda", "conv")))
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            self.found.append(("matmul", get("cuda", "matmul")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("setting", ["default", "high", "allow_tf32", "generic tf32"])
def test_encoding_is_exact_in_convolutions_as_well(tiny_config, setting):
    model = UniTok(tiny_config()).eval()
    for change in SETTINGS[setting]:
        change()
    pixels = torch.zeros(1, 3, 64, 64)
    with Products() as products:
        codes = model.encode(pixels)
        model.reconstruct(pixels)  # its codes are these
    encoder = products.found[: len(products.found) // 2]
    assert {kind for kind, _ in encoder} == {"conv", "matmul"}
    assert {precision for _, precision in encoder} <= {"none", "ieee"}
    with Products() as products:
        model.decode(codes)
    # the pixel decoder's follow the caller
    assert ("conv", "tf32") in products.found


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_projections_run_in_tf32_in_training_on_cuda_alone():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    before = state()
    with tf32_products():
        found = {}
        for device, training in ((cuda, True), (cuda, False), (cpu, True), (cpu, False)):
            with float32_projections(device, training):
                found[device.type, training] = get("cuda", "matmul")
        with exact_float32(cuda):  # the search for codes
            check_exact()
        assert torch.backends.cuda.matmul.allow_tf32
    assert found.pop(("cuda", True)) == "tf32" and set(found.values()) == {"ieee"}
    assert state()["cublas"] == before["cublas"] == "False"


def test_threads_share_one_setting_until_the_last_has_left():
    torch.set_float32_matmul_precision("high")
    before, inside, leave = state(), threading.Event(), threading.Event()

    def other() -> None:
        with exact_products():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with exact_products():
        check_exact()
    check_exact()  # the other thread is still inside
    leave.set()
    thread.join()
    assert state() == before


# The tests' environment switches the compiler off, so this one runs in a process of its own.
COMPILED = """
import torch
from open_unitok.tokenizer import UniTok, UniTokConfig

get, found = torch._C._get_fp32_precision_getter, []
SLOTS = [(backend, name) for backend in ("cuda", "mkldnn") for name in ("all", "matmul", "conv", "rnn")]


class Caller(torch.nn.Module):
    def forward(self, pixels):
        return model.encode_latents(pixels * 1.0) * 2.0


def backend(graph, inputs):
    torch._C._get_cublas_allow_tf32(), torch._C._get_cudnn_allow_tf32()  # as Inductor: they may raise

    def run(*args):
        found.append((get("cuda", "matmul"), get("cuda", "conv")))
        return graph(*args)

    return run


model = UniTok(UniTokConfig(**CONFIG)).eval()
pixels = torch.zeros(1, 3, 64, 64)
for change in ("", "torch.set_float32_matmul_precision('high')", "torch.backends.fp32_precision = 'tf32'"):
    exec(change)
    before = [get(*slot) for slot in SLOTS]
    with torch.no_grad():
        expected = model.encode_latents(pixels) * 2.0
        compiled = torch.compile(Caller(), backend=backend)
        compiled(pixels)
        assert torch.allclose(compiled(pixels), expected, atol=1e-6)
    assert [get(*slot) for slot in SLOTS] == before, change
    assert any({matmul, conv} <= {"none", "ieee"} for matmul, conv in found), "no graph ran inside"
    found.clear()
"""


@pytest.mark.slow
def test_a_compiled_caller_is_exact_and_restores_the_setting(tiny_config):
    fields = {k: v for k, v in tiny_config().to_diff_dict().items() if k not in ("model_type",)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED.replace("CONFIG", repr(fields))],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
