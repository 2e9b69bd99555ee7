"""An image set of one's own: FD-DINOv2, CMMD and FID against a reference, and CLIP score with its prompts.

FD-DINOv2 (arXiv 2306.04675) follows dgm-eval, CMMD (arXiv 2401.09603) cmmd-pytorch; CLIP score is the mean of
max(100 cos, 0) (arXiv 2104.08718).
"""

from pathlib import Path
from typing import Any

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256
from open_unitok.core.text_files import numbered_lines

from ..core.benchmark import Metric, Options, Record, Sample, Scored, Task
from ..core.generated_images import EXTERNAL, generation_metadata, save_generated_images, unscored_records
from ..core.image_sets import ImageSet, images_of_array, images_of_folder, images_of_run
from ..core.judge_pass import (
    judge_findings,
    read_judge_pass,
    run_judge_pass,
    samples_with_images,
)
from ..core.records import mean_metric
from ..judges import clip_model
from ..metrics import fid, inception_features, set_distances
from ..metrics.inception_features import StoredFeatures
from ..metrics.inception_weights import Features

_PROMPTS = "prompts.txt"
_DINOV2, _CMMD, _CLIP = "dinov2", "cmmd", "clipscore"  # kinds of judge passes
_CLIP_BATCH = 32
_DINOV2_WIDTH = 1024  # of ViT-L/14
_CMMD_VISION = [1024, 24, 14, 336]  # ViT-L/14 at 336 pixels: width, layers, patch and side
_FEW = 10_000


def load(data: Path, settings: Options) -> Task:
    """A sample per line of `prompts.txt`; without it, one sample that stands for all images of --model."""
    path = data / _PROMPTS
    metadata = generation_metadata(settings, "png") | {"split": "image set"}
    if not path.exists():
        return Task([Sample(0, "images", kind="images")], {"data": data, "prompts": False}, metadata)
    # an image is named by the number of its line; blank lines have none
    lines = [(number, line.strip()) for number, line in numbered_lines(path) if line.strip()]
    samples = [
        Sample(k, f"{number:05d}", line, None, "generate", settings.seed + k)
        for k, (number, line) in enumerate(lines[: settings.limit])
    ]
    if not samples:
        raise UserError(f"{path} holds no prompt.")
    return Task(samples, {"data": data, "prompts": True}, metadata | {"split": f"{len(samples)} prompts"})


def answer(model: Any, samples: list[Sample], folder: Path, task: Task) -> list[Record]:
    """Generated images, or the place of the images of another system."""
    if task.truth["prompts"]:
        return save_generated_images(model, samples, folder, task)
    if getattr(model, "kind", "") != EXTERNAL:
        raise UserError(
            f"{task.truth['data']} has no {_PROMPTS}, so --model must be images: a folder of them or an .npz."
        )
    return [{"images": str(model.path)} for _ in samples]


def _sets(task: Task, records: dict[int, Record], out: Path, scoring: Options) -> list[ImageSet]:
    """The images, and those of the reference if there are any."""
    data = task.truth["data"]
    if task.truth["prompts"]:
        sets = [images_of_run(task, records, out)]
    else:
        path = Path(records[0]["images"])
        sets = [images_of_array("samples", path) if path.is_file() else images_of_folder("samples", path)]
    if scoring.reference:
        found = inception_features.reference_images(scoring.reference)
        return sets if found is None else [*sets, found]
    # prompts may come without any reference, for CLIP score alone
    if task.truth["prompts"] and not (data / "images").is_dir():
        return sets
    return [*sets, images_of_folder("reference", data / "images" if (data / "images").is_dir() else data)]


def judge(
    task: Task, records: dict[int, Record], out: Path, scoring: Options, device: str, quiet: bool
) -> None:
    """The features of each network whose weights are given, and the CLIP score of every image."""
    if not records or all(record.get("error") for record in records.values()):
        return
    if scoring.clip_model and task.truth["prompts"]:
        _score_prompts(task, records, out, scoring.clip_model, device, quiet)
    if not (scoring.dinov2_weights or scoring.cmmd_model or scoring.inception_weights):
        return
    sets = _sets(task, records, out, scoring)
    if scoring.inception_weights:
        variant = inception_features.choose_variant(scoring, "torch-fidelity")
        inception_features.extract_inception_features(
            out, variant, scoring.inception_weights, sets, device, quiet
        )
    if scoring.dinov2_weights:
        file = set_distances.find_dinov2_weights(scoring.dinov2_weights)
        about = {"weights": file.name, "fingerprint": sha256(file)}
        inception_features.extract_features(
            out, _DINOV2, about, sets, lambda: set_distances.Dinov2Extractor(file, device), quiet
        )
    if scoring.cmmd_model:
        net = clip_model.ClipModel(scoring.cmmd_model, device, "--cmmd-model")
        inception_features.extract_features(
            out, _CMMD, net.about, sets, lambda: lambda images: Features(net.embed_squares(images)), quiet
        )


def _score_prompts(
    task: Task, records: dict[int, Record], out: Path, folder: str, device: str, quiet: bool
) -> None:
    """CLIP score of every generated image with its prompt."""
    net = clip_model.ClipModel(folder, device, "--clip-model")

    def measure(batch: list[Sample], images: list[Image.Image]) -> list[Record]:
        scores = clip_model.clip_scores(net.embed_images(images), net.embed_texts([s.prompt for s in batch]))
        return [{"clip_score": float(score)} for score in scores]

    samples = samples_with_images(task.samples, records)
    run_judge_pass(out, _CLIP, net.about, samples, records, measure, _CLIP_BATCH, quiet)


# --------------------------------------------------------------------------------------------------- scoring


def score(task: Task, records: dict[int, Record], folder: Path, run: Record, scoring: Options) -> Scored:
    """Every metric whose features are there.

    Raises:
        UserError: there is none; the message names the options.
    """
    metrics: dict[str, Metric] = {}
    details: dict[str, Any] = {}
    problems: list[str] = []
    _add_distance(metrics, details, problems, folder, _DINOV2, "fd_dinov2")
    _add_distance(metrics, details, problems, folder, _CMMD, "cmmd")
    _add_fid(metrics, details, problems, folder, scoring)
    per_sample = unscored_records(task, records)
    if task.truth["prompts"]:
        per_sample = _add_clip_score(metrics, details, problems, task, folder, per_sample, records)
    if not metrics:
        raise UserError(
            f"{folder}: nothing was measured. Run again with --dinov2-weights, --cmmd-model or "
            "--inception-weights and a reference (--reference, or images in DATA), or with --clip-model and "
            f"{_PROMPTS} in DATA; generated images are kept."
        )
    absent = sum(bool(record.get("error")) for record in records.values())
    problems += [f"{absent} images are missing from every metric"] * (absent > 0)
    reason = "an image set and a reference of one's own have no published number"
    return Scored(metrics, details, per_sample, not_comparable=reason, problems=problems)


def _add_distance(
    metrics: dict[str, Metric],
    details: dict[str, Any],
    problems: list[str],
    folder: Path,
    kind: str,
    name: str,
) -> None:
    """Add FD-DINOv2 or CMMD if both sets have features, and warnings."""
    found = [inception_features.read_features(folder, kind, role) for role in ("samples", "reference")]
    samples, reference = found
    if samples is None or reference is None:
        return
    about = inception_features.require_all_features(folder, kind, *found)
    if kind == _DINOV2:
        value = fid.frechet_distance(samples.moments(), reference.moments())
        published = samples.column("pooled").shape[1] == _DINOV2_WIDTH
        network = "DINOv2 ViT-L/14"
    else:
        value = set_distances.cmmd(samples.column("pooled"), reference.column("pooled"))
        published, network = about.get("vision") == _CMMD_VISION, "CLIP ViT-L/14 at 336 pixels"
    metrics[name] = Metric(value, samples.n, None, name.removeprefix("fd_"))
    details[name] = about | {"images": samples.n, "reference images": reference.n}
    if not published:
        problems.append(f"{name}: the network is not {network}, the published one")
    problems += _set_problems(samples, reference, name)


def _set_problems(samples: StoredFeatures, reference: StoredFeatures, name: str) -> list[str]:
    """Warnings about small sets and unreadable images."""
    few = min(samples.n, reference.n)
    problems = [f"{name}: {few} images are few, so the value is too high"] * (few < _FEW)
    problems += inception_features.unreadable_note(samples, "images")
    return problems + inception_features.unreadable_note(reference, "reference images")


def _add_fid(
    metrics: dict[str, Metric], details: dict[str, Any], problems: list[str], folder: Path, scoring: Options
) -> None:
    """Add FID, KID and Inception Score if there are Inception features of both sets."""
    variant = inception_features.choose_variant(scoring, "torch-fidelity")
    samples = inception_features.read_inception_features(folder, variant, "samples")
    others = inception_features.read_inception_features(folder, variant, "reference")
    if samples is None or (others is None and not scoring.reference.endswith(".npz")):
        return
    if others is not None:
        reference = (others.moments(), "images")
    else:
        reference = inception_features.reference_moments(scoring.reference, folder, variant)
    inception_features.require_all_features(folder, f"inception-{variant}", samples, others)
    found = inception_features.feature_distances(folder, variant, samples, reference, others=others)
    metrics |= found.metrics
    details["fid"] = found.details
    problems += found.problems


def _add_clip_score(
    metrics: dict[str, Metric],
    details: dict[str, Any],
    problems: list[str],
    task: Task,
    folder: Path,
    per_sample: list[Record],
    records: dict[int, Record],
) -> list[Record]:
    """Add the mean CLIP score if there is a judge pass; returns the records with their scores."""
    found = read_judge_pass(folder, _CLIP, samples_with_images(task.samples, records))
    if found is None:
        return per_sample
    judged, notes = judge_findings(found[0])
    # a missing image counts as 0, so that a failed one cannot raise the mean
    values = [float(judged.get(s.index, {}).get("clip_score", 0.0)) for s in task.samples]
    metrics["clip_score"] = mean_metric(values, [s.prompt for s in task.samples], "score")
    details["clip_score"] = found[1]
    without = len(values) - len(judged)
    problems += notes + [f"{without} prompts have no image with a CLIP score (counted as 0)"] * (without > 0)
    return [
        row | {"score": value, "group": "", "cluster": row["prompt"]}
        for row, value in zip(per_sample, values)
    ]
