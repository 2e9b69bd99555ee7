"""One concept, one word, the field's: a grep lands in the right file, and retired words stay out of names."""

import argparse
import ast
import pathlib
import re

import pytest
import yaml

from open_unitok.cli.main import COMMANDS, command_module

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


def retired_parts(name: str) -> list[str]:
    """The retired words that a name, a flag or a key consists of."""
    return [part for part in re.findall(r"[A-Za-z][a-z]*", name) if part.lower() in RETIRED]


@pytest.mark.parametrize("command", COMMANDS)
def test_retired_words_are_in_no_flag(command):
    parser = argparse.ArgumentParser(prog=command)
    command_module(command).add_arguments(parser)
    flags = [flag for action in parser._actions for flag in (action.dest, *action.option_strings)]
    assert not [flag for flag in flags if retired_parts(flag)]


def test_retired_words_are_in_no_yaml_key():
    def keys(value):
        if isinstance(value, dict):
            return {*value}.union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert not [key for key in keys(yaml.safe_load(file.read_text())) if retired_parts(key)], file
