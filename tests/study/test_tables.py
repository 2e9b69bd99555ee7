"""Tables, claims and page of a study, from finished rows that are made up here."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.eval.core.bootstrap import group_mean_columns, group_mean_statistic
from open_unitok.study.claims import NOT_SEEN, OPPOSITE, SEEN, claims_table, format_finding, study_findings
from open_unitok.study.columns import study_tables
from open_unitok.study.jobs import load_study
from open_unitok.study.measure_downstream import weighted_clusters
from open_unitok.study.page import study_page
from open_unitok.study.plots import Point, scatter_svg, ticks
from open_unitok.study.table import csv_table, make_cells, markdown_table, read_results

from .made_up import DOWNSTREAM, write_result, write_study

CLAIMS = [
    {"text": "more", "source": "A", "differences": ["base.psnr - ibq.psnr", "ibq.psnr - base.psnr"]},
    {"text": "no cost", "source": "B", "margin": 0.5, "differences": ["continuous.psnr - base.psnr"]},
    {"text": "use", "source": "C", "differences": ["base.usage - ibq.usage", "coda.psnr - base.psnr"]},
]


@pytest.fixture
def measured(tmp_path):
    """base and ibq with two seeds, continuous with one, coda with none."""
    study, rng = load_study(write_study(tmp_path, claims=CLAIMS)), np.random.default_rng(0)
    images = rng.normal(20, 2, 60)
    for seed in (0, 1):
        write_result(study, "base", seed, {"psnr": images + 0.1 * seed}, usage=1.0)
        worse = images - 1 + rng.normal(0, 0.5, 60)
        write_result(study, "ibq", seed, {"psnr": worse}, {"bits": 144.0}, usage=0.42 + 0.01 * seed)
    reasons = {"ssim": "n/a: not tried", "bits": "n/a: not all of it is codes"}
    noise = rng.normal(0, 0.4, 60)
    noisy = {"psnr": images + noise - noise.mean()}
    write_result(study, "continuous", 0, noisy, {"bits": None}, reasons)
    return study


def cells_of(study, title):
    table = next(table for table in study_tables(study) if title in table.title)
    keys = [column.key for column in table.columns]
    return {row: dict(zip(keys, cells)) for row, cells in make_cells(study, table).items()}


# ---- tables ------------------------------------------------------------------------------------------------


def test_cells_have_means_spreads_and_significant_differences(measured):
    cells = cells_of(measured, "pairs")
    base, ibq = cells["base"]["psnr"], cells["ibq"]["psnr"]
    assert base.value - ibq.value == pytest.approx(1.05, abs=0.2)
    assert base.spread == pytest.approx(0.05, abs=1e-3) and not base.significant and ibq.significant
    same = cells["continuous"]["psnr"]
    assert same.spread is None and not same.significant
    assert (
        cells["continuous"]["ssim"].reason == "n/a: not tried" and cells["coda"]["psnr"].reason == "not run"
    )


def test_the_tables_show_every_row_and_why_cells_are_empty(measured):
    text = markdown_table(measured)
    lines = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            lines.setdefault(line.split("`")[1], line)
    assert list(lines) == ["base", "ibq", "continuous", "coda"]  # in the order of the YAML
    assert lines["ibq"].split(" | ")[1].startswith("**") and "± 0.05" in lines["base"]
    assert "not run" in lines["coda"] and "n/a" in lines["continuous"] and "42" in lines["ibq"]
    assert "5 of 8 runs, seeds 0, 1; measured on P." in text
    assert "- n/a: not tried (SSIM): `continuous`" in text and "- not run yet: `coda`" in text
    rows = list(csv.DictReader(io.StringIO(csv_table(measured))))
    assert len(rows) == 5 and {row["row"] for row in rows} == {"base", "ibq", "continuous"}
    assert float(rows[0]["psnr"]) == pytest.approx(20, abs=1) and rows[0]["usage"] == "1.0"


def test_a_file_that_is_no_result_is_named(measured, tmp_path):
    (tmp_path / "results" / "base" / "0.json").write_text('{"row": "base"}')
    with pytest.raises(UserError, match=r"base/0\.json is not a result of a study"):
        read_results(measured)


# ---- claims ------------------------------------------------------------------------------------------------


def test_claims_are_seen_opposite_or_not_run(measured):
    findings = [(difference, found[0]) for _, difference, found in study_findings(measured)]
    more, less, no_cost, use, missing = (finding for _, finding in findings)
    assert more.verdict == SEEN and less.verdict == OPPOSITE
    assert more.value == pytest.approx(-less.value) and len(more.seeds) == 2
    assert more.interval[0] < more.value < more.interval[1]
    # within the margin, though the interval holds zero
    assert no_cost.verdict == SEEN and no_cost.interval[0] < 0 and len(no_cost.seeds) == 1
    assert use.verdict == SEEN and use.interval is None and use.value == pytest.approx(0.575)
    assert missing.verdict == "not run: coda" and missing.value is None
    text = claims_table(measured)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "measured" not in line]
    assert len(lines) == 5 and lines[0].startswith("| A: more | `base.psnr - ibq.psnr` > 0 (PSNR, dB)")
    assert lines[1].startswith("|  | `ibq.psnr - base.psnr`") and "> -0.5 (PSNR" in lines[2]
    assert "+58 (no interval), seeds +58 +57: **seen**" in lines[3] and "not run: coda" in lines[4]


def test_one_seed_or_seeds_that_disagree_decide_nothing(tmp_path):
    claims = [
        {"text": "use", "source": "A", "differences": ["base.usage - ibq.usage", "base.psnr - ibq.psnr"]}
    ]
    study = load_study(write_study(tmp_path, claims=claims))
    images = np.random.default_rng(0).normal(20, 2, 200)
    for row, usage, shift in (("base", 0.9, 0.0), ("ibq", 0.5, 0.3)):
        write_result(study, row, 0, {"psnr": images + shift}, usage=usage)
    usage, psnr = (found[0] for _, _, found in study_findings(study))
    # one seed without an interval decides nothing
    assert usage.verdict == "needs a second seed" and usage.value == pytest.approx(0.4)
    assert '<i class="chip open">needs a second seed</i><br><small>+40 (no' in study_page([study])
    assert psnr.verdict == OPPOSITE
    write_result(study, "base", 1, {"psnr": images + 0.1}, usage=0.4)
    write_result(study, "ibq", 1, {"psnr": images}, usage=0.5)
    usage, psnr = (found[0] for _, _, found in study_findings(study))
    # the mean over seeds has an interval below zero, but the second seed lies above
    assert usage.verdict == NOT_SEEN and psnr.verdict == NOT_SEEN and psnr.interval[1] < 0
    assert "seeds -0.30 +0.10" in format_finding(psnr)


def test_a_difference_of_differences_is_paired(tmp_path):
    claim = "k1.probe_latents - k1.probe_quantised - k8.probe_latents + k8.probe_quantised"
    claims = [{"text": "t", "source": "s", "differences": [claim]}]
    study = load_study(write_study(tmp_path, downstream=DOWNSTREAM, claims=claims, seeds=[0]))
    rng = np.random.default_rng(0)
    common = rng.normal(0.6, 0.3, 300)  # how hard an image is, which cancels
    write_result(study, "k8", 0, {"probe_latents": common, "probe_quantised": common - 0.02})
    write_result(
        study, "k1", 0, {"probe_latents": common, "probe_quantised": common - 0.1 + rng.normal(0, 0.05, 300)}
    )
    ((_, _, (finding,)),) = study_findings(study)
    assert finding.verdict == SEEN and finding.value == pytest.approx(0.08, abs=0.01)
    assert finding.interval[1] - finding.interval[0] < 0.02


def test_clusters_keep_the_mean_of_a_metric():
    rng = np.random.default_rng(0)
    scores, clusters = rng.random(50).tolist(), rng.integers(0, 7, 50).tolist()
    assert np.mean(weighted_clusters(scores, clusters)) == pytest.approx(np.mean(scores), abs=1e-3)
    groups = [str(cluster % 3) for cluster in clusters]
    expected = group_mean_statistic(group_mean_columns(scores, groups).sum(axis=0))
    assert np.mean(weighted_clusters(scores, clusters, groups)) == pytest.approx(expected, abs=1e-3)


# ---- page --------------------------------------------------------------------------------------------------


def test_the_page_shows_rows_points_claims_and_images(measured, tmp_path, capsys):
    page = study_page([measured])
    assert page.count("<h2>") >= 7 and "not run" in page and "IBQ" in page
    assert page.count('<circle class="dot g') >= 2  # continuous has no bits
    assert page.count('class="strip"') == 3 and page.count("data:image/webp") == 3
    assert page.count('class="chip yes"') == 3 and page.count('class="chip no"') == 1
    assert not re.search(r"https?://(?!www\.w3\.org)", page)  # nothing is fetched
    main(["study", str(tmp_path / "study.yaml"), "--table"])
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "table.md",
        "claims.md",
        "table.csv",
        "index.html",
    }
    (tmp_path / "empty").mkdir()
    assert "0<small> / 8" in study_page([load_study(write_study(tmp_path / "empty"))])


def test_one_page_shows_several_studies(measured, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    path = write_study(other, downstream=DOWNSTREAM, seeds=[0])
    study = load_study(path)
    write_result(
        study, "k8", 0, {"classes_none": [0.5] * 9, "probe_latents": [1.0], "probe_quantised": [0.9]}
    )
    write_result(study, "dual", 0, reasons={"psnr": "n/a: the tokenizer is that of k8"})
    main(["study", str(tmp_path / "study.yaml"), path, "--table"])
    page = (tmp_path / "runs" / "index.html").read_text()
    assert "Class-conditional images over guidance" in page and "Quality against bits" in page
    assert page.count('<polyline class="line') == 2 and (other / "runs" / "table.md").exists()
    assert not (other / "runs" / "index.html").exists()


def test_titles_of_rows_are_escaped(tmp_path):
    rows = {"base": {"config": "configs/study/base.yaml", "title": "<script>alert(1)</script> & co"}}
    study = load_study(write_study(tmp_path, rows=rows))
    write_result(study, "base", 0, {"psnr": [20.0, 21.0], "probe_category": [1, 0]})
    page = study_page([study])
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_points_of_the_scatter_are_in_order_and_labels_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    crowd = [Point(f"row_number_{i}", 144, 17 + 0.1 * rng.random(), 1) for i in range(12)]
    svg = scatter_svg([Point("few", 100, 17.0), Point("many", 768, 20.0), *crowd], "bits", "PSNR", log=True)
    points = [
        tuple(map(float, m)) for m in re.findall(r'<circle class="dot g\d" cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]
    assert len(points) == 14
    few, many = min(points), max(points)
    assert few[1] > many[1]  # more bits right, more dB up
    labels = re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', svg)
    boxes = []
    for x, y, anchor, name in labels:
        width = 6.0 * len(name)
        left = float(x) - {"start": 0, "end": width, "middle": width / 2}[anchor]
        boxes.append((left, float(y) - 9, left + width, float(y)))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (labels[i],)


def test_ticks_are_round_and_inside():
    for low, high in ((16.2, 20.4), (0, 1), (-3, 1e4), (0.001, 0.0013)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 10 and low <= found[0] and found[-1] <= high + 1e-9
        assert all(math.isfinite(value) for value in found)


def test_results_are_strict_json(tmp_path):
    from open_unitok.study.measure import write_result as write

    path = tmp_path / "row" / "0.json"
    path.parent.mkdir()
    write(path, {"row": "a", "images": {"pairs": {"psnr": [1, 2.5]}}, "columns": {"x": None}})
    assert json.loads(path.read_text())["images"]["pairs"]["psnr"] == [1, 2.5]
    assert len(path.read_text().splitlines()) == 5
    with pytest.raises(ValueError, match="JSON"):
        write(path, {"psnr": float("nan")})
