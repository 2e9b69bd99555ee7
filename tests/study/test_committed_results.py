"""The finished rows in the repository: of the settings that the YAMLs have, and shown as they are."""

import json
import re
from pathlib import Path

import pytest

from open_unitok.core.errors import UserError
from open_unitok.study.claims import claims_table
from open_unitok.study.jobs import is_finished, load_study, study_jobs
from open_unitok.study.page import study_page
from open_unitok.study.table import csv_table, markdown_table

ROOT = Path(__file__).resolve().parents[2]
# study -> folder with its tables
SHOWN = {name: ROOT / "docs/study_results" / name for name in ("tokenizers", "downstream")}


@pytest.fixture(scope="module", params=SHOWN)
def study(request):
    return load_study(f"configs/study/{request.param}.yaml")


def rows_of(text):
    """{first cell: {heading: cell}} of the first Markdown table in a text."""
    table = text[text.index("\n| ") :].strip().partition("\n\n")[0]
    heading, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    return {cells[0]: dict(zip(heading, cells, strict=True)) for cells in lines}


def test_no_result_is_of_other_settings(study):
    finished = 0
    for job in study_jobs(study):
        try:
            finished += is_finished(study, job)
        except UserError as error:
            pytest.fail(str(error))
    files = list(Path(study.results).glob("*/*.json"))
    assert finished == len(files) > 0  # no file that nobody reads
    assert all(json.loads(path.read_text())["processor"] for path in files)


def test_the_tables_in_the_documentation_are_those_of_the_results(study):
    folder = SHOWN[Path(study.results).name]
    # `unitok study ... --table` writes them to the study's `out`, from where they are copied
    assert (folder / "table.md").read_text() == markdown_table(study)
    assert (folder / "claims.md").read_text() == claims_table(study)
    assert (folder / "table.csv").read_text() == csv_table(study)


def test_the_page_in_the_documentation_is_that_of_the_results():
    studies = [load_study(f"configs/study/{name}.yaml") for name in SHOWN]
    assert (ROOT / "docs/study_results/index.html").read_text() == study_page(studies)


def test_the_readme_shows_the_first_columns():
    study = load_study("configs/study/tokenizers.yaml")
    section = re.search(r"^## The tokenizer study$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    shown, whole = rows_of(section[1]), rows_of(markdown_table(study))
    sizes = rows_of(markdown_table(study).partition("### Sizes and times")[2])
    titles = {name.partition(": ")[2]: name for name in whole}
    assert shown.keys() == titles.keys()
    for title, cells in shown.items():
        for heading, cell in list(cells.items())[1:]:
            assert cell == (whole[titles[title]] | sizes[titles[title]])[heading], (title, heading)
