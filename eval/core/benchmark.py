"""The benchmark interface: options, samples, tasks, scores, and the functions of a benchmark module."""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean

Record = dict[str, Any]  # one JSON line: an answer, a judge's finding or a score


class Options(SimpleNamespace):
    """Option values as attributes; `vars(options)` is saved in run.json."""


@dataclass(frozen=True)
class Option:
    """One option of a benchmark: `name` in run.json and Python, `--name` with hyphens on the command line.

    Attributes:
        type: str, int, float or bool (a pair of flags, --name and --no-name).
        scoring: True if it affects the scores only: `unitok eval score` accepts it too. All others affect the
            answers: a run is not resumed with another value.
        minimum: the smallest value allowed.
    """

    name: str
    help: str
    type: Callable[[str], Any] = str
    default: Any = None
    scoring: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None

    def check(self, value: Any) -> Any:
        """Return the value; UserError if it is not allowed."""
        # None means "as published": the benchmark chooses
        if value is None:
            return None
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} is {value!r}." + did_you_mean(value, self.choices))
        # `not >=` instead of `<`: NaN is rejected too
        if self.minimum is not None and not value >= self.minimum:
            raise UserError(f"{self.name} is {value}; it must be at least {self.minimum:g}.")
        return value


class Sample(NamedTuple):
    """One question, prompt or image given to a model."""

    index: int  # position in the benchmark, the key of its records
    id: Any  # the benchmark's own id
    prompt: str = ""
    image: Any = None  # a Path, or an `image_files.Base64Image`
    kind: str = ""  # e.g. "generate" or "reconstruct", in benchmarks with several kinds of samples
    seed: int = 0
    label: int | None = None  # the class, for class-conditional models
    malformed: str = ""  # the error in its annotation: the sample is not answered and counts as wrong

    @property
    def key(self) -> tuple[int, str]:
        """The resume key: index, and a hash of everything that determines the answer."""
        # not the benchmark's id: ids repeat in MME and TextVQA
        name = self.image.name if self.image else ""
        text = "\0".join((self.kind, self.prompt, name, str(self.seed)))
        return self.index, hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(NamedTuple):
    """A benchmark read from disk: samples, ground truth, and metadata for the result."""

    samples: list[Sample]
    truth: Any
    metadata: dict[str, Any]  # split, prompt template, decoding, ...; copied into the result
    problems: Sequence[str] = ()  # warnings about the files other than malformed samples, one line each
    # per sample the id in LLaVA's question file, where it is not that of the release
    aliases: Sequence[Any] = ()
    not_comparable: str = ""  # why numbers over these samples are not comparable with published ones


class Metric(NamedTuple):
    """A value over n samples with its unit ("fraction", "dB", ...) and 95 % interval, if it has one."""

    value: float
    n: int
    interval: list[float] | None = None
    unit: str = "fraction"


class Scored(NamedTuple):
    """Metrics (the main one first), details, and a record per sample.

    A record has "index" and "score". If the main metric is a statistic of the records, they also have
    "cluster" (the image) and "group": `unitok eval compare` recomputes the metric from them with
    `bootstrap.STATISTICS[statistic]`.
    """

    metrics: dict[str, Metric]
    details: dict[str, Any]
    per_sample: list[Record]
    statistic: str = "mean"
    not_comparable: str = ""  # why the numbers are not comparable with published ones
    problems: Sequence[str] = ()  # warnings for the reader, one line each


@dataclass(frozen=True)
class Benchmark:
    """A registry entry; the benchmark's module is imported on first use, so that --help loads no torch.

    The module defines these functions; `judge` and `submit` are optional:

        load(data, settings) -> Task
        answer(model, samples, folder, task) -> one record per sample
        score(task, records by index, folder, run.json, scoring) -> Scored, from files alone
        judge(task, records, folder, scoring, device, quiet): a judge pass over the images of a run
        submit(task, records, folder, data) -> the input files of a challenge server or official tool

    Attributes:
        module: relative to `open_unitok.eval`, e.g. "understanding.pope".
        needs: "tokenizer"; "mllm"; or "generator", which is an MLLM or images of another system.
        files: glob patterns of its files in the data folder, or in folders below it unless it needs only a
            tokenizer; `all` runs the benchmarks with a match.
        options: in addition to `COMMON_OPTIONS`.
        scorers: variants of the scorer, the default first.
    """

    name: str
    module: str
    description: str
    needs: str
    files: tuple[str, ...]
    options: tuple[Option, ...] = ()
    scorers: tuple[str, ...] = ("official",)
    batch_size: int = 64

    @property
    def code(self) -> ModuleType:
        """The benchmark's module."""
        return importlib.import_module(f"open_unitok.eval.{self.module}")

    @property
    def all_options(self) -> tuple[Option, ...]:
        """`COMMON_OPTIONS`, the benchmark's options, and `scorer`."""
        scorer = Option("scorer", "variant of the scorer", default=self.scorers[0], scoring=True)
        return (*COMMON_OPTIONS, *self.options, scorer)

    def resolve(self, given: Mapping[str, Any]) -> tuple[Options, Options]:
        """(settings, scoring): validated option values; options that are not given have their defaults.

        Raises:
            UserError: an unknown option, or a value that is not allowed.
        """
        known = {option.name: option for option in self.all_options}
        for name in given:
            if name not in known:
                raise UserError(f"{self.name} has no option {name!r}." + did_you_mean(name, known))
        settings, scoring = Options(), Options()
        for name, option in known.items():
            value = given.get(name, option.default)
            # the variants differ by benchmark, so the error names the benchmark
            if name == "scorer" and value not in self.scorers:
                raise UserError(f"{self.name}: scorer is {value!r}." + did_you_mean(value, self.scorers))
            setattr(scoring if option.scoring else settings, name, option.check(value))
        return settings, scoring


COMMON_OPTIONS = (
    Option("limit", "run only the first samples", int, minimum=1),
    Option("dtype", "float32, bfloat16 or float16", default="float32"),
)


def malformed_sample(index: int, name: Any, error: object, image: Path | None = None) -> Sample:
    """The sample of a malformed annotation: it is not answered and counts as wrong.

    Args:
        name: the entry's id if it is readable; otherwise the id is "#" and the index.
        image: the image if it is known: questions about one image form one bootstrap cluster.
    """
    name = name if isinstance(name, str | int) else f"#{index}"
    return Sample(index, name, "", image, "malformed", malformed=str(error))


def malformed_reasons(samples: Sequence[Sample]) -> list[str]:
    """The errors of malformed annotations; an error that several samples share is listed once."""
    return list(dict.fromkeys(s.malformed for s in samples if s.malformed))
