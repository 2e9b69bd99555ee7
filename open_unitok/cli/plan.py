"""`unitok plan`: estimate parameters, memory and hours of a training run, without a GPU."""

import argparse
import importlib

from open_unitok.core.errors import UserError
from open_unitok.training.core.gpus import PEAK_TFLOPS
from open_unitok.training.run import load_run_config

# stage -> module of its estimates
PLANS = {"tokenizer": "tokenizer.plan", "adapt": "tokenizer.plan", "mllm": "mllm.plan"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key.sub=value ...] and the hardware."""
    parser.add_argument("config", help="YAML config of a run, e.g. configs/mllm/pretrain_7b.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override single keys")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: one process on this machine, whose speed is measured (default: cuda)",
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default: 8)")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(PEAK_TFLOPS)} (default: H100)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilization (default: 0.4)")
    parser.add_argument(
        "--text-tokens", type=int, default=64, help="mean text tokens per sample of stage mllm (default: 64)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from open_unitok.training.core.plan import cpu_tflops

    config = load_run_config(args.config, args.overrides)
    if getattr(config, "conditioner", "prompt") != "prompt":
        raise UserError(
            f"{args.config} is of stage {config.stage} with conditioner: {config.conditioner}; `unitok plan` "  # pyright: ignore
            "only supports conditioner: prompt."
        )
    if args.gpus < 1 or not 0 < args.mfu <= 1 or args.text_tokens < 1:
        raise UserError("--gpus and --text-tokens must be at least 1, --mfu above 0 and at most 1.")
    if args.gpu not in PEAK_TFLOPS:
        raise UserError(f"--gpu is {args.gpu!r}; it must be one of {', '.join(PEAK_TFLOPS)}.")
    if args.device == "cpu":
        args.gpus = 1
    # arithmetic only: no weights are allocated
    stage = importlib.import_module(f"open_unitok.training.{PLANS[config.stage]}")
    plan = stage.plan_run(config, args.gpus, args.text_tokens)
    tflops = cpu_tflops(config.engine.dtype) if args.device == "cpu" else PEAK_TFLOPS[args.gpu]
    print("\n".join(stage.describe_plan(plan, config, args, tflops)))
