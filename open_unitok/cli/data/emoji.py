"""`unitok data emoji`: captioned emoji in up to three styles, from npm packages; the data of the study."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out DIR, and which images."""
    parser.add_argument("--out", required=True, help="output folder")
    parser.add_argument("--size", type=int, default=64, help="side of the images, 64 or 128 (default: 64)")
    parser.add_argument(
        "--styles",
        nargs="+",
        default=["google", "twitter", "fluent"],
        metavar="STYLE",
        help="styles of the images: google, twitter, fluent (default: all)",
    )
    parser.add_argument(
        "--packages",
        nargs="+",
        default=(),
        metavar="P",
        help="the npm packages: unpacked folders, a folder that holds them, or .tgz files of `npm pack` "
        "(default: npm fetches them, 150 MB)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the data set, if it is not there, and print its counts."""
    from open_unitok.training.emoji.dataset import write_emoji

    facts = write_emoji(args.out, args.size, args.packages, args.styles)
    counts = ", ".join(f"{split} {count:,}" for split, count in facts["images"].items())
    print(f"{args.out}: {sum(facts['images'].values()):,} image-caption pairs ({counts})")
    if facts["differing"]:
        print(
            f"Note: the pixels of {', '.join(facts['differing'])} differ from the published ones, though the "
            f"files are the same: Pillow {facts['pillow']} decodes or scales them otherwise."
        )
