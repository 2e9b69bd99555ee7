"""The `unitok` command: a table of subcommands, one module each."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from open_unitok import __version__
from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.memory import is_memory_error, memory_reason

# command -> its line in --help. `unitok eval run` is the module cli/eval/run.py, with add_arguments(parser)
# and run(args).
COMMANDS: dict[str, str] = {
    "demo": "train a small model from scratch, use it and evaluate it, in minutes on a CPU",
    "doctor": "check hardware, optional packages and versions",
    "data emoji": "fetch captioned emoji in three styles: training shards and held-out splits",
    "data scenes": "render captioned scenes of shapes: training shards and a test split",
    "data convert": "convert image-text data sets in common layouts to tar shards",
    "data text-tokenizer": "train a text tokenizer on the captions and texts of a data set",
    "data replay": "store some of a model's training data with it, for fine-tuning",
    "data check": "summarise a data set and list its broken samples",
    "train": "train from a YAML config: unitok train CONFIG [key.sub=value ...]",
    "plan": "estimate parameters, memory and time of an MLLM training run",
    "study": "train and measure tokenizers on the same data and budget, in one table",
    "extract-codes": "encode image shards as code shards",
    "reconstruct": "encode and decode images; original and reconstruction side by side",
    "generate": "generate images from prompts",
    "ask": "answer questions about an image",
    "chat": "a conversation about images in the terminal",
    "ui": "a web page: generate, ask, reconstruct",
    "serve": "an OpenAI-compatible HTTP server with batching",
    "eval run": "run benchmarks on a model and score them",
    "eval score": "score answers or images on disk, without a model",
    "eval compare": "compare two runs with a paired bootstrap",
    "eval report": "an HTML report of runs with published numbers",
    "convert tokenizer": "convert a published tokenizer (UniTok, VQGAN, IBQ, LlamaGen) to a model folder",
    "convert mllm": "convert a published MLLM to a model folder, or back",
    "convert class-conditional": "convert a class-conditional checkpoint of LlamaGen or UniTok, or back",
    "convert quantizer": "take the quantiser of another system's published tokenizer",
    "convert token-merging": "copy a visual tokenizer with token merging switched on or off",
    "convert bf16": "round a model's weights to bfloat16",
    "convert adapter": "merge a LoRA adapter into its MLLM",
}
_GROUPS = {name.split()[0] for name in COMMANDS if " " in name}  # data, eval, convert


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A UserError is one line on stderr and its exit code, 2; Ctrl-C is exit code 130."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].startswith("--local_rank="):  # added by the deepspeed launcher
        arguments = arguments[1:]
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        # Waiting OpenMP threads spin for milliseconds by default, which starves other processes;
        # PASSIVE makes each small operator wait for threads to wake. A short spin avoids both.
        # torch reads the variable on import.
        os.environ["GOMP_SPINCOUNT"] = "20000"
    try:
        _check_working_folder()
        run(arguments)
    except UserError as error:
        # UNITOK_TRACEBACK=1 shows where it was raised
        if os.environ.get("UNITOK_TRACEBACK"):
            raise
        print(f"unitok: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("unitok: interrupted; run the same command again to resume.", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT
    except BrokenPipeError:
        sys.exit(141)  # 128 + SIGPIPE, e.g. `unitok ... | head`
    except (MemoryError, RuntimeError, OSError) as error:
        if os.environ.get("UNITOK_TRACEBACK") or not is_memory_error(error):
            raise
        print(f"unitok: error: {memory_reason(error)}; lower the batch size.", file=sys.stderr)
        sys.exit(2)


def _check_working_folder() -> None:
    """
    Raises:
        UserError: the working folder was deleted; MKL ends the process there without a reason.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UserError("The working folder does not exist any more: change to another one.") from error


def run(arguments: list[str]) -> None:
    """Parse the arguments, import the module of the command and run it; errors are raised."""
    # `eval run` before `eval`
    name = next(
        (n for n in (" ".join(arguments[:2]), arguments[0] if arguments else "") if n in COMMANDS), None
    )
    if name is None:
        overview(arguments)
        return
    # only the module of this command is imported: no command pays for the imports of another
    module = command_module(name)
    parser = argparse.ArgumentParser(prog=f"unitok {name}", description=module.__doc__)
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments[len(name.split()) :]))


def command_module(name: str) -> ModuleType:
    """`eval run` -> open_unitok.cli.eval.run."""
    return importlib.import_module(f"{__package__}." + name.replace("-", "_").replace(" ", "."))


def overview(arguments: list[str]) -> None:
    """Handle `unitok`, `unitok --help`, `unitok --version`, `unitok eval` and unknown commands."""
    # `unitok eval --help` lists the subcommands of eval
    words = [a for a in arguments if not a.startswith("-")]
    if "--version" in arguments[:1]:
        print(f"unitok {__version__}")
        return
    if words and words[0] not in _GROUPS:
        raise UserError(
            f"Unknown command {words[0]!r}." + did_you_mean(words[0], {n.split()[0] for n in COMMANDS})
        )
    if len(words) > 1:
        subs = {n.split()[1] for n in COMMANDS if n.startswith(words[0] + " ")}
        raise UserError(f"Unknown command {' '.join(words[:2])!r}." + did_you_mean(words[1], subs))
    shown = {n: line for n, line in COMMANDS.items() if not words or n.startswith(words[0] + " ")}
    width = max(map(len, shown))
    print("usage: unitok COMMAND [options]      (unitok COMMAND --help for its options)\n")
    print("\n".join(f"  {n:<{width}}  {line}" for n, line in shown.items()))
