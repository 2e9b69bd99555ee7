"""T2I-CompBench (arXiv 2307.06350): attributes by BLIP-VQA, and non-spatial relations by CLIP similarity.

Its spatial, numeracy and complex prompts are judged by UniDet, which transformers lacks: they are not run.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_lines

from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.generated_images import (
    generation_metadata,
    require_generated_images,
    save_generated_images,
    unscored_records,
)
from ..core.judge_pass import judge_findings, read_judge_pass, run_judge_pass, samples_with_images
from ..core.records import mean_metric
from ..core.release_files import COMPBENCH_CATEGORIES, find_files, wrong_place
from ..judges import blip_vqa, clip_model

_IMAGES_PER_PROMPT = 10
_BATCH = 16
_BLIP, _CLIP = "blipvqa", "clipsimilarity"  # kinds of judge passes
_BLIP_CATEGORIES = ("color", "shape", "texture")
_CLIP_VISION = [768, 12, 32, 224]  # ViT-B/32: width, layers, patch and side

answer = save_generated_images


def load(data: Path, settings: Options) -> Task:
    """Images of the prompts of `{color,shape,texture,non_spatial}_val.txt`, ten each.

    They are named CATEGORY/samples/PROMPT_NUMBER.png, as the published scripts read them.
    """
    per_prompt = settings.images_per_prompt or _IMAGES_PER_PROMPT
    samples: list[Sample] = []
    categories: list[str] = []
    for category in COMPBENCH_CATEGORIES:
        paths = find_files(data, (f"{category}_val.txt",))
        prompts = [line.strip() for line in read_lines(paths[0])] if paths else []
        for number in range(len(prompts) * per_prompt):
            prompt, k = prompts[number // per_prompt], len(samples)
            name = f"{category}/samples/{prompt.replace('/', ' ')}_{number:06d}"
            samples.append(Sample(k, name, prompt, None, "generate", settings.seed + k))
            categories.append(category)
    if not samples:
        raise wrong_place(data, tuple(f"{category}_val.txt" for category in COMPBENCH_CATEGORIES))
    metadata = generation_metadata(settings, "png") | {"split": "val", "images_per_prompt": per_prompt}
    return Task(samples[: settings.limit], categories[: settings.limit], metadata)


def _of_categories(task: Task, records: dict[int, Record], names: Sequence[str]) -> list[Sample]:
    """The samples of some categories that have an image."""
    return [s for s in samples_with_images(task.samples, records) if task.truth[s.index] in names]


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """BLIP-VQA of attributes, and CLIP similarity of non-spatial relations, if the models are given."""
    if scoring.blip_model and (samples := _of_categories(task, records, _BLIP_CATEGORIES)):
        phrases_of = blip_vqa.load_noun_phrases(scoring.spacy_model)
        blip = blip_vqa.BlipVqa(scoring.blip_model, device)

        def ask(batch: list[Sample], images: list[Any]) -> list[Record]:
            phrases = [phrases_of(s.prompt) for s in batch]
            pairs = [(image, f"{text}?") for image, texts in zip(images, phrases) for text in texts]
            values = iter(blip.probabilities(*zip(*pairs)) if pairs else ())
            return [{"phrases": texts, "probabilities": [next(values) for _ in texts]} for texts in phrases]

        about = blip.about | {"spacy": scoring.spacy_model, "published size": blip.is_published}
        # another pipeline of spaCy is another judge
        about["fingerprint"] = hashlib.sha256(f"{about['fingerprint']} {about['spacy']}".encode()).hexdigest()
        run_judge_pass(out, _BLIP, about, samples, records, ask, _BATCH, quiet)
    if scoring.clip_model and (samples := _of_categories(task, records, ("non_spatial",))):
        clip = clip_model.ClipModel(scoring.clip_model, device, "--clip-model")

        def compare(batch: list[Sample], images: list[Any]) -> list[Record]:
            texts = clip.embed_texts([s.prompt for s in batch])
            return [{"similarity": float(v)} for v in (clip.embed_images(images) * texts).sum(axis=1)]

        run_judge_pass(out, _CLIP, clip.about, samples, records, compare, _BATCH, quiet)


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """The mean BLIP-VQA score of each attribute, and the mean similarity of non-spatial prompts.

    Raises:
        UserError: the images are not judged; the message names the options.
    """
    require_generated_images(task, records, folder)
    blip, blip_problems, blip_about = _findings(task, records, folder, _BLIP, _BLIP_CATEGORIES)
    clip, clip_problems, clip_about = _findings(task, records, folder, _CLIP, ("non_spatial",))
    if blip_about is None and clip_about is None:
        raise UserError(
            f"{folder}: the images are generated, but not judged. Run again with --blip-model for color, "
            "shape and texture, with --clip-model for non_spatial, or both (the images are kept)."
        )
    scores = {i: blip_vqa.blip_score(r["probabilities"]) for i, r in blip.items()}
    scores |= {i: r["similarity"] for i, r in clip.items()}
    metrics: dict[str, Metric] = {}
    problems = [*blip_problems, *clip_problems]
    for category in dict.fromkeys(task.truth):
        if (clip_about if category == "non_spatial" else blip_about) is None:
            problems.append(f"{category} has no judge: see --blip-model and --clip-model")
            continue
        kept = [s for s in task.samples if task.truth[s.index] == category]
        # a missing image counts as 0, so that a failed one cannot raise the mean
        values = [scores.get(s.index, 0.0) for s in kept]
        metrics[category] = mean_metric(values, [s.prompt for s in kept], "score")
        absent = sum(s.index not in scores for s in kept)
        problems += [f"{absent} images of {category} have no score (counted as 0)"] * (absent > 0)
    rows = [
        row | {
            "score": scores.get(s.index), "group": task.truth[s.index], "cluster": s.prompt,
            "phrases": blip.get(s.index, {}).get("phrases"),
        }
        for row, s in zip(unscored_records(task, records), task.samples)
    ]  # fmt: skip
    about = {_BLIP: blip_about, _CLIP: clip_about}
    return Scored(metrics, about, rows, not_comparable=_not_comparable(task, about), problems=problems)


def _findings(
    task: Task, records: dict[int, Record], folder: Path, kind: str, categories: Sequence[str]
) -> tuple[dict[int, Record], list[str], Record | None]:
    """Findings by sample index, warnings, and the description of the judge; None without a judge pass."""
    found = read_judge_pass(folder, kind, _of_categories(task, records, categories))
    return (*judge_findings(found[0]), found[1]) if found else ({}, [], None)


def _not_comparable(task: Task, about: dict[str, Record | None]) -> str:
    """The reasons why the numbers are not comparable with published ones."""
    blip, clip, count = about[_BLIP], about[_CLIP], task.metadata["images_per_prompt"]
    reasons = []
    if blip and not blip["published size"]:
        reasons.append(f"BLIP-VQA reads {blip['side']} pixels, the published one 480")
    if blip and "en_core_web_sm" not in blip["spacy"]:
        reasons.append(f"noun phrases by {blip['spacy']}, not by en_core_web_sm")
    if clip and clip["vision"] != _CLIP_VISION:
        reasons.append("the CLIP model is not ViT-B/32, the published one")
    if count != _IMAGES_PER_PROMPT:
        reasons.append(f"{count} images per prompt instead of {_IMAGES_PER_PROMPT}")
    return "; ".join(reasons)
