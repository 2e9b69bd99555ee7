"""`unitok generate`, `ask`, `chat` and `reconstruct` through the command line's entry point."""

import argparse
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from open_unitok.cli import ask, serve, ui
from open_unitok.cli.main import main
from open_unitok.core import distributed
from open_unitok.generation import Sampling


@pytest.fixture
def unitok(capsys):
    """unitok(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            main([str(a) for a in arguments])
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_generate_writes_images_with_their_settings_and_skips_existing_ones(unitok, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("two blue squares\n\na star\n")
    command = ["generate", "A red circle!", "--prompts", tmp_path / "prompts.txt", "--model", folder]
    command += ["--out", tmp_path / "out", "--num-images", "2", "--seed", "9", "--guidance", "2"]
    code, _, err = unitok(*command)
    assert code == 0 and "6 images generated" in err
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files[:2] == ["00000-a-red-circle-seed10.png", "00000-a-red-circle-seed9.png"]
    assert len(files) == 7 and files[-1] == "grid.png"
    with Image.open(tmp_path / "out" / "00001-two-blue-squares-seed11.png") as image:
        assert image.size == (48, 48) and image.text["prompt"] == "two blue squares"
        record = json.loads(image.text["unitok"])
    assert record["seed"] == 11 and record["guidance"] == 2 and record["model"] == str(folder)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*.png")}
    removed = tmp_path / "out" / "00002-a-star-seed13.png"
    content = removed.read_bytes()
    removed.unlink()
    code, _, err = unitok(*command)
    assert code == 0 and "1 images generated" in err and "5 existed" in err
    assert removed.read_bytes() == content  # alone = in the batch
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != removed)

    code, _, err = unitok(*command, "--temperature", "0.5")
    assert code == 2 and "temperature = 1.0, not 0.5" in err and err.count("\n") == 1
    code, _, err = unitok(*command, "--adapter", "other")
    assert code == 2 and "adapter = None, not 'other'" in err and err.count("\n") == 1


def test_generate_applies_every_sampling_option(unitok, folder, pipe, tmp_path):
    command = ["generate", "a star", "--model", folder, "--out", tmp_path, "--seed", "3"]
    command += ["--guidance", "4", "--guidance-schedule", "linear", "--temperature", "0.8", "--top-k", "9"]
    command += ["--top-p", "0.9", "--negative-prompt", "a square"]
    assert unitok(*command)[0] == 0
    sampling = Sampling(4.0, 0.8, 9, 0.9, guidance_schedule="linear")
    expected = pipe.generate(["a star"], sampling, seed=3, negative_prompt="a square")[0]
    with Image.open(tmp_path / "00000-a-star-seed3.png") as image:
        assert image.tobytes() == expected.tobytes()
        record = json.loads(image.text["unitok"])
    assert record["guidance_schedule"] == "linear" and record["negative_prompt"] == "a square"
    code, _, err = unitok(*command[:-2])
    assert code == 2 and "negative_prompt = 'a square', not None" in err


def test_inference_needs_no_training_package(folder, photos, tmp_path):
    """In a separate process the inference commands load no training package."""
    code = """
import json, sys
from open_unitok.cli.main import main
folder, image, out = sys.argv[1:]
main(["generate", "a circle", "--model", folder, "--out", out])
main(["ask", image, "What?", "--model", folder, "--max-new-tokens", "2"])
main(["reconstruct", image, "--model", folder, "--out", out])
import open_unitok.cli.chat, open_unitok.cli.serve, open_unitok.cli.ui
print(json.dumps(sorted(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(folder), str(photos[0]), str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.png"))) >= 2
    loaded = json.loads(result.stdout.splitlines()[-1])
    assert "open_unitok.generation.pipeline" in loaded
    assert not {"open_unitok.training", "open_unitok.eval"} & set(loaded)
    others = {"deepspeed", "webdataset", "gradio", "fastapi", "uvicorn", "tensorboard", "torchdata"}
    assert not others & {name.split(".")[0] for name in loaded}


def test_ask_prints_one_line_per_question(unitok, folder, photos):
    code, out, _ = unitok("ask", photos[0], "What?", "How many?", "--model", folder, "--max-new-tokens", "3")
    assert code == 0 and out.count("\n") == 2


def launch(monkeypatch):
    """The variables of a launcher of two ranks, without RANK."""
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_several_processes_share_prompts_and_questions(unitok, folder, photos, tmp_path, monkeypatch):
    rows = [{"image": path.name, "question": q} for q in ("What?", "How many?") for path in photos]
    questions = photos[0].parent / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    generate = ["generate", "a", "b", "c", "--model", folder, "--guidance", "2", "--out"]
    ask = ["ask", "--questions", questions, "--model", folder, "--max-new-tokens", "3", "--out"]
    assert unitok(*generate, tmp_path / "alone")[0] == 0
    assert unitok(*ask, tmp_path / "alone.jsonl")[0] == 0
    # another test of this process may not have destroyed its process group
    monkeypatch.setattr(distributed, "process_group", lambda: None)
    launch(monkeypatch)
    for rank in ("1", "0"):
        assert not (tmp_path / "shared.jsonl").exists() and not (tmp_path / "shared" / "grid.png").exists()
        monkeypatch.setenv("RANK", rank)
        code, _, err = unitok(*generate, tmp_path / "shared")
        assert code == 0 and f"{2 - int(rank)} images generated" in err and "0 existed" in err
        assert f"(rank {rank} of 2 has {2 - int(rank)} of 3 images)" in err
        assert unitok(*ask, tmp_path / "shared.jsonl")[0] == 0
    assert (tmp_path / "shared.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "shared").iterdir()) and len(names) == 4
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone",
        "alone.jsonl",
        "shared",
        "shared.jsonl",
    ]
    code, _, err = unitok("ask", photos[0], "What?", "--model", folder)
    assert code == 2 and "--out FILE" in err


def test_answers_of_a_killed_launch_are_discarded(unitok, folder, photos, tmp_path, monkeypatch):
    """Rank 1 of an interrupted launch left its answers; in the next launch rank 0 finishes before rank 1."""

    def command(*questions):
        rows = [{"image": str(photos[0]), "question": question} for question in questions]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["ask", "--questions", tmp_path / "q.jsonl", "--model", folder, "--max-new-tokens", "3",
                "--out", tmp_path / "a.jsonl"]  # fmt: skip

    def as_rank(rank, words):
        monkeypatch.setenv("RANK", rank)
        assert unitok(*words)[0] == 0

    def load_later(args):
        monkeypatch.setattr(ask, "load_pipeline", load)
        as_rank("0", words)
        monkeypatch.setenv("RANK", "1")
        return load(args)

    monkeypatch.setattr(distributed, "process_group", lambda: None)
    launch(monkeypatch)
    as_rank("1", command("Old?", "Older?"))
    words, load = command("New?", "And?"), ask.load_pipeline
    monkeypatch.setattr(ask, "load_pipeline", load_later)
    as_rank("1", words)
    found = [json.loads(line)["question"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert found == ["New?", "And?"] and not list(tmp_path.glob(".*"))


def test_servers_listen_on_loopback_by_default():
    for module in (serve, ui):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert parser.parse_args([]).host == "127.0.0.1"


def test_reconstruct_writes_originals_and_reconstructions_side_by_side(unitok, folder, photos, tmp_path):
    for model in (folder, folder / "unitok"):
        code, out, _ = unitok("reconstruct", *photos, photos[0], "--model", model, "--out", tmp_path)
        assert code == 0 and out.count("PSNR") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p0-2.png", "p0.png", "p1.png", "p2.png"]
    with Image.open(tmp_path / "p2.png") as image:
        assert image.size == (2 * 48 + 6, 48 + 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "MODEL", "--out", "OUT"], "No prompt"),
        (["generate", " ", "--model", "MODEL", "--out", "OUT"], "Prompt 0 is empty"),
        (["generate", "a", "--model", "MODEL", "--out", "OUT", "--temperature", "nan"], "temperature is nan"),
        (["generate", "a", "--model", "MODEL", "--out", "OUT", "--num-images", "0"], "--num-images is 0"),
        (["generate", "a", "--model", "MODEL", "--out", "OUT", "--top-k", "1" + "0" * 400], "top_k is 1000"),
        (
            ["generate", "a", "--model", "MODEL", "--out", "OUT", "--guidance-schedule", "up"],
            "constant, linear",
        ),
        (["generate", "a\udcff", "--model", "MODEL", "--out", "OUT"], r"Prompt 0 is 'a\udcff'"),
        (["generate", "a", "--model", "MODEL", "--out", "TEXT"], "text.png: File exists"),
        (["generate", "a", "--model", "x" * 300, "--out", "OUT"], "does not exist"),
        (["generate", "a", "--model", "MODEL", "--out", "OUT", "--seed", "-1"], "seed is -1"),
        (["generate", "word " * 99, "--model", "MODEL", "--out", "OUT"], "shorten the prompt"),
        (
            ["generate", "--prompts", "gone.txt", "--model", "MODEL", "--out", "OUT"],
            "gone.txt does not exist",
        ),
        (["generate", "a", "--model", "gone/away/x", "--out", "OUT"], "gone/away/x does not exist"),
        (["generate", "a", "--model", "UNITOK", "--out", "OUT"], "visual tokenizer"),
        (["ask", "gone.png", "What?", "--model", "MODEL"], "gone.png"),
        (["ask", "TEXT", "What?", "--model", "MODEL"], "not a readable image"),
        (["ask", "IMAGE", " ", "--model", "MODEL"], "Question 0"),
        (["ask", "word " * 99, "IMAGE", "--model", "MODEL"], "does not exist"),
        (["ask", "IMAGE", "a\udcff", "--model", "MODEL"], r"Question 0 is 'a\udcff'"),
        (["ask", "IMAGE", "a", "--model", "MODEL", "--out", "OTHER"], "other_kind is a folder"),
        (["ask", "IMAGE", "a", "--model", "MODEL", "--out", "TEXT/a"], "Cannot create the folder"),
        (["ask", "IMAGE", "--model", "MODEL"], "No question"),
        (["ask", "--model", "MODEL"], "--questions FILE"),
        (["ask", "IMAGE", "What?", "--questions", "TEXT", "--model", "MODEL"], "--questions FILE"),
        (["ask", "--questions", "TEXT", "--model", "MODEL"], "line 1, is not valid JSON"),
        (["ask", "--questions", "IMAGE", "--model", "MODEL"], "line 1, byte 1, is not UTF-8"),
        (["generate", "--prompts", "IMAGE", "--model", "MODEL", "--out", "OUT"], "byte 1, is not UTF-8"),
        (["ask", "IMAGE", "What?", "--model", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["ask", "IMAGE", "What?", "--model", "MODEL", "--device", "tpu"], "device is 'tpu'"),
        (["chat", "gone.png", "--model", "MODEL"], "gone.png"),
        (["chat", "IMAGE", "--model", "MODEL", "--temperature", "nan"], "temperature is nan"),
        (["chat", "IMAGE", "--model", "MODEL", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["serve", "--model", "MODEL", "--port", "70000"], "--port is 70000"),
        (["serve", "--model", "MODEL", "--port", "0", "--host", "no such host"], "--host no such host"),
        (["serve", "--model", "MODEL", "--port", "0", "--timeout", "nan"], "--timeout is nan"),
        (["serve", "--model", "MODEL", "--port", "0", "--max-queue-size", "0"], "--max-queue-size is 0"),
        (["serve", "--model", "MODEL", "--port", "0", "--token-file", "gone.txt"], "gone.txt does not exist"),
        (["serve", "--model", "MODEL", "--port", "0", "--files", "IMAGE"], "is not a folder"),
        (
            ["serve", "--model", "MODEL", "--port", "0", "--token-file", "OTHER"],
            "is a folder, expected a text file",
        ),
        (["serve", "--model", "MODEL", "--port", "0", "--host", ""], "--host is empty"),
        (["serve", "--model", "MODEL", "--port", "0", "--host", "a..b"], "--host a..b"),
        (["ui", "--model", "MODEL", "--port", "7860", "--host", ""], "--host is empty"),
        (["serve", "--model", "gone/away/x", "--port", "0"], "gone/away/x does not exist"),
        (["reconstruct", "gone.png", "--model", "MODEL", "--out", "OUT"], "gone.png"),
        (["reconstruct", "OTHER", "--model", "MODEL", "--out", "OUT"], "give its image files"),
        (["reconstruct", "TEXT", "--model", "MODEL", "--out", "OUT"], "not a readable image"),
        (["reconstruct", "IMAGE", "--model", "MODEL", "--out", "OUT", "--size", "50"], "16"),
        (["reconstruct", "IMAGE", "--model", "MODEL", "--out", "OUT", "--size", "-16"], "size is -16"),
        (["reconstruct", "IMAGE", "--model", "MODEL", "--out", "OUT", "--size", "0"], "size is 0"),
        (["reconstruct", "IMAGE", "--model", "MODEL", "--out", "TEXT"], "Cannot create the folder"),
        (["reconstruct", "IMAGE", "--model", "OTHER", "--out", "OUT"], "bert"),
        (["ask", "IMAGE", "word " * 99, "--model", "MODEL"], "shorten the question"),
    ],
)
def test_errors_are_one_line_and_write_no_files(unitok, folder, photos, tmp_path, arguments, words):
    text = tmp_path / "text.png"
    text.write_text("no image at all")
    other = tmp_path / "other_kind"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    names = {
        "MODEL": folder,
        "OTHER": other,
        "UNITOK": folder / "unitok",
        "OUT": tmp_path / "out",
        "TEXT": text,
        "IMAGE": photos[0],
    }
    names["TEXT/a"] = text / "a"
    code, _, err = unitok(*[names.get(a, a) for a in arguments])
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("unitok: error: "), err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_chat_answers_each_line_and_remembers(unitok, folder, pipe, photos, monkeypatch):
    lines = [
        "What is it?",
        f"/image {photos[1]}",
        "How many?",
        "",
        "Is it red?",
        "/nothing",
        "/image gone.png",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "/new", "What?\n"])))
    code, out, err = unitok("chat", photos[0], "--model", folder, "--max-new-tokens", "3")
    both = [photos[0], photos[1]]
    first = pipe.chat("What is it?", photos[0], max_new_tokens=3)
    second = pipe.chat("How many?", both, max_new_tokens=3)
    third = pipe.chat("Is it red?", both, [("How many?", second)], max_new_tokens=3)
    last = pipe.chat("What?", both, max_new_tokens=3)
    assert code == 0 and out == f"{first}\n{second}\n{third}\n{last}\n"
    assert "Unknown command '/nothing'" in err and "gone.png" in err and err.count("\n") == 2


def test_chat_continues_after_bytes_that_are_not_utf8(unitok, folder, pipe, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff?\nWhat?\n"), encoding="utf-8"))
    code, out, _ = unitok("chat", "--model", folder, "--max-new-tokens", "3")
    assert code == 0 and out.count("\n") == 2
