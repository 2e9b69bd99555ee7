"""`unitok generate`: generate images from prompts, as PNGs that store prompt, seed and settings."""

import argparse
import dataclasses
import sys
from pathlib import Path

from open_unitok.core.distributed import rank, share_of, world_size
from open_unitok.core.errors import UserError
from open_unitok.core.files import make_folder

from .options import add_model_options, add_sampling_options, at_least_one, load_pipeline, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ "PROMPT" ... [--prompts FILE] --model M --out DIR."""
    parser.add_argument("words", metavar="PROMPT", nargs="*", help="text prompt; several are allowed")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
    parser.add_argument(
        "--class",
        dest="classes",
        metavar="ID",
        type=int,
        nargs="+",
        help="classes of a class-conditional model, in the place of prompts",
    )
    add_model_options(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder of the PNGs and grid.png")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="replaces the unconditional prompt of guidance"
    )
    parser.add_argument("--num-images", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first image; each further image adds 1 (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (default: 64)")
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Generate the images missing in DIR; under torchrun, every process generates its share."""
    from tqdm import tqdm

    from open_unitok.generation.image_jobs import (
        generate_files,
        is_generated,
        plan_images,
        read_prompt_file,
        save_grid,
    )

    at_least_one(args, "num_images", "batch_size")
    sampling, out = sampling_of(args, args.model), Path(args.out)
    prompts = args.words + (read_prompt_file(args.prompts) if args.prompts else [])
    if prompts and args.classes:
        raise UserError("--class takes the place of prompts: give one of them.")
    prompts = args.classes or prompts
    if not prompts:
        raise UserError(
            'No prompt: give "PROMPT" ..., --prompts FILE with one prompt per line, or --class ID ....'
        )
    # recorded only if set, so that records of earlier runs without these options still match
    optional = {"negative_prompt": args.negative_prompt, "adapter": args.adapter, "dtype": args.dtype}
    optional["quantization"] = args.quantization
    settings = {"model": str(args.model), **dataclasses.asdict(sampling)}
    if sampling.guidance_interval < 0:
        del settings["guidance_interval"]
    settings |= {key: value for key, value in optional.items() if value is not None}
    jobs = plan_images(prompts, out, args.num_images, args.seed, settings)
    make_folder(out)
    # strided, so that all ranks work on the first prompts first
    share = jobs[rank() :: world_size()]
    # do not load the model if all images exist
    missing = [job for job in share if not is_generated(job)]
    if missing:
        pipe = load_pipeline(args, classes=True)
        with tqdm(total=len(missing), unit="image", disable=None) as bar:
            for count in generate_files(pipe, missing, sampling, args.batch_size, args.negative_prompt):
                bar.update(count)
    print(
        f"{len(missing)} images generated into {out}, {len(share) - len(missing)} existed"
        f"{share_of(len(jobs), 'images')}.",
        file=sys.stderr,
    )
    save_grid(jobs, out / "grid.png")
