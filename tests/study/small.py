"""The shipped studies at the scale of seconds."""

import json
import sys

import numpy as np
import yaml

from open_unitok.cli.main import main
from open_unitok.study import measure, measure_downstream
from open_unitok.study.jobs import load_study
from open_unitok.study.run import measure_command
from open_unitok.training.core.config import read_yaml

TOKENIZERS, DOWNSTREAM = "configs/study/tokenizers.yaml", "configs/study/downstream.yaml"
SHARED = ["steps=2", "batch_size=4", "checkpoint.every=2", "log.every=1"]


def small_tokenizers(emoji, folder):
    """Two steps per row on the small emoji; rows of words have made-up vectors."""
    raw = read_yaml(TOKENIZERS)
    rows = {}
    for name, row in raw["rows"].items():
        own = {"inherits": f"configs/study/{row['config']}"}
        config = read_yaml(own["inherits"])
        if "discriminator" in config:
            own["discriminator"] = {"start": 0}
        if "words" in config:
            own["words"] = make_words(folder, config["words"]["lists"])
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own))
        rows[name] = {**row, "config": f"{name}.yaml"}
    overrides = [*SHARED, "log.images_every=0", "data.shuffle=16"]
    changed = {"out": f"{folder}/runs", "data": str(emoji), "results": f"{folder}/results", "rows": rows}
    changed |= {"overrides": overrides, "seeds": [0], "splits": ["pairs"]}
    (folder / "study.yaml").write_text(yaml.safe_dump({**raw, **changed}, sort_keys=False))
    return load_study(str(folder / "study.yaml"))


def make_words(folder, lists):
    """The lists of the small emoji are too short for a codebook: others, with random vectors."""
    words = {
        "words": ["face", "heart", "animal", "flag"],
        "modifiers": ["red", "big"],
        "heads": ["face", "dog"],
    }
    chosen = [path.split("/")[-1].removesuffix(".txt") for path in lists]
    for name in chosen:
        (folder / f"{name}.txt").write_text("\n".join(words[name]))
    count = len(dict.fromkeys(word for name in chosen for word in words[name]))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32))
    (folder / "edges.txt").write_text("red\tface\nbig\tdog\n")
    edges = {"edges": f"{folder}/edges.txt"} if "heads" in chosen else {}
    return {"lists": [f"{folder}/{name}.txt" for name in chosen], "vectors": f"{folder}/vectors.npy", **edges}


def write_scenes(folder):
    """Scenes and classes of a few images each."""
    few = ["--train", "80", "--test", "12", "--shard", "80", "--pope", "4", "--prompts", "1"]
    configs = {"scenes": "configs/demo/scenes.yaml", "classes": "configs/scenes/classes_scenes.yaml"}
    for name, config in configs.items():
        main(["data", "scenes", "--config", config, "--out", f"{folder / name}", *few, "--text-lines", "400"])
    return folder


def small_downstream(scenes, folder):
    """Two steps of every training, one guidance scale, an image per class and prompt."""
    raw = read_yaml(DOWNSTREAM)
    rows = {name: in_place(row, ("config", "first", "classes", "joint")) for name, row in raw["rows"].items()}
    stages = in_place(raw["downstream"], ("classes", "joint"))
    stages["probe"] = [f"configs/study/{config}" for config in stages["probe"]]
    stages |= {"guidance": [2], "images_per_class": 1, "images_per_prompt": 1}
    changed = {"out": f"{folder}/runs", "data": str(scenes), "results": f"{folder}/results", "rows": rows}
    # the first images start k-means and codebooks: as many as there are
    overrides = [*SHARED]
    changed |= {"downstream": stages, "overrides": overrides}
    (folder / "study.yaml").write_text(yaml.safe_dump({**raw, **changed}, sort_keys=False))
    return load_study(str(folder / "study.yaml"))


def in_place(mapping, keys):
    return {k: f"configs/study/{v}" if k in keys else v for k, v in mapping.items()}


def run_here(study, job, patch):
    """The commands of a job in this process: imports are the larger part of a small one."""
    for command in job.commands:
        main(command)
    module, argument = measure_command(study, job)
    patch.setattr(sys, "argv", [module, argument])
    (measure_downstream if module.endswith("downstream") else measure).main()
    return json.loads(job.result.read_text())
