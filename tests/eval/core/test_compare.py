"""Comparing two runs by paired bootstrap, and the report page of several runs."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.eval.core.bootstrap import f1_statistic, mean_columns, paired_bootstrap
from open_unitok.eval.report.compare import compare, result_folders

from ..conftest import run_named

spec = importlib.util.spec_from_file_location("releases", Path(__file__).with_name("releases.py"))
releases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(releases)


class Scripted:
    def __init__(self, replies):
        self.replies = replies

    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens):
        return [next(r for key, r in self.replies.items() if key in q) for q in questions]


def test_a_paired_interval_is_narrower_than_two_apart_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    ease = rng.random(2000)
    a = (rng.random(2000) < 0.5 * ease + 0.2).astype(float)
    b = np.where(rng.random(2000) < 0.05, 1.0, a)  # b is a, and right some times more
    found = paired_bootstrap(mean_columns(a), mean_columns(b))
    assert found.value == pytest.approx(b.mean() - a.mean())
    low, high = found.interval
    assert 0 < low < found.value < high and found.p == pytest.approx(2 / 1000)
    # the interval of a mean of differences, by the central limit theorem
    half = 1.96 * (b - a).std() / np.sqrt(len(a))
    assert high - low == pytest.approx(2 * half, rel=0.1)
    same = paired_bootstrap(mean_columns(a), mean_columns(a))
    assert same == (0.0, [0.0, 0.0], 1.0)


def test_a_cluster_counts_once_however_many_questions_it_has():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    once = paired_bootstrap(mean_columns(a), mean_columns(b), list(range(60)))
    many = paired_bootstrap(
        mean_columns(np.repeat(a, 9)), mean_columns(np.repeat(b, 9)), list(np.repeat(range(60), 9))
    )
    assert many.value == pytest.approx(once.value) and many.interval == pytest.approx(once.interval)
    assert paired_bootstrap(mean_columns(a), mean_columns(b), [0] * 60).interval is None
    counts = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert paired_bootstrap(counts, counts[[0, 0, 0]], statistic=f1_statistic).value == pytest.approx(0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of four benchmarks; the second answers vqav2 better and mme worse."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("vqav2", "pope", "mme", "mmvet"):
        replies, _ = releases.BUILDERS[name](root / "data" / name, False)
        better = replies | ({"What is thing 3?": "yes"} if name == "vqav2" else {})
        if name == "mme":
            better |= {key: "no" for key in replies if "count image" in key}
        judge = str(root / "data" / "mmvet" / "replies.jsonl")
        options = {"judge_replay": judge} if name == "mmvet" else {}
        for label, script in (("a", replies), ("b", better)):
            run_named(name, Scripted(script), root / "data", root / label / name, options=options, quiet=True)
    return root


def test_main_numbers_and_differences_equal_the_results(runs):
    for name in ("vqav2", "pope", "mme", "mmvet"):
        lines = compare(runs / "a" / name, runs / "b" / name)
        for label, value in (("a", lines[0].a), ("b", lines[0].b)):
            result = json.loads((runs / label / name / "results.json").read_text())
            assert value == pytest.approx(result["value"], abs=1e-9), name
        assert lines[0].difference.value == pytest.approx(lines[0].b - lines[0].a)
    assert compare(runs / "a" / "vqav2", runs / "b" / "vqav2")[0].difference.value == pytest.approx(1 / 5)
    mme = compare(runs / "a" / "mme", runs / "b" / "mme")
    assert mme[0].difference.value == pytest.approx(100 * (0.5 - 0.75) - 50)
    assert mme[0].difference.interval[1] <= 0


def test_a_number_that_rows_do_not_make_is_not_called_by_its_name(runs, tmp_path):
    for label in "ab":
        shutil.copytree(runs / label / "vqav2", tmp_path / label)
        path = tmp_path / label / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"value": 3.5, "metric": "accuracy"}))
    assert compare(tmp_path / "a", tmp_path / "b")[0].name == "score per sample"


def test_the_command_compares_all_that_both_have(runs, capsys):
    main(["eval", "compare", str(runs / "a"), str(runs / "b")])
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in ("vqav2", "pope", "mme", "mmvet"))
    assert "+20.00" in out and "-75.00" in out


def test_runs_that_differ_in_more_than_the_model_are_refused(runs, tmp_path):
    replies, _ = releases.BUILDERS["vqav2"](tmp_path / "d", False)
    run_named("vqav2", Scripted(replies), tmp_path / "d", tmp_path / "o", {"limit": 3}, quiet=True)
    with pytest.raises(UserError, match="their samples differ"):
        compare(runs / "a" / "vqav2", tmp_path / "o")
    with pytest.raises(UserError, match="benchmark is 'vqav2' and 'pope'"):
        compare(runs / "a" / "vqav2", runs / "b" / "pope")
    scoring = {"scorer": "official"}
    run_named("vqav2", Scripted(replies), tmp_path / "d", tmp_path / "p", options=scoring, quiet=True)
    with pytest.raises(UserError, match="scorer is 'lmms' and 'official'"):
        compare(runs / "a" / "vqav2", tmp_path / "p")
    with pytest.raises(SystemExit):
        main(["eval", "compare", str(tmp_path), str(tmp_path / "nowhere")])


def test_samples_are_matched_by_id_where_the_orders_differ(tmp_path):
    data = tmp_path / "pope"
    replies, _ = releases.pope(data, True)
    path = data / "llava_pope_test.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    worse = replies | {"Is there popular thing 0 in the image?": "no"}
    for layout, script in (("original", replies), ("llava", worse)):
        run_named("pope", Scripted(script), data, tmp_path / layout, {"layout": layout}, quiet=True)
    lines = compare(tmp_path / "original", tmp_path / "llava")
    results = [json.loads((tmp_path / x / "results.json").read_text()) for x in ("original", "llava")]
    assert [lines[0].a, lines[0].b] == pytest.approx([r["value"] for r in results])
    # of one category, although the orders differ
    assert {line.name.strip(): round(line.difference.value, 6) for line in lines[1:]} == {
        f"{name}, mean score": change
        for name, change in (("random", 0.0), ("popular", -0.2), ("adversarial", 0.0))
    }  # fmt: skip
    same = compare(tmp_path / "original", tmp_path / "original")
    assert all(line.difference.value == 0 for line in same)


def test_one_that_cannot_be_compared_does_not_hide_the_others(tmp_path, capsys):
    scripts = {
        name: releases.BUILDERS[name](tmp_path / "data" / name, False)[0]
        for name in ("pope", "vizwiz", "gqa")
    }
    for label, options in (("a", {}), ("b", {"pope": {"scorer": "strict"}, "gqa": {"limit": 3}})):
        for name in scripts:
            model, out = Scripted(scripts[name]), tmp_path / label / name
            run_named(name, model, tmp_path / "data", out, options.get(name), quiet=True)
    main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert "cannot be compared: scorer is 'official' and 'strict'" in out
    assert "their samples differ: 4 and 3, of which 3 have the same id" in out
    assert "vizwiz: " in out and "+0.00" in out
    shutil.rmtree(tmp_path / "b" / "vizwiz")
    with pytest.raises(SystemExit):
        main(["eval", "compare", str(tmp_path / "a"), str(tmp_path / "b")])
    found = capsys.readouterr()
    assert "nothing could be compared" in found.err and f"vizwiz: only {tmp_path / 'a'} has it" in found.out
    shutil.copytree(tmp_path / "a" / "pope", tmp_path / "a" / "pope again")
    with pytest.raises(UserError, match="are both runs of pope: give one of them"):
        result_folders(tmp_path / "a")


def test_the_page_shows_numbers_bars_and_samples_and_loads_nothing(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    main(["eval", "report", str(runs / "a"), str(runs / "b"), "--out", str(page), "--title", "A <b>"])
    assert capsys.readouterr().out.strip() == str(page)
    content = page.read_text()
    assert "<title>A &lt;b&gt;</title>" in content and "UniTok (paper)" in content and "1448.0" in content
    assert "76.8" in content and "Janus-Pro 7B" in content and "data:image/png;base64," in content
    assert "What is thing 4?" in content and "truth: left" in content and "(empty)" in content
    assert "not comparable with published numbers: the judge is" in content
    assert "<b>125.0</b><small>of 200 points, n = 4" in content
    for loaded in ("http://", "https://", "<script", "<link", "url("):
        assert loaded not in content, loaded
    assert len(re.findall(r"<section>", content)) == 2 + 4 and content.count("<details") == 2 * 4
    first = page.read_bytes()
    main(["eval", "report", str(runs / "a"), str(runs / "b"), "--out", str(page), "--title", "A <b>"])
    assert page.read_bytes() == first
    for words, message in (
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(runs / "data")], "holds no results.json"),
        ([str(runs / "a"), "--out", str(tmp_path)], "a folder; expected a file"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", "report", *words])
        assert message in capsys.readouterr().err
