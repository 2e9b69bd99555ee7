"""OpenUniTok: a unified visual tokenizer and a multimodal language model on its codes (arXiv 2502.20321)."""

import importlib
import pathlib
from typing import TYPE_CHECKING

_here = pathlib.Path(__file__).resolve().parent
if not (
    _here / "tokenizer"
).is_dir():  # a checkout, not an installed wheel: the subpackages are the root's folders
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

_HOMES = {
    "UniTok": "tokenizer",
    "UniTokConfig": "tokenizer",
    "UniTokForConditionalGeneration": "mllm",
    "UniTokMLLMConfig": "mllm",
    "UniTokProcessor": "mllm",
    "Pipeline": "generation",
    "Sampling": "generation",
}
__all__ = [
    "Pipeline",
    "Sampling",
    "UniTok",
    "UniTokConfig",
    "UniTokForConditionalGeneration",
    "UniTokMLLMConfig",
    "UniTokProcessor",
]

if (
    TYPE_CHECKING
):  # so that editors and type checkers see the names; at run time they are imported on first use
    from open_unitok.generation import Pipeline as Pipeline
    from open_unitok.generation import Sampling as Sampling
    from open_unitok.mllm import UniTokForConditionalGeneration as UniTokForConditionalGeneration
    from open_unitok.mllm import UniTokMLLMConfig as UniTokMLLMConfig
    from open_unitok.mllm import UniTokProcessor as UniTokProcessor
    from open_unitok.tokenizer import UniTok as UniTok
    from open_unitok.tokenizer import UniTokConfig as UniTokConfig
else:

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'open_unitok' has no attribute {name!r}")
        return getattr(importlib.import_module(f"open_unitok.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
