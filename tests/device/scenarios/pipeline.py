"""The pipeline on a device: streams, prefixes, answers, chat, reconstruction, codes of image files."""

import hashlib
import io
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from emulated_cuda import host_copy, measure
from PIL import Image

from open_unitok.cli.main import main as unitok
from open_unitok.generation import Pipeline, Sampling

from .parts import TESTS, Folders, load_conftest

conftest = load_conftest("generation")
SAMPLING = Sampling(guidance=3.0, temperature=0.5)


def _pipeline(device: str) -> tuple[Pipeline, list[Image.Image], Path]:
    """A tiny random model of the tests, and images."""
    folder = conftest.folder.__wrapped__(
        Folders(), conftest.tiny_model(), conftest.tiny_unitok.__wrapped__(), TESTS / "golden"
    )
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(2)]
    return Pipeline.from_pretrained(folder, device=device, dtype="float32"), images, folder


def _use(pipe: Pipeline, images: list[Image.Image]) -> dict:
    """Results of every method, as lists."""
    first_rows = pipe.first_rows(images[:1], 1)
    codes = pipe.generate_codes(["a red circle"] * 2, SAMPLING, seed=1, prefix=first_rows)
    previews = list(pipe.stream(["a red circle"], SAMPLING, seed=1))
    return {
        "codes": host_copy(codes).tolist(),
        "previews": len(previews),
        "images": [np.asarray(image).tolist() for image in pipe.generate(["a cat"], SAMPLING, seed=3)],
        "answers": pipe.answer([images[0], None], ["what?", "hello?"], 5),
        "sampled": pipe.answer(images[:1], ["what?"], 5, seed=3, do_sample=True, temperature=0.7),
        "chat": "".join(pipe.chat_stream("what?", images[0], [("a", "b")], 5)),
        "reconstructed": [np.asarray(image).tolist() for image in pipe.reconstruct(images)],
    }


def scenario_pipeline() -> dict:
    """Results on the device and on the CPU, and what each method counted."""
    pipe, images, _ = _pipeline("cuda")
    on_cpu = _use(_pipeline("cpu")[0], images)
    found, report = measure(_use, pipe, images)
    differs = [
        name for name in found if name not in ("images", "reconstructed") and found[name] != on_cpu[name]
    ]
    for name in ("images", "reconstructed"):
        a, b = np.array(found[name]), np.array(on_cpu[name])
        differs += [name] if a.shape != b.shape or abs(a - b).max() > 1 else []
    return {**report, "differs": differs, "previews": found["previews"]}


def scenario_answers() -> dict:
    """Host synchronisations of an answer, by its number of tokens."""
    pipe, images, _ = _pipeline("cuda")
    return {
        f"{length} tokens": measure(pipe.answer, images[:1], ["what?"], length)[1] for length in (4, 20, 36)
    }


def scenario_extract_codes() -> dict:
    """`unitok extract-codes` on the device and on the CPU."""
    folder = Path(tempfile.mkdtemp())
    _, images, model = _pipeline("cpu")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number in range(6):
            png = io.BytesIO()
            images[number % 2].save(png, "PNG")
            for ending, data in (("png", png.getvalue()), ("txt", b"a thing")):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for device in ("cpu", "cuda"):
        given = ["--tokenizer", model / "unitok", "--data", folder / "images.tar", "--out", folder / device]
        unitok(["extract-codes", *map(str, given), "--device", device, "--batch-size", "4"])
    found = {}
    for device in ("cpu", "cuda"):
        (shard,) = (folder / device).glob("*.tar")
        found[device] = hashlib.sha256(shard.read_bytes()).hexdigest()
    return found


def scenario_tokenizer() -> dict:
    """Codes, reconstructions and embeddings in fp32 and bf16."""
    found = {}
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        on_cpu = conftest.tiny_unitok.__wrapped__().to(dtype)
        model = conftest.tiny_unitok.__wrapped__().to("cuda", dtype)
        moved = x.to("cuda", dtype)
        ids = torch.ones(2, 5, dtype=torch.long, device="cuda")
        codes, report = measure(model.encode, moved)
        decoded = host_copy(model.decode(codes))
        model.embed_image(moved), model.embed_text(ids)
        expected = on_cpu.encode(x.to(dtype))
        found[str(dtype)] = {
            **report,
            "equal": torch.equal(host_copy(codes), expected),
            "error": float((decoded - on_cpu.decode(expected)).abs().max()),
        }
    return found
