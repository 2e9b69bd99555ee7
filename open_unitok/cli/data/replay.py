"""`unitok data replay`: store some of a model's training data with it, for fine-tuning with `data.replay`."""

import argparse
from pathlib import Path

from open_unitok.core.errors import UserError
from open_unitok.core.files import REPLAY_FOLDER, existing, model_path
from open_unitok.core.text_files import read_json
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture_options import REPLAY_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL CODES --kinds KIND=SHARE ..."""
    parser.add_argument("model", metavar="MODEL", help="MLLM folder")
    parser.add_argument(
        "codes", metavar="CODES", help="code folder of its training data, by its own tokenizer"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        required=True,
        metavar="KIND=SHARE",
        help="kinds of samples and their shares, as in its training: text_to_image=0.4 conversation=0.6",
    )
    parser.add_argument("--samples", type=int, default=1500, help="evenly spaced in CODES (default: 1500)")
    parser.add_argument(
        "--texts",
        type=int,
        default=1,
        help="captions and conversations that a sample keeps, at most this many of each (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of texts (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="replay folder, replaced (default: MODEL/replay)")


def run(args: argparse.Namespace) -> None:
    """Write the replay folder and print its size."""
    if args.samples < 1 or args.texts < 1 or args.seed < 0:
        raise UserError("--samples and --texts must be 1 or more, --seed 0 or more.")
    kinds = _shares(args.kinds)
    model = existing(model_path(args.model))
    config = read_json(existing(model / "config.json", "MODEL must be an MLLM folder."))
    fingerprint = config.get("unitok_fingerprint") if isinstance(config, dict) else None
    if not fingerprint:
        raise UserError(f"{model} is not an MLLM folder: its config.json has no unitok_fingerprint.")
    codes = CodeFolder(args.codes, fingerprint)
    out = Path(args.out) if args.out else model / REPLAY_FOLDER
    if out.exists() and not (out / REPLAY_FILE).exists():
        raise UserError(f"{out} exists and is not replay data: choose another --out, or delete it.")
    from open_unitok.training.mllm.replay import write_replay  # it imports torch

    facts = write_replay(codes, kinds, out, samples=args.samples, texts=args.texts, seed=args.seed)
    left_out = f", {facts.unusable:,} unusable ones left out" if facts.unusable else ""
    print(f"{out}: {facts.samples:,} samples{left_out}, {facts.num_bytes / 1e3:.1f} kB")


def _shares(words: list[str]) -> dict[str, float]:
    """["captioning=0.3"] -> {"captioning": 0.3}."""
    shares: dict[str, float] = {}
    for word in words:
        kind, _, number = word.partition("=")
        try:
            shares[kind] = float(number)
        except ValueError:
            raise UserError(f"--kinds: {word!r} is not KIND=SHARE, e.g. captioning=0.3.") from None
    if len(shares) < len(words):
        raise UserError("--kinds names a kind twice.")
    return shares
