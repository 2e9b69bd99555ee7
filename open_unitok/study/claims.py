"""Published claims as differences of a study's columns, each with an interval, its seeds and a verdict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from open_unitok.eval.core.bootstrap import bootstrap, mean_columns

from .columns import Column, known_columns
from .config import Claim, Study, parse_difference
from .table import NOT_RUN, Results, read_results, scores_of, value_of

SEEN, NOT_SEEN, OPPOSITE = "seen", "not seen at this scale", "opposite"
UNDECIDED = "needs a second seed"


class Finding(NamedTuple):
    """A difference on one split, in the unit of its columns.

    Attributes:
        value: mean over the seeds; None where a row was not run.
        interval: 95 %, by a paired bootstrap over images; None for columns that are of a split as a whole.
        seeds: the difference with each seed.
        verdict: `SEEN`: above -margin with every seed and as a whole interval; `OPPOSITE`: below it so; or
            `NOT_SEEN`; `UNDECIDED`: one seed without an interval; `NOT_RUN` with the rows that are missing.
        column: how it is shown.
    """

    value: float | None
    interval: list[float] | None
    seeds: list[float]
    verdict: str
    column: Column


def find(study: Study, difference: str, margin: float, split: str, results: Results) -> Finding:
    """A difference of a claim on a split."""
    terms = parse_difference(difference)
    column = known_columns(study)[terms[0][2]]
    rows = dict.fromkeys(row for _, row, _ in terms)
    # seeds that every row of the difference has
    common = set.intersection(*({result["seed"] for result in results[row]} for row in rows))
    seeds = [seed for seed in study.seeds if seed in common]
    found = {row: [r for r in results[row] if r["seed"] in seeds] for row in rows}
    if not seeds:
        missing = [row for row in rows if not results[row]] or list(rows)
        return Finding(None, None, [], f"{NOT_RUN}: {', '.join(missing)}", column)
    differences = []
    for number in range(len(seeds)):
        values = [(sign, value_of(found[row][number], split, key)) for sign, row, key in terms]
        if any(value is None for _, value in values):
            return Finding(None, None, [], f"{NOT_RUN}: {difference} is not measured", column)
        differences.append(float(sum(sign * value for sign, value in values if value is not None)))
    scores = [(sign, scores_of(found[row], split, key)) for sign, row, key in terms]
    interval = None
    if len({None if s is None else len(s) for _, s in scores}) == 1 and scores[0][1] is not None:
        # paired: the same image is resampled in every term
        interval = bootstrap(mean_columns(np.sum([sign * s for sign, s in scores if s is not None], axis=0)))
    return Finding(
        float(np.mean(differences)), interval, differences, _verdict(differences, interval, margin), column
    )


def _verdict(seeds: Sequence[float], interval: list[float] | None, margin: float) -> str:
    """Above or below -margin, by the interval and by every seed; without an interval two seeds are needed."""
    if interval is None and len(seeds) < 2:
        return UNDECIDED
    bounds = [*seeds, *(interval or [])]
    if min(bounds) > -margin:
        return SEEN
    return OPPOSITE if max(bounds) < -margin else NOT_SEEN


def format_finding(finding: Finding) -> str:
    """ "+0.31 [+0.22, +0.40], seeds +0.30 +0.32: seen"."""
    if finding.value is None:
        return finding.verdict
    return f"{format_numbers(finding)}: **{finding.verdict}**"


def format_numbers(finding: Finding) -> str:
    """The difference with its interval and seeds, without the verdict."""
    if finding.value is None:
        return ""
    scale, places = finding.column.scale, finding.column.places

    def signed(value: float) -> str:
        return f"{value * scale:+.{places}f}"

    interval = finding.interval
    bounds = f"[{signed(interval[0])}, {signed(interval[1])}]" if interval else "(no interval)"
    seeds = f", seeds {' '.join(map(signed, finding.seeds))}" if len(finding.seeds) > 1 else ", one seed"
    return f"{signed(finding.value)} {bounds}{seeds}"


def format_limit(claim: Claim, column: Column) -> str:
    """ "> 0", or "> -0.1" with a margin, in the unit of the column."""
    return f"> -{claim.margin * column.scale:g}" if claim.margin else "> 0"


def study_findings(study: Study) -> list[tuple[Claim, str, list[Finding]]]:
    """(claim, difference, a finding per split) for each line of the table."""
    results = read_results(study)
    return [
        (claim, difference, [find(study, difference, claim.margin, split, results) for split in study.splits])
        for claim in study.claims
        for difference in claim.differences
    ]


def claims_table(study: Study) -> str:
    """The claims as a Markdown table."""
    splits = study.splits
    head = f"| claim | measured | {' | '.join(f'`{split}`' for split in splits)} |"
    lines = [head, f"|---|---|{'---|' * len(splits)}"]
    shown = None
    for claim, difference, findings in study_findings(study):
        text = f"{claim.source}: {claim.text}" if claim is not shown else ""
        shown = claim
        unit = findings[0].column
        limit = format_limit(claim, unit)
        cells = " | ".join(map(format_finding, findings))
        lines.append(f"| {text} | `{difference}` {limit} ({unit.title}) | {cells} |")
    note = (
        'A claim is "seen" where the 95 % interval of a paired bootstrap over images and the difference with '
        'every seed lie above the limit, "opposite" where all lie below, else "not seen at this scale". '
        "Columns of a split as a whole (entries used, codebook overlap) have no interval: "
        "two seeds must agree, and one decides nothing."
    )
    return "\n".join([note, "", *lines]) + "\n" if study.claims else "This study has no claims.\n"
