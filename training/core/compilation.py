"""`engine.compile`: torch.compile on the blocks that a model repeats, each compiled in place."""

import os

import torch
from torch import nn

from open_unitok.core.errors import UserError

BACKEND = "inductor"


def compile_blocks(model: nn.Module, *kinds: type[nn.Module], dynamic: bool | None = None) -> int:
    """Compile every module in `model` that is of one of `kinds`, but not those inside another one.

    By block instead of as a whole: blocks are equal, so one of each kind is compiled, in seconds, and what
    torch cannot trace lies between them. Names of weights stay as they are: `module.compile()` wraps nothing.

    Args:
        dynamic: False compiles a block once for each shape of its inputs; None again, for all, when a second
            one comes: for rows of any length.

    Returns:
        How many modules are compiled.

    Raises:
        UserError: there is no compiler on this machine.
    """
    _check_compiler(next(model.parameters()).device)
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    # an earlier run in this process may have turned it off, see `deepspeed_engine.init_distributed`
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    torch._dynamo.config.disable = False  # pyright: ignore
    # the same random numbers as without compiling, for the dropout of LoRA
    torch._inductor.config.fallback_random = True
    # the adaptive GAN weight runs a backward pass over the same graph twice
    torch._functorch.config.donated_buffer = False
    # lengths, training and evaluation, with and without gradients (reentrant checkpoints)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # pyright: ignore
    inside, count = set(), 0
    for module in model.modules():
        if isinstance(module, kinds) and module not in inside:
            inside.update(module.modules())
            module.compile(backend=BACKEND, dynamic=dynamic)
            count += 1
    return count


def _check_compiler(device: torch.device) -> None:
    """
    Raises:
        UserError: inductor would fail in the first step, after the model has been loaded.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("engine.compile needs the package triton on a GPU: install it, or turn it off.")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "engine.compile needs a C++ compiler on a CPU (g++, or the one that CXX names): install it, or "
            "turn it off."
        ) from None
