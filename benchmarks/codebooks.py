"""A small version of the paper's central ablation: the same number of entries in one codebook or in several
sub-codebooks (arXiv 2502.20321, section 4.3). About 10 minutes on 2 idle CPU cores, 30 on busy ones:

    python benchmarks/codebooks.py [--out runs/codebooks] [--steps 1000] [--books 1 2 4 8]

Each row trains configs/tokenizer/codebooks.yaml on scenes and evaluates `unitok eval run reconstruction` on
test scenes. An interrupted run resumes. The table also has the bits per visual token, as part of the gain in
quality is a higher rate.
"""

import argparse
import json
import math
from pathlib import Path

from open_unitok.cli import main as cli
from open_unitok.core.files import write_atomic
from open_unitok.core.text_files import read_json

CONFIG = "configs/tokenizer/codebooks.yaml"
ENTRIES, WIDTH = 512, 32  # over all sub-codebooks: entries, and numbers per visual token
HEAD = ("sub-codebooks x entries", "bits per visual token", "PSNR (dB)", "RMS error (of 255)", "usage (%)")


def main() -> None:
    """Write the scenes, train, evaluate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/codebooks"), help="folder of all runs")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training run")
    parser.add_argument("--books", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of sub-codebooks")
    parser.add_argument("--scenes", type=int, default=4000, help="number of training images")
    args = parser.parse_args()
    for books in args.books:
        if WIDTH % books or ENTRIES % books:
            parser.error(f"--books {books}: expected a divisor of {WIDTH} and of {ENTRIES}")
    if not (args.out / "data" / "scenes.json").exists():
        cli.run(["data", "scenes", "--config", "configs/demo/scenes.yaml", "--out", str(args.out / "data"),
                 "--train", str(args.scenes), "--test", "500"])  # fmt: skip
    results = [train_and_evaluate(args.out, books, args.steps) for books in args.books]
    write_atomic(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    table = [HEAD, ("---",) * len(HEAD), *[tuple(table_row(result)) for result in results]]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in table))


def train_and_evaluate(out: Path, books: int, steps: int) -> dict:
    """Train with `books` sub-codebooks, unless that run is finished, and evaluate the saved model."""
    run, data = out / f"k{books}", out / "data"
    size = ENTRIES // books
    overrides = {
        "out": run,
        "steps": steps,
        "data.sources": f"[{{path: '{data}/train/*.tar'}}]",
        "caption_tokenizer": data / "text" / "tokenizer.model",
        "model.num_codebooks": books,
        "model.codebook_size": size,
        "model.codebook_dim": WIDTH // books,
    }
    cli.run(["train", CONFIG, *[f"{key}={value}" for key, value in overrides.items()]])
    cli.run(["eval", "run", "reconstruction", "--model", str(run / "model"), "--data", str(data / "test"),
             "--out", str(run / "eval")])  # fmt: skip
    found = read_json(run / "eval" / "reconstruction" / "results.json")
    psnr = found["metrics"]["psnr"]["value"]
    return {
        "sub_codebooks": books,
        "entries": size,
        "bits_per_token": books * math.log2(size),
        "psnr": psnr,
        # PSNR = -20 log10(RMS) with a peak of 1
        "rms_error": 255 * 10 ** (-psnr / 20),
        "usage": found["details"]["usage"],
    }


def table_row(result: dict) -> list[str]:
    """The cells of one row, in the order of HEAD."""
    usage = result["usage"]
    return [
        f"{result['sub_codebooks']} x {result['entries']}",
        f"{result['bits_per_token']:.0f}",
        f"{result['psnr']:.2f}",
        f"{result['rms_error']:.1f}",
        f"{100 * sum(usage) / len(usage):.0f} (worst {100 * min(usage):.0f})",
    ]


if __name__ == "__main__":
    main()
