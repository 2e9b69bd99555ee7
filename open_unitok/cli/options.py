"""Options shared by several commands, and the objects that they load."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from open_unitok.core.distributed import local_rank
from open_unitok.core.errors import UserError
from open_unitok.core.files import DEFAULT_MODEL

if TYPE_CHECKING:
    from open_unitok.generation.pipeline import Pipeline
    from open_unitok.generation.sampling import Sampling


def add_decoder_option(parser: argparse.ArgumentParser) -> None:
    """--unitok, a tokenizer in place of the model's."""
    parser.add_argument(
        "--unitok",
        metavar="U",
        help="folder of a visual tokenizer that replaces the model's: same codes, another pixel decoder",
    )


def add_model_options(parser: argparse.ArgumentParser, adapter: bool = True) -> None:
    """--model, --device, --dtype; --adapter, --quantization and --backend except for a tokenizer."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help=f"model folder, hub id, or a shipped model: scenes, emoji (default: {DEFAULT_MODEL})",
    )
    if adapter:
        parser.add_argument("--adapter", metavar="A", help="LoRA adapter of that model: folder or hub id")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N or mps (default: the first available of cuda, mps, cpu)",
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on cuda, else float32)"
    )
    if adapter:
        parser.add_argument(
            "--quantization", metavar="Q", help="int8: linear layers with 8-bit weights, on a CPU"
        )
        parser.add_argument(
            "--backend",
            default="auto",
            help="torch, native (C++, on a CPU) or cuda_graph (default: auto, the fastest of them)",
        )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `Sampling`; an option that is not given keeps the model's sampling.json."""
    # no argparse defaults: None = not given, so that the model's own settings apply
    default = "(default: the model's sampling.json, else %s)"
    parser.add_argument(
        "--guidance", type=float, help=f"classifier-free guidance scale; 1 = no guidance {default % 5}"
    )
    parser.add_argument("--temperature", type=float, help=f"of sampling codes {default % 1}")
    parser.add_argument("--top-k", type=int, help=f"sample from the k likeliest codes; 0 = all {default % 0}")
    parser.add_argument(
        "--top-p",
        type=float,
        help=f"sample from the smallest set of codes with this probability {default % 1}",
    )
    parser.add_argument(
        "--guidance-schedule",
        metavar="S",
        help=f"constant, or linear or cosine: rising from 1 over the image {default % 'constant'}",
    )
    parser.add_argument(
        "--guidance-interval",
        type=int,
        metavar="N",
        help=f"guidance on visual tokens 0 to N + 1 alone; -1 = on all {default % -1}",
    )
    parser.add_argument("--greedy", action="store_true", default=None, help="take the likeliest code")


def add_address_options(parser: argparse.ArgumentParser, port: int, help: str | None = None) -> None:
    """--host, --port and --allow-host."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, default=port, help=help or f"(default: {port})")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this name in the Host and Origin headers, for a reverse proxy; may be repeated "
        "(default: on this machine's own address its names only, elsewhere any)",
    )


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Check integer options.

    Raises:
        UserError: one of these options is less than 1.
    """
    for name in names:
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(args, name)}; it must be a whole number >= 1.")


def new_path(name: str) -> Path:
    """The path of an output that must not exist yet.

    Raises:
        UserError: the path already exists.
    """
    path = Path(name)
    if path.exists():
        raise UserError(f"{path} already exists: delete it or choose another name.")
    return path


def pick_device(name: str) -> str:
    """Resolve "auto"; under torchrun each process takes its own GPU."""
    import torch

    if name != "auto":
        return name
    if torch.cuda.is_available():
        # modulo: with more processes than GPUs, several share one
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def require_extra(extra: str, *modules: str) -> None:
    """Check that optional packages are installed.

    Raises:
        UserError: one of the modules is missing; the message has the pip command.
    """
    # find_spec instead of an import, which takes seconds
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"unitok {extra} needs {' and '.join(missing)}: pip install 'open-unitok[{extra}]' "
            f"(in a checkout: pip install -e '.[{extra}]' -c configs/constraints.txt)."
        )


def quiet_loading() -> None:
    """Turn off transformers' progress bar unless stderr is a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_pipeline(args: argparse.Namespace, classes: bool = False) -> "Pipeline":
    """The pipeline of --model, --device, --dtype, --adapter, --quantization and --backend.

    Args:
        classes: whether the command can use a class-conditional model.

    Raises:
        UserError: --model is a class-conditional model, and the command needs texts.
    """
    from open_unitok.generation.loading import find_model
    from open_unitok.generation.pipeline import Pipeline

    quiet_loading()
    from open_unitok.mllm.loading import CLASS_TYPE, folder_type

    if not classes and folder_type(find_model(args.model)) == CLASS_TYPE:
        raise UserError(
            f"{args.model} is a class-conditional model, which reads no text: use `unitok generate "
            "--class` or `unitok eval run`."
        )
    options = (pick_device(args.device), args.dtype, args.adapter, args.quantization, args.backend)
    return Pipeline.from_pretrained(args.model, *options)


def sampling_of(args: argparse.Namespace, model: str) -> "Sampling":
    """The model's sampling settings, overridden by the options.

    Raises:
        UserError: an option is out of range.
    """
    from open_unitok.generation.loading import find_model
    from open_unitok.generation.sampling import Sampling

    return Sampling.from_folder(find_model(model)).override(vars(args))
