"""`unitok eval run` and `eval score` with a tiny real model, from folders to results; their error lines."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch

from open_unitok.cli.main import main
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.caption_tokenizer import CaptionTokenizer
from open_unitok.training.scenes.dataset import SceneConfig, write_scenes

from . import releases

NAMES = ("reconstruction", "zeroshot", "retrieval", "vqav2", "pope", "geneval", "positions")
SIZES = {
    "image_size": 32, "stem_width": 8, "stage_widths": [8, 8], "stage_depths": [1, 1], "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_widths": [8, 8], "decoder_depths": [1, 1],
    "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "embed_dim": 8, "text_hidden_size": 8,
    "text_num_layers": 1, "text_num_heads": 1, "text_context_length": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "data"
    config = SceneConfig(train=4, shard=4, test=12, pope=2, prompts=2, text_lines=20)
    write_scenes(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def model(scenes, tmp_path_factory):
    torch.manual_seed(0)
    folder, text = tmp_path_factory.mktemp("model") / "mllm", scenes / "text" / "tokenizer.model"
    captions = CaptionTokenizer.from_path(text, 24)
    unitok = UniTok(UniTokConfig(**SIZES, text_vocab_size=captions.vocab_size))
    unitok.save_pretrained(folder / "unitok")
    captions.save(folder / "unitok")
    processor = UniTokProcessor.from_text_tokenizer(text, image_size=32, num_image_tokens=4, template="plain")
    processor.save_pretrained(folder)
    decoder = {
        "model_type": "llama", "vocab_size": processor.vocab_size, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    config = UniTokMLLMConfig.for_tokenizer(
        unitok.config, text_config=decoder, depth_config={"num_hidden_layers": 1}, **processor.token_ids()
    )
    UniTokForConditionalGeneration(config).save_pretrained(folder)
    return folder


def call(capsys, *words):
    """Exit code, stdout, stderr of a command."""
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    return code, output.out, output.err


def test_every_benchmark_runs_and_scores_again_from_files(capsys, model, scenes, tmp_path):
    words = ("eval", "run", "all", "--model", model, "--data", scenes, "--out", tmp_path, "--limit", 8)
    code, out, _ = call(capsys, *words, "--max-new-tokens", 4)
    assert code == 0
    before = {}
    for name in NAMES:
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert result["complete"] and result["value"] is not None and f"{name}  (" in out
        assert len(result["model"]["fingerprint"]) == 64 and result["versions"]["torch"]
        assert result["settings"].get("guidance", 5.0) == 5.0 and result["missing"] == 0
        before[name] = (tmp_path / name / "answers-00000.jsonl").read_bytes()
    code, again, _ = call(capsys, *words, "--max-new-tokens", 4)
    assert code == 0 and again == out
    code, scored, _ = call(capsys, "eval", "score", tmp_path)
    assert code == 0 and sorted(scored.splitlines()) == sorted(out.splitlines())
    for name in NAMES:
        assert (tmp_path / name / "answers-00000.jsonl").read_bytes() == before[name]


def test_a_batch_changes_no_answer(capsys, model, scenes, tmp_path):
    for size in (1, 5):
        words = ("eval", "run", "vqav2", "geneval", "--model", model, "--data", scenes, "--limit", 4)
        assert call(capsys, *words, "--out", tmp_path / str(size), "--batch-size", size)[0] == 0
    for name in ("vqav2", "geneval"):
        one, five = ((tmp_path / size / name / "scores.jsonl").read_bytes() for size in "15")
        assert one == five


def test_one_line_says_what_is_wrong(capsys, model, scenes, tmp_path):
    good = {"--model": model, "--data": scenes, "--out": tmp_path / "o"}
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text('{"model_type": "bert"}')
    shutil.rmtree(other / "unitok")
    for name, change, message in (
        ("vqa", {}, "no benchmark 'vqa'. Did you mean 'vqav2'?"),
        ("vqav2", {"--model": model / "unitok"}, "vqav2 needs an MLLM"),
        ("vqav2", {"--model": tmp_path / "nowhere"}, "does not exist"),
        ("vqav2", {"--model": tmp_path / "empty"}, "neither a config.json nor images"),
        ("vqav2", {"--model": other}, "model_type is 'bert'"),
        ("pope", {"--data": tmp_path / "empty"}, "found no files of this benchmark"),
        (
            "geneval",
            {"--data": tmp_path / "empty"},
            "expected one list of GenEval prompts (evaluation_metadata.jsonl), found nothing",
        ),
        ("reconstruction", {"--data": tmp_path / "empty"}, "holds neither images"),
        ("reconstruction", {"--dtype": "int8"}, "dtype is 'int8'"),
        ("geneval", {"--guidance": 0.5}, "guidance is 0.5"),
        ("pope", {"--limit": 0}, "limit is 0; it must be at least 1"),
        ("vqav2", {"--batch-size": 0}, "must be at least 1"),
    ):
        options = [word for pair in (good | change).items() for word in pair]
        code, _, err = call(capsys, "eval", "run", name, *options)
        assert code == 2 and message in err and err.count("\n") == 1, (name, err)
    code, _, err = call(capsys, "eval", "score", tmp_path / "empty")
    assert code == 2 and "holds no answers" in err


def free_port():
    """A port that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_ranks_that_are_killed_and_resumed_leave_the_files_of_one(model, scenes, tmp_path):
    """One process; two under torchrun; two killed in the middle and one that goes on: the same bytes."""
    words = [
        "eval",
        "run",
        "vqav2",
        "pope",
        "--model",
        str(model),
        "--data",
        str(scenes),
        "--batch-size",
        "3",
    ]
    words += ["--max-new-tokens", "4", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

    def launch(out, *launcher, **more):
        command = [sys.executable, *launcher, "-m", "open_unitok", *words, "--out", str(out)]
        return subprocess.Popen(command, env=environment | more)

    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    at_once = [launch(tmp_path / "one"), launch(tmp_path / "two", *several)]
    assert [process.wait(400) for process in at_once] == [0, 0]
    assert len(list((tmp_path / "two" / "vqav2").glob("answers-*.jsonl"))) == 2

    ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    killed = [launch(tmp_path / "killed", RANK=str(rank), LOCAL_RANK=str(rank), **ranks) for rank in (0, 1)]
    files = [tmp_path / "killed" / "vqav2" / f"answers-0000{rank}.jsonl" for rank in (0, 1)]
    end = time.monotonic() + 300
    while not any(file.exists() and file.stat().st_size for file in files) and time.monotonic() < end:
        time.sleep(0.01)
    for process in killed:
        process.kill()
        process.wait(60)
    assert not (tmp_path / "killed" / "pope" / "results.json").exists()
    assert launch(tmp_path / "killed").wait(400) == 0
    for name in ("vqav2", "pope"):
        for file in ("results.json", "scores.jsonl"):
            expected = (tmp_path / "one" / name / file).read_bytes()
            assert (tmp_path / "two" / name / file).read_bytes() == expected
            assert (tmp_path / "killed" / name / file).read_bytes() == expected


def test_an_answer_longer_than_the_context_gets_the_rest_of_it(capsys, model, tmp_path):
    """MM-Vet's 512 new tokens, on a model whose context is 128."""
    releases.mmvet(tmp_path / "data", False)
    words = ("eval", "run", "mmvet", "--model", model, "--data", tmp_path / "data", "--out", tmp_path / "o")
    code, _, err = call(capsys, *words, "--judge-replay", tmp_path / "data" / "replies.jsonl")
    result = json.loads((tmp_path / "o" / "mmvet" / "results.json").read_text())
    assert code == 0 and result["failed"] == 0 and result["value"] == pytest.approx(0.5), err
    (problem,) = [p for p in result["problems"] if "context" in p]
    assert problem.startswith("5 answers could only have the rest of the context, at least ")
    # a question that fills the context has no answer
    rows = json.loads((tmp_path / "data" / "mm-vet.json").read_text())
    rows["v1_0"]["question"] = "red " * 200
    (tmp_path / "data" / "mm-vet.json").write_text(json.dumps(rows))
    words = (*words[:-1], tmp_path / "o2", "--judge-replay", tmp_path / "data" / "replies.jsonl")
    assert call(capsys, *words)[0] == 0
    result = json.loads((tmp_path / "o2" / "mmvet" / "results.json").read_text())
    assert result["failed"] == 1 and result["not_comparable_reason"].endswith("1 samples could not be asked")
