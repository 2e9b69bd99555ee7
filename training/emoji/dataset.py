"""Writes the emoji as webdataset shards and held-out splits, in the layouts that training and `eval` read.

The same packages give the same bytes. Every file is renamed into place and `emoji.json` is written last: a
folder that has it is finished, an interrupted run resumes. The images are checked against `splits.json`.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL
from tqdm import tqdm

from open_unitok.core.errors import UserError, did_you_mean
from open_unitok.core.files import write_atomic, write_json
from open_unitok.core.text_files import read_json, read_text

from ..core.text_tokenizer import prompt_lines, train_text_tokenizer
from ..data.tar_files import tar_writer, write_sample
from .packages import STYLES, EmojiImage, package_folders, read_emoji
from .questions import EMOJI_QUESTIONS, evaluation_questions, sample_conversations
from .splits import SIZES, SPLITS, check_sources, load_frozen, pixel_hash, render_emoji, split_of
from .words import EDGES, write_words

_FINISHED = "emoji.json"
_UNFINISHED = "unfinished.json"
_ITEMS = "items.json"  # per split: what `eval` reads about each image
_PACKAGES = ".packages"  # where packages are unpacked, removed at the end
SHARD = 1000  # images per tar
VOCABULARY = 2000  # of the text tokenizer: the captions have 1,700 words
_TEMPLATES = {"category": ["{}"], "style": ["{} style"]}  # prompts of zero-shot classes


def write_emoji(
    out: str | Path,
    size: int = 64,
    packages: Sequence[str | Path] = (),
    styles: Sequence[str] = tuple(STYLES),
    progress: bool = True,
) -> dict[str, Any]:
    """Write the data set below `out`, unless it is finished; returns the content of `emoji.json`.

    Args:
        size: side of the images in pixels, one of `SIZES`.
        packages: folders or files of the npm packages; none: npm fetches them.
        styles: keys of `STYLES`. The splits of a part of the styles are a part of the published ones.

    Raises:
        UserError: the size or a style is not one of them, `out` has other contents, or the packages are not
            available or not the ones that the splits were made of.

    `differing` of the result lists splits of other pixels than the published ones; None for a part of the
    styles, whose pixels are not compared.
    """
    if size not in SIZES:
        raise UserError(f"--size is {size}; it must be {' or '.join(map(str, SIZES))}.")
    _check_styles(styles)
    out, frozen = Path(out), load_frozen()
    wanted = {"size": size, "packages": {s: frozen["packages"][s] for s in STYLES if s in styles}}
    finished = _open_folder(out, wanted)
    if finished is not None:
        return finished
    write_json(out / _UNFINISHED, wanted)
    with package_folders(packages, out / _PACKAGES, styles) as folders:
        images = read_emoji(folders)
        check_sources(images, frozen, folders)
        # Unicode writes names in capitals; people type small letters
        images = [i._replace(emoji=i.emoji._replace(name=i.emoji.name.lower())) for i in images]
        splits: dict[str, list[EmojiImage]] = {split: [] for split in SPLITS}
        # an order of hashes: styles and categories are mixed in every tar
        for image in sorted(images, key=lambda image: hashlib.sha256(image.key.encode()).digest()):
            splits[split_of(image, frozen)].append(image)
        counts = {split: len(group) for split, group in splits.items()}
        if len(folders) == len(STYLES) and counts != frozen["splits"]:
            raise UserError(f"The splits are {counts}, expected {frozen['splits']}: splits.json is damaged.")
        # a held-out split may lack a class, which is then a wrong choice
        classes = {label: sorted({_label(label, image) for image in images}) for label in _TEMPLATES}
        names = sorted({image.emoji.name for image in splits["train"]})
        for split, group in splits.items():
            for label, known in classes.items():
                write_json(out / split / f"{label}.json", _class_list(label, known, group, split))
            write_json(out / split / _ITEMS, _items(group, split, names))
        with tqdm(total=len(images), desc="emoji", unit=" images", disable=not progress) as bar:
            pixels = {
                split: _write_split(out / split, group, names, size, bar) for split, group in splits.items()
            }
        _write_text_tokenizers(out / "text", splits["train"], names)
        write_words(out / "text", [image.emoji.name for image in splits["train"]])
        write_atomic(out / "README.md", _readme(counts, size, folders))
    differing = None  # not known for a part of the styles: the frozen hashes are of all
    if len(folders) == len(STYLES):
        differing = [split for split in SPLITS if pixels[split] != frozen["pixels"][str(size)][split]]
    facts = {**wanted, "images": counts, "pixels": pixels, "differing": differing, "pillow": PIL.__version__}
    write_json(out / _FINISHED, facts)
    (out / _UNFINISHED).unlink(missing_ok=True)
    return facts


def _check_styles(styles: Sequence[str]) -> None:
    """Raise UserError for an unknown style, and for styles whose packages have no list of emoji."""
    for style in styles:
        if style not in STYLES:
            raise UserError(f"--styles: {style!r} is not a style.{did_you_mean(style, STYLES)}")
    if not styles:
        raise UserError(f"--styles is empty: give some of {', '.join(STYLES)}.")
    if {*styles} == {"fluent"}:
        raise UserError("--styles: fluent alone has no list of emoji: add google or twitter.")


def _open_folder(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The facts of a finished folder of the same settings, else None; removes an unfinished one of others."""
    if (out / _FINISHED).exists():
        found = read_json(out / _FINISHED)
        if isinstance(found, dict) and {key: found.get(key) for key in wanted} == wanted:
            if not all((out / split / _ITEMS).exists() for split in SPLITS):
                raise UserError(f"{out} is of an earlier version, without questions; remove it and repeat.")
            names = [item["name"] for item in read_json(out / "train" / _ITEMS)]
            if any(name != name.lower() for name in names):
                raise UserError(
                    f"{out} is of an earlier version, with names in capitals; remove it and repeat."
                )
            if not (out / "text" / EDGES).exists():  # a folder of an earlier version
                write_words(out / "text", names)
            return found
        held = _settings(found) if isinstance(found, dict) else "unknown"
        raise UserError(
            f"{out} holds emoji of other settings ({held}) than {_settings(wanted)}: choose another --out."
        )
    if (out / _UNFINISHED).exists():
        if read_json(out / _UNFINISHED) != wanted:
            for name in (*SPLITS, "text"):
                shutil.rmtree(out / name, ignore_errors=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds files that are not the emoji data set; choose an empty or new folder.")
    return None


def _settings(facts: Mapping[str, Any]) -> str:
    return f"size {facts.get('size')}, {' '.join(facts.get('packages') or [])}"


# ---- splits ------------------------------------------------------------------------------------------------


def _write_split(
    folder: Path, images: Sequence[EmojiImage], names: Sequence[str], size: int, bar: tqdm
) -> str:
    """Write the tars of a split and, if it is held out, its image files; returns its pixel hash."""
    digests = {}
    for number, start in enumerate(range(0, len(images), SHARD)):
        buffer = io.BytesIO()
        with tar_writer(buffer) as writer:
            for image in images[start : start + SHARD]:
                rendered, png = render_emoji(image.file, size), io.BytesIO()
                digests[image.key] = hashlib.sha256(rendered.tobytes()).digest()
                rendered.save(png, "PNG")
                write_sample(writer, image.key, _members(image, png.getvalue(), names))
                if folder.name != "train":
                    _write_missing(folder / "images" / f"{image.key}.png", png.getvalue())
                bar.update()
        _write_missing(folder / _tar_name(number), buffer.getvalue())
    if folder.name != "train":
        # retrieval takes the first caption: the name alone stands for three images of `unseen`
        rows = [{"file": f"images/{i.key}.png", "captions": captions_of(i)[::-1]} for i in images]
        write_json(folder / "captions.json", rows)
    return pixel_hash(digests)


def _tar_name(number: int) -> str:
    return f"emoji-{number:06d}.tar"


def _write_missing(path: Path, content: bytes) -> None:
    """Write a file that an interrupted run has not; one that exists is complete."""
    if not path.exists():
        write_atomic(path, content)


def captions_of(image: EmojiImage) -> list[str]:
    """The captions of an image: its name, and with its style."""
    return [image.emoji.name, f"{image.emoji.name}, {STYLES[image.style].title} style"]


def _members(image: EmojiImage, png: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """The files of a sample: image, captions, and captions with labels and conversations."""
    captions, emoji = captions_of(image), image.emoji
    # an MLLM samples the short one for `data.short_captions` of the samples, so that most name the style
    record = {"captions": captions, "long_caption": captions[1], "short_caption": captions[0]}
    record |= {"name": emoji.name, "style": STYLES[image.style].title}
    record |= {"category": emoji.category, "subcategory": emoji.subcategory, "code_points": emoji.code}
    record["conversations"] = sample_conversations(image, names)
    return {
        "png": png,
        "txt": "".join(caption + "\n" for caption in captions).encode(),
        "json": json.dumps(record, ensure_ascii=False).encode(),
    }


def _class_list(label: str, names: list[str], images: Sequence[EmojiImage], split: str) -> dict[str, Any]:
    """What `eval`'s zero-shot classification and linear probe read: classes, prompts, {file: class}."""
    found: dict[str, Any] = {"classes": names, "templates": _TEMPLATES[label]}
    found["images"] = {file: _label(label, i) for file, i in zip(_image_files(images, split), images)}
    return found if split == "train" else {**found, "train": f"../train/{label}.json"}


def _image_files(images: Sequence[EmojiImage], split: str) -> list[str]:
    """Paths in the folder of the split: held-out images are files, trained ones lie in the tars."""
    places = [f"{_tar_name(n // SHARD)}/" if split == "train" else "images/" for n in range(len(images))]
    return [f"{place}{image.key}.png" for place, image in zip(places, images)]


def _items(images: Sequence[EmojiImage], split: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What `eval` reads: per image its file, prompt and labels, and one question of each kind."""
    return [
        {
            "file": file,
            "prompt": captions_of(image)[1],
            "name": image.emoji.name,
            "style": STYLES[image.style].title,
            "category": image.emoji.category,
            "questions": [question._asdict() for question in evaluation_questions(image, names)],
        }
        for file, image in zip(_image_files(images, split), images)
    ]


def _label(label: str, image: EmojiImage) -> str:
    return image.emoji.category if label == "category" else STYLES[image.style].title


def _write_text_tokenizers(folder: Path, images: Sequence[EmojiImage], names: Sequence[str]) -> None:
    """tokenizer.model of the trained captions, and mllm.model of captions and questions.

    Held-out names are spelt with their pieces.
    """
    captions = [caption for image in images for caption in captions_of(image)]
    lines = captions + prompt_lines(len(captions))
    phrases = [phrase.replace("{} or {}", "or") for kind in EMOJI_QUESTIONS.values() for phrase in kind]
    # repeated, so that BPE merges each phrase into few tokens
    phrases = [*phrases, *sorted({image.emoji.category for image in images})] * (len(captions) // 20 + 1)
    for name, corpus in (("tokenizer", lines), ("mllm", lines + phrases)):
        if not (folder / f"{name}.model").exists():
            write_atomic(folder / f"{name}.model", train_text_tokenizer(corpus, VOCABULARY))


# ---- licences ----------------------------------------------------------------------------------------------

_README = """# Emoji

{total:,} image-caption pairs of {size} x {size} pixels: {counts}. Written by `unitok data emoji`.

The images were composited on white and scaled; nothing else was changed.

{styles}

Captions, categories and code points: emoji-datasource, Copyright Cal Henderson, MIT License. Apple's and
Facebook's images are not used: they have no licence that allows it. Whoever passes the images on, or a model
that reproduces them, names these authors and licences.

## emoji-datasource{fluent}

{licence}"""


def _readme(counts: Mapping[str, int], size: int, folders: Mapping[str, Path]) -> str:
    """Licences and attribution of the images."""
    styles = "\n".join(
        f"- **{p.title}** (npm {p.spec}): {p.attribution}. Licence: {p.licence}."
        for p in map(STYLES.__getitem__, folders)
    )
    listed = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    licence = read_text(next(iter(folders.values())) / "LICENSE").strip() + "\n"
    fluent = " (its text of the MIT License also holds for Fluent Emoji, under Microsoft's copyright)"
    return _README.format(
        total=sum(counts.values()), size=size, counts=listed, styles=styles, licence=licence,
        fluent=fluent if "fluent" in folders else "",
    )  # fmt: skip
