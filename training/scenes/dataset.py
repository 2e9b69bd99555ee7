"""Writes seeded scenes of coloured shapes in the file formats of real data sets: shards and a test split.

The same configuration gives the same bytes. Every file is renamed into place, and `scenes.json` comes last: a
folder that has it is finished. A killed run goes on where it stopped; a finished folder of another
configuration is refused unless `--overwrite` is given.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json, write_atomic, write_json

from ..core.config import read
from . import language, test_split
from .config import SceneConfig, with_values
from .scene import Scene, render, sample_scene
from .shapes import COLORS, PALE, SHAPES

__all__ = ["Scene", "SceneConfig", "render", "sample_scene", "write_scenes"]

FINISHED = "scenes.json"
UNFINISHED = "unfinished.json"  # the configuration of a run that has not come to its end
# what surrounds captions, questions and answers in a model's input: to be short in the text tokenizer too
PROMPT_PIECES = ("USER:", "ASSISTANT:", " Generate an image based on this description.", "<unconditional>")


def load_config(path: str | Path | None) -> SceneConfig:
    """The demo's settings with those of a YAML file over them.

    Raises:
        UserError: the file is missing or is not a YAML mapping, or a setting is unknown or impossible.
    """
    return with_values(SceneConfig(), read(path)) if path else SceneConfig()


def write_scenes(
    config: SceneConfig, out: str | Path, overwrite: bool = False, progress: bool = True
) -> bool:
    """Write everything below `out`; returns False where it was there already.

    Raises:
        UserError: `out` holds something else.
    """
    out, wanted, defaults = Path(out), _as_json(config), _as_json(SceneConfig())
    state = next((out / n for n in (FINISHED, UNFINISHED) if (out / n).exists()), None)
    if state:
        found = {**defaults, **read_json(state)["config"]}  # settings may have come since
        if found == wanted and state.name == FINISHED:
            return False
        if found != wanted:
            _make_room(out, state, found, wanted, overwrite)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something that is not scenes; choose an empty or new folder.")
    write_json(out / UNFINISHED, {"config": wanted})
    with tqdm(total=config.train + config.test, desc="scenes", unit=" scenes", disable=not progress) as bar:
        for shard in range(-(-config.train // config.shard)):
            path = out / "train" / f"scenes-{shard:06d}.tar"
            indices = range(shard * config.shard, min((shard + 1) * config.shard, config.train))
            if not path.exists():
                write_atomic(path, _tar(config, indices))
            bar.update(len(indices))
        _write_text(config, out / "text")
        test_split.write_test_split(config, out / "test", bar.update)
    write_json(out / FINISHED, describe(config))
    (out / UNFINISHED).unlink(missing_ok=True)
    return True


def _as_json(config: SceneConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def _make_room(out: Path, state: Path, found: dict, wanted: dict, overwrite: bool) -> None:
    differing = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
    if state.name == FINISHED and not overwrite:
        shown = ", ".join(f"{k} = {found.get(k)!r}, now {wanted.get(k)!r}" for k in differing[:4])
        raise UserError(
            f"{out} holds scenes made with other settings ({shown}); use another --out, or --overwrite."
        )
    for name in ("train", "text", "test"):
        shutil.rmtree(out / name, ignore_errors=True)
    state.unlink()


def describe(config: SceneConfig) -> dict[str, Any]:
    """What a reader of the images must know: the detector of `eval` works from this alone."""
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
    """Training scene `index` and what its `key.json` says."""
    scene = sample_scene(config, "train", index)
    rng = Random(f"{config.seed}/train text/{index}")
    known = [pair for pair in config.pairs if pair not in config.held_out_pairs]
    talks = (language.conversation(scene, config, rng, known) for _ in range(config.conversations))
    record = {
        "scene": scene.as_json(),
        "captions": language.captions(scene, config, rng, config.captions)
        + language.pair_captions(scene, config, rng),
        "conversations": [_as_turns(talk) for talk in talks if talk],
        "held_out": False,
    }
    return scene, record


def _as_turns(talk: list[language.Question]) -> list[dict[str, str]]:
    turns = []
    for number, question in enumerate(talk):
        turns.append({"from": "human", "value": ("" if number else "<image>\n") + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def _tar(config: SceneConfig, indices: Iterable[int]) -> bytes:
    """A webdataset tar of some training scenes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            scene, record = training_record(config, index)
            text = json.dumps(record, separators=(",", ":")).encode()
            for ending, content in (
                ("png", png(scene)),
                ("txt", record["captions"][0].encode()),
                ("json", text),
            ):
                member = tarfile.TarInfo(f"{index:08d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def png(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    render(scene).save(buffer, "PNG")
    return buffer.getvalue()


# ---- text --------------------------------------------------------------------------------------------------


def _write_text(config: SceneConfig, folder: Path) -> None:
    """text/train.txt, text/captions.txt and the text tokenizer that is trained on all that is said."""
    if (folder / "tokenizer.model").exists():
        return
    # scenes beyond the training set's, of the same kind: text alone shows no image
    scenes = (sample_scene(config, "train", config.train + i) for i in range(config.text_lines))
    plain = list(language.sentences(config, scenes, Random(f"{config.seed}/text")))
    write_atomic(folder / "train.txt", "".join(line + "\n" for line in plain))
    captions, spoken = [], list(plain)
    for index in range(min(config.train, 3_000)):
        record = training_record(config, index)[1]
        captions.append(record["captions"][0])
        spoken += record["captions"]
        for turns in record["conversations"]:
            spoken += [turn["value"].removeprefix("<image>\n") for turn in turns]
    write_atomic(folder / "captions.txt", "".join(line + "\n" for line in captions))
    # every word of the scenes must be heard, the held-out pairs' names included, as single words
    spoken += [*config.color_names, *config.shape_names] * 40
    write_atomic(folder / "tokenizer.model", train_text_tokenizer(spoken, config.vocabulary))


def train_text_tokenizer(lines: list[str], vocabulary: int) -> bytes:
    """A byte-fallback sentencepiece BPE model with LLaMA's ids 0 to 4: <unk>, <s>, </s>, <0x00>, <0x01>."""
    import sentencepiece

    lines = lines + [piece.strip() for piece in PROMPT_PIECES] * 200
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
