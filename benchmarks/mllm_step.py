"""Memory and time of parts of an MLLM training step on a CPU, each against what it replaces in one run.

    python benchmarks/mllm_step.py                     # all; minutes
    python benchmarks/mllm_step.py --part attention

attention: forward and backward of a decoder on packed rows of samples of up to 320 tokens (a caption and 256
    visual tokens), three or more to a row, with a dense (rows, 1, L, L) mask and by samples.
losses: of logits as the published 7B has them, whole and in chunks: 2,600 visual tokens of 8 codes out of
    4,096, and 8,192 text tokens out of 32,000.
residual: a decoder under bf16 autocast whose sums over layers are fp32 or bf16, with checkpointing.

step: a training step of a whole small MLLM (width 256, four layers, a depth head of 8 codes out of 4,096)
    on one row of 4,096 packed tokens in bf16 with checkpointing: a dense mask and whole losses against
    today's defaults.

Seconds are CPU time of one thread, so that other load does not count. Memory is the growth of the peak of a
process of its own. Results go to benchmarks/results/mllm_step-PROCESSOR.json.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    load_average,
    peak_memory_gib,
    processor_name,
    reset_peak_memory,
    result_file,
    write_results,
)
from mllm_training import batch_of
from transformers import AutoModel, LlamaConfig

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, losses
from open_unitok.mllm.attention import VARLEN, bounds_arguments
from open_unitok.mllm.positions import find_bounds

SAMPLE = 320
CASES = {
    **{
        f"attention {dtype} {length}": [f"{name} {dtype} {length}" for name in ("sdpa", VARLEN)]
        for dtype in ("fp32", "bf16")
        for length in ("18x128", "8x512", "1x2048", "1x8192")
    },
    **{
        f"losses {dtype} {head}": [f"{name} {dtype} {head}" for name in ("whole", "chunks")]
        for dtype in ("fp32", "bf16")
        for head in ("depth", "text")
    },
    "residual bf16 4096": ["fp32 bf16 1x4096", "bf16 bf16 1x4096"],
    "step bf16 4096": ["sdpa bf16 4096", f"{VARLEN} bf16 4096"],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def decoder(attention: str) -> Any:
    """A LLaMA decoder of width 256 and two layers, with checkpointing."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModel.from_config(config, attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable()
    model.set_attn_implementation(attention)
    return model


def decoder_step(attention: str, dtype: str, shape: str, residual: str = "fp32") -> Callable[[], Any]:
    """A step of the decoder on packed rows of `shape` ROWSxTOKENS."""
    rows, length = map(int, shape.split("x"))
    model, vectors = decoder(attention), torch.randn(rows, length, 256)
    positions = (torch.arange(length) % min(SAMPLE, length // 3)).expand(rows, -1)

    def step() -> None:
        model.zero_grad()
        arguments = bounds_arguments(model, find_bounds(None, positions), vectors.shape[:2])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            # a leaf, so that layers are recomputed as behind trained embeddings
            inputs = vectors.clone().requires_grad_().to(DTYPES[residual])
            if arguments:  # one row
                inputs, where = inputs.flatten(0, 1)[None], positions.flatten()[None]
            else:
                where = positions
            out = model(inputs_embeds=inputs, position_ids=where, use_cache=False, **arguments)
        out.last_hidden_state.float().square().mean().backward()

    return step


def loss_step(name: str, dtype: str, head: str) -> Callable[[], Any]:
    """A step of an output layer of width 64 and its loss."""
    if name == "whole":
        losses.WHOLE_LOGITS = 2**40
    shape, entries = ((2600, 8), 4096) if head == "depth" else ((8192,), 32000)
    hidden = torch.randn(*shape, 64, dtype=DTYPES[dtype], requires_grad=True)
    weight = torch.randn(entries, 64, dtype=DTYPES[dtype], requires_grad=True)
    targets = torch.randint(0, entries, shape)

    def step() -> None:
        hidden.grad = weight.grad = None
        logits = F.linear(hidden, weight)
        if head == "depth":
            loss = losses.image_loss(logits, targets, 1e-4, keep_logits=False)[0]
        else:
            loss = losses.text_loss(logits, targets, keep_logits=False)
        del logits  # else the caller would hold them through the backward pass
        loss.backward()

    return step


def whole_step(attention: str, dtype: str, length: int) -> Callable[[], Any]:
    """A step of a whole model; with "sdpa" also whole losses."""
    if attention == "sdpa":
        losses.WHOLE_LOGITS = 2**40
    text = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704,
            "num_hidden_layers": 4, "num_attention_heads": 4}  # fmt: skip
    config = UniTokMLLMConfig(text_config=text, depth_config={"num_hidden_layers": 2}, num_codebooks=8,
                              codebook_size=4096, codebook_dim=8, visual_hidden_size=256)  # fmt: skip
    model = UniTokForConditionalGeneration(config).train()
    model.visual_embedder.freeze_codebooks()
    model.gradient_checkpointing_enable()
    model.language_model.set_attn_implementation(attention)
    batch, _ = batch_of(config, 1, length, torch.device("cpu"))

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(**batch, return_logits=False).loss
        loss.backward()

    return step


def measure(part: str, case: str) -> dict[str, float | None]:
    """CPU seconds and GiB of one case, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, dtype, size = case.split()
    if part == "losses":
        step = loss_step(name, dtype, size)
    elif part == "attention":
        step = decoder_step(name, dtype, size)
    elif part == "step":
        step = whole_step(name, dtype, int(size))
    else:
        step = decoder_step(VARLEN, dtype, size, residual=name)
    reset_peak_memory()
    before, start = peak_memory_gib(), time.process_time()
    step()
    seconds, peak = time.process_time() - start, peak_memory_gib()
    if seconds < 1:  # the first call is slower
        start = time.process_time()
        step()
        seconds = time.process_time() - start
    gib = None if peak is None or before is None else peak - before
    return {"cpu_seconds": round(seconds, 3), "gib": gib and round(gib, 4)}


def measure_forked(part: str, case: str) -> dict[str, Any]:
    """`measure` in a child process, which imports nothing again."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (part, case))


def main() -> None:
    """Measure all parts and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = sorted({name.split()[0] for name in CASES})
    parser.add_argument("--part", choices=parts, nargs="+", default=parts)
    parser.add_argument("--out", help="default: benchmarks/results/mllm_step-PROCESSOR.json")
    args = parser.parse_args()
    out = Path(args.out or result_file("mllm_step", processor_name()))
    results: dict[str, Any] = {
        "machine": {
            "processor": processor_name(),
            "torch": torch.__version__,
            "measured": time.strftime("%F"),
        }
    }
    for name, cases in CASES.items():
        part = name.split()[0]
        if part not in args.part:
            continue
        before, after = (measure_forked(part, case) for case in cases)
        results[name] = {
            "before": before,
            "after": after,
            "time_ratio": round(after["cpu_seconds"] / before["cpu_seconds"], 3),
            "memory_ratio": round(after["gib"] / before["gib"], 3)
            if before["gib"] and after["gib"]
            else None,
            "load": load_average(),
        }
        write_results(out, results)
        print(name, json.dumps(results[name]), flush=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
