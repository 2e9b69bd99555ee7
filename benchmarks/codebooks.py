"""The paper's central ablation in small: the same number of entries, as one codebook or as several (arXiv
2502.20321, section 4.3).  Ten minutes on 2 free CPU cores, half an hour on busy ones:

    python benchmarks/codebooks.py [--out runs/codebooks] [--steps 1000] [--books 1 2 4 8]

Each row is a training of configs/tokenizer/codebooks.yaml on scenes, measured by `unitok eval run
reconstruction` on scenes that no training shows. Run again after a stop, it goes on. Beside the error stand
the bits that a visual token takes, for part of the gain is rate.
"""

import argparse
import json
import math
from pathlib import Path

from open_unitok.cli import main as cli
from open_unitok.core.files import read_json, write_atomic

CONFIG = "configs/tokenizer/codebooks.yaml"
ENTRIES, WIDTH = 512, 32  # of all sub-codebooks together
HEAD = ("sub-codebooks x entries", "bits per visual token", "PSNR (dB)", "RMS error (of 255)", "usage (%)")


def main() -> None:
    """Make the scenes, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/codebooks"), help="folder of all runs")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--books", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of sub-codebooks")
    parser.add_argument("--scenes", type=int, default=4000, help="images to train on")
    args = parser.parse_args()
    for books in args.books:
        if WIDTH % books or ENTRIES % books:
            parser.error(f"--books {books}: {WIDTH} and {ENTRIES} are not multiples of it")
    if not (args.out / "data" / "scenes.json").exists():
        cli.run(["data", "scenes", "--config", "configs/demo/scenes.yaml", "--out", str(args.out / "data"),
                 "--train", str(args.scenes), "--test", "500"])  # fmt: skip
    rows = [measure(args.out, books, args.steps) for books in args.books]
    write_atomic(args.out / "results.json", json.dumps(rows, indent=2) + "\n")
    table = [HEAD, ("---",) * len(HEAD), *[tuple(shown(row)) for row in rows]]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in table))


def measure(out: Path, books: int, steps: int) -> dict:
    """Train with `books` sub-codebooks, unless that is done, and measure what the folder on disk rebuilds."""
    run, data = out / f"k{books}", out / "data"
    size = ENTRIES // books
    changes = {
        "out": run,
        "steps": steps,
        "data.sources": f"[{{path: '{data}/train/*.tar'}}]",
        "caption_tokenizer": data / "text" / "tokenizer.model",
        "model.num_codebooks": books,
        "model.codebook_size": size,
        "model.codebook_dim": WIDTH // books,
    }
    cli.run(["train", CONFIG, *[f"{key}={value}" for key, value in changes.items()]])
    cli.run(["eval", "run", "reconstruction", "--model", str(run / "model"), "--data", str(data / "test"),
             "--out", str(run / "eval")])  # fmt: skip
    found = read_json(run / "eval" / "reconstruction" / "results.json")
    psnr = found["metrics"]["psnr"]["value"]
    return {
        "sub_codebooks": books,
        "entries": size,
        "bits_per_token": books * math.log2(size),
        "psnr": psnr,
        "rms_error": 255 * 10 ** (-psnr / 20),
        "usage": found["details"]["usage"],
    }


def shown(row: dict) -> list[str]:
    """The cells of one row."""
    usage = row["usage"]
    return [
        f"{row['sub_codebooks']} x {row['entries']}",
        f"{row['bits_per_token']:.0f}",
        f"{row['psnr']:.2f}",
        f"{row['rms_error']:.1f}",
        f"{100 * sum(usage) / len(usage):.0f} (worst {100 * min(usage):.0f})",
    ]


if __name__ == "__main__":
    main()
