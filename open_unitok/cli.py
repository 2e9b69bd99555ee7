"""The `unitok` command: a table of subcommands, each in the module that does the work."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .errors import UserError

# command -> (module, one line for --help); a module offers add_arguments(parser) and run(args).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("open_unitok.demo", "train, draw, answer and report from nothing, in minutes on a laptop"),
    "doctor": ("open_unitok.doctor", "what this machine has, and what each missing thing costs"),
    "data scenes": (
        "open_unitok.training.scenes",
        "write captioned scenes: training shards and a test split",
    ),
    "data convert": ("open_unitok.training.data_convert", "pictures with texts, in usual layouts, to tars"),
    "data check": ("open_unitok.training.data_check", "what a data set holds, and what of it is broken"),
    "train": (
        "open_unitok.training.run",
        "train a stage from a YAML: unitok train CONFIG [key.sub=value ...]",
    ),
    "plan": ("open_unitok.training.plan", "parameters, memory and time of an MLLM run, before it has a GPU"),
    "extract-codes": ("open_unitok.training.extract", "turn image shards into code shards"),
    "reconstruct": ("open_unitok.generation.reconstruct", "encode and decode pictures, side by side"),
    "generate": ("open_unitok.generation.generate", "draw pictures from prompts"),
    "ask": ("open_unitok.generation.ask", "ask a question about a picture"),
    "chat": ("open_unitok.generation.chat", "talk about pictures in the terminal"),
    "ui": ("open_unitok.generation.ui", "a page in the browser: draw, ask, reconstruct"),
    "serve": ("open_unitok.generation.serve", "an HTTP server with OpenAI's shapes, in batches"),
    "eval run": ("open_unitok.eval.run", "run a benchmark on a model and score it"),
    "eval score": ("open_unitok.eval.score", "score answers or pictures that are already on disk"),
    "eval compare": ("open_unitok.eval.compare", "is one run better than another: paired bootstrap"),
    "eval report": ("open_unitok.eval.runs_report", "runs beside published numbers, as one HTML page"),
    "convert tokenizer": (
        "open_unitok.generation.convert_tokenizer",
        "rewrite a published tokenizer as a folder of ours",
    ),
    "convert mllm": ("open_unitok.generation.convert_mllm", "rewrite a published MLLM as a folder of ours"),
    "convert bf16": ("open_unitok.generation.convert_bf16", "round a model's weights: half the bytes"),
    "convert adapter": (
        "open_unitok.generation.convert_adapter",
        "write an MLLM and its LoRA adapter as one model",
    ),
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
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"unitok {name}", description=module.__doc__)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments[len(name.split()) :]))


def overview(arguments: list[str]) -> None:
    """`unitok`, `unitok --help`, `unitok --version`, `unitok eval`, and every unknown command end here."""
    from . import __version__
    from .errors import did_you_mean

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
    shown = {n: line for n, (_, line) in COMMANDS.items() if not words or n.startswith(words[0] + " ")}
    width = max(map(len, shown))
    print("usage: unitok COMMAND [options]      (unitok COMMAND --help for its options)\n")
    print("\n".join(f"  {n:<{width}}  {line}" for n, line in shown.items()))
