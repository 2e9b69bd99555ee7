"""The pass that looks at drawings: one process, two ranks, and a run cut off and resumed: the same files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core import distributed
from open_unitok.eval.core import judge_pass
from open_unitok.eval.core.benchmark import Sample
from open_unitok.eval.core.harness import AnswerStore
from open_unitok.eval.metrics.inception_weights import INCEPTION_VARIANTS

from ..generation.test_generated_images import random_image, write_dpg, write_genai
from ..judges.test_judges import clip, llava, mask2former, words

assert clip and llava and mask2former and words  # fixtures: tiny models in transformers' layout

NAMES = ("geneval", "genai_bench", "dpg_bench", "mjhq")
PROMPTS = 20  # more than two batches of each model that looks


class CleanNet(torch.nn.Module):
    """Replaces NVIDIA's torchscript file: a few random features."""

    def __init__(self):
        super().__init__()
        pooled = torch.nn.AdaptiveAvgPool2d(4)
        self.layers = torch.nn.Sequential(pooled, torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.ReLU())

    def forward(self, x):
        return self.layers(x)


def save(path, seed, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random_image("x", seed, size)).save(path)


@pytest.fixture
def command(clip, llava, mask2former, tmp_path):
    """Everything but --out: drawings from elsewhere, and models that look at them."""
    data, generated = tmp_path / "data", tmp_path / "generated"
    (data / "geneval").mkdir(parents=True)
    tags = ("single_object", "two_object", "counting", "colors", "position")
    rows = [
        {"tag": tags[i % 5], "prompt": f"p{i}", "include": [{"class": "cup", "count": 1}]}
        for i in range(PROMPTS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (data / "geneval" / "evaluation_metadata.jsonl").write_text(lines)
    write_genai(data / "genai_bench", tuple("a photo of red cup " + "a " * i for i in range(PROMPTS)))
    write_dpg(data / "dpg_bench", tuple(f"p{i}" for i in range(10)))
    meta = {f"id{i}": {"category": "art", "prompt": f"p{i}"} for i in range(PROMPTS)}
    (data / "mjhq").mkdir()
    (data / "mjhq" / "meta_data.json").write_text(json.dumps(meta))
    for i in range(PROMPTS):
        save(generated / f"{i:05d}" / "samples" / "0000.png", i)
        save(generated / f"{i + 1:05d}.png", 100 + i)
        save(generated / "art" / f"id{i}.png", 200 + i)
        save(data / "mjhq" / "mjhq30k_imgs" / "art" / f"id{i}.png", 300 + i)
    for i in range(10):
        for j in range(2):
            save(generated / f"item{i}" / f"{j}.png", 400 + 2 * i + j)
    (generated / "00007.png").write_bytes(b"no image")
    torch.manual_seed(0)
    weights = tmp_path / INCEPTION_VARIANTS["clean"].file
    torch.jit.script(CleanNet()).save(str(weights))
    more = ["--detector-model", mask2former, "--colour-model", clip, "--vqa-model", llava]
    more += ["--inception-weights", weights, "--image-format", "png", "--images-per-prompt", "1"]
    words = ["eval", "run", *NAMES, "--model", generated, "--data", data, *more]
    return [str(word) for word in words]


def launch(command, out, *launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    words = [sys.executable, *launcher, "-m", "open_unitok", *command, "--out", str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def contents(out: Path):
    return {
        (name, file): (out / name / file).read_bytes()
        for name in NAMES
        for file in ("results.json", "scores.jsonl")
    }


def cut_off(out: Path):
    """As a kill leaves it: of every answer file the first rows and half a line; no scores, no features."""
    for path in sorted(out.rglob("answers-*.jsonl")):
        if path.parent.parent.name == "judge_passes":
            rows = path.read_text().splitlines(keepends=True)
            path.write_text("".join(rows[:3]) + rows[3][:20])
    for name in NAMES:
        for file in ("results.json", "scores.jsonl"):
            (out / name / file).unlink()
    sorted(out.rglob("samples-*.npz"))[0].unlink()


@pytest.mark.slow
def test_one_process_two_ranks_and_a_resumed_run_leave_the_same_files(command, call, tmp_path):
    launch(command, tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for kind in ("detections", "vqascore", "dpg"):
        files = list((tmp_path / "two").glob(f"*/judge_passes/{kind}-*/answers-*.jsonl"))
        assert len(files) == 2 and all(file.stat().st_size for file in files), kind
    code, _, err = call(*command, "--out", tmp_path / "one")
    assert code == 0, err
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == one
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    cut_off(tmp_path / "resumed")
    code, _, err = call(*command, "--out", tmp_path / "resumed")
    assert code == 0, err
    assert contents(tmp_path / "resumed") == one
    result = json.loads(one["genai_bench", "results.json"])
    assert result["failed"] == 1 and len({row["score"] for row in rows_of(one, "genai_bench")}) > 10
    assert np.isfinite(json.loads(one["mjhq", "results.json"])["value"])


def rows_of(found, name):
    return [json.loads(line) for line in found[name, "scores.jsonl"].decode().splitlines()]


def test_batches_of_a_look_depend_on_no_rank_and_no_kill(tmp_path, monkeypatch):
    """The last digits of a model may depend on the batch; this judge returns the batch itself."""
    samples = [Sample(i, f"{i}", "p", None, "generate") for i in range(30)]
    for sample in samples:
        save(tmp_path / f"{sample.id}.png", sample.index, 8)
    rows = {s.index: {"file": f"../{s.id}.png"} for s in samples}

    def look(name, rank=0, world=1):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "is_main", lambda: rank == 0)

        def work(batch, images):
            return [{"batch": [s.index for s in batch]} for _ in batch]

        out = tmp_path / name
        out.mkdir(exist_ok=True)
        judge_pass.run_judge_pass(out, "x", {"fingerprint": "f" * 12}, samples, rows, work, 8, quiet=True)
        return out / "judge_passes" / "x-ffffffffffff"

    def said(folder):
        answers = AnswerStore(folder, "x").gather(samples)
        assert not answers.missing and not answers.duplicates
        return {i: row["batch"] for i, row in answers.records.items()}

    expected = said(look("one"))
    assert expected[29] == list(range(24, 30))
    for rank, world in ((2, 3), (1, 3), (0, 1)):  # one after the other: the last resumes the rest
        folder = look("three", rank, world)
    assert said(folder) == expected and len(list(folder.glob("answers-*"))) == 3
    path = folder / "answers-00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:9])
    assert said(look("three")) == expected
