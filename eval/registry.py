"""The benchmark registry. A new benchmark is a module with `load`, `answer` and `score`, and an entry here.

Entries name their modules as strings: `unitok eval run --help` lists every benchmark and its options without
loading torch, and a run imports only the modules of its benchmarks.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError, did_you_mean

from .core.benchmark import Benchmark, Option
from .core.release_files import (
    benchmark_data,
    describe_contents,
    holds_benchmark,
    named_folders,
    release_patterns,
)
from .options import (
    CLIP_MODEL,
    CROP,
    DETECTOR,
    IMAGE_FORMAT,
    IMAGES_PER_PROMPT,
    INCEPTION,
    JUDGE,
    LAYOUT,
    QUESTIONS,
    REFERENCE,
    SAMPLING,
    SPLIT,
    VQA_MODEL,
)

# --------------------------------------------------------------------------------------------- the benchmarks

_TABLE = (
    # a tokenizer is sufficient
    Benchmark(
        name="reconstruction",
        module="tokenizer.reconstruction",
        description="rFID, PSNR, SSIM, LPIPS and codebook usage of encode-decode on images",
        needs="tokenizer",
        files=("scenes.json", "val", "ILSVRC/Data/CLS-LOC/val"),
        options=(
            CROP,
            *INCEPTION,
            Option(
                "lpips_weights", "the file lpips_with_vgg.pth; required for LPIPS", default="", scoring=True
            ),
        ),
        scorers=("skimage7", "gauss11", "llamagen", "torchmetrics"),
    ),
    Benchmark(
        name="zeroshot",
        module="tokenizer.zeroshot",
        description="zero-shot classification by the tokenizer's image and text embeddings",
        needs="tokenizer",
        files=(
            "scenes.json",
            "classes.json",
            "classes.txt",
            "val/n[0-9]*",
            "ILSVRC/Data/CLS-LOC/val",
            "n[0-9]*",
            "LOC_val_solution.csv",
        ),
        options=(SPLIT, CROP),
    ),
    Benchmark(
        name="retrieval",
        module="tokenizer.retrieval",
        description="image-text retrieval among a pool of captions by the tokenizer's embeddings",
        needs="tokenizer",
        files=("scenes.json", "captions.json"),
        options=(CROP, Option("pool", "candidates per query, 0: all", int, 100, minimum=0)),
    ),
    Benchmark(
        name="linear_probe",
        module="tokenizer.linear_probe",
        description="classification by one linear layer on frozen features",
        needs="tokenizer",
        files=("train/n[0-9]*", "ILSVRC/Data/CLS-LOC/train"),
        options=(CROP, Option("pooling", "features: embedding (default), quantised or latents")),
        scorers=("lbfgs", "sgd"),
    ),
    Benchmark(
        name="emoji_reconstruction",
        module="tokenizer.emoji_reconstruction",
        description="whether the nearest original of a reconstruction is the same emoji",
        needs="tokenizer",
        files=("items.json",),
    ),
    # questions about images
    Benchmark(
        name="emoji_questions",
        module="understanding.emoji_questions",
        description="name, style and category of emoji, and which of two names is right",
        needs="mllm",
        files=("items.json",),
        options=QUESTIONS,
        batch_size=1024,
    ),
    Benchmark(
        name="vqav2",
        module="understanding.vqav2",
        description="open questions with ten answers each",
        needs="mllm",
        files=("scenes.json", *release_patterns("vqav2")),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("lmms", "official", "official-2018"),
        batch_size=1024,
    ),
    Benchmark(
        name="gqa",
        module="understanding.gqa",
        description="compositional questions about real images",
        needs="mllm",
        files=release_patterns("gqa"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("official", "lenient"),
        batch_size=1024,
    ),
    Benchmark(
        name="textvqa",
        module="understanding.textvqa",
        description="questions about text in images, with the OCR words in the prompt or without",
        needs="mllm",
        files=release_patterns("textvqa"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("m4c",),
        batch_size=1024,
    ),
    Benchmark(
        name="pope",
        module="understanding.pope",
        description="object hallucination: is an object in the image",
        needs="mllm",
        files=("scenes.json", *release_patterns("pope")),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("official", "strict"),
        batch_size=1024,
    ),
    Benchmark(
        name="mme",
        module="understanding.mme",
        description="fourteen tasks of yes or no, two questions per image",
        needs="mllm",
        files=release_patterns("mme"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    Benchmark(
        name="mmvet",
        module="understanding.mmvet",
        description="open answers graded by a judge model",
        needs="mllm",
        files=release_patterns("mmvet"),
        options=(
            LAYOUT,
            *QUESTIONS,
            *JUDGE,
            Option("judge_runs", "number of gradings of every answer", int, 1, scoring=True, minimum=1),
        ),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    Benchmark(
        name="vizwiz",
        module="understanding.vizwiz",
        description="questions of blind people, some without an answer",
        needs="mllm",
        files=release_patterns("vizwiz"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("m4c",),
        batch_size=1024,
    ),
    Benchmark(
        name="seedbench",
        module="understanding.seedbench",
        description="twelve dimensions with four options, images and videos",
        needs="mllm",
        files=release_patterns("seedbench"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    Benchmark(
        name="scienceqa",
        module="understanding.scienceqa",
        description="school questions with options, half of them with an image",
        needs="mllm",
        files=release_patterns("scienceqa"),
        options=(SPLIT, LAYOUT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    Benchmark(
        name="mmbench",
        module="understanding.mmbench",
        description="twenty abilities with options, each question once per rotation of its options",
        needs="mllm",
        files=release_patterns("mmbench"),
        options=(SPLIT, *QUESTIONS),
        scorers=("static",),
        batch_size=1024,
    ),
    Benchmark(
        name="ai2d",
        module="understanding.ai2d",
        description="questions with options about diagrams",
        needs="mllm",
        files=release_patterns("ai2d"),
        options=(SPLIT, *QUESTIONS),
        scorers=("lmms",),
        batch_size=1024,
    ),
    Benchmark(
        name="mmstar",
        module="understanding.mmstar",
        description="questions with options that cannot be answered without the image",
        needs="mllm",
        files=release_patterns("mmstar"),
        options=(SPLIT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    Benchmark(
        name="realworldqa",
        module="understanding.realworldqa",
        description="questions about photos of daily life, with options or short answers",
        needs="mllm",
        files=release_patterns("realworldqa"),
        options=(SPLIT, *QUESTIONS),
        scorers=("lmms",),
        batch_size=1024,
    ),
    Benchmark(
        name="mmmu",
        module="understanding.mmmu",
        description="college questions of thirty subjects about one or more images",
        needs="mllm",
        files=release_patterns("mmmu"),
        options=(SPLIT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=256,
    ),
    Benchmark(
        name="chartqa",
        module="understanding.chartqa",
        description="questions about charts; numbers may be off by a twentieth",
        needs="mllm",
        files=release_patterns("chartqa"),
        options=(SPLIT, *QUESTIONS),
        scorers=("relaxed",),
        batch_size=1024,
    ),
    Benchmark(
        name="ocrbench",
        module="understanding.ocrbench",
        description="questions about text in images, from single words to forms and formulas",
        needs="mllm",
        files=release_patterns("ocrbench"),
        options=(SPLIT, *QUESTIONS),
        scorers=("official", "lmms"),
        batch_size=1024,
    ),
    # images from prompts
    Benchmark(
        name="geneval",
        module="generation.geneval",
        description="objects, number, colours and positions of generated images against their prompts",
        needs="generator",
        files=("scenes.json", *release_patterns("geneval")),
        options=(
            *SAMPLING,
            IMAGES_PER_PROMPT,
            DETECTOR,
            Option("detector_model", "folder of a Mask2Former or OWL model", default="", scoring=True),
            Option("colour_model", "folder of a CLIP model that names colours", default="", scoring=True),
        ),
        batch_size=128,
    ),
    Benchmark(
        name="positions",
        module="generation.positions",
        description="one object of a colour at a named position (scenes)",
        needs="generator",
        files=("scenes.json",),
        options=(*SAMPLING, IMAGES_PER_PROMPT, DETECTOR),
        batch_size=128,
    ),
    Benchmark(
        name="scene_attributes",
        module="generation.scene_attributes",
        description="one object of a named size or texture (scenes)",
        needs="generator",
        files=("test/attributes.jsonl",),
        options=(*SAMPLING, IMAGES_PER_PROMPT),
        batch_size=128,
    ),
    Benchmark(
        name="scene_classes",
        module="generation.scene_classes",
        description="one object of each class, for class-conditional models (scenes)",
        needs="generator",
        files=("test/classes.jsonl",),
        options=(*SAMPLING, IMAGES_PER_PROMPT, DETECTOR),
        batch_size=128,
    ),
    Benchmark(
        name="emoji",
        module="generation.emoji",
        description="whether the nearest original of a generated image is the prompt's emoji",
        needs="generator",
        files=("items.json",),
        options=(*SAMPLING, IMAGES_PER_PROMPT),
        batch_size=128,
    ),
    Benchmark(
        name="genai_bench",
        module="generation.genai_bench",
        description="VQAScore of generated images, by skill (GenAI-Bench)",
        needs="generator",
        files=release_patterns("genai_bench"),
        options=(*SAMPLING, IMAGE_FORMAT, VQA_MODEL),
    ),
    Benchmark(
        name="dpg_bench",
        module="generation.dpg_bench",
        description="questions about images of dense prompts (DPG-Bench)",
        needs="generator",
        files=release_patterns("dpg_bench"),
        options=(
            *SAMPLING,
            IMAGES_PER_PROMPT,
            IMAGE_FORMAT,
            Option("grid", "external images are 2 x 2 grids of squares of this side", int, minimum=1),
            VQA_MODEL,
        ),
    ),
    Benchmark(
        name="mjhq",
        module="generation.mjhq",
        description="FID of generated images against MJHQ-30K",
        needs="generator",
        files=release_patterns("mjhq"),
        options=(*SAMPLING, IMAGE_FORMAT, *INCEPTION, REFERENCE),
    ),
    Benchmark(
        name="imagenet_generation",
        module="generation.imagenet_generation",
        description="gFID, sFID, IS, precision and recall of class-conditional images (ADM)",
        needs="generator",
        files=release_patterns("imagenet_generation"),
        options=(*SAMPLING, IMAGE_FORMAT, *INCEPTION, REFERENCE),
    ),
    Benchmark(
        name="wise",
        module="generation.wise",
        description="WiScore of images whose prompts take world knowledge, by a judge model",
        needs="generator",
        files=release_patterns("wise"),
        options=(*SAMPLING, IMAGE_FORMAT, *JUDGE),
        scorers=("official", "lmms"),
    ),
    Benchmark(
        name="t2i_compbench",
        module="generation.t2i_compbench",
        description="colours, shapes, textures and relations of generated images (T2I-CompBench)",
        needs="generator",
        files=release_patterns("t2i_compbench"),
        options=(
            *SAMPLING,
            IMAGES_PER_PROMPT,
            IMAGE_FORMAT,
            Option("blip_model", "folder of a BLIP VQA model for BLIP-VQA", default="", scoring=True),
            Option("spacy_model", "spaCy pipeline of noun phrases", default="en_core_web_sm", scoring=True),
            CLIP_MODEL,
        ),
    ),
    Benchmark(
        name="image_set",
        module="generation.image_set",
        description="FD-DINOv2, CMMD and FID against a reference set, CLIP score with the prompts",
        needs="generator",
        files=(),
        options=(
            *SAMPLING,
            IMAGE_FORMAT,
            *INCEPTION,
            REFERENCE,
            Option(
                "dinov2_weights", "weight file of DINOv2 ViT-L/14 for FD-DINOv2", default="", scoring=True
            ),
            Option("cmmd_model", "folder of CLIP ViT-L/14 at 336 pixels for CMMD", default="", scoring=True),
            CLIP_MODEL,
        ),
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name; UserError if there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"There is no benchmark {name!r}." + did_you_mean(name, BENCHMARKS))
    return BENCHMARKS[name]


def detect_benchmarks(data: str | Path) -> list[str]:
    """The names of the benchmarks whose files are in `data`.

    Raises:
        UserError: there are none.
    """
    names = [
        name
        for name, benchmark in BENCHMARKS.items()
        if holds_benchmark(benchmark_data(data, benchmark), benchmark)
    ]
    if not names:
        folders = "".join(f" {line}" for line in incomplete_benchmarks(data))
        raise UserError(
            f"{data} holds no benchmark's files; eval/README.md lists what each one needs.{folders}"
        )
    return names


def incomplete_benchmarks(data: str | Path) -> list[str]:
    """A line for every benchmark that has a folder of its name in `data`, but none of its files."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        folders = named_folders(Path(data), name) if Path(data).is_dir() else []
        if folders and not holds_benchmark(benchmark_data(data, benchmark), benchmark):
            patterns = [pattern for pattern in benchmark.files if pattern != "scenes.json"]
            wanted = ", ".join(patterns[:3]) or "parquet files"
            lines.append(
                f"{name}: {folders[0]} has none of its files ({wanted}). "
                f"{describe_contents(folders[0], patterns)}"
            )
    return lines


def options_of(benchmarks: Iterable[Benchmark], scoring_only: bool = False) -> dict[str, Option]:
    """Name -> option, for all options of these benchmarks."""
    options = (option for benchmark in benchmarks for option in benchmark.all_options)
    return {option.name: option for option in options if option.scoring or not scoring_only}


def select_options(given: Mapping[str, Any], benchmarks: Iterable[Benchmark]) -> dict[str, dict[str, Any]]:
    """Benchmark name -> those of the given options that it has.

    Raises:
        UserError: none of the benchmarks has an option; the message lists those that do.
    """
    chosen = {b.name: {option.name for option in b.all_options} for b in benchmarks}
    for name in given:
        if not any(name in names for names in chosen.values()):
            owners = [b.name for b in BENCHMARKS.values() if name in {o.name for o in b.all_options}]
            raise UserError(
                f"--{name.replace('_', '-')} is not an option of {', '.join(chosen)}; it is one of "
                f"{', '.join(owners)}."
            )
    return {
        name: {option: value for option, value in given.items() if option in names}
        for name, names in chosen.items()
    }
