"""`unitok plan`: estimate parameters, memory, communication and hours of a training run, without a GPU."""

import argparse
import importlib
from typing import Any

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
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[8],
        help="numbers of GPUs; of several, a table with a line each (default: 8)",
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="GPUs that share a node's links (default: 8)"
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=50.0,
        help="GB/s of a GPU between nodes, what nccl-tests print as busbw (default: 50)",
    )
    parser.add_argument(
        "--node-bandwidth", type=float, default=300.0, help="the same within a node (default: 300)"
    )
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(PEAK_TFLOPS)} (default: H100)")
    parser.add_argument(
        "--gpu-memory", type=float, default=79.0, help="GiB of a GPU (default: 79, one of 80 GB)"
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilization (default: 0.4)")
    parser.add_argument(
        "--text-tokens", type=int, default=64, help="mean text tokens per sample of stage mllm (default: 64)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    config = load_run_config(args.config, args.overrides)
    if getattr(config, "conditioner", "prompt") != "prompt":
        raise UserError(
            f"{args.config} is of stage {config.stage} with conditioner: {config.conditioner}; `unitok plan` "  # pyright: ignore
            "only supports conditioner: prompt."
        )
    smallest = min(*args.gpus, args.gpus_per_node, args.text_tokens)
    if smallest < 1 or not 0 < args.mfu <= 1:
        raise UserError(
            "--gpus, --gpus-per-node and --text-tokens must be at least 1, --mfu above 0 and at most 1."
        )
    if not min(args.bandwidth, args.node_bandwidth) > 0:
        raise UserError("--bandwidth and --node-bandwidth must be above 0 GB/s.")
    if not 0 < args.gpu_memory < float("inf"):
        raise UserError(f"--gpu-memory is {args.gpu_memory:g}; it must be a number of GiB above 0.")
    if args.gpu not in PEAK_TFLOPS:
        raise UserError(f"--gpu is {args.gpu!r}; it must be one of {', '.join(PEAK_TFLOPS)}.")
    if args.device == "cpu":
        args.gpus = [1]
    print("\n".join(describe(config, args)))


def describe(config: Any, args: argparse.Namespace) -> list[str]:
    """The plan as lines of text: in full for one number of GPUs, as a table for several."""
    from open_unitok.training.core import plan as core

    # arithmetic only: no weights are allocated
    stage = importlib.import_module(f"open_unitok.training.{PLANS[config.stage]}")
    tflops = core.cpu_tflops(config.engine.dtype) if args.device == "cpu" else PEAK_TFLOPS[args.gpu]
    networks = [
        core.Network(ranks, args.gpus_per_node, args.node_bandwidth, args.bandwidth) for ranks in args.gpus
    ]
    plans, estimates = [], []
    for network in networks:
        core.check_hpz(config.engine, network.ranks)
        fitted = config if len(networks) == 1 else core.fit_to_ranks(config, network.ranks)
        plans.append(stage.plan_run(fitted, network.ranks, args.text_tokens))
        estimates.append(core.estimate_run(plans[-1], fitted, network, tflops, args.mfu))
    lines = [f"! {text}" for text in plans[0].assumed] + core.describe_parameters(plans[0].parameters)
    if len(plans) > 1:
        return lines + core.describe_estimates(estimates, plans[0].work[1], config, tflops, args.gpu_memory)
    own = plans[0].memory[config.engine.zero_stage]
    fit = [] if args.device == "cpu" else [core.describe_fit(own, args.gpu_memory)]
    return [
        *lines,
        *core.describe_memory(plans[0].memory, config.engine, networks[0].ranks),
        *fit,
        *core.describe_transfers(estimates[0], networks[0]),
        "",
        stage.describe_step(plans[0], config, networks[0].ranks, args.text_tokens),
        core.describe_time(estimates[0], plans[0].work[1], config, tflops, args),
    ]
