"""What a benchmark is: its options, its samples, its scores, and the functions that its file defines."""

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from open_unitok.core.errors import UserError, did_you_mean

Record = dict[str, Any]  # one JSON line: an answer, a judge's finding or a score


class Options(SimpleNamespace):
    """The values of a benchmark's options as attributes; `vars(options)` is what run.json keeps."""


@dataclass(frozen=True)
class Option:
    """One option: `name` in run.json and Python, `--name` with hyphens on the command line.

    Attributes:
        type: str, int, float or bool (a pair of flags, --name and --no-name).
        scoring: it shapes the scores alone, so that `unitok eval score` takes it too; the others shape the
            answers, and a run with another value is not resumed.
        minimum: the smallest value allowed.
    """

    name: str
    help: str
    type: type = str
    default: Any = None
    scoring: bool = False
    choices: tuple[str, ...] = ()
    minimum: float | None = None

    def check(self, value: Any) -> Any:
        """The value as it is; UserError where it is not allowed."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} is {value!r}." + did_you_mean(value, self.choices))
        if self.minimum is not None and not value >= self.minimum:
            raise UserError(f"{self.name} is {value}; it must be at least {self.minimum:g}.")
        return value


class Sample(NamedTuple):
    """One question, prompt or image given to a model."""

    index: int  # position in the benchmark, the key of its records
    id: Any  # the benchmark's own id
    prompt: str = ""
    image: Any = None  # a Path, or an `image_files.Base64Image`
    kind: str = ""  # what the model does with it, where a benchmark has several kinds
    seed: int = 0
    malformed: str = ""  # why its annotation cannot be used: it is not answered and counts as wrong

    @property
    def key(self) -> tuple[int, str]:
        """Index and a hash of all that decides the answer: ids repeat in MME and TextVQA."""
        name = self.image.name if self.image else ""
        text = "\0".join((self.kind, self.prompt, name, str(self.seed)))
        return self.index, hashlib.sha256(text.encode()).hexdigest()[:16]


class Task(NamedTuple):
    """A benchmark read from disk: its samples, the truth, and what its result records about the run."""

    samples: list[Sample]
    truth: Any
    metadata: dict[str, Any]  # split, prompt template, decoding, ...: written into the result
    problems: Sequence[str] = ()  # of the files, beyond malformed samples; one line each


class Metric(NamedTuple):
    """One number with its unit ("fraction", "dB", ...), over n samples, with its 95 % interval if any."""

    value: float
    n: int
    interval: list[float] | None = None
    unit: str = "fraction"


class Scored(NamedTuple):
    """A benchmark's metrics, the main one first, with details and a record per sample.

    A record has "index", "score" and, where the main metric is a statistic of records, "cluster" (the image)
    and "group": `bootstrap.STATISTICS[statistic]` computes the main metric from them, which is how two runs
    are compared.
    """

    metrics: dict[str, Metric]
    details: dict[str, Any]
    per_sample: list[Record]
    statistic: str = "mean"
    not_comparable: str = ""  # why the numbers are not comparable with published ones
    problems: Sequence[str] = ()  # warnings for the reader, one line each


@dataclass(frozen=True)
class Benchmark:
    """The table entry of one benchmark; its file is imported when it runs, so that help needs no torch.

    The file defines these functions, the last two where the benchmark has such a step:

        load(data, settings) -> Task
        answer(model, samples, folder, task) -> one record per sample
        score(task, records by index, folder, run.json, scoring) -> Scored, from files alone
        judge(task, records, folder, scoring, device, quiet): a judge pass over a run's images
        submit(task, records, folder, data) -> the files that a challenge server or official tool takes

    Attributes:
        module: the benchmark's file below `open_unitok.eval`, such as "understanding.pope".
        needs: "tokenizer"; "mllm", which answers; or "generator", an MLLM or images of another system.
        files: patterns below the data folder; a match means that the benchmark is there (for `all`).
        options: its own, in addition to those of every benchmark.
        scorers: the variants of its scorer, the default first.
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
        """The benchmark's file."""
        return importlib.import_module(f"open_unitok.eval.{self.module}")

    @property
    def all_options(self) -> tuple[Option, ...]:
        """The options of every benchmark, its own, and the variant of its scorer."""
        scorer = Option("scorer", "variant of the scorer", default=self.scorers[0], scoring=True)
        return (*COMMON_OPTIONS, *self.options, scorer)

    def resolve(self, given: Mapping[str, Any]) -> tuple[Options, Options]:
        """(settings, scoring): the values given over the defaults, checked.

        Raises:
            UserError: the benchmark has no such option, or its value is not allowed.
        """
        known = {option.name: option for option in self.all_options}
        for name in given:
            if name not in known:
                raise UserError(f"{self.name} has no option {name!r}." + did_you_mean(name, known))
        settings, scoring = Options(), Options()
        for name, option in known.items():
            value = given.get(name, option.default)
            if name == "scorer" and value not in self.scorers:
                raise UserError(f"{self.name}: scorer is {value!r}." + did_you_mean(value, self.scorers))
            setattr(scoring if option.scoring else settings, name, option.check(value))
        return settings, scoring


COMMON_OPTIONS = (
    Option("limit", "run only the first samples", int, minimum=1),
    Option("dtype", "float32, bfloat16 or float16", default="float32"),
)


def malformed_sample(index: int, name: Any, error: object, image: Path | None = None) -> Sample:
    """Stands in for a malformed annotation: it is not answered and counts as wrong.

    Args:
        name: the entry's id where it can be read; otherwise the sample gets a number, "#7".
        image: its image where it is known, so that the questions of one image stay one cluster.
    """
    name = name if isinstance(name, str | int) else f"#{index}"
    return Sample(index, name, "", image, "malformed", malformed=str(error))


def malformed_reasons(samples: Sequence[Sample]) -> list[str]:
    """What is wrong with the malformed annotations, each reason once however many samples share it."""
    return list(dict.fromkeys(s.malformed for s in samples if s.malformed))
