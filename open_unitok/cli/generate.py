"""`unitok generate`: images from prompts, as PNGs that carry prompt, seed and settings."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing, make_folder

from .options import add_model_options, add_sampling_options, load_pipeline, sampling_of

GRID_LIMIT = 100  # images in grid.png


class Job(NamedTuple):
    """One image to draw."""

    path: Path
    record: dict[str, Any]  # what the PNG carries: prompt, seed, model and settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ "PROMPT" ... [--prompts FILE] --model M --out DIR."""
    parser.add_argument("words", metavar="PROMPT", nargs="*", help="what to draw")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    add_model_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the PNGs and grid.png go")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first image; each next one takes one more"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images drawn together")
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Draw what is missing in DIR. Under torchrun each process draws its share."""
    from tqdm import tqdm

    from open_unitok.core.distributed import rank, world_size
    from open_unitok.generation.image_files import save_png

    sampling = sampling_of(args, args.model)
    for name in ("num_images", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be a whole number >= 1."
            )
    jobs = plan(read_prompts(args), args, dataclasses.asdict(sampling))
    make_folder(args.out)
    share = jobs[rank() :: world_size()]
    mine = [job for job in share if not is_drawn(job)]
    if mine:
        pipe = load_pipeline(args)
        with tqdm(total=len(mine), unit="image", disable=None) as bar:
            for start in range(0, len(mine), args.batch_size):
                batch = mine[start : start + args.batch_size]
                prompts, seeds = ([job.record[key] for job in batch] for key in ("prompt", "seed"))
                images = pipe.generate(prompts, sampling, seeds, args.batch_size, negative=args.negative)
                for job, image in zip(batch, images):
                    save_png(image, job.path, job.record)
                bar.update(len(batch))
    print(f"{len(mine)} images drawn into {args.out}, {len(share) - len(mine)} were there.", file=sys.stderr)
    write_grid(jobs, Path(args.out) / "grid.png")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        UserError: there are none, one of them is empty, or the file cannot be read.
    """
    prompts = list(args.words)
    if args.prompts:
        path = existing(args.prompts)
        if not path.is_file():
            raise UserError(f"--prompts {path} is a folder; it must be a text file with one prompt a line.")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {path} is no UTF-8 text file: {error}") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UserError('There is nothing to draw: give a "PROMPT" or --prompts FILE with one prompt a line.')
    if empty := [i for i, prompt in enumerate(prompts) if not prompt.strip()]:
        raise UserError(f"Prompt {empty[0]} is empty: write what to draw.")
    return prompts


def plan(prompts: list[str], args: argparse.Namespace, settings: dict[str, Any]) -> list[Job]:
    """One job per image, its file named by number, prompt and seed."""
    from open_unitok.generation.sampling import check_seed

    # what else changes an image, where it was asked for
    rest = {"negative_prompt": args.negative, "adapter": args.adapter, "dtype": args.dtype}
    given = {key: value for key, value in rest.items() if value is not None}
    jobs = []
    for i, prompt in enumerate(prompts):
        for j in range(args.num_images):
            seed = check_seed(args.seed + i * args.num_images + j)
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "image"
            record = {"prompt": prompt, "seed": seed, "model": str(args.model), **settings, **given}
            jobs.append(Job(Path(args.out) / f"{i:05d}-{slug}-seed{seed}.png", record))
    return jobs


def is_drawn(job: Job) -> bool:
    """True if this very image is there.

    Raises:
        UserError: an image of other settings stands in its place.
    """
    from open_unitok.generation.image_files import read_record

    if not job.path.exists():
        return False
    found = read_record(job.path) or {}
    for key in {**job.record, **found}:
        had, wanted = found.get(key), job.record.get(key)
        if had != wanted:
            raise UserError(
                f"{job.path} was drawn with {key} = {had!r}, not {wanted!r}: choose another --out, or "
                "remove it."
            )
    return True


def write_grid(jobs: list[Job], path: Path) -> None:
    """All images on one sheet, once all are there: the last process of a launch finds them so."""
    from PIL import Image

    from open_unitok.generation.image_files import grid_of, save_png

    jobs = jobs[:GRID_LIMIT]
    if all(job.path.exists() for job in jobs):
        images = [Image.open(job.path).convert("RGB") for job in jobs]
        save_png(grid_of(images), path, {"prompts": [job.record["prompt"] for job in jobs]})
