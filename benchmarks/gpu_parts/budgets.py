"""Host waits per use of the shipped model and per training step, as counted on the emulated device.

An upper bound for what a GPU shows: a wait on a GPU that is not counted there is a fault of one of the two.
"""

WAITS: dict[str, int] = {}


def beside_budget(name: str, waits: int) -> dict[str, int | bool]:
    """The fields of a row: waits, their budget, and whether they exceed it."""
    budget = WAITS.get(name)
    return {"waits": waits} if budget is None else {"waits": waits, "budget": budget, "over": waits > budget}
