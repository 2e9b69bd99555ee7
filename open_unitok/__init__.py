"""OpenUniTok: a unified visual tokenizer and a multimodal language model on its codes (arXiv 2502.20321)."""

import importlib
import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"


class _Checkout:
    """Meta path finder for the six packages at the root of a checkout; a wheel has them in this folder.

    Appending the root to `__path__` instead would also make `open_unitok.tests` and a second
    `open_unitok.open_unitok` importable.
    """

    root = pathlib.Path(__file__).resolve().parents[1]
    packages = frozenset(
        f"open_unitok.{name}" for name in ("tokenizer", "mllm", "generation", "training", "eval", "configs")
    )

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """The spec of one of the six packages, None for any other name (protocol of importlib)."""
        if fullname not in cls.packages:
            return None
        folder = cls.root / fullname.rpartition(".")[2]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


# a checkout, not a wheel; reloading this module must not add the finder twice
if not (pathlib.Path(__file__).parent / "tokenizer").is_dir() and _Checkout not in sys.meta_path:
    sys.meta_path.insert(0, _Checkout)

# public name -> subpackage that defines it
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

# static imports for editors and type checkers; at run time PEP 562: `import open_unitok` loads no torch
if TYPE_CHECKING:
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
