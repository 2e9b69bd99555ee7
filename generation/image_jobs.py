"""Jobs of `unitok generate`: one PNG per image; finished files are skipped; processes share the jobs."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_lines
from open_unitok.tokenizer.images import load_image

from .image_files import grid_of, read_record, save_png
from .pipeline import Pipeline
from .sampling import Sampling, check_seed

GRID_LIMIT = 100  # images in grid.png


class ImageJob(NamedTuple):
    """One image to generate."""

    path: Path
    record: dict[str, Any]  # stored in the PNG: prompt, seed, model and sampling settings


def read_prompt_file(path: str | Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        UserError: the file is missing, a folder, not UTF-8, or empty.
    """
    prompts = read_lines(path)
    if not prompts:
        raise UserError(f"{path} holds no prompt.")
    return prompts


def plan_images(
    prompts: Sequence[str | int], out: Path, num_images: int, seed: int, settings: dict[str, Any]
) -> list[ImageJob]:
    """One job per image; its file is named by prompt number, prompt and seed, and seeds count up from `seed`.

    A prompt that is an integer is a class.

    Raises:
        UserError: a prompt is empty, or a seed is out of range.
    """
    jobs = []
    for i, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else f"class {prompt}"
        if not text.strip():
            raise UserError(f"Prompt {i} is empty.")
        # the number first: files sort in the order of the prompts
        slug = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "image"
        for j in range(num_images):
            # every image has its own seed, so that the split over processes and batches does not matter
            own_seed = check_seed(seed + i * num_images + j)
            record = {_prompt_key(prompt): prompt, "seed": own_seed, **settings}
            jobs.append(ImageJob(out / f"{i:05d}-{slug}-seed{own_seed}.png", record))
    return jobs


def _prompt_key(prompt: str | int) -> str:
    return "prompt" if isinstance(prompt, str) else "class"


def _prompt_of(job: ImageJob) -> Any:
    """The prompt or the class of a job."""
    return job.record["prompt"] if "prompt" in job.record else job.record["class"]


def is_generated(job: ImageJob) -> bool:
    """True if the job's file exists with the job's record.

    Raises:
        UserError: the file was generated with other settings.
    """
    if not job.path.exists():
        return False
    found = read_record(job.path) or {}
    # keys of both: a setting that only one of them has is a difference too
    for key in {**job.record, **found}:
        had, wanted = found.get(key), job.record.get(key)
        if had != wanted:
            raise UserError(
                f"{job.path} was generated with {key} = {had!r}, not {wanted!r}: choose another --out, or "
                "delete it."
            )
    return True


def generate_files(
    pipe: Pipeline,
    jobs: Sequence[ImageJob],
    sampling: Sampling,
    batch_size: int,
    negative: str | None = None,
) -> Iterator[int]:
    """Generate and save the images batch by batch; yields the size of each finished batch."""
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        prompts, seeds = [_prompt_of(job) for job in batch], [job.record["seed"] for job in batch]
        given = {"classes" if isinstance(prompts[0], int) else "prompts": prompts}
        options = {"seed": seeds, "batch_size": batch_size, "negative_prompt": negative}
        images = pipe.generate(sampling=sampling, **given, **options)
        for job, image in zip(batch, images):
            save_png(image, job.path, job.record)
        yield len(batch)


def save_grid(jobs: Sequence[ImageJob], path: Path) -> None:
    """Save the first `GRID_LIMIT` images as one grid, if all of them exist."""
    jobs = jobs[:GRID_LIMIT]
    # with several processes only the last to finish finds all files
    if all(job.path.exists() for job in jobs):
        images = [load_image(job.path) for job in jobs]
        save_png(grid_of(images), path, {"prompts": [_prompt_of(job) for job in jobs]})
