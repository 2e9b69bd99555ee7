"""Generate and save the images of a benchmark, or read images of another system instead."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import IMAGE_SUFFIXES, is_image_name
from open_unitok.core.text_files import read_json_lines

from .benchmark import Options, Record, Sample, Task
from .image_files import read_sample_image
from .image_sets import images_of_array
from .release_files import walk_folders

JPEG_QUALITY = 75  # Pillow's default, used for the published images
SAMPLING_KEYS = (
    "guidance",
    "temperature",
    "top_k",
    "top_p",
    "greedy",
    "guidance_schedule",
    "guidance_interval",
)
CLASS_CONDITIONAL = "class-conditional"  # the model kind of one that generates images of classes
EXTERNAL = "external images"  # the model kind in run.json if --model is a folder or .npz of images


def generation_metadata(settings: Options, default_format: str) -> dict[str, Any]:
    """The part of a result that describes how images were generated and saved."""
    image_format = settings.image_format or default_format
    return {
        "decoding": describe_sampling(settings),
        "images": f"JPEG of quality {JPEG_QUALITY}" if image_format == "jpg" else "PNG",
        "format": image_format,
    }


def describe_sampling(settings: Options) -> str:
    """The sampling settings in words: guidance scale and schedule, then temperature, top-k and top-p."""
    schedule = "" if settings.guidance_schedule == "constant" else f" ({settings.guidance_schedule})"
    if settings.guidance_interval >= 0:
        schedule += f" on visual tokens 0 to {settings.guidance_interval + 1}"
    sampled = f"temperature {settings.temperature}, top-k {settings.top_k}, top-p {settings.top_p}"
    return f"guidance {settings.guidance}{schedule}, {'greedy' if settings.greedy else sampled}"


def generate_images(model: Any, batch: list[Sample]) -> list[np.ndarray | str]:
    """Per sample a uint8 image (H, W, 3), or an error message."""
    if isinstance(model, ExternalImages):
        return model.load_batch(batch)
    try:
        seeds = [s.seed for s in batch]
        if getattr(model, "kind", "") == CLASS_CONDITIONAL:
            return [np.asarray(p) for p in model.generate_classes([s.label for s in batch], seeds)]
        return [np.asarray(p) for p in model.generate([s.prompt for s in batch], seeds)]
    except UserError as error:
        # one rejected prompt fails the whole batch: generate one by one to isolate it
        if len(batch) == 1:
            return [str(error)]
        return [generate_images(model, [sample])[0] for sample in batch]


def save_generated_images(model: Any, batch: list[Sample], out: Path, task: Task) -> list[Record]:
    """Generate a batch and save it below `out/images` under the samples' ids."""
    records: list[Record] = []
    image_format = task.metadata["format"]
    for sample, result in zip(batch, generate_images(model, batch)):
        if isinstance(result, str):
            records.append({"error": result})
            continue
        path = out / "images" / f"{sample.id}.{image_format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # JPEG only where it is published: compression changes FID and VQAScore
        options = {"quality": JPEG_QUALITY} if image_format == "jpg" else {}
        Image.fromarray(result).save(path, **options)  # pyright: ignore
        records.append({"file": path.relative_to(out).as_posix(), "seed": sample.seed})
    return records


def require_generated_images(task: Task, records: dict[int, Record], folder: Path) -> None:
    """Raise UserError if no image was generated."""
    if not any(records.get(s.index, {}).get("file") for s in task.samples):
        raise UserError(f"{folder}: there is no generated image, so there is nothing to score.")


def unscored_records(task: Task, records: dict[int, Record]) -> list[Record]:
    """Records of scores.jsonl for a benchmark without a score per image, such as FID."""
    return [
        {"index": s.index, "id": s.id, "prompt": s.prompt, "file": records.get(s.index, {}).get("file")}
        for s in task.samples
    ]


def holds_external_images(path: str | Path) -> bool:
    """Whether `path` is an .npz, or a folder of images without config.json, rather than a model."""
    path = Path(path)
    if path.suffix == ".npz":
        return True
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return any(is_image_name(p) for p in path.rglob("*"))


class ExternalImages:
    """Images of another system, used as a model: a folder in the benchmark's layout, or an .npz.

    Args:
        grid: side in pixels of the squares if each file `ID.png` is a 2 x 2 grid of a prompt's images, the
            input format of DPG-Bench's scorer; None = one image per file.

    Raises:
        UserError: an .npz without images.
    """

    kind = EXTERNAL

    def __init__(self, path: Path, device: str = "cpu", grid: int | None = None):
        self.path, self.device, self.grid = path, device, grid
        self.arrays = images_of_array("samples", path) if path.is_file() else None
        self.root = path  # the folder of the images, `path` or one below it
        self._listings: dict[Path, _Listing] = {}
        self._prompts: dict[Path, str | None] = {}
        self.notes: list[str] = []  # problems of the images of the benchmark that is run, for its result

    def check_needs(self, needs: str, benchmark: str) -> None:
        """Raise UserError unless the benchmark scores generated images."""
        if needs != "generator":
            raise UserError(f"{benchmark} needs a model, but {self.path} holds images.")
        if self.grid and self.arrays is not None:
            raise UserError("--grid needs a folder of 2 x 2 images, but --model is an .npz.")

    def describe(self) -> dict[str, Any]:
        """Path and a fingerprint of file names and sizes, for run.json."""
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        # names and sizes, not contents: hashing 50,000 images would take minutes
        text = "\n".join(
            f"{p.name if p == self.path else p.relative_to(self.path)} {p.stat().st_size}" for p in files
        )
        digest = hashlib.sha256(text.encode()).hexdigest()
        notes = {"notes": self.notes} if self.notes else {}
        return {"path": str(self.path), "kind": self.kind, "fingerprint": digest, **notes}

    def load_batch(self, batch: Sequence[Sample]) -> list[np.ndarray | str]:
        """Per sample its image, by index in an array or by id in a folder, or an error message."""
        results: list[np.ndarray | str] = []
        for sample in batch:
            try:
                results.append(self._load(sample))
            except UserError as error:
                results.append(str(error))
        return results

    def refuse_missing(self, benchmark: str, samples: Sequence[Sample]) -> None:
        """Check before the first image is read that most are there.

        Raises:
            UserError: more than half of the images are missing.
        """
        wanted = [s for s in samples if s.kind == "generate" and not s.malformed]
        if self.arrays is None:
            self._find_root(wanted)
        missing = [reason for s in wanted if (reason := self._missing_reason(s))]
        self._note_unused(wanted)
        if 2 * len(missing) > len(wanted):
            amount = "none" if len(missing) == len(wanted) else f"only {len(wanted) - len(missing)}"
            hint = " --images-per-prompt N takes the first N images of each prompt." * (
                "/" in str(wanted[0].id) and self._missing_reason(wanted[0]) == ""
            )
            raise UserError(
                f"{benchmark}: {self.path} holds {amount} of its {len(wanted)} images, the first problem: "
                f"{missing[0]} --limit N scores the first N samples alone.{hint}"
            )

    def _note_unused(self, samples: Sequence[Sample]) -> None:
        """Count the numbered images of the prompts that no sample takes."""
        self.notes = []
        if self.arrays is not None or self.grid:
            return
        # images in a folder per prompt; others may be left out by --limit
        used = {self._find(s) for s in samples if "/" in str(s.id) and not self._missing_reason(s)}
        listings = [self._listing(folder).by_number.values() for folder in {path.parent for path in used}]
        unused = sum(path not in used for numbers in listings for paths in numbers for path in paths)
        if unused:
            self.notes.append(
                f"{unused} images of these prompts are not scored: --images-per-prompt is smaller"
            )

    def _missing_reason(self, sample: Sample) -> str:
        """Why the image of a sample cannot be found, or ""."""
        try:
            if self.arrays is None:
                self._find(sample)
            elif sample.index >= len(self.arrays.names):
                return f"there are only {len(self.arrays.names)} images."
        except UserError as error:
            return str(error)
        return ""

    def _find_root(self, samples: Sequence[Sample]) -> None:
        """Let `root` be the nearest folder with some of the images: they may lie in one of their own."""
        some = samples[:: max(1, len(samples) // 16)]
        for level in walk_folders(self.path, depth=2):
            for folder in level:
                self.root = folder
                if not all(map(self._missing_reason, some)):
                    return
        self.root = self.path

    def _load(self, sample: Sample) -> np.ndarray:
        if self.arrays is not None:
            if sample.index >= len(self.arrays.names):
                raise UserError(f"{self.path} holds only {len(self.arrays.names)} images.")
            return self.arrays.load(sample.index)
        path = self._find(sample)
        image = np.asarray(read_sample_image(path))
        if self.grid is None:
            return image
        return _grid_cell(image, int(str(sample.id).rpartition("/")[2]), self.grid, path)

    def _find(self, sample: Sample) -> Path:
        """The file of a sample; numbers in its id may be written with any number of digits."""
        # ids of DPG-Bench are ITEM/NUMBER; with a grid, the number is the cell
        name = str(sample.id).rpartition("/")[0] if self.grid else str(sample.id)
        *above, last = name.split("/")
        folder = self.root
        for part in above:
            folders = self._listing(folder).folders
            match = folders.get(part) or (folders.get(str(int(part))) if part.isdecimal() else None)
            if match is None:
                raise UserError(f"{folder} has no folder {part}.")
            folder = match
            self._check_prompt(folder, sample)
        found = self._find_in(
            folder, last, sample, bool(above) and (above[-1] == "samples" or len(last) <= 2)
        )
        if len(found) > 1:
            raise UserError(
                f"{folder}: {' and '.join(path.name for path in found)} are the same image: remove one."
            )
        if not found:
            raise UserError(f"{folder} has no image {last} ({', '.join(IMAGE_SUFFIXES[:4])}, ...).")
        return found[0]

    def _find_in(self, folder: Path, name: str, sample: Sample, ordered: bool) -> list[Path]:
        """The files of a folder that may be the image `name`."""
        files = self._listing(folder)
        if name.isdecimal() and ordered:
            # the published scorers take all images of a prompt: the order counts, not the number
            numbers = sorted(files.by_number)
            return files.by_number[numbers[int(name)]] if int(name) < len(numbers) else []
        if name.isdecimal() and 0 in files.by_number and sample.index + 1 == int(name):
            raise UserError(f"{folder} has an image number 0, but the first prompt is number 1: rename them.")
        if exact := files.by_stem.get(name):
            return exact
        if name.isdecimal():
            return files.by_number.get(int(name), [])
        prompt, _, number = name.rpartition("_")  # T2I-CompBench
        return files.by_prompt.get((prompt, int(number)), []) if number.isdecimal() else []

    def _check_prompt(self, folder: Path, sample: Sample) -> None:
        """Compare the prompt with the one that GenEval's scripts keep beside the images."""
        if folder not in self._prompts:
            file = folder / "metadata.jsonl"
            rows = read_json_lines(file, lenient=True)[:1] if file.exists() else []
            prompt = rows[0].get("prompt") if rows and isinstance(rows[0], dict) else None
            self._prompts[folder] = prompt
        prompt = self._prompts[folder]
        if prompt is not None and prompt != sample.prompt:
            raise UserError(
                f"{folder}/metadata.jsonl has the prompt {prompt!r}, the benchmark {sample.prompt!r}: these "
                "are images of another list of prompts."
            )

    def _listing(self, folder: Path) -> "_Listing":
        """The images and folders of a folder, listed once."""
        if folder not in self._listings:
            by_stem: dict[str, list[Path]] = {}
            by_number: dict[int, list[Path]] = {}
            by_prompt: dict[tuple[str, int], list[Path]] = {}
            folders: dict[str, Path] = {}
            entries = sorted(folder.iterdir()) if folder.is_dir() else []
            for path in entries:
                if is_image_name(path):
                    by_stem.setdefault(path.stem, []).append(path)
                    # isdecimal: int() rejects other digits, such as superscripts
                    if path.stem.isdecimal():
                        by_number.setdefault(int(path.stem), []).append(path)
                    prompt, mark, number = path.stem.rpartition("_")
                    if mark and number.isdecimal():
                        by_prompt.setdefault((prompt, int(number)), []).append(path)
                elif path.is_dir():
                    folders[path.name] = path
                    if path.name.isdecimal():
                        folders.setdefault(str(int(path.name)), path)
            self._listings[folder] = _Listing(by_stem, by_number, by_prompt, folders)
        return self._listings[folder]


class _Listing(NamedTuple):
    """Images by name without suffix, by number, by prompt and number; folders by name and by number."""

    by_stem: dict[str, list[Path]]
    by_number: dict[int, list[Path]]
    by_prompt: dict[tuple[str, int], list[Path]]
    folders: dict[str, Path]


def _grid_cell(image: np.ndarray, number: int, side: int, path: Path) -> np.ndarray:
    """Cell `number` of a 2 x 2 grid, in row-major order from 0: uint8 (H, W, 3) -> (side, side, 3)."""
    top, left = side * (number // 2), side * (number % 2)
    if number > 3 or image.shape[0] < top + side or image.shape[1] < left + side:
        height, width = image.shape[:2]
        raise UserError(f"{path}: {width} x {height} pixels have no cell {number + 1} of side {side}.")
    return image[top : top + side, left : left + side]
