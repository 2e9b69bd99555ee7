"""Schedules against the published ones, at 20 steps of each kind."""

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.core.schedules import check_schedule_kind, linear_ramp, lr_multiplier


def test_learning_rates_are_the_published_ones(numbers):
    table = numbers["lr_schedules (iter -> [lr of base 5e-4, lr of base 2e-5])"]
    assert len(table) == 7
    for name, points in table.items():
        kind, *pairs = name.split("|")
        values = {key: float(value) for key, value in (pair.split("=") for pair in pairs)}
        for step, rates in points:
            factor = lr_multiplier(
                kind, step, values["max"], values["warmup"], values["start"], values["end"]
            )
            for base, rate in zip((5e-4, 2e-5), rates):
                assert base * factor == pytest.approx(rate, rel=1e-9, abs=1e-15), (name, step)


def test_unknown_kind():
    for good in ("cos", "lin0.25", "constant"):
        check_schedule_kind(good)
    for bad in ("cosine", "lin<THRESHOLD>", "lin1.5"):
        with pytest.raises(UserError, match=r"schedule\.kind"):
            check_schedule_kind(bad)


def test_ends():
    assert lr_multiplier("constant", 5, 10) == 1
    assert lr_multiplier("cos", 9, 10, end=0.2) == pytest.approx(0.2)
    assert lr_multiplier("cos", 0, 1) == 1
    assert [linear_ramp(s, 4) for s in (0, 1, 9)] == [0, 0.25, 1]
    assert linear_ramp(0, 0) == 1
