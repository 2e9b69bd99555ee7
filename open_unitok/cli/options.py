"""The options that the commands of this package share."""

import argparse
import sys
from typing import TYPE_CHECKING

from open_unitok.core.errors import UserError
from open_unitok.core.files import DEFAULT_MODEL

if TYPE_CHECKING:
    from open_unitok.generation.pipeline import Pipeline
    from open_unitok.generation.sampling import Sampling


def add_model_options(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """--model, --device, --dtype, and --adapter where the decoder is used."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help=f"model folder, hub id, or the shipped model (default: {DEFAULT_MODEL})",
    )
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
    """The fields of `Sampling`; what is not given is as the model's folder has it."""
    own = "(default: the model's own, else %s)"
    parser.add_argument(
        "--guidance", type=float, help=f"how strongly the prompt is followed; 1 = plainly {own % 5}"
    )
    parser.add_argument("--temperature", type=float, help=f"lower is safer, higher is wilder {own % 1}")
    parser.add_argument("--top-k", type=int, help=f"choose among this many codes {own % '0: all'}")
    parser.add_argument(
        "--top-p", type=float, help=f"choose among the likeliest codes up to this probability {own % 1}"
    )
    parser.add_argument(
        "--guidance-schedule",
        metavar="S",
        help=f"constant; linear and cosine rise from 1 {own % 'constant'}",
    )
    parser.add_argument("--greedy", action="store_true", default=None, help="always take the likeliest code")


def pick_device(name: str) -> str:
    """The device that "auto" means here; under a launcher each process takes its own GPU."""
    import torch

    from open_unitok.core.distributed import local_rank

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
    from open_unitok.generation.pipeline import Pipeline

    quiet_loading()
    return Pipeline.from_pretrained(args.model, pick_device(args.device), args.dtype, args.adapter)


def sampling_of(args: argparse.Namespace, model: str) -> "Sampling":
    """The sampling settings that the options ask for over those of the model, checked."""
    from open_unitok.generation.loading import find_model
    from open_unitok.generation.sampling import Sampling

    return Sampling.of_model(find_model(model)).but(vars(args))
