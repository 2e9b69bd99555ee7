"""Training passes with `engine.compile` beside the same without it, in turns in one process:

    cd benchmarks; python -m gpu_parts.compilation [--out FILE] [--repeats 15] [--batch 16]

Forward and backward pass of the shipped model's tokenizer and MLLM in fp32. Prints and writes the median
ratio of the seconds (above 1: compiled is faster), those of compiling, and the difference of the losses.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import device_name, measure_seconds, result_file
from transformers.modeling_layers import GradientCheckpointingLayer

from open_unitok.core.files import model_path, write_atomic
from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.tokenizer import UniTok
from open_unitok.training.core.compilation import compile_blocks
from open_unitok.training.tokenizer.train import compile_tokenizer


def main() -> None:
    """Measure both models, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (default: in benchmarks/results)")
    parser.add_argument("--repeats", type=int, default=15, help="passes of each (default: 15)")
    parser.add_argument("--batch", type=int, default=16, help="images or rows (default: 16)")
    args = parser.parse_args()
    folder, name = model_path("scenes"), device_name("cpu")
    torch.manual_seed(0)
    tokenizer = UniTok.from_pretrained(folder / "unitok", dtype=torch.float32).train()
    mllm = UniTokForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    rows = {
        "tokenizer": compare(
            tokenizer,
            lambda m: compile_tokenizer(m, None, None),
            tokenizer_pass(tokenizer, args.batch),
            args.repeats,
        ),
        "mllm": compare(
            mllm,
            lambda m: compile_blocks(m, GradientCheckpointingLayer),
            mllm_pass(mllm, args.batch),
            args.repeats,
        ),
    }
    found = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "load": os.getloadavg()[0],
        "results": rows,
    }
    out = args.out or result_file("compilation", name)
    write_atomic(out, json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def compare(
    plain: Any, compile_model: Callable[[Any], Any], run: Callable[[Any], torch.Tensor], repeats: int
) -> dict[str, float]:
    """Seconds of `run` on a model and on its compiled copy, which take turns."""
    compiled = copy.deepcopy(plain)
    compile_model(compiled)
    first = measure_seconds(lambda: run(compiled))
    losses = [run(model).item() for model in (plain, compiled)]
    pairs = [
        (measure_seconds(lambda: run(plain)), measure_seconds(lambda: run(compiled))) for _ in range(repeats)
    ]
    return {
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "plain_seconds": round(min(a for a, _ in pairs), 4),
        "compiled_seconds": round(min(b for _, b in pairs), 4),
        "seconds_to_compile": round(first, 1),
        "relative_difference_of_losses": abs(losses[0] - losses[1]) / abs(losses[0]),
    }


def tokenizer_pass(model: UniTok, batch: int) -> Callable[[Any], torch.Tensor]:
    """Reconstruct random images; mean square error and the quantiser's losses."""
    pixels = torch.rand(batch, 3, *model.config.image_shape) * 2 - 1

    def run(model: Any) -> torch.Tensor:
        out = model(pixels)
        loss = (out.reconstruction - pixels).square().mean() + sum(out.losses.values())
        loss.backward()
        model.zero_grad()
        return loss

    return run


def mllm_pass(model: Any, batch: int) -> Callable[[Any], torch.Tensor]:
    """Text to image: 32 ids of text, then an image, all learned."""
    config = model.config
    count, image = config.num_image_tokens, config.image_token_id
    text = torch.randint(10, 100, (batch, 32))
    ids = torch.cat([text, torch.full((batch, count), image), torch.full((batch, 1), 2)], dim=1)
    codes = torch.randint(0, config.codebook_size, (batch, count, config.num_codebooks))

    def run(model: Any) -> torch.Tensor:
        loss = model(ids, image_codes=codes, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss

    return run


if __name__ == "__main__":
    main()
