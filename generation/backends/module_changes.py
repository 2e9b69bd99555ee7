"""Find what a caller attached to a model: hooks, adapters, replaced modules, changed methods.

A backend that does not call the modules' `forward` in Python would ignore these without a word. The check
compares a model with a fresh one of the same config, so that it needs no list of known changes.
"""

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.mllm.class_conditional import ClassConditionalModel

from .int8 import Int8Linear

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_METHODS = ("forward", "__call__", "step", "embed", "text_logits", "decode", "embed_codes")
# Installed for good by the first call with output_hidden_states=True; without effect outside such calls.
_CAPTURING = "transformers.utils.output_capturing"
# Decoding calls `step` or reads the weight of these modules, never their `forward`.
_WITHOUT_FORWARD = ("depth_head", "visual_embedder", "visual_embedder.projection.attention.qkv")

_types: "weakref.WeakKeyDictionary[Any, dict[str, type]]" = weakref.WeakKeyDictionary()


def find_module_change(model: Any) -> str | None:
    """What was changed on a model since it was built, e.g. "depth_head.layers.0 has a forward hook".

    None if every module is of the type that the config builds, without hooks, adapters, parametrisations,
    tensor subclasses, and methods other than its class's own.
    """
    if type(model) not in (UniTokForConditionalGeneration, ClassConditionalModel):
        return f"the model is {type(model).__name__}, not UniTokForConditionalGeneration"
    for attribute, kind in _HOOKS.items():
        if getattr(torch_module, f"_global{attribute}", None):
            return f"torch has a global {kind} for all modules"
    expected, found = _built_types(model), dict(model.named_modules())
    if missing := expected.keys() - found.keys():
        return f"{min(missing)} is missing"
    for name, module in found.items():
        if change := _change(module, expected.get(name)):
            return f"{name or 'the model'} {change}"
    return None


def unreached_hooks(model: nn.Module) -> list[str]:
    """Names of modules with hooks that no backend calls while it generates images."""
    modules = dict(model.named_modules())
    names = [name for name in _WITHOUT_FORWARD if name in modules]
    return [name for name in names if any(_hooks(modules[name]))]


def _built_types(model: Any) -> dict[str, type]:
    """Type of each module of a fresh model with the same config."""
    if model not in _types:
        with torch.device("meta"):  # no memory, no initialisation
            fresh = type(model)(copy.deepcopy(model.config))
        _types[model] = {name: type(module) for name, module in fresh.named_modules()}
    return _types[model]


def _change(module: nn.Module, expected: type | None) -> str | None:
    for kind in _hooks(module):
        return f"has a {kind}"
    kind = type(module)
    # 8-bit layers take the place of linear layers; other types are adapters, parametrised or swapped modules
    if kind is not expected and not (kind is Int8Linear and expected and issubclass(expected, nn.Linear)):
        return f"is a {kind.__module__}.{kind.__name__}, expected {expected.__name__ if expected else 'none'}"
    for name, value in vars(module).items():
        # an instance attribute that hides a method: module.forward = ..., accelerate's hooks
        if callable(value) and (name == "_compiled_call_impl" or callable(getattr(kind, name, None))):
            return "was compiled" if name == "_compiled_call_impl" else f"has a replaced method {name}"
    for name in _METHODS:
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if owner is not None and not _is_own(vars(owner)[name], owner):
            return f"has a replaced method {name} ({owner.__name__}.{name})"
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"has a {type(tensor).__name__} as its {name}"
    return None


def _hooks(module: nn.Module) -> Iterator[str]:
    """Kinds of the hooks of one module."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(module, attribute).values():
            if getattr(hook, "__module__", None) != _CAPTURING:
                yield kind


def _is_own(method: Any, owner: type) -> bool:
    """Whether a method was written in the module of its class; decorators keep `__module__`."""
    source = getattr(method, "__module__", None)
    # nn.Module's own methods are functions of the same file under other names
    return source == owner.__module__ and source in sys.modules
