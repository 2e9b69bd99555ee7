"""The report of a whole run: headline table, page, curves and its screenshot."""

import json
import shutil

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.registry import detect_benchmarks, find_benchmark
from open_unitok.eval.report import screenshot
from open_unitok.eval.report.demo import write_report
from open_unitok.eval.report.demo_run import choose_samples, stage_curves, text_table

from ..conftest import run_named
from ..core.test_runs import QUIET, Scripted, data

__all__ = ["data"]  # a fixture

HAS_BROWSER = any(map(shutil.which, screenshot.BROWSERS))

# what the stages write into metrics.jsonl
TOKENIZER_NAMES = [
    "step",
    "seconds",
    "samples_per_second",
    "loss",
    "l1",
    "l2",
    "vq",
    "entropy",
    "clip",
    "skipped",
    "grad_norm",
    "lr",
    "logit_scale",
    "usage/0",
    "perplexity/0",
    "usage/1",
    "perplexity/1",
]
MLLM_NAMES = [
    "step",
    "seconds",
    "samples_per_second",
    "loss",
    "text_loss",
    "image_loss",
    "grad_norm",
    "lr",
    "text_loss/text_to_image",
    "text_loss/captioning",
    "text_loss/conversation",
    "text_loss/text",
    "accuracy/0",
    "accuracy/1",
    "padding",
    "tokens_per_second",
]


def curve_rows(names):
    return [{name: i if name == "step" else 1 / i for name in names} for i in range(1, 60)]


def test_the_curves_shown_are_the_losses():
    assert list(stage_curves(curve_rows(TOKENIZER_NAMES)))[:5] == ["loss", "l2", "l1", "vq", "clip"]
    shown = list(stage_curves(curve_rows(MLLM_NAMES)))
    assert shown[:3] == ["loss", "text_loss", "image_loss"] and len(shown) == 6
    assert all(name.startswith("text_loss/") for name in shown[3:])
    assert list(stage_curves(curve_rows(MLLM_NAMES), 1)) == ["loss"]


def test_report_is_whole_and_self_contained(data, tmp_path):
    for name in detect_benchmarks(data):
        model = Scripted(data, lambda i: i % 5 != 0)
        options = {"guidance": 2.0} if find_benchmark(name).needs == "generator" else {}
        run_named(name, model, data, tmp_path / "eval" / name, options, **QUIET)
    (tmp_path / "tokenizer").mkdir()
    rows = curve_rows(TOKENIZER_NAMES)
    (tmp_path / "tokenizer" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    phases = [{"name": "tokenizer", "seconds": 12.5, "peak_memory": 2**30, "calls": 2}]
    phases.append({"name": "codes", "seconds": 2.5, "peak_memory": 2**29, "calls": 1})
    metrics = write_report(tmp_path, phases)
    assert (tmp_path / "report.png").exists() == HAS_BROWSER
    page = (tmp_path / "report.html").read_text()
    for needed in (
        "Generated images",
        "Question answering",
        "Reconstructions",
        "codebook 2",
        "1.00 GiB",
        "<svg",
        "base64,",
    ):
        assert needed in page, needed
    for needed in ("vq", "clip", "images with held-out pairs", "including those with held-out pairs"):
        assert needed in page, needed
    assert page.count("stopped and resumed") == 1
    for loaded in ("http://", "https://", "<script", "<link", "url("):
        assert loaded not in page, loaded
    assert metrics["metrics"]["reconstruction"]["psnr"] == pytest.approx(48.13, abs=0.01)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "Question answering" in text_table(tmp_path)
    held_out = metrics["metrics"]["vqav2"]["images with held-out pairs"]
    line = next(row for row in text_table(tmp_path).split("\n") if "images with held-out pairs" in row)
    assert f"{100 * held_out:.1f} %" in line
    first = (tmp_path / "report.html").read_bytes()
    write_report(tmp_path, phases)
    assert (tmp_path / "report.html").read_bytes() == first
    with pytest.raises(UserError, match="holds no results"):
        write_report(tmp_path / "eval")


def test_report_of_a_tokenizer_alone(data, tmp_path):
    run_named("reconstruction", Scripted(data), data, tmp_path / "eval" / "reconstruction", **QUIET)
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Reconstructions" in page and "Generated images" not in page and "Time and memory" not in page


def test_samples_are_chosen_in_turn_from_the_groups():
    rows = [{"group": "a", "i": i} for i in range(9)] + [{"group": "b", "i": 9}]
    chosen = choose_samples(rows, 5, "group")
    assert [r["group"] for r in chosen] == ["a", "b", "a", "a", "a"] and choose_samples(
        rows, 5, "group"
    ) == chosen


def test_screenshot_shows_the_page_or_says_why_not(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.html"
    page.write_text("<body style='margin:0;background:#00ff00'></body>")
    if HAS_BROWSER:
        assert screenshot.save_screenshot(page, tmp_path / "page.png", 300, 200) == ""
        with Image.open(tmp_path / "page.png") as image:
            assert image.size == (300, 200) and image.convert("RGB").getpixel((9, 9)) == (0, 255, 0)
    monkeypatch.setattr(screenshot.shutil, "which", lambda name: None)
    reason = screenshot.save_screenshot(page, tmp_path / "none.png")
    assert "chromium" in reason and "PATH" in reason and not (tmp_path / "none.png").exists()
    monkeypatch.setattr(screenshot.shutil, "which", lambda name: "/bin/false")
    assert screenshot.save_screenshot(page, tmp_path / "none.png") == "/bin/false exited with status 1"
