"""The `unitok` command: a table of subcommands, each a module of this package."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from open_unitok.core.errors import UserError

# command -> one line for --help; `unitok eval run` is the module cli/eval/run.py, which offers
# add_arguments(parser) and run(args).
COMMANDS: dict[str, str] = {
    "demo": "train, generate, answer and report from nothing, in minutes on a laptop",
    "doctor": "what this machine has, and what each missing thing costs",
    "data scenes": "write captioned scenes: training shards and a test split",
    "data convert": "images with texts, in common layouts, to tars",
    "data check": "what a data set holds, and what of it is broken",
    "train": "train a stage from a YAML: unitok train CONFIG [key.sub=value ...]",
    "plan": "parameters, memory and time of an MLLM run, before it has a GPU",
    "extract-codes": "turn image shards into code shards",
    "reconstruct": "encode and decode images, side by side",
    "generate": "generate images from prompts",
    "ask": "ask a question about an image",
    "chat": "talk about images in the terminal",
    "ui": "a page in the browser: generate, ask, reconstruct",
    "serve": "an OpenAI-compatible HTTP server with batching",
    "eval run": "run a benchmark on a model and score it",
    "eval score": "score answers or images that are already on disk",
    "eval compare": "is one run better than another: paired bootstrap",
    "eval report": "runs beside published numbers, as one HTML page",
    "convert tokenizer": "convert a published tokenizer to a folder of ours, or back",
    "convert mllm": "convert a published MLLM to a folder of ours, or back",
    "convert bf16": "round a model's weights to bfloat16: half the bytes",
    "convert adapter": "merge an MLLM and its LoRA adapter into one model",
}
# groups of commands, for the help text of `unitok data`, `unitok eval`, ...
GROUPS = {"data": "make and check data sets", "eval": "benchmarks", "convert": "published weights to ours"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].startswith("--local_rank="):  # what the deepspeed launcher adds in front
        arguments = arguments[1:]
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # Waiting OpenMP threads spin for milliseconds by default, which starves every other process; PASSIVE
        # makes each small operator pay for waking them. A short spin costs neither. Read when torch loads.
        os.environ["GOMP_SPINCOUNT"] = "20000"
    try:
        run(arguments)
    except UserError as error:
        if os.environ.get("UNITOK_TRACEBACK"):
            raise
        print(f"unitok: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("unitok: stopped; run the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def run(arguments: list[str]) -> None:
    """Parse and run, raising what goes wrong; only the chosen command's module is imported."""
    name = next(
        (n for n in (" ".join(arguments[:2]), arguments[0] if arguments else "") if n in COMMANDS), None
    )
    if name is None:
        overview(arguments)
        return
    module = command_module(name)
    parser = argparse.ArgumentParser(prog=f"unitok {name}", description=module.__doc__)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments[len(name.split()) :]))


def command_module(name: str) -> ModuleType:
    """The module of a command: `eval run` is open_unitok.cli.eval.run."""
    return importlib.import_module(f"{__package__}." + name.replace("-", "_").replace(" ", "."))


def overview(arguments: list[str]) -> None:
    """`unitok`, `unitok --help`, `unitok --version`, `unitok eval`, and every unknown command end here."""
    from open_unitok import __version__
    from open_unitok.core.errors import did_you_mean

    words = [a for a in arguments if not a.startswith("-")]
    if "--version" in arguments[:1]:
        print(f"unitok {__version__}")
        return
    if words and words[0] not in GROUPS:
        raise UserError(
            f"There is no command {words[0]!r}." + did_you_mean(words[0], {n.split()[0] for n in COMMANDS})
        )
    if len(words) > 1:
        subs = {n.split()[1] for n in COMMANDS if n.startswith(words[0] + " ")}
        raise UserError(f"There is no command {' '.join(words[:2])!r}." + did_you_mean(words[1], subs))
    shown = {n: line for n, line in COMMANDS.items() if not words or n.startswith(words[0] + " ")}
    width = max(map(len, shown))
    print("usage: unitok COMMAND [options]      (unitok COMMAND --help for its options)\n")
    print("\n".join(f"  {n:<{width}}  {line}" for n, line in shown.items()))
