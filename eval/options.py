"""Options that several benchmarks of the registry share; loads no torch."""

from .core.benchmark import Option

SPLIT = Option("split", "split, if the folder contains several: mscoco_val2014, aokvqa of POPE, ...")
CROP = Option(
    "crop", "crop to the tokenizer's size: bicubic, lanczos or adm (default: lanczos for classification)"
)
SEED = Option("seed", "seed of the first sample; sample i uses seed + i", int, 0, minimum=0)

QUESTIONS = (
    Option("prompt_template", "short, letter, letter-cn, unanswerable, plain or ocr (default: as published)"),
    Option(
        "max_new_tokens",
        "longest answer in tokens (default: 128 as published, 16 for scenes)",
        int,
        minimum=1,
    ),
)
LAYOUT = Option(
    "layout",
    "layout of the files, if the folder contains several: the release, LLaVA's archive or the hub's data set",
    choices=("original", "llava", "parquet"),
)

SAMPLING = (  # precedence: command line, sampling.json of the model, these defaults
    Option("guidance", "scale of classifier-free guidance; the model's own before the default", float, 5.0),
    Option(
        "guidance_schedule",
        "constant, linear or cosine; the model's own before the default",
        default="constant",
    ),
    Option(
        "guidance_interval",
        "guidance on visual tokens 0 to n + 1 alone, -1: on all; the model's own before the default",
        int,
        -1,
        minimum=-1,
    ),
    Option("temperature", "temperature of code sampling; the model's own before the default", float, 1.0),
    Option("top_k", "number of codes to sample from, 0: all; the model's own before the default", int, 0),
    Option("top_p", "probability mass to sample from; the model's own before the default", float, 1.0),
    Option("greedy", "take the most likely codes; the model's own before the default", bool, False),
    SEED,
)
IMAGES_PER_PROMPT = Option(
    "images_per_prompt", "images per prompt (default: as published, 4 or 10; 1 for scenes)", int, minimum=1
)
IMAGE_FORMAT = Option(
    "image_format", "format of saved images (default: as published)", choices=("jpg", "png")
)
DETECTOR = Option("detector", "scenes (default where DATA has a scenes.json), or none: see --detector-model")

INCEPTION = (
    Option(
        "inception_variant",
        "Inception network of FID: torch-fidelity, pytorch-fid, clean or adm (default: by benchmark)",
        default="",
        scoring=True,
    ),
    Option("inception_weights", "its weight file; required for FID", default="", scoring=True),
)
REFERENCE = Option(
    "reference", "real images (folder or .npz), or an .npz of their statistics", default="", scoring=True
)
CLIP_MODEL = Option(
    "clip_model", "folder of a CLIP model for CLIP score or similarity", default="", scoring=True
)
VQA_MODEL = Option(
    "vqa_model", "folder of an image-text model that judges the images", default="", scoring=True
)

JUDGE = (
    Option("judge", "name of the judge model", default="", scoring=True),
    Option(
        "judge_url",
        "OpenAI-compatible endpoint, such as http://localhost:8000/v1",
        default="",
        scoring=True,
    ),
    Option("judge_replay", "file of replies instead of an endpoint", default="", scoring=True),
    Option("judge_timeout", "seconds to wait for a reply", float, 60.0, scoring=True, minimum=1e-3),
)
