"""Folders that transformers loads in a process that never imported open_unitok (but has it installed).

transformers has no entry points for packages. It looks a model type up in its own tables, in those that an
import has extended, or, with trust_remote_code=True, in `auto_map` of the folder, which names a module there.
"""

import os
from pathlib import Path
from typing import Any

from open_unitok.core.files import write_atomic, write_json

from .folder_checks import read_config

MODULE = "open_unitok_classes"
_CODE = '''"""The classes of this folder, from the installed package: pip install open-unitok."""

from open_unitok.mllm import ClassConditionalConfig, ClassConditionalModel
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
'''
# file of a folder -> its auto_map
_MLLM = {
    "config.json": {
        "AutoConfig": "UniTokMLLMConfig",
        "AutoModel": "UniTokForConditionalGeneration",
        "AutoModelForCausalLM": "UniTokForConditionalGeneration",
        "AutoModelForImageTextToText": "UniTokForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "UniTokProcessor"},
}
_CLASS_CONDITIONAL = {
    "config.json": {"AutoConfig": "ClassConditionalConfig", "AutoModel": "ClassConditionalModel"}
}
_TOKENIZER = {"config.json": {"AutoConfig": "UniTokConfig", "AutoModel": "UniTok"}}


class InstalledCode:
    """A mixin: saved folders import the installed package instead of holding copies of its files."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing; transformers calls this after loading by `auto_map` and would copy our files."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As transformers' save_pretrained; standalone = True calls `make_standalone` on the folder.

        None = as the folder that the model was loaded from.
        """
        standalone = kwargs.pop("standalone", None)
        if standalone is None:  # the config keeps auto_map, which needs the module
            standalone = hasattr(self.config, "auto_map")  # type: ignore[attr-defined]
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if standalone:
            make_standalone(save_directory)
        return saved


def make_standalone(folder: str | os.PathLike[str]) -> None:
    """Add `auto_map` and a module of imports to a model folder, and to the `unitok/` in it.

    Raises:
        UserError: a config is broken, or a file cannot be written.
    """
    folder = Path(folder)
    has_config = (folder / "config.json").exists()  # a processor may be saved before the model
    kind = read_config(folder).get("model_type") if has_config else None
    maps = {"unitok": _TOKENIZER, "unitok_c2i": _CLASS_CONDITIONAL}
    for name, classes in maps.get(str(kind), _MLLM).items():
        if (folder / name).exists():
            auto_map = {auto: f"{MODULE}.{own}" for auto, own in classes.items()}
            write_json(folder / name, {**read_config(folder, name), "auto_map": auto_map})
    write_atomic(folder / f"{MODULE}.py", _CODE)
    if (folder / "unitok" / "config.json").exists():
        make_standalone(folder / "unitok")
