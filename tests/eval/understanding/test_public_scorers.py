"""Our scorers against the public ones, on at least fifty answers each.

`public_scorers.json` holds inputs and what the functions of lmms-eval 0.7.3 and of the benchmarks' scripts
return for them ("source" names the versions); lmms-eval strips an answer before it scores it.
"""

import json
import math

import pytest

from open_unitok.eval.core.multiple_choice import find_letter
from open_unitok.eval.understanding import ai2d, chartqa, mmmu, mmstar, ocrbench, realworldqa

from ..conftest import GOLDEN

VECTORS = json.loads((GOLDEN / "public_scorers.json").read_text(encoding="utf-8"))


def differing(name, ours):
    """The cases of a scorer in which `ours` returns something else than the public function."""
    cases = VECTORS[name]
    assert len(cases) >= 50
    return [case for case in cases if not ours(*case)]


def test_find_letter_is_that_of_lmms_eval():
    assert not differing("find_letter", lambda text, letter: find_letter(text) == letter)


def test_realworldqa_is_that_of_lmms_eval():
    same = lambda text, truth, right: realworldqa.is_realworldqa_right(text, truth) == bool(right)  # noqa: E731
    assert not differing("realworldqa", same)


def test_ai2d_is_that_of_lmms_eval():
    assert not differing("ai2d", lambda text, letter, right: ai2d.is_ai2d_right(text, letter) == bool(right))


@pytest.mark.parametrize("scorer", ["official", "lmms"])
def test_mmstar_is_that_of_its_repository_and_of_lmms_eval(scorer):
    def same(text, letter, official, lmms):
        return mmstar.is_mmstar_right(text, letter, scorer) == bool(
            official if scorer == "official" else lmms
        )

    assert not differing("mmstar", same)


@pytest.mark.parametrize("scorer", ["official", "lmms"])
def test_a_letter_of_mmmu_is_that_of_its_repository_and_of_lmms_eval(scorer):
    def same(text, options, official, lmms):
        return mmmu.parse_choice(text, options, scorer) == (official if scorer == "official" else lmms)

    assert not differing("mmmu_choice", same)


def test_an_open_answer_of_mmmu_is_read_as_by_its_repository():
    def same(text, truth, candidates, official, lmms):
        found = mmmu.parse_open_answer(text)
        texts = {f"float:{c!r}" if isinstance(c, float) and not math.isnan(c) else str(c) for c in found}
        expected = {c.replace("float:nan", "nan") for c in candidates}
        right = [mmmu.is_open_right(found, mmmu.accepted_answers(truth, s)) for s in ("official", "lmms")]
        return texts == expected and right == [official, lmms]

    assert not differing("mmmu_open", same)


def test_chartqa_is_that_of_lmms_eval():
    assert not differing("chartqa", lambda text, truth, right: chartqa.relaxed_match(text, truth) == right)


@pytest.mark.parametrize("scorer", ["official", "lmms"])
def test_ocrbench_is_that_of_its_repository_and_of_lmms_eval(scorer):
    def same(text, answers, source, official, lmms):
        right = ocrbench.is_ocrbench_right(text, answers, source, scorer)
        return right == bool(official if scorer == "official" else lmms)

    assert not differing("ocrbench", same)
