"""Speed of MLLM training on one device: tokens/s, MFU and memory for packed rows and random weights.

    python benchmarks/mllm_training.py                            # 1b, 7b_8of32 and 7b_lora
    python benchmarks/mllm_training.py --case tiny --out x.json   # on any machine, to try it

Results go to benchmarks/results/mllm_training-DEVICE.json; a case that does not fit is reported as out of
memory. Half of the samples are text-to-image, half questions about an image, packed into rows of `--length`
tokens. A step is forward, backward, gradient clipping and AdamW as in `unitok train`, without loading data.
"7b_8of32" has the published 7B's widths and 8 of its 32 layers.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import device_name, load_average, result_file
from transformers.modeling_layers import GradientCheckpointingLayer

from open_unitok.core.files import write_json
from open_unitok.mllm import MLLM_SIZES, UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.attention import VARLEN
from open_unitok.mllm.lora import add_lora
from open_unitok.mllm.positions import plan_batch
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.compilation import compile_blocks
from open_unitok.training.core.flops import MLLMFlops, TokenCounts, peak_tflops
from open_unitok.training.core.options import EngineOptions, Optimizer

# what a record has from a clock or an allocator
MEASURED = (
    "seconds_per_step",
    "fastest",
    "slowest",
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "memory_gb",
)


class Case(NamedTuple):
    """A model configuration and its kind of training."""

    description: str
    text: dict[str, Any]
    lora: int = 0  # rank; 0 = full fine-tuning
    visual: dict[str, Any] = {}


PUBLISHED = dict(MLLM_SIZES["unitok_mllm_7b"]["text_config"])
TINY_TEXT = {
    **PUBLISHED,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY = {"num_codebooks": 4, "codebook_size": 64, "visual_hidden_size": 64, "num_image_tokens": 16}
CASES = {
    "tiny": Case("two layers of width 64, to try this script", TINY_TEXT, visual=TINY),
    "tiny_lora": Case("tiny with LoRA of rank 4 on a bf16 base", TINY_TEXT, lora=4, visual=TINY),
    "1b": Case(
        "a decoder of 1 B parameters (width 2048, 16 layers)",
        {**PUBLISHED, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "7b_8of32": Case("the published 7B's widths, 8 of its 32 layers", {**PUBLISHED, "num_hidden_layers": 8}),
    "7b_lora": Case("the published 7B with LoRA of rank 64 on a bf16 base", PUBLISHED, lora=64),
}  # fmt: skip


def make_model(case: Case, device: torch.device) -> UniTokForConditionalGeneration:
    """The case's model with random weights, initialised on the device."""
    config = UniTokMLLMConfig(text_config=case.text, depth_config={"num_hidden_layers": 3}, **case.visual)
    base = torch.bfloat16 if case.lora else torch.float32
    # construct directly in the final dtype: a 7B model in fp32 first would not fit
    before = torch.get_default_dtype()
    torch.set_default_dtype(base)
    try:
        with device:
            model = UniTokForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    if case.lora:
        # as in `unitok train`: frozen weights in bf16, trained ones in fp32
        model.visual_embedder.float()
        add_lora(model, ["language_model", "depth_head"], case.lora, 2.0 * case.lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    model.visual_embedder.codebooks.requires_grad_(False)
    return model


def packed_row(config: UniTokMLLMConfig, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One row of `length` tokens: samples of 64 text tokens and an image, alternately generated and read."""
    image, words = config.num_image_tokens, 64
    ids, labels, positions, images = [], [], [], 0
    while len(ids) + image + words + 1 <= length:
        text = torch.randint(5, config.text_config.vocab_size, (words,), generator=generator).tolist()
        image_ids = [config.image_token_id] * image
        if images % 2:  # a question: loss on the text after the image
            ids += [1, *image_ids, *text]
            labels += [-100] * (1 + image) + text
        else:  # text-to-image: loss on the begin-of-image token and the image
            ids += [1, *text[1:], 3, *image_ids]
            labels += [-100] * words + [3, *image_ids]
        positions += range(image + words + 1)
        images += 1
    rest = length - len(ids)  # filled with one sample of plain text
    ids += [7] * rest
    labels += [7] * rest
    positions += range(rest)
    shape = (images, image, config.num_codebooks)
    codes = torch.randint(0, config.codebook_size, shape, generator=generator)
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {**{name: torch.tensor([values]) for name, values in row.items()}, "image_codes": codes}


def batch_of(
    config: UniTokMLLMConfig, rows: int, length: int, device: torch.device
) -> tuple[dict[str, Any], TokenCounts]:
    """A micro-batch of packed rows, and the token counts for its FLOPs."""
    generator = torch.Generator().manual_seed(0)
    made = [packed_row(config, length, generator) for _ in range(rows)]
    batch = {name: torch.cat([row[name] for row in made]) for name in made[0]}
    # no loss on the first token of a sample: nothing precedes it
    first = batch["position_ids"] == 0
    text = (batch["labels"] >= 0) & ~first
    image_targets = (batch["labels"] == config.image_token_id).sum().item()
    work = TokenCounts(
        tokens=batch["input_ids"].numel(),
        attention_pairs=float((batch["position_ids"] + 1).sum()),
        text_targets=text.sum().item(),
        image_tokens=batch["image_codes"].shape[0] * config.num_image_tokens,
        image_targets=image_targets,
    )
    plan = plan_batch(
        batch["input_ids"],
        batch["labels"],
        position_ids=batch["position_ids"],
        num_images=len(batch["image_codes"]),
        image_token_id=config.image_token_id,
    )
    return {name: tensor.to(device) for name, tensor in {**batch, "plan": plan}.items()}, work


def measure(
    name: str, args: argparse.Namespace, device: torch.device, around_last: Any = None
) -> dict[str, Any]:
    """Train for some steps; returns the record of results.

    Args:
        around_last: a context manager around one more step, which is not timed.
    """
    case = CASES[name]
    torch.manual_seed(0)
    model = make_model(case, device)
    model.language_model.set_attn_implementation(args.attention)
    deepspeed_engine.enable_activation_checkpointing(model)
    if args.compile:  # as `engine.compile: true`
        compile_blocks(model, GradientCheckpointingLayer)
    trained_count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total_count, cost = sum(p.numel() for p in model.parameters()), MLLMFlops(model)
    batch, work = batch_of(model.config, args.rows, args.length, device)
    options = EngineOptions(dtype="bf16", gradient_checkpointing=True)
    optimizer = Optimizer(lr=1e-5, weight_decay=0.0, clip_grad=1.0)
    engine = deepspeed_engine.build_engine(
        model.train(), deepspeed_engine.parameter_groups(model, 0.0), optimizer, options, args.rows
    )

    def train_step() -> None:
        out = engine(**batch, return_logits=False)
        engine.backward(out.loss)
        deepspeed_engine.optimizer_step(engine)

    seconds = []
    for step in range(args.warmup + args.steps):
        if step == args.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if around_last is not None:
        with around_last:
            train_step()
    median = statistics.median(seconds[args.warmup :])
    flops, peak = cost.flops(work), args.peak_tflops or peak_tflops(device)
    return {
        "case": name,
        "description": case.description,
        "parameters": total_count,
        "trained": trained_count,
        "rows": args.rows,
        "length": args.length,
        "attention": args.attention,
        "compiled": args.compile,
        "seconds_per_step": median,
        "fastest": min(seconds[args.warmup :]),
        "slowest": max(seconds[args.warmup :]),
        "tokens_per_second": work.tokens / median,
        "tflops_per_second": flops / median / 1e12,
        "mfu": flops / median / 1e12 / peak if peak else None,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def make_parser() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=["1b", "7b_8of32", "7b_lora"])
    parser.add_argument("--rows", type=int, default=4, help="packed rows per step (default: 4)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row (default: 2048)")
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before measuring (default: 3)")
    parser.add_argument(
        "--attention", default=VARLEN, help=f"{VARLEN} (default), sdpa, eager or flash_attention_2"
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers, as engine.compile does")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak of a device that training/core/gpus.py does not list"
    )
    parser.add_argument("--out", help="default: benchmarks/results/mllm_training-DEVICE.json")
    return parser


def main() -> None:
    """Measure all cases and write the results."""
    args = make_parser().parse_args()
    device = deepspeed_engine.init_distributed(EngineOptions(), 0)
    name = device_name(device)
    out = Path(args.out or result_file("mllm_training", name))
    records = []
    for case in args.case:
        try:
            records.append(measure(case, args, device))
        except torch.cuda.OutOfMemoryError:
            records.append({"case": case, "description": CASES[case].description, "failed": "out of memory"})
        print(json.dumps(records[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    facts = {
        "device": name,
        "torch": torch.__version__,
        "load": load_average(),
        "measured": time.strftime("%F"),
    }
    write_json(out, {**facts, "results": records})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
