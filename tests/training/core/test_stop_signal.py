"""Signals and the checkpoint clock: one rank stops at once, several after the same step, asking rarely."""

import signal

import pytest
import torch

from open_unitok.core import distributed
from open_unitok.training.core import stop_signal
from open_unitok.training.core.stop_signal import StopOnSignal


def test_signals_stop_between_steps():
    before = signal.getsignal(signal.SIGINT)  # SIG_IGN if the tests run as a background job of a shell
    with StopOnSignal() as stop:
        assert not stop()
        stop.exit_if_signalled()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(SystemExit) as exit:
            stop.exit_if_signalled()
        assert exit.value.code == 143
    with pytest.raises(KeyboardInterrupt), StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        stop.exit_if_signalled()
    assert signal.getsignal(signal.SIGINT) is before


class Ranks:
    """Several `StopOnSignal` that step together; a reduction gives each the largest answers of all."""

    def __init__(self, monkeypatch, count: int):
        self.stops = [StopOnSignal() for _ in range(count)]
        self.now, self.current, self.asked = 0.0, 0, []
        self.reduce = lambda answers: None
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "is_main", lambda: self.current == 0)
        monkeypatch.setattr(stop_signal.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(stop_signal.dist, "all_reduce", lambda answers, op: self.reduce(answers))
        for stop in self.stops:
            stop._asked = 0.0

    def step(self, seconds: float, late: tuple[int, ...] = ()) -> list[bool]:
        """One step of every rank; returns each one's answer."""
        self.now += seconds
        given: list[torch.Tensor] = []
        before = [dict(vars(stop)) for stop in self.stops]
        # two rounds: first what every rank gives, then each gets the largest of it
        self.reduce = given.append
        self._call(late)
        assert len(given) in (0, len(self.stops)), "some ranks ask while others do not: they would hang"
        if given:
            self.asked.append(self.now)
        for stop, state in zip(self.stops, before):
            vars(stop).update(state)
        self.reduce = lambda answers: answers.copy_(torch.stack(given).amax(0))
        return self._call(late)

    def _call(self, late: tuple[int, ...]) -> list[bool]:
        found = []
        for number, stop in enumerate(self.stops):
            self.current = number
            found.append(stop(number in late))
        return found


def test_ranks_ask_each_other_once_a_second(monkeypatch):
    ranks = Ranks(monkeypatch, 3)
    for _ in range(1000):
        assert ranks.step(0.05) == [False] * 3
    # 50 s: a question a second, and a few more until the number of steps has doubled often enough
    assert 48 <= len(ranks.asked) <= 56
    # steps of half a minute: in every step
    ranks.asked.clear()
    for _ in range(20 + 10):
        ranks.step(30.0)
    assert len(ranks.asked) >= 10


@pytest.mark.parametrize("seconds", [0.001, 0.05, 0.7, 3.0])
def test_a_signal_on_one_rank_stops_all_after_the_same_step(monkeypatch, seconds):
    ranks = Ranks(monkeypatch, 3)
    for _ in range(300):
        ranks.step(seconds)
    ranks.stops[1].signal = signal.SIGTERM
    began, found = ranks.now, [False] * 3
    while not any(found):
        # a rank with a signal that is not agreed upon must not leave alone
        ranks.stops[1].exit_if_signalled()
        found = ranks.step(seconds)
    assert found == [True] * 3
    assert ranks.now - began <= max(1.5, 2 * seconds)
    for stop in ranks.stops:
        with pytest.raises(SystemExit) as exit:
            stop.exit_if_signalled()
        assert exit.value.code == 143


def test_the_clock_of_rank_0_decides_for_all(monkeypatch):
    ranks = Ranks(monkeypatch, 2)
    assert not any(answer for _ in range(50) for answer in ranks.step(0.5, late=(1,)))
    assert any(ranks.step(0.5, late=(0,)) == [True, True] for _ in range(4))
    assert StopOnSignal().agreed is None
