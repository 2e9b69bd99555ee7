"""Writes a scene data set in the file formats of real data sets: webdataset shards and a test split.

The same configuration gives the same bytes. Every file is renamed into place, and `scenes.json` is written
last: a folder that has it is finished. An interrupted run resumes; a finished folder of another configuration
is rejected unless `--overwrite` is given.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic, write_json
from open_unitok.core.processes import available_cores, die_with_parent
from open_unitok.core.text_files import read_json

from ..core.config import read_yaml
from ..core.text_tokenizer import train_text_tokenizer
from ..data.tar_files import tar_writer, write_sample
from .benchmark_files import write_attribute_prompts, write_test_split
from .captions import sample_captions, sample_pair_captions, sample_partial_captions, sample_sentences
from .config import QUESTION_KINDS, SceneConfig, with_values
from .questions import SceneQuestion, sample_conversation
from .scene import Scene, render, sample_scene
from .shapes import COLORS, PALE, SHAPES

FINISHED = "scenes.json"
UNFINISHED = "unfinished.json"  # the configuration of a run in progress
PER_PROCESS = 1000  # training scenes for which a process is worth its start
# prompt templates around captions, questions and answers: the text tokenizer must encode them in few tokens
_PROMPT_PIECES = ("USER:", "ASSISTANT:", " Generate an image based on this description.", "<unconditional>")


def load_config(path: str | Path | None) -> SceneConfig:
    """The default settings, overridden by those of a YAML file.

    Raises:
        UserError: the file is missing or is not a YAML mapping, or a setting is unknown or invalid.
    """
    return with_values(SceneConfig(), read_yaml(path)) if path else SceneConfig()


def write_scenes(
    config: SceneConfig, out: str | Path, overwrite: bool = False, progress: bool = True
) -> bool:
    """Write the data set below `out`; returns False if it was finished before.

    Raises:
        UserError: `out` holds other files, or scenes of other settings.
    """
    out, wanted = Path(out), _as_json(config)
    state = next((out / n for n in (FINISHED, UNFINISHED) if (out / n).exists()), None)
    if state:
        found = _stored_settings(state)
        if found == wanted and state.name == FINISHED:
            write_attribute_prompts(config, out / "test")  # which folders of earlier versions lack
            return False
        if found != wanted:
            _remove_old(out, state, found, wanted, overwrite)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds files that are not a scene data set; choose an empty or new folder.")
    write_json(out / UNFINISHED, {"config": wanted})
    train = config.train if config.split == "test" else 0
    with tqdm(total=train + config.test, desc="scenes", unit=" scenes", disable=not progress) as bar:
        _write_shards(config, out / "train", train, bar.update)
        if train:
            _write_text(config, out / "text")
        write_test_split(config, out / "test", bar.update)
    write_json(out / FINISHED, scenes_description(config))
    (out / UNFINISHED).unlink(missing_ok=True)
    return True


def _as_json(config: SceneConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _stored_settings(state: Path) -> dict[str, Any]:
    """The settings in a state file; settings that were added later have defaults that keep it valid."""
    stored = read_json(state)["config"]
    if "asked" in stored:  # the key in older folders: shares in the order of QUESTION_KINDS
        stored["question_shares"] = dict(zip(QUESTION_KINDS, map(float, stored.pop("asked"))))
    return {**_as_json(SceneConfig()), **stored}


def _remove_old(out: Path, state: Path, found: dict, wanted: dict, overwrite: bool) -> None:
    """Remove scenes of other settings: an unfinished run's always, a finished one's with `overwrite`."""
    differing = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if state.name == FINISHED and not overwrite:
        shown = ", ".join(f"{k} = {found.get(k)!r}, now {wanted.get(k)!r}" for k in differing[:4])
        raise UserError(f"{out} holds scenes of other settings ({shown}); use another --out, or --overwrite.")
    # the marker of a finished folder goes first: a kill in between must not leave half a data set with it;
    # the settings of an unfinished one go last, so that the rest is removed by the next call
    if state.name == FINISHED:
        state.replace(out / UNFINISHED)
    for name in ("train", "text", "test"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    (out / UNFINISHED).unlink()


def scenes_description(config: SceneConfig) -> dict[str, Any]:
    """Contents of `scenes.json`: everything that the object detector of `eval` reads about the images."""
    return {
        "config": asdict(config),
        "size": config.size,
        "grid": config.grid,
        "palette": {name: COLORS[name] for name in config.color_names},
        "outlines": {name: SHAPES[name] for name in config.shape_names},
        "sizes": config.sizes,
        "size_names": config.size_names,
        "textures": config.textures,
        "pale": round(float(PALE), 6),
        "jitter": config.jitter,
        "step": config.step,
        "objects": [config.min_objects, config.max_objects],
        "light": [config.light_min, config.light_max],
        "gradient": config.gradient,
        "held_out": sorted(config.held_out_pairs),
    }


# ---- training shards ---------------------------------------------------------------------------------------


def training_record(config: SceneConfig, index: int) -> tuple[Scene, dict[str, Any]]:
    """Training scene `index` and its `key.json`: captions, conversations and ground truth."""
    scene = sample_scene(config, "train", index)
    # texts have their own generator: changing them does not change the images
    rng = Random(f"{config.seed}/train text/{index}")
    known = config.class_pairs
    # a generator: conversations are sampled after the captions, from the same random numbers
    conversations = (sample_conversation(scene, config, rng, known) for _ in range(config.conversations))
    record = {
        "scene": scene.as_json(),
        "captions": sample_captions(scene, config, rng, config.captions)
        + sample_pair_captions(scene, config, rng)
        + sample_partial_captions(scene, config, rng),
        "conversations": [as_turns(questions) for questions in conversations if questions],
        "held_out": False,
    }
    if config.classes:
        record["label"] = config.class_pairs.index(scene.objects[0].pair)
    return scene, record


def as_turns(questions: list[SceneQuestion]) -> list[dict[str, str]]:
    """A conversation in LLaVA's format, its image before the first question."""
    turns = []
    for number, question in enumerate(questions):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def _write_shards(config: SceneConfig, folder: Path, count: int, progress: Callable[[int], object]) -> None:
    """Write the tars of `count` training scenes that are missing, by one process per core."""
    starts = range(0, count, config.shard)
    shards = [range(start, min(start + config.shard, count)) for start in starts]
    processes = min(available_cores(), len(shards), count // PER_PROCESS)
    write = partial(_write_shard, config, folder)
    if processes < 2 or "fork" not in get_all_start_methods():
        for indices in shards:
            progress(write(indices))
        return
    # the order of the tars in time does not matter: each is a function of its indices
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=die_with_parent) as pool:
        try:
            for written in as_completed([pool.submit(write, indices) for indices in shards]):
                progress(written.result())
        except BaseException:  # also KeyboardInterrupt: do not write the rest first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_shard(config: SceneConfig, folder: Path, indices: range) -> int:
    """Write a tar, unless it exists; returns the number of its scenes."""
    path = folder / f"scenes-{indices.start // config.shard:06d}.tar"
    if not path.exists():  # written atomically: one that exists is complete
        write_atomic(path, _tar(config, indices))
    return len(indices)


def _tar(config: SceneConfig, indices: Iterable[int]) -> bytes:
    """A webdataset tar of some training scenes."""
    buffer = io.BytesIO()
    with tar_writer(buffer) as writer:
        for index in indices:
            scene, record = training_record(config, index)
            text = json.dumps(record, separators=(",", ":")).encode()
            members = {"png": _png(scene), "txt": record["captions"][0].encode(), "json": text}
            write_sample(writer, f"{index:08d}", members)
    return buffer.getvalue()


def _png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return buffer.getvalue()


# ---- text --------------------------------------------------------------------------------------------------


def _write_text(config: SceneConfig, folder: Path) -> None:
    """Write text/train.txt, text/captions.txt and a text tokenizer trained on all texts of the data set."""
    if (folder / "tokenizer.model").exists():  # written last
        return
    # scene indices beyond the training set: these sentences belong to no training image
    scenes = (sample_scene(config, "train", config.train + i) for i in range(config.text_lines))
    plain = list(sample_sentences(config, scenes, Random(f"{config.seed}/text")))
    write_atomic(folder / "train.txt", "".join(line + "\n" for line in plain))
    captions, corpus = [], list(plain)
    for index in range(min(config.train, 3_000)):
        record = training_record(config, index)[1]
        captions.append(record["captions"][0])
        corpus += record["captions"]
        for turns in record["conversations"]:
            corpus += [turn["value"].removeprefix("<image>\n") for turn in turns]
    write_atomic(folder / "captions.txt", "".join(line + "\n" for line in captions))
    # repeated, so that every colour and shape becomes a single token even if the texts rarely name it
    corpus += [*config.color_names, *config.shape_names] * 40
    # repeated, so that BPE merges each template into few tokens
    corpus += [piece.strip() for piece in _PROMPT_PIECES] * 200
    write_atomic(folder / "tokenizer.model", train_text_tokenizer(corpus, config.vocabulary))
