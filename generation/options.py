"""The options that the commands of this package share."""

import argparse
import sys
from typing import TYPE_CHECKING

from open_unitok.errors import UserError

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .sampling import Sampling


def add_model_options(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """--model, --device, --dtype, and --adapter where the decoder is used."""
    parser.add_argument("--model", required=True, metavar="M", help="model folder or hub id")
    if adapter:
        parser.add_argument("--adapter", metavar="A", help="LoRA adapter of that model: folder or hub id")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:N or mps (default: the fastest there is)"
    )
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16 or, on a CPU, int8 (default: bfloat16 on cuda, else float32)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `Sampling`."""
    parser.add_argument(
        "--guidance", type=float, default=5.0, help="how strongly the prompt is followed; 1 = plainly"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="lower is safer, higher is wilder")
    parser.add_argument("--top-k", type=int, default=0, help="choose among this many codes (0 = all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="choose among the likeliest codes up to this probability"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest code")


def pick_device(name: str) -> str:
    """The device that "auto" means here; under a launcher each process takes its own GPU."""
    import torch

    from open_unitok.ranks import local_rank

    if name != "auto":
        return name
    if torch.cuda.is_available():
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def need_extra(extra: str, *modules: str) -> None:
    """
    Raises:
        UserError: one of the modules is not installed; the message says how to get them.
    """
    import importlib.util

    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"unitok {extra} needs {' and '.join(missing)}: pip install 'open-unitok[{extra}]' "
            f"(in a checkout: pip install -e '.[{extra}]' -c configs/constraints.txt)."
        )


def quiet_loading() -> None:
    """No bar of transformers' own in logs and scripts; a terminal gets it."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_pipeline(args: argparse.Namespace) -> "Pipeline":
    """The pipeline that the options ask for."""
    from .pipeline import Pipeline

    quiet_loading()
    return Pipeline.from_pretrained(args.model, pick_device(args.device), args.dtype, args.adapter)


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """The sampling settings that the options ask for, checked."""
    from .sampling import Sampling

    return Sampling(args.guidance, args.temperature, args.top_k, args.top_p, args.greedy)
