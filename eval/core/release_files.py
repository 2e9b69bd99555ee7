"""The files of benchmarks as they are released, and where they lie in the layouts that people have.

A file is searched by name in the given folder and up to three folders below, the nearest first: zip files are
unpacked into folders of their own, and a repository keeps its data somewhere inside.
"""

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.image_names import find_sibling

from .benchmark import Benchmark, Options
from .parquet import holds_parquet

DEPTH = 3  # folders below the given one that are searched
_MANY = 64  # more folders than this hold images (ImageNet, ScienceQA), not release files
# folders of answers in LLaVA's archive, MME's tool, ours; their files are named as the questions'
_RESULTS = frozenset({
    "answers", "answersupload", "results", "evaltool", "submission", "judgepasses", "macosx", "pycache",
})  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
LAYOUTS = ("original", "llava", "parquet")
MME_TASK_FOLDERS = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
# T2I-CompBench's other categories are judged by a detector that transformers lacks
COMPBENCH_CATEGORIES = ("color", "shape", "texture", "non_spatial")
WISE_FILES = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")


class Release(NamedTuple):
    """Glob patterns of a benchmark's files, and names of its folder (letters and digits, lower case)."""

    original: tuple[str, ...]  # as released
    llava: tuple[str, ...] = ()  # in LLaVA's evaluation archive
    folders: tuple[str, ...] = ()  # besides the benchmark's own name


# the loaders and `unitok eval run all` use the same patterns
RELEASES = {
    "vqav2": Release(("v2_OpenEnded_*_questions.json",), ("*vqav2*.jsonl",), ("vqa", "vqa2")),
    "gqa": Release(("*_balanced_questions.json", "*_all_questions.json"), ("*gqa*.jsonl",)),
    "textvqa": Release(("TextVQA_0.5.1_*.json",), ("*textvqa*.jsonl",)),
    "pope": Release(("*_pope_*.json",), ("*pope*.jsonl",)),
    "mme": Release(
        tuple(f"{task}/{inner}*.txt" for task in MME_TASK_FOLDERS for inner in ("", "questions_answers_YN/")),
        ("llava_mme*.jsonl",),
        ("mmebenchmark", "mmebenchmarkreleaseversion"),
    ),
    "mmvet": Release(("mm-vet.json",), ("*mm-vet*.jsonl",)),
    "vizwiz": Release(
        ("val.json", "test.json", "train.json"), ("llava_test*.jsonl", "llava_val*.jsonl"), ("vizwizvqa",)
    ),
    "seedbench": Release(("SEED-Bench.json",), ("*seed*.jsonl",), ("seed",)),
    "scienceqa": Release(("problems.json",), ("llava_*CQM-A.json",), ("sqa",)),
    "mmbench": Release(("mmbench*.tsv", "MMBench*.tsv"), (), ("mmbenchen", "mmbenchcn")),
    "ai2d": Release(()),
    "mmstar": Release(("*MMStar*.tsv",)),
    "realworldqa": Release(()),
    "mmmu": Release(("Accounting/validation-*.parquet",)),
    "chartqa": Release(
        tuple(f"{split}_{kind}.json" for split in ("test", "val") for kind in ("human", "augmented")),
        (),
        ("chartqadataset",),
    ),
    "ocrbench": Release(("OCRBench.json",)),
    "geneval": Release(("evaluation_metadata.jsonl",)),
    "genai_bench": Release(("genai_skills.json",), (), ("genaibench527", "genaibench1600")),
    "dpg_bench": Release(("dpg_bench.csv",), (), ("dpg",)),
    "wise": Release(WISE_FILES),
    "t2i_compbench": Release(
        tuple(f"{name}_val.txt" for name in COMPBENCH_CATEGORIES), (), ("t2icompbench",)
    ),
    "mjhq": Release(("meta_data.json",), (), ("mjhq30k",)),
    "imagenet_generation": Release(("VIRTUAL_imagenet*.npz",)),
}


def release_patterns(name: str) -> tuple[str, ...]:
    """The patterns of both layouts of a benchmark."""
    return (*RELEASES[name].original, *RELEASES[name].llava)


# ------------------------------------------------------------------------------------------------- searching


def walk_folders(root: Path, skipped: Collection[str] = (), depth: int = DEPTH) -> Iterator[list[Path]]:
    """Yield the folders at each depth below `root`, `root` first; links are followed.

    Args:
        skipped: simplified names of folders that are left out.
    """
    level = [root]
    for _ in range(depth + 1):
        yield level
        below: list[Path] = []
        for folder in level:
            inside = _folders_of(folder)
            if len(inside) <= _MANY:
                below += [f for f in inside if _simplify(f.name) not in _RESULTS.union(skipped)]
        level = below


def _folders_of(folder: Path) -> list[Path]:
    """The folders in a folder, sorted; hidden ones are left out."""
    try:
        # scandir knows the type of an entry without a call per file: an image folder has 40,000
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError:  # not readable by this user
        return []
    return [folder / name for name in sorted(names)]


def _simplify(name: str) -> str:
    """Letters and digits in lower case: mm-vet, MM-Vet and mm_vet are one name."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _folder_names(name: str) -> set[str]:
    """The simplified names that the folder of a benchmark may have."""
    return {_simplify(name), *(RELEASES[name].folders if name in RELEASES else ())}


def _other_folders(patterns: Collection[str]) -> set[str]:
    """Folder names of the benchmarks that have none of these patterns: their files are not ours."""
    return {
        folder
        for name in RELEASES
        if not set(patterns) & set(release_patterns(name))
        for folder in _folder_names(name)
    }


def _search(
    root: Path, patterns: Sequence[str], depth: int = DEPTH, in_others: bool = False
) -> Iterator[list[Path]]:
    """Yield the matches of the patterns at each depth that has some, the nearest first."""
    for folders in walk_folders(root, () if in_others else _other_folders(patterns), depth):
        found = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
        # hidden: macOS writes ._name beside name
        if found := sorted({path for path in found if not path.name.startswith(".")}):
            yield found


def find_files(data: Path, patterns: Sequence[str], in_others: bool = False) -> list[Path]:
    """All files in or below `data`, or beside it if it is a file, that match a pattern, the nearest first.

    Args:
        in_others: also in folders that have the name of another benchmark.
    """
    root = data if data.is_dir() else data.parent
    return [path for level in _search(root, patterns, in_others=in_others) for path in level]


def holds_files(data: Path, patterns: Sequence[str], depth: int = DEPTH) -> bool:
    """Whether a file in `data`, or `data` itself, matches a pattern."""
    if data.is_file():
        return _is_named(data, patterns)
    return next(_search(data, patterns, depth), None) is not None


def _is_named(file: Path, patterns: Sequence[str]) -> bool:
    """Whether a file has a name of the patterns."""
    return any(fnmatch.fnmatch(file.name, Path(pattern).name) for pattern in patterns)


def find_file(
    data: Path, patterns: Sequence[str], what: str, split: str | None = None, default: str = ""
) -> Path:
    """The one file in or below `data` that matches a pattern and has `split` in its name.

    Args:
        data: a folder, or the file itself.
        what: the kind of file, for the error text.
        default: part of the file name that selects one of several files if `split` is None.

    Raises:
        UserError: no file matches, or several.
    """
    if data.is_file():
        if _is_named(data, patterns):
            return data
        data = data.parent
    levels = list(_search(data, patterns))
    names = ", ".join(str(path.relative_to(data)) for level in levels for path in level)
    if split:
        levels = [kept for level in levels if (kept := [p for p in level if split in p.name])]
    # copies deeper down do not count
    found = levels[0] if levels else []
    # the default decides only between several files: a lone file of another name is taken
    if default and not split and len(found) > 1:
        found = [path for path in found if default in path.name]
    if len(found) != 1:
        wanted = f"{what} ({' or '.join(patterns)}){f' of split {split}' if split else ''}"
        place = f"found {names}. Choose one with --split."
        if not names:
            place = f"found nothing here or up to {DEPTH} folders below. {describe_contents(data, patterns)}"
        raise UserError(f"{data}: expected one {wanted}, {place}")
    return found[0]


def find_beside(data: Path, file: Path, name: str) -> Path:
    """The file `name` next to `file`, else the nearest one below `data`, else its place beside `file`."""
    beside = file.with_name(name)
    return beside if beside.exists() else (find_files(data, [name]) or [beside])[0]


def detect_layout(data: Path, settings: Options, original: Sequence[str], llava: Sequence[str]) -> str:
    """One of `LAYOUTS`: the `layout` option, else the first that is found in `data`.

    Raises:
        UserError: `data` has files of no layout.
    """
    patterns = {"original": tuple(original), "llava": tuple(llava)}
    if settings.layout is not None:
        return settings.layout
    for layout in patterns:
        if holds_files(existing(data), patterns[layout]):
            return layout
    if holds_parquet(data):
        return "parquet"
    raise wrong_place(data, patterns["original"], patterns["llava"])


# ------------------------------------------------------------------------------------- folders of benchmarks


def benchmark_data(data: str | Path, benchmark: Benchmark) -> Path:
    """The folder or file of one benchmark: `data` itself, or the folder of the benchmark's name in it."""
    data = existing(data)
    own = data / benchmark.name
    if data.is_file() or holds_benchmark(data, benchmark, depth=0):
        # a folder of the very name first: images may lie beside it
        return own if own.is_dir() and holds_benchmark(own, benchmark) else data
    named = [data] if _simplify(data.name) in _folder_names(benchmark.name) else []
    named += named_folders(data, benchmark.name)
    # a named folder without files only if the files are nowhere else: its error says what is missing
    candidates = [folder for folder in (*named, data) if holds_benchmark(folder, benchmark)] + named
    return candidates[0] if candidates else data


def named_folders(data: Path, name: str) -> list[Path]:
    """The folders below `data` that have a benchmark's name, the nearest first."""
    levels = list(walk_folders(data))[1:]
    named = [f for level in levels for f in level if _simplify(f.name) in _folder_names(name)]
    # --out may lie in the data folder: a run's own folder is no data
    return [folder for folder in named if not (folder / "run.json").exists()]


def holds_benchmark(data: Path, benchmark: Benchmark, depth: int = DEPTH) -> bool:
    """Whether `data` has files of the benchmark."""
    # any folder of images will do for some benchmarks of a tokenizer: its name tells which one it is for
    if benchmark.needs == "tokenizer":
        if data.is_dir() and data.name == benchmark.name and any(data.iterdir()):
            return True
        depth = 0
    # tables of the hub do not tell by their names what they hold: the folder has to
    named = benchmark.needs == "mllm" and _simplify(data.name) in _folder_names(benchmark.name)
    if named and holds_parquet(data):
        return True
    return holds_files(data, benchmark.files, depth)


def image_folders(data: Path, file: Path, names: Sequence[str]) -> list[Path]:
    """The folders of the given names near an annotation file, the nearest first, then its own folder."""
    root = data if data.is_dir() else data.parent
    above = file.parent.parent
    near = [base / name for base in (file.parent, root, above) for name in names]
    wanted = {name.lower() for name in names}
    below = [f for level in walk_folders(root) for f in level if f.name.lower() in wanted]
    return list(dict.fromkeys([*(f for f in (*near, *below) if f.is_dir()), file.parent, root]))


def image_finder(folders: Sequence[Path], suffixes: Sequence[str] = ("",)) -> Callable[[str], Path]:
    """Returns name -> the path in the first folder that has it, with the first suffix that fits.

    A missing image gets its place in the first folder: it is reported when it is read.
    """
    places = [(folder, suffix) for folder in folders for suffix in suffixes]

    def find(name: str) -> Path:
        for i, (folder, suffix) in enumerate(places):
            if (path := folder / f"{name}{suffix}").is_file():
                # images of a benchmark lie in one folder: ask it first for the next one
                places.insert(0, places.pop(i))
                return path
        # a suffix in capitals
        for folder, suffix in places:
            path = folder / f"{name}{suffix}"
            if path.suffix and path.parent.is_dir() and (other := find_sibling(path, (path.suffix.lower(),))):
                return other
        return folders[0] / f"{name}{suffixes[0] or (suffixes[1] if len(suffixes) > 1 else '')}"

    return find


# --------------------------------------------------------------------------------------------------- errors


def wrong_place(data: Path, original: Sequence[str], llava: Sequence[str] = ()) -> UserError:
    """The error for `data` without files of a benchmark: what was looked for, what is there, what to do."""
    wanted = f"neither {' nor '.join(_shortened(original))} (the release)"
    if llava:
        wanted += f", nor {' nor '.join(_shortened(llava))} (LLaVA's evaluation archive), nor parquet files"
    return UserError(
        f"{data}: found no files of this benchmark: {wanted}, here or up to {DEPTH} folders below. "
        f"{describe_contents(data, (*original, *llava))}"
    )


def _shortened(patterns: Sequence[str]) -> list[str]:
    """The first few patterns."""
    return [*patterns[:3], *(["..."] if len(patterns) > 3 else [])]


def describe_contents(data: Path, patterns: Sequence[str]) -> str:
    """What lies in `data` instead of the files wanted, and what to do about it."""
    if data.is_file():
        if _is_archive(data.name):
            return "Unpack it first, and pass the folder."
        for folder in data.resolve().parents[:3]:
            if holds_files(folder, patterns, 0):
                return f"Pass {folder} instead."
        return "It is another file."
    names = sorted(p.name + "/" * p.is_dir() for p in data.iterdir() if not p.name.startswith("."))
    inside = [p.name for level in walk_folders(data, depth=2) for f in level for p in f.iterdir()]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    parts = [f"There: {', '.join(names[:5])}{more}." if names else "The folder is empty."]
    if archives := sorted({name for name in inside if _is_archive(name)}):
        parts.append(f"Unpack {', '.join(archives[:3])} first.")
    if parquet := sorted({name for name in inside if name.endswith(".parquet")}):
        parts.append(f"It holds parquet files, such as {parquet[0]}.")
    others = [name for name in RELEASES if not set(patterns) & set(release_patterns(name))]
    if known := [name for name in others if holds_files(data, release_patterns(name), 2)]:
        parts.append(f"These are files of {', '.join(known)}.")
    for folder in data.resolve().parents[:2]:
        if holds_files(folder, patterns, 0):
            parts.append(f"Pass {folder} instead.")
            break
    return " ".join(parts)


def _is_archive(name: str) -> bool:
    """Whether a file name is that of an archive."""
    return name.lower().endswith(_ARCHIVES) and not name.lower().endswith((".nii.gz", ".json.gz"))
