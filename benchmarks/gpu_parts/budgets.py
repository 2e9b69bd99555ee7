"""Host waits per use of the shipped model and per training step, as counted on the emulated device.

More on a GPU than here means that the emulated device misses one: it is reported as over the budget. The test
of the dry run fails where a change adds one.
"""

# Loading a model is a part of the commands: a wait per tensor.
WAITS = {
    "generate": 20,
    "stream": 32,
    "generate with prefix": 29,
    "answer": 22,
    "answer sampled": 22,
    "answer_stream": 16,
    "chat": 23,
    "chat_stream": 13,
    "reconstruct": 4,
    "extract-codes": 210,
    "eval reconstruction": 218,
    "images of 7B": 11,
    "tokenizer train step": 0,
    "MLLM train step": 0,
    "MLLM train step, with a mask": 1,
}


def beside_budget(name: str, waits: int) -> dict[str, int | bool]:
    """The fields of a row: waits, their budget, and whether they exceed it."""
    return {"waits": waits, "budget": WAITS[name], "over": waits > WAITS[name]}
