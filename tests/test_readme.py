"""Commands in the documentation parse, their configs load, keys of configs exist, and so do paths."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from open_unitok.cli.main import COMMANDS, command_module
from open_unitok.training.run import load_run_config

ROOT = Path(__file__).resolve().parent.parent
# file -> fewest commands that are expected to be found in it
DOCUMENTS = {
    "README.md": 4,
    "training/README.md": 6,
    "eval/README.md": 6,
    "open_unitok/models/scenes/README.md": 6,
    "open_unitok/models/emoji/README.md": 8,
}
DOCUMENTS |= {path.relative_to(ROOT).as_posix(): 0 for path in sorted((ROOT / "docs").rglob("*.md"))}
DOCUMENTS |= {"docs/own_images.md": 6}
TOKENIZER = "configs/tokenizer/unitok_large.yaml"
MLLM, FINETUNE = "configs/mllm/pretrain_7b.yaml", "configs/mllm/finetune_7b.yaml"


def commands(text):
    """The words of every `unitok` command in the fenced blocks, also behind a launcher."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        if language == "python":  # where `unitok` is a variable
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\[(--[^]]*)\]", r"\1", line)  # [--optional VALUE]
            for part in line.split("&&"):
                words = re.split(r"(?:^unitok|-m open_unitok|--module open_unitok) ", part.strip())
                if len(words) > 1:
                    yield shlex.split(words[1], comments=True)


def parse(words):
    """The options of a command; an unknown option fails the test."""
    name = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
    module = command_module(name)
    parser = argparse.ArgumentParser(prog=f"unitok {name}")
    module.add_arguments(parser)
    return name, parser.parse_args(words[len(name.split()) :])


@pytest.mark.parametrize("file", DOCUMENTS)
def test_commands_parse_and_their_configs_load(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands((ROOT / file).read_text(encoding="utf-8")))
    assert len(found) >= DOCUMENTS[file]
    for words in found:
        name, args = parse(words)
        if name in ("train", "plan"):
            load_run_config(args.config, args.overrides)


def test_keys_in_the_training_readme_are_keys_of_a_config(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    found = 0
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        config = TOKENIZER if section.startswith("The visual tokenizer") else MLLM
        prose = re.sub(r"^```.*?^```$", "", section, flags=re.M | re.S).replace("`, then `", " ")
        for span in re.findall(r"`([a-z_.]+=[^`]+)`", prose):
            load_run_config(
                FINETUNE if span.startswith(("lora=", "data.replay=")) else config, shlex.split(span)
            )
            found += 1
    assert found > 10


def test_paths_in_the_documentation_exist():
    for file in (*DOCUMENTS, "CONTRIBUTING.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        named = re.findall(r"\b(?:configs|benchmarks|docs)/[\w/]+\.(?:yaml|py|png|json|md)\b", text)
        for path in [*named, *re.findall(r"\]\(([\w./]+)\)", text)]:
            there = (ROOT / path).exists() or ((ROOT / file).parent / path).exists()
            assert there, f"{file} names {path}"
