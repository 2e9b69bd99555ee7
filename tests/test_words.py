"""One concept, one word, the field's: a grep lands in the right file, and retired words stay out of names."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("open_unitok", "tokenizer", "mllm", "generation", "training", "eval")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
# what a reader greps for -> the file that must be among those found
LANDS_IN = {
    "prefill": "generation/kv_cache.py",
    "kv.cache": "generation/kv_cache.py",
    "autoregressive": "generation/image_sampling.py",
    "classifier-free": "generation/sampling.py",
    "dead.code": "training/tokenizer/dead_codes.py",
    "augment": "training/tokenizer/diff_augment.py",
    "adaptive.*weight": "training/tokenizer/gan.py",
    "data.?loader": "training/data/shards.py",
    "run_dir": "training/core/run_dir.py",
    "class Quantizer": "tokenizer/quantizers/base.py",
    "prompt.template": "eval/core/answering.py",
    "POPE": "eval/understanding/pope.py",
}
# parts of a name that belonged to private words
RETIRED = {
    "picture", "pictures", "draw", "draws", "drawn", "drawing", "drawings", "rival", "adversary", "logbook",
    "looks", "looked", "restarts", "roomy", "recipe", "recipes", "strangers", "chances", "copies",
}  # fmt: skip
# names that others define: PIL.ImageDraw
FOREIGN = {"ImageDraw"}


@pytest.mark.parametrize("word", LANDS_IN)
def test_a_grep_lands_in_the_right_file(word):
    found = [file.relative_to(ROOT).as_posix() for file in FILES if re.search(word, file.read_text(), re.I)]
    assert LANDS_IN[word] in found


def test_retired_words_are_in_no_name():
    wrong = []
    for file in FILES:
        names = {*file.relative_to(ROOT).with_suffix("").parts}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names |= {getattr(node, "name", None), getattr(node, "id", None), getattr(node, "arg", None)} - {
                None
            }
        for name in sorted(map(str, names - FOREIGN)):
            parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
            wrong += [f"{file.relative_to(ROOT)}: {name}" for p in parts if p.lower() in RETIRED]
    assert not wrong, "\n".join(wrong)
