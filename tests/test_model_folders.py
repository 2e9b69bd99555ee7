"""Broken and hostile model folders: one line that names file and reason, exit 2; no code of a folder runs."""

import ast
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.core.files import SHIPPED_MODELS
from open_unitok.training.mllm.model import load_parts

ROOT = Path(__file__).parents[1]


class Evil:
    """A pickle that would run a command."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.system, (f"touch {self.folder}/code-ran",))


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped model."""
    return Path(shutil.copytree(SHIPPED_MODELS / "scenes", tmp_path / "model"))


def change(path, **fields):
    """Set fields of a JSON file; "a__b" is b within a."""
    content = json.loads(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        target[last] = value
    path.write_text(json.dumps(content))


def config(file="config.json", **fields):
    return lambda folder: change(folder / file, **fields)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def replace_by_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil(folder.parent)}, folder / "pytorch_model.bin")


def replace_by_fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def absurd_shape():
    entry = {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


def weight(make):
    """Replace one weight by `make(weight)`."""

    def replace(folder):
        from safetensors.torch import load_file, save_file

        weights, name = load_file(folder / "model.safetensors"), "language_model.layers.2.mlp.up_proj.weight"
        weights[name] = make(weights[name])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return replace


def shards_elsewhere(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "unknown decoder": (config(text_config__model_type="evil"), "config.json", "'evil'"),
    "size as text": (config(text_config__hidden_size="x"), "config.json", "expected int, got str"),
    "negative size": (config(text_config__hidden_size=-1), "config.json", "hidden size (-1)"),
    "1e9 layers": (config(text_config__num_hidden_layers=10**9), "config.json", "100 tensors"),
    "1e9 depth layers": (config(depth_config__num_hidden_layers=10**9), "config.json", "100 tensors"),
    "1e9 labels": (config(text_config__num_labels=10**9), "config.json", "100 tensors"),
    "1e12 words": (config(text_config__vocab_size=10**12), "model.safetensors", "(1000000000000, 192)"),
    "1e9 image tokens": (config(num_image_tokens=10**9), "config.json", "do not fill a square grid"),
    "image tokens": (config("processor_config.json", num_image_tokens=15), "processor_config.json", "16"),
    "image size": (config("processor_config.json", image_size="a"), "processor_config.json", "'a'"),
    "code from a hub": (config(text_config__attn_implementation="a/b"), "config.json", "code from a hub"),
    "1e9 codes": (config("unitok/config.json", codebook_size=10**9), "unitok/model.safetensors", "10000"),
    "1e6 pixels": (config("unitok/config.json", image_size=10**6), "unitok/config.json", "1000000"),
    "a list": (write("config.json", b"[1]"), "config.json", "JSON object"),
    "nested": (write("config.json", b"[" * 100_000), "config.json", ""),
    "fifo": (replace_by_fifo, "config.json", "regular file"),
    "truncated": (cut("model.safetensors", 3000), "model.safetensors", "header"),
    "truncated data": (cut("model.safetensors", 3_000_000), "model.safetensors", "not fully covered"),
    "empty": (cut("model.safetensors", 0), "model.safetensors", "header too small"),
    "huge header": (write("model.safetensors", struct.pack("<Q", 2**62)), "model.safetensors", "header"),
    "absurd shape": (write("model.safetensors", absurd_shape()), "model.safetensors", "overflow"),
    "unitok truncated": (cut("unitok/model.safetensors", 3000), "unitok/model.safetensors", "header"),
    "pickle": (replace_by_pickle, "pytorch_model.bin", "without running code"),
    "shards elsewhere": (shards_elsewhere, "index.json", "same folder"),
    "integers": (weight(lambda w: w.to(torch.int64)), "model.safetensors", "up_proj.weight holds integers"),
    "NaN": (weight(lambda w: w * float("nan")), "model", "layers.2.mlp.up_proj.weight holds NaN"),
    "tokenizer garbage": (write("tokenizer.json", bytes(range(256)) * 20), "tokenizer.json", ""),
    "tokenizer wrong": (write("tokenizer.json", b'{"model": {"type": "BPE"}}'), "tokenizer.json", ""),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "model", "neither tokenizer.json"),
    "other words": (config("tokenizer.json", model__vocab={"<unk>": 0, "<s>": 1}), "model", ""),
    "sampling": (write("sampling.json", b'{"guidance": 1e999, "top_k": -5}'), "sampling.json", "guidance"),
    "sampling list": (write("sampling.json", b"[]"), "sampling.json", "JSON object"),
    "max_new_tokens": (config("generation_config.json", max_new_tokens=-1), "generation_config.json", "-1"),
    "num_beams": (config("generation_config.json", num_beams="2"), "generation_config.json", "'2'"),
    "eos": (config("generation_config.json", eos_token_id=[2, None]), "generation_config.json", "None"),
}  # fmt: skip


def run(arguments, capsys):
    """Exit code and stderr of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr().err


def check_one_line(code, err, *words):
    lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("unitok: error: "), err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name, folder, capsys):
    spoil, file, reason = BROKEN[name]
    spoil(folder)
    code, err = run(["generate", "a red circle", "--model", folder, "--out", folder.parent / "out"], capsys)
    check_one_line(code, err, file, reason)
    assert not (folder.parent / "code-ran").exists()


@pytest.mark.parametrize("name", ["truncated", "1e9 layers", "1e12 words", "NaN", "max_new_tokens", "pickle"])
def test_broken_folders_with_quantization(name, folder, capsys):
    """8-bit weights are read tensor by tensor, not by transformers."""
    spoil, file, reason = BROKEN[name]
    spoil(folder)
    command = ["generate", "a", "--model", folder, "--out", folder.parent / "out", "--quantization", "int8"]
    code, err = run(command, capsys)
    check_one_line(code, err, file, reason)


def test_code_in_a_folder_is_not_run(folder, capsys):
    """auto_map names modules that transformers would import from the folder."""
    (folder / "evil.py").write_text(f"import os; os.system('touch {folder.parent}/code-ran')")
    change(folder / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.C"})
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.E"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    main(
        ["generate", "a red circle", "--model", str(folder), "--out", str(folder.parent / "out"), "--greedy"]
    )
    change(folder / "tokenizer_config.json", tokenizer_class="Evil")
    run(["generate", "a", "--model", folder, "--out", folder.parent / "out"], capsys)
    assert not (folder.parent / "code-ran").exists()


def test_vocabulary_of_training(folder, capsys):
    """The config keeps the vocabulary's hash; two words that change places are noticed."""
    from open_unitok import Pipeline

    pipe = Pipeline.from_pretrained(folder)
    change(folder / "config.json", vocabulary_fingerprint=pipe.processor.vocabulary_fingerprint())
    Pipeline.from_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    code, err = run(["generate", "a", "--model", folder, "--out", folder.parent / "out"], capsys)
    check_one_line(code, err, "vocabulary", str(folder))
    with pytest.raises(UserError, match="vocabulary"):  # training would save the new one
        load_parts(str(folder))


def test_training_reads_the_visual_tokenizer_first(folder):
    """It only copies unitok/, and would find a broken one after all steps."""
    os.truncate(folder / "unitok" / "model.safetensors", 3000)
    with pytest.raises(UserError, match=r"unitok/model\.safetensors"):
        load_parts(str(folder))


def test_too_little_memory(folder, capsys, monkeypatch):
    monkeypatch.setattr("open_unitok.core.memory.available_memory", lambda: 1e6)
    code, err = run(["generate", "a", "--model", folder, "--out", folder.parent / "out"], capsys)
    check_one_line(code, err, "needs", "MB of memory; 1 MB are available")


def test_an_allocation_that_fails_is_one_line(folder, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr("open_unitok.generation.pipeline.Pipeline.decode", fail)
    code, err = run(["generate", "a", "--model", folder, "--out", folder.parent / "out"], capsys)
    check_one_line(code, err, "not enough memory", "are available", "8 bytes")


def test_every_torch_load_is_weights_only():
    """torch.load runs code of the file otherwise; other pickles pass only between our own processes."""
    files = [f for top in ("open_unitok", "tokenizer", "mllm", "generation", "training", "eval", "benchmarks")
             for f in (ROOT / top).rglob("*.py")]  # fmt: skip
    calls = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.partition(".")[0] in ("pickle", "joblib", "dill"):
                assert file.name in ("mixture.py", "prefetch.py"), file  # from worker processes
            if name == "torch.load":
                calls += 1
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("weights_only") == "True", f"{file}:{node.lineno}"
            if name.endswith(".load") and any(k.arg == "allow_pickle" for k in getattr(node, "keywords", ())):
                assert all(ast.unparse(k.value) == "False" for k in node.keywords if k.arg == "allow_pickle")
    assert calls > 2
