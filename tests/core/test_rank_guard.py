"""Barriers that fail on all ranks if one fails; threads are the ranks, with one store."""

import threading

import pytest
import torch.distributed

from open_unitok.core.distributed import RankGuard
from open_unitok.core.errors import UserError


def run_ranks(work, world_size=3):
    """Run work(guard) in a thread per rank; returns what each returned or raised."""
    store, found = torch.distributed.HashStore(), [None] * world_size

    def one(rank):
        guard = RankGuard(store, rank, world_size, poll_seconds=0.001)
        try:
            found[rank] = work(guard)
        except Exception as error:
            found[rank] = error
        guard.close()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_on_one_rank_is_an_error_on_all_and_all_go_on(place):
    def work(guard):
        results = []
        for number in range(3):
            try:
                with guard.section():
                    if number == guard.rank == 1 and place == "before":
                        raise UserError("no such file")
                    guard.wait()
                    if number == guard.rank == 1 and place == "after":
                        raise UserError("no such file")
                results.append("done")
            except UserError as error:
                results.append(str(error))
        return results

    other = ["done", "rank 1: no such file", "done"]
    assert run_ranks(work) == [other, ["done", "no such file", "done"], other]


def test_a_bug_on_one_rank_ends_the_others_at_their_next_barrier():
    def work(guard):
        with guard.section():
            if guard.rank == 2:
                raise KeyError("index")
            guard.wait()

    found = run_ranks(work)
    assert isinstance(found[2], KeyError)
    assert all(isinstance(e, UserError) and "rank 2: 'index'" in str(e) for e in found[:2])


def test_barriers_wait_for_all():
    passed = []

    def work(guard):
        for number in range(5):
            passed.append(number)
            guard.wait()
            assert passed.count(number) == guard.world_size

    assert run_ranks(work) == [None] * 3
