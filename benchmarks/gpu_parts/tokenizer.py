"""Speed: the tokenizer of the paper's size: memory and images/s of the real training step, encode, decode."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from open_unitok.core.files import tokenizer_path
from open_unitok.tokenizer import UniTokConfig
from open_unitok.tokenizer.frozen.dinov2 import DINOv2
from open_unitok.tokenizer.frozen.lpips import LPIPS
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.flops import peak_tflops, tokenizer_flops
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer import train
from open_unitok.training.tokenizer.data import PairCollate, build_pair_stream
from open_unitok.training.tokenizer.image_losses import PIECE
from open_unitok.training.tokenizer.model import recompute_activations
from open_unitok.training.tokenizer.plan import plan_run

from .budgets import beside_budget
from .codes import TOY
from .data import write_tar
from .kernels import top_kernels
from .plain_engine import use_plain_engine
from .report import GIB, Report, count_waits, free_memory, load_script, peak_gib

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer" / "unitok_large.yaml"
TOY_TEXT = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_context_length": 12,
            "embed_dim": 16}  # fmt: skip
# what is recomputed in the backward pass (None: nothing), compiled (for good), images per step
CASES = [
    (None, False, 8), (None, False, 32), ("convolutions", False, 32), ("convolutions", False, 64),
    ("all", False, 64), ("convolutions", True, 64),
]  # fmt: skip
INFERENCE = [(1, False), (64, False), (64, True)]  # images, compiled


def run(report: Report) -> None:
    """Rows of the training step, then of encode and decode."""
    with tempfile.TemporaryDirectory() as folder:
        training = None

        def build() -> dict[str, Any]:
            nonlocal training
            training = Training(report, Path(folder))
            return {"parameters": training.parameters, "engine": training.engine_name}

        report.row("build", build)
        if training is not None:
            report.row("train step, waits of the host", training.waits)
            for case in CASES:
                report.row(describe(*case), training.measure, *case, need=60.0 if case[1] else 10.0)
            report.row("train step, kernels", training.kernels, need=10.0)
            report.row("train, planned memory", training.plan, need=15.0)
        training = None
    free_memory(report.device)
    report.row("inference", measure_inference, report, need=20.0)


def describe(recomputed: str | None, compiled: bool, images: int) -> str:
    """The name of a row: "train, 64 images, convolutions recomputed, compiled"."""
    words = ["train", f"{images} images"]
    words += [f"{recomputed} recomputed"] if recomputed else []
    return ", ".join([*words, *["compiled"] * compiled])


class Training:
    """The train state of unitok_large.yaml with every loss, on one device, with one batch again and again.

    Weights are random: LPIPS and DINOv2 come from files that this writes. ZeRO is off, because one device
    shards nothing; 256 of them save 6 GiB of Adam's moments each.
    """

    def __init__(self, report: Report, folder: Path):
        self.report, self.folder = report, folder
        self.config, self.engine_name = self.load_config(), use_plain_engine(report)
        device = deepspeed_engine.init_distributed(self.config.engine, 0)
        run_dir = RunDir.open(self.config)
        self.state = train.build_train_state(self.config, run_dir, device, new=False)
        self.state.model.train()
        self.parameters = sum(p.numel() for p in self.state.model.parameters())
        # of a forward and backward pass of one image and its caption, without losses
        self.flops = tokenizer_flops(self.state.model.config, captions=True)
        self.given = next(iter(self.state.loader))
        self.pairs = self.load_pairs()
        self.compiled = False

    def load_config(self) -> Any:
        """The config of the paper's run on generated data; toy sizes where asked for."""
        toy, folder = self.report.toy, self.folder
        write_tar(folder / "images.tar", 8 if toy else 64, 64 if toy else 256)
        torch.save(LPIPS().state_dict(), folder / "lpips_with_vgg.pth")
        dino = DINOv2(width=64, depth=12, heads=1, patch=14, grid=2) if toy else DINOv2()
        torch.save(dino.state_dict(), folder / "dinov2_vits14_pretrain.pth")
        changes = {
            "out": folder / "run", "steps": 1000, "batch_size": 2 if toy else 8,
            "data.sources": f"[{{path: {folder / 'images.tar'}}}]", "data.workers": 0, "data.shuffle": 8,
            "data.split": "samples", "images.captions": "json",
            "caption_tokenizer": tokenizer_path("scenes") / "caption_tokenizer",
            "model.text_vocab_size": 49408, "losses.lpips_weights": folder / "lpips_with_vgg.pth",
            "discriminator.weights": folder / "dinov2_vits14_pretrain.pth", "discriminator.start": 0,
            "discriminator.warmup": 1, "engine.zero_stage": 0, "engine.gradient_checkpointing": "false",
        }  # fmt: skip
        sizes = {**TOY, **TOY_TEXT, "image_size": 64, "text_vocab_size": 2000} if toy else {}
        changes |= {f"model.{key}": list(x) if isinstance(x, tuple) else x for key, x in sizes.items()}
        return load_run_config(str(CONFIG), [f"{key}={value}" for key, value in changes.items()])

    def load_pairs(self) -> list[Any]:
        """Decoded images with captions, as many as the largest batch has."""
        config, shape = self.config, self.state.model.config.image_shape
        stream = build_pair_stream(config.data, config.images, shape, True, 0, 4 if self.report.toy else 64)
        return [pair for pair, _ in stream.take()]

    def batch(self, images: int) -> Iterator[dict[str, Any]]:
        """The same batch for ever, on pinned memory as the loader's."""
        collate = PairCollate(self.state.captions, self.config.reconstruct_share)
        made = {**self.given, **collate(self.pairs[:images])}
        if self.report.device == "cuda":
            made = {k: x.pin_memory() if isinstance(x, torch.Tensor) else x for k, x in made.items()}
        while True:
            yield made

    def step(self, batch: Iterator[dict[str, Any]]) -> Callable[[], Any]:
        """One optimiser step as in `unitok train`: schedules, generator, discriminator."""

        def work() -> None:
            train.set_schedules(self.state, self.config)
            train.train_step(self.state, self.config, batch)

        return work

    def recompute(self, what: str | None) -> None:
        """Set what is recomputed, as `engine.gradient_checkpointing` and `recompute` do."""
        state = self.state
        for module in state.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # pyright: ignore[reportAttributeAccessIssue]
        if what is not None:
            recompute_activations(state.model, what)
        state.gan.piece = None if what is None else PIECE
        engine = dataclasses.replace(self.config.engine, gradient_checkpointing=what is not None)
        self.config = dataclasses.replace(self.config, engine=engine, recompute=what or "convolutions")

    def measure(self, recomputed: str | None, compiled: bool, images: int) -> dict[str, Any]:
        """Seconds, memory, images/s and MFU of a step."""
        report, model = self.report, self.state.model
        self.recompute(recomputed)
        if compiled and not self.compiled:
            # as `engine.compile: true`
            train.compile_tokenizer(model, self.state.lpips, self.state.gan)
            self.compiled = True
        images = min(images, 2) if report.toy else images
        work = self.step(self.batch(images))
        if not report.toy:  # compilation, cuDNN's choice of kernels: not a part of the peak
            work()
        free_memory(report.device)
        seconds = report.seconds(work, 5)
        peak = peak_tflops(torch.device(report.device)) or float("nan")
        return {"images": images} | report.measured(
            seconds=seconds,
            images_per_second=images / seconds,
            mfu=self.flops * images / seconds / 1e12 / peak,
            peak_gib=peak_gib(report.device),
        )

    def waits(self) -> dict[str, Any]:
        """What makes the host wait in one step, beside the budget of the dry run."""
        work = self.step(self.batch(2 if self.report.toy else 8))
        work()
        with count_waits(self.report.device) as waits:
            work()
        return {**beside_budget("tokenizer train step", len(waits)), "where": sorted(set(waits))[:20]}

    def plan(self) -> dict[str, Any]:
        """GiB that `unitok plan` expects for each case that it knows."""
        config = dataclasses.replace(self.config, recompute="convolutions")
        plan = plan_run(config, 1)
        # without activations
        rest = sum(plan.memory[0]) - plan.memory[0].activations
        cases = [case for case in CASES if case[0] != "all"]
        kept = {
            describe(*case): plan.activations[case[0] is not None].of_batch(case[2], case[2])
            for case in cases
        }
        return {"gib": report_each(self.report, {name: (rest + size) / GIB for name, size in kept.items()})}

    def kernels(self) -> dict[str, Any]:
        """The kernels that take most of a step."""
        return top_kernels(self.report, self.step(self.batch(2 if self.report.toy else 16)))


def report_each(report: Report, numbers: dict[str, float]) -> dict[str, Any]:
    """The numbers under names that are no Python words."""
    return {name: report.measured(value=value)["value"] for name, value in numbers.items()}


# ---- encode and decode -------------------------------------------------------------------------------------


def measure_inference(report: Report) -> dict[str, Any]:
    """Adds a row per part, batch and precision."""
    script, toy = load_script("tokenizer"), report.toy
    small = {**TOY, **TOY_TEXT} if toy else {}
    config = UniTokConfig.named("vitamin_large", **{**small, "text_num_layers": 1, "text_vocab_size": 64})
    model = script.random_model(config, report.device)
    needed = script.count_operations(config, config.image_size)
    exact = copy.deepcopy(model)
    half = model.to(torch.bfloat16)
    for images, compiled in INFERENCE:
        if compiled:
            half.encoder.compile()
            half.decoder.compile()
        for part in ("encode", "decode"):
            name = f"{part}, bf16, {images} images{', compiled' * compiled}"
            report.row(name, inference, report, half, part, images, needed[part], need=10.0)
    report.row("encode, fp32, 64 images", inference, report, exact, "encode", 64, needed["encode"], need=10.0)
    return {"flops_per_image": needed}


def inference(report: Report, model: Any, part: str, images: int, flops: float) -> dict[str, Any]:
    """Images/s, MFU and memory of one part."""
    images = min(images, 2) if report.toy else images
    side, config = model.config.image_size, model.config
    pixels = (torch.rand(images, 3, side, side, device=report.device) * 2 - 1).to(model.dtype)
    tokens = (side // config.patch_size) ** 2 + config.num_register_tokens
    codes = torch.randint(config.codebook_size, (images, tokens, config.num_codebooks), device=report.device)
    grid = (side // config.patch_size,) * 2
    with torch.no_grad():
        seconds = report.seconds(
            lambda: model.encode(pixels) if part == "encode" else model.decode(codes, grid), 5
        )
    peak = peak_tflops(torch.device(report.device)) or float("nan")
    return {"images": images} | report.measured(
        seconds=seconds,
        images_per_second=images / seconds,
        mfu=flops * images / seconds / 1e12 / peak,
        peak_gib=peak_gib(report.device),
    )
