"""`unitok convert quantizer`: the quantiser of another system's published tokenizer, for `init_quantizer`."""

import argparse
import json

from open_unitok.core.files import existing

from ..options import new_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SYSTEM FILE DST."""
    systems = ("ibq", "tokenflow", "vqkd", "cluster", "coda")
    parser.add_argument("system", metavar="SYSTEM", help=f"one of {', '.join(systems)}")
    parser.add_argument(
        "source", metavar="FILE", help="published checkpoint (.pth, .ckpt, .pt, .safetensors)"
    )
    parser.add_argument("target", metavar="DST", help="new folder, the init_quantizer of a training run")


def run(args: argparse.Namespace) -> None:
    """Convert, and print the fields of the tokenizer that the quantiser fits."""
    from open_unitok.tokenizer.quantizers.published import convert_quantizer

    fields = convert_quantizer(args.system, existing(args.source), new_path(args.target))
    print(f"{args.source} -> {args.target}\n\ninit_quantizer: {args.target}\nmodel:")
    print("\n".join(f"  {name}: {json.dumps(value)}" for name, value in fields.items()))
