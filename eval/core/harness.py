"""Inference that survives: answers appended to JSON lines, resumed by key, scored only when complete.

A row is keyed by (benchmark, sample index, hash of prompt and image name); the benchmark's own id stands
beside it, since ids repeat in some benchmarks. Rows of the same key, and samples without a row, are found
before scoring.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

Record = dict[str, Any]
# the settings of a drawing, which a model folder may name for itself
SAMPLING_KEYS = ("guidance", "temperature", "top_k", "top_p", "greedy", "guidance_schedule")


@dataclass(frozen=True)
class Settings:
    """What shapes the answers of a run; None = the benchmark's own default."""

    split: str | None = None
    prompt_template: str | None = None  # a name of `annotations.PROMPT_TEMPLATES`
    layout: str | None = None  # "original" or "llava": whose files are read
    max_new_tokens: int | None = None
    images_per_prompt: int | None = None
    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    guidance_schedule: str = "constant"
    seed: int = 0
    limit: int | None = None  # only the first samples, for a quick look
    detector: str | None = None
    image_format: str | None = None  # of drawings: jpg or png
    grid: int | None = None  # drawings from elsewhere: side of each image in a file of 2 x 2 (DPG-Bench)
    crop: str | None = None  # how an image comes to the tokenizer's square: see `crops.CROPS`
    pooling: str | None = None  # what a linear probe reads: see `probe.POOLINGS`
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.layout not in (None, "original", "llava"):
            raise UserError(f"layout is {self.layout!r}; allowed: original, llava.")
        for name in ("max_new_tokens", "images_per_prompt", "limit", "grid"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more.")

    @property
    def decoding(self) -> str:
        """How images are drawn, in words."""
        rise = "" if self.guidance_schedule == "constant" else f" ({self.guidance_schedule})"
        chosen = f"temperature {self.temperature}, top-k {self.top_k}, top-p {self.top_p}"
        return f"guidance {self.guidance}{rise}, {'greedy' if self.greedy else chosen}"


@dataclass(frozen=True)
class Scoring:
    """What shapes the scores, not the answers; "" = the benchmark's own default."""

    scorer: str = ""  # a variant of the scorer by name: see `Benchmark.scorers`
    judge: str = ""  # the name of the model that judges
    judge_url: str = ""
    judge_replay: str = ""  # a file of replies instead of a server
    judge_runs: int = 1
    judge_timeout: float = 60.0
    inception_variant: str = (
        ""  # the Inception network behind FID: see `inception_weights.INCEPTION_VARIANTS`
    )
    inception_weights: str = ""  # its weight file
    reference: str = ""  # real images, or an .npz of their statistics
    lpips_weights: str = ""
    detector_model: str = ""  # a Mask2Former or OWL folder in transformers' layout
    colour_model: str = ""  # a CLIP folder in transformers' layout, which names the colours of boxes
    vqa_model: str = ""  # an image-text folder in transformers' layout

    def __post_init__(self) -> None:
        if self.judge_runs < 1:
            raise UserError(f"judge_runs is {self.judge_runs}; it must be at least 1.")
        if not self.judge_timeout > 0:
            raise UserError(f"judge_timeout is {self.judge_timeout}; it must be more than 0 seconds.")


class Sample(NamedTuple):
    """One thing to ask of a model."""

    index: int  # place in the benchmark, the key
    id: Any  # the benchmark's own id
    prompt: str = ""
    image: Any = None  # a Path, or an `asking.EncodedImage`
    kind: str = ""  # what is to be done, where a benchmark asks for several things
    seed: int = 0
    malformed: str = ""  # why it cannot be asked at all: its annotation is malformed (see `malformed`)

    @property
    def key(self) -> tuple[int, str]:
        picture = self.image.name if self.image else ""
        text = "\0".join((self.kind, self.prompt, picture, str(self.seed)))
        return self.index, hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(NamedTuple):
    """A benchmark read from disk: what to ask, what is true, and what the result has to say about it."""

    samples: list[Sample]
    truth: Any
    metadata: dict[str, Any]  # split, prompt template, decoding, ...: written into the result
    problems: Sequence[str] = ()  # of the files, beyond malformed samples; one line each


def malformed_sample(index: int, name: Any, error: object, image: Path | None = None) -> Sample:
    """In the place of a malformed annotation: a sample that is never asked and counts as wrong.

    Args:
        name: the entry's id where it can be read; else the sample gets a number, "#7".
        image: its image where it is known, so that the questions of one image stay together.
    """
    name = name if isinstance(name, str | int) else f"#{index}"
    return Sample(index, name, "", image, "malformed", malformed=str(error))


def malformed_reasons(samples: Sequence[Sample]) -> list[str]:
    """What is wrong with the malformed annotations, each once however many samples hang on it."""
    return list(dict.fromkeys(s.malformed for s in samples if s.malformed))


class Metric(NamedTuple):
    """One number in its unit ("share", "dB", ...), of n samples, with a 95 % interval if there is one."""

    value: float
    n: int
    interval: list[float] | None = None
    unit: str = "share"


class Scored(NamedTuple):
    """A benchmark's numbers by name, the main one first; what belongs beside them; a row per sample.

    A row has "index", "score" and, where the main number is a statistic of rows, "cluster" (the image) and
    "group": `intervals.STATISTICS[statistic]` makes the main number of them, so two runs can be compared.
    """

    metrics: dict[str, Metric]
    details: dict[str, Any]
    per_sample: list[Record]
    statistic: str = "mean"
    not_comparable: str = ""  # why the numbers must not stand beside published ones
    problems: Sequence[str] = ()  # what has to be said, one line each


Work = Callable[[Any, list[Sample], Path, Task], list[Record]]
JudgePass = Callable[[Task, dict[int, Record], Path, Scoring, str, bool], None]


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, run and scored.

    Attributes:
        needs: "tokenizer" or "mllm".
        load: (data, settings) -> task.
        work: (data, settings) -> what runs a batch: (model, samples, folder, task) -> rows.
        score: (task, rows by index, folder, run.json, scoring) -> numbers; from files alone.
        scorers: the variants of the scorer, the default first.
        files: patterns below the data folder; one that is there means that the benchmark is (for `all`).
        look: (task, rows by index, folder, scoring, device, quiet): lets other models look at a run's
            images and writes what they say (see `looks`), so that `score` needs files alone.
        submit: (task, rows by index, folder, data) -> the files that its server or official tool takes.
    """

    line: str
    needs: str
    load: Callable[[Path, Settings], Task]
    work: Callable[[Path, Settings], Work]
    score: Callable[[Task, dict[int, Record], Path, dict[str, Any], Scoring], Scored]
    batch_size: int
    scorers: tuple[str, ...] = ("official",)
    files: tuple[str, ...] = ()
    submit: Callable[[Task, dict[int, Record], Path, Path], list[Path]] | None = None
    look: JudgePass | None = None


def always(work: Work) -> Callable[[Path, Settings], Work]:
    """The same work whatever the data and settings."""
    return lambda data, settings: work


class Answers(NamedTuple):
    """The rows of a run by sample index, and what is not as it should be."""

    records: dict[int, Record]
    missing: list[int]
    failed: list[int]  # samples whose row says that they could not be asked, such as an unreadable image
    duplicates: int
    unknown: int  # records of samples that this benchmark does not have


class Store:
    """The answers of one run in `folder`, one file per rank, append-only."""

    def __init__(self, folder: str | Path, benchmark: str):
        self.folder, self.benchmark = Path(folder), benchmark
        self.own = self.folder / f"answers-{distributed.rank():05d}.jsonl"
        self.looked_at_end = False

    def records(self) -> Iterator[Record]:
        """Every row on disk, all ranks' files in order; a last line cut off by a kill is passed over."""
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            with open(path, "rb") as file:  # a kill may have left half a character
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        continue
                    try:
                        row = json.loads(line)
                        yield row | {"key": (row["index"], row["prompt_hash"])}
                    except (ValueError, KeyError, TypeError) as error:
                        raise UserError(
                            f"{path}, line {number}, is no answer of ours ({error}). "
                            "Remove the line, and the next run asks again."
                        ) from error

    def done(self) -> set[tuple[int, str]]:
        """The keys that have an answer."""
        return {row["key"] for row in self.records() if row["benchmark"] == self.benchmark}

    def append(self, samples: Sequence[Sample], fields: Sequence[Record]) -> None:
        """Write one row per sample in one go."""
        lines = []
        for sample, more in zip(samples, fields, strict=True):
            index, prompt_hash = sample.key
            row = {"benchmark": self.benchmark, "index": index, "prompt_hash": prompt_hash, "id": sample.id}
            lines.append(json.dumps(row | {"prompt": sample.prompt} | more, ensure_ascii=False) + "\n")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.own.exists() and not self.looked_at_end:
            truncate_partial_line(self.own)
        self.looked_at_end = True
        with open(self.own, "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def gather(self, samples: Sequence[Sample]) -> Answers:
        """Match the rows with the samples; of rows with one key the first counts."""
        wanted = {sample.key for sample in samples}
        rows: dict[int, Record] = {}
        duplicates = unknown = 0
        for row in self.records():
            if row["benchmark"] != self.benchmark or row["key"] not in wanted:
                unknown += 1
            elif row["index"] in rows:
                duplicates += 1
            else:
                rows[row["index"]] = row
        missing = [sample.index for sample in samples if sample.index not in rows]
        failed = sorted(i for i, row in rows.items() if row.get("error"))
        return Answers(rows, missing, failed, duplicates, unknown)


def answer_valid(batch: list[Sample], work: Callable[[list[Sample]], list[Record]]) -> list[Record]:
    """The rows of a batch; a malformed sample's says why, without the model."""
    good = [s for s in batch if not s.malformed]
    rows = iter(work(good) if good else ())
    return [{"text": "", "error": s.malformed} if s.malformed else next(rows) for s in batch]


def truncate_partial_line(path: Path) -> None:
    """Cut off what a kill left after the last newline."""
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        with open(path, "rb+") as file:
            file.truncate(data.rfind(b"\n") + 1)


def answer_samples(
    store: Store,
    samples: Sequence[Sample],
    work: Callable[[list[Sample]], list[Record]],
    batch_size: int,
    quiet: bool = False,
    whole: bool = False,
) -> int:
    """Ask for every sample that has no row yet, this rank's share of them; returns how many were asked.

    In the benchmark's order and in one piece per rank, so that questions about one image meet in a batch
    and it is encoded once.

    Args:
        whole: batches are the same however many ranks there are and wherever a run was killed: one that lacks
            a row is computed again as a whole. For numbers whose last digits depend on the batch around them.
    """
    done = store.done()
    distributed.barrier()  # nobody writes before all have read
    ordered = sorted(samples, key=lambda s: (s.kind, s.index))
    if not whole:
        ordered = [s for s in ordered if s.key not in done]
    rank, world, size = distributed.rank(), distributed.world_size(), batch_size if whole else 1
    pieces = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    pieces = [piece for piece in pieces if any(s.key not in done for s in piece)]
    count = len(pieces)
    mine = [s for piece in pieces[count * rank // world : count * (rank + 1) // world] for s in piece]
    bar = tqdm(
        total=len(mine),
        desc=store.benchmark,
        unit=" samples",
        disable=quiet or not mine or not distributed.is_main(),
    )
    with bar:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            rows = answer_valid(batch, work)
            fresh = [(s, row) for s, row in zip(batch, rows, strict=True) if s.key not in done]
            store.append([s for s, _ in fresh], [row for _, row in fresh])
            bar.update(len(batch))
    distributed.barrier()
    return len(mine)
