"""Drawing and answering with a trained model: sampling, batches, streaming, and the Pipeline around them."""

import importlib
from typing import TYPE_CHECKING

# name -> module, imported on first use: `unitok generate --help` shall not wait for torch
_HOMES = {
    "Pipeline": "pipeline",
    "Sampling": "sampling",
    "answer_ids": "answering",
    "answer_steps": "answering",
    "draw_codes": "drawing",
    "draw_steps": "drawing",
    "filter_logits": "sampling",
}
__all__ = ["Pipeline", "Sampling", "answer_ids", "answer_steps", "draw_codes", "draw_steps", "filter_logits"]

if TYPE_CHECKING:
    from .answering import answer_ids as answer_ids
    from .answering import answer_steps as answer_steps
    from .drawing import draw_codes as draw_codes
    from .drawing import draw_steps as draw_steps
    from .pipeline import Pipeline as Pipeline
    from .sampling import Sampling as Sampling
    from .sampling import filter_logits as filter_logits
else:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'open_unitok.generation' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
