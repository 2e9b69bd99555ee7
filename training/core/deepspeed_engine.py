"""DeepSpeed as the training engine, from one CPU process to many GPUs; all workarounds for it are here."""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from open_unitok.core import distributed
from open_unitok.core.devices import fast_bf16
from open_unitok.core.errors import UserError
from open_unitok.core.memory import keep_freed_memory

from . import replicas
from .muon import Muon, muon_groups
from .options import REDUCE_BUCKET_SIZE, EngineOptions, Optimizer

# Undocumented parts of DeepSpeed that this module uses, tested with 0.19.8. An upgrade may change any of them
# without an error: tests/training/core/test_deepspeed_internals.py checks existence and behaviour.
# "engine" is a DeepSpeedEngine, "zero" its optimizer at ZeRO 1 and 2, "parameter" one at ZeRO 3.
DEEPSPEED_INTERNALS = {
    "deepspeed.ops.__compatible_ops__": "skip the build of deepspeed_shm_comm in init_distributed (minutes)",
    "deepspeed.runtime.config.DeepSpeedConfigError": "raise config errors as a UserError",
    "deepspeed.DeepSpeedEngine._broadcast_model": "its first broadcast fails on 0-d parameters",
    "deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP": "made once per process, but runs may differ",
    "engine.enable_backward_allreduce": "no all-reduce of gradients on one rank at ZeRO 0",
    "engine.zero_optimization": "is the engine at ZeRO 1 or more",
    "engine.is_gradient_accumulation_boundary": "is this micro-batch the last of its step",
    "engine.get_global_grad_norm": "gradient norm that ZeRO computed for clipping",
    "engine.torch_autocast_enabled": "precision of losses computed outside the module",
    "engine.torch_autocast_dtype": "precision of losses computed outside the module",
    "engine._zero3_consolidated_16bit_state_dict": "whole weights at ZeRO 3, without writing a file",
    "engine.checkpoint_engine": "writes its files: replaced to write them in the background",
    "engine.param_names": "names of parameters, to find their states in files of other ranks",
    "engine._get_zero_param_shapes": "order of parameters in flat groups, as above",
    "zero.single_partition_of_fp32_groups": "size of this rank's part of a flat group, as above",
    "zero.optimizer": "the torch optimizer inside",
    "zero.get_param_comm_dtype": "dtype in which a gradient is reduced, and the key of its bucket",
    "zero.ipg_buckets": "dtype -> bucket of gradients; ZeRO 3 allocates them in advance",
    "zero.clear_backward_seen_flag": "a call of engine.module must have the effects of a call of the engine",
    "zero.set_gradient_accumulation_boundary": "a call of engine.module, as above",
    "zero._hp_optimizer_states_linked": "link moments of parameter groups that are linked too early",
    "zero._lazy_init_hp_params_optimizer_state": "link moments of parameter groups, as above",
    "parameter.ds_tensor": "this rank's part of a parameter at ZeRO 3",
    "parameter.ds_shape": "shape of the whole parameter",
    "parameter.ds_id": "marks a parameter that ZeRO 3 has partitioned",
}

# As in the published UniTok: no weight decay for vectors and for names that contain one of these words.
NO_DECAY_WORDS = ("norm_scale", "bn", "ln", "bias", "logit_scale")


# `engine.reduce_dtype`, but for "auto"
REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def init_distributed(options: EngineOptions, seed: int) -> torch.device:
    """Set up process group, threads, seed and the CPU's arithmetic (denormal numbers become zero in this
    process); without a launcher this is rank 0 of 1.

    Returns:
        This rank's device.

    Raises:
        UserError: deepspeed is not installed.
    """
    cuda = torch.cuda.is_available()
    # After some hundred steps gradients of a pixel decoder fall below 1e-38, which makes a step on a CPU take
    # half as long again (docs/performance.md). The threads of operators inherit this setting, so it comes
    # before the first operator.
    torch.set_flush_denormal(True)
    if not cuda:
        keep_freed_memory()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    if not (cuda or options.compile):  # importing torch's compiler takes seconds
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    deepspeed = _import_deepspeed()
    transformers_logging.disable_progress_bar()  # the metric logger has the only bar
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda", distributed.local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo for CPU tensors: ranks reduce small values (the stop flag) without waiting for the GPU
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if distributed.under_launcher():
            dist.init_process_group(backend)
        else:  # a HashStore needs no RANK, WORLD_SIZE, ..., which child processes would inherit
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
            atexit.register(_leave_group)
    from deepspeed.ops import __compatible_ops__ as operators

    # this operator only speeds up inference; its build takes minutes and needs a compiler
    if "deepspeed_shm_comm" in operators:
        operators["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    torch.manual_seed(seed)
    return device


def _import_deepspeed() -> Any:
    for name in ("DeepSpeed", "deepspeed", "numexpr", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"Training needs deepspeed ({error}): pip install 'open-unitok[train]'.") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    return deepspeed


def parameter_groups(
    module: torch.nn.Module, weight_decay: float, multipliers: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups by the published rule: no weight decay for vectors, biases and scales.

    Args:
        multipliers: part of a parameter's name -> factor on its learning rate; the first match counts.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        undecayed = parameter.ndim < 2 or any(word in name for word in NO_DECAY_WORDS)
        factor = next((f for part, f in (multipliers or {}).items() if part in name), 1.0)
        decay = 0.0 if undecayed else weight_decay
        group = groups.setdefault((decay, factor), {"params": [], "weight_decay": decay, "lr_factor": factor})
        group["params"].append(parameter)
    return list(groups.values())


def shard_to_device(
    module: torch.nn.Module,
    device: torch.device,
    optimizer: Optimizer,
    options: EngineOptions,
    micro_batch: int,
) -> None:
    """Move a model to its device before `build_engine`; ZeRO 3 partitions it on the way.

    Every rank gets the values of rank 0, so the others may have built theirs on meta (`build_on_main`). At
    ZeRO 3 parameters are moved one at a time: to the device, where rank 0's values are broadcast and only
    this rank's partition is kept (on the host, if parameters are offloaded). No device ever holds the whole
    model. Afterwards parameters have no shape.

    Raises:
        UserError: see `build_engine`.
    """
    import deepspeed

    if options.zero_stage != 3:
        replicas.materialise(module, device)
        return
    # of an earlier run in this process; DeepSpeed refuses to make a second one
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    with _config_errors(), replicas.allocated_on_demand(module, device):
        deepspeed.zero.Init(
            module=module, config_dict_or_path=deepspeed_settings(optimizer, options, micro_batch)
        )
    module.to(device)  # buffers, and parameters that are not partitioned
    replicas.share_buffers(module)


@contextlib.contextmanager
def _config_errors() -> Iterator[None]:
    """Raise DeepSpeed's errors about its config as a one-line UserError."""
    import deepspeed

    try:
        yield
    except (
        deepspeed.DeepSpeedConfigError,
        AssertionError,
        ValueError,
    ) as error:  # pydantic's is a ValueError
        raise UserError(f"DeepSpeed rejects the engine section: {' '.join(str(error).split())}") from error


def build_engine(
    module: torch.nn.Module,
    groups: Sequence[dict[str, Any]],
    optimizer: Optimizer,
    options: EngineOptions,
    micro_batch: int,
) -> Any:
    """A DeepSpeed engine around `module`, with AdamW or Muon on `groups`.

    Master weights stay fp32; bf16 runs through torch's autocast, so that the quantiser can opt out of it. Per
    micro-batch call the engine for the forward pass, `engine.backward(loss)`, then `optimizer_step(engine)`.

    Raises:
        UserError: DeepSpeed rejects an option of `engine.deepspeed`.
    """
    import deepspeed

    kind: Any = torch.optim.AdamW
    if optimizer.kind == "muon":
        kind, groups = Muon, muon_groups(module, groups)
    adam = kind(
        [{**group, "lr": optimizer.lr * group.get("lr_factor", 1.0)} for group in groups],
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=True,
    )
    for group in adam.param_groups:
        group["init_lr"] = group["lr"]  # scaled by `set_lr_multiplier`
    settings = deepspeed_settings(optimizer, options, micro_batch)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET_SIZE, max(trained, 1)))
    with _config_errors(), _broadcast_scalars(module):
        engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
    if options.zero_stage and options.reduce_dtype != "auto":
        _set_reduce_dtype(engine.optimizer, REDUCE_DTYPES[options.reduce_dtype], options.zero_stage)
    # read by `optimizer_step`, which clips at ZeRO 0
    engine.unitok_clip = optimizer.clip_grad if options.zero_stage == 0 else 0.0  # pyright: ignore
    if distributed.world_size() == 1 and options.zero_stage == 0:
        engine.enable_backward_allreduce = False  # all-reduce is a no-op on one rank
    return engine


def _set_reduce_dtype(zero: Any, dtype: torch.dtype, stage: int) -> None:
    """Reduce all gradients in one dtype, whatever DeepSpeed has chosen by the classes of the modules.

    By `torch_autocast.lower_precision_safe_modules` it could not be chosen alone: at ZeRO 3 that list also
    decides in which dtype weights are gathered.
    """
    zero.get_param_comm_dtype = lambda parameter: dtype
    bucket = type(next(iter(zero.ipg_buckets.values())))()
    if stage == 3:  # ZeRO 1 and 2 allocate buckets in the backward pass
        device = next(iter(zero.ipg_buckets.values())).buffer.device
        bucket.buffer = torch.empty(zero.reduce_bucket_size, dtype=dtype, device=device)  # pyright: ignore
    zero.ipg_buckets = {dtype: bucket}


@contextlib.contextmanager
def _broadcast_scalars(module: torch.nn.Module) -> Iterator[None]:
    """DeepSpeed's first broadcast fails on 0-d parameters: view them as 1-d while it runs."""
    from deepspeed import DeepSpeedEngine

    scalars = [parameter for parameter in module.parameters() if parameter.ndim == 0]
    original = getattr(DeepSpeedEngine, "_broadcast_model", None)
    if not scalars or original is None:
        yield
        return

    def broadcast(self: Any) -> None:
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        original(self)
        for parameter in scalars:
            parameter.data = parameter.data.view(())

    DeepSpeedEngine._broadcast_model = broadcast
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = original


def deepspeed_settings(optimizer: Optimizer, options: EngineOptions, micro_batch: int) -> dict[str, Any]:
    """DeepSpeed's config: the options, with `engine.deepspeed` merged over them."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        # ZeRO 0 is clipped in optimizer_step(): DeepSpeed does not report the norm it computes there
        "gradient_clipping": optimizer.clip_grad if options.zero_stage else 0.0,
        "zero_optimization": {"stage": options.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": options.dtype == "bf16" or (options.dtype == "auto" and fast_bf16()),
            "dtype": "bfloat16",
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # its timer waits for the device twice per forward pass, from the third step on
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    zero = settings["zero_optimization"]
    if options.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["zero_hpz_partition_size"] = options.hpz
    if options.zero_stage == 0 and options.reduce_dtype != "auto":  # else see `_set_reduce_dtype`
        settings["communication_data_type"] = options.reduce_dtype
    if options.overlap_comm is not None:
        zero["overlap_comm"] = options.overlap_comm
    if options.offload != "none":
        host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero["offload_optimizer"] = host
        if options.offload == "parameters":
            zero["offload_param"] = host
        # torch's AdamW runs on a CPU; DeepSpeed's would have to be compiled
        settings["zero_force_ds_cpu_optimizer"] = False
    if options.deepspeed:
        _check_zero_keys(options.deepspeed)
    return _merge(settings, options.deepspeed)


def _check_zero_keys(given: dict[str, Any]) -> None:
    """DeepSpeed ignores keys that it does not know, and so options of ZeRO outside their section.

    Raises:
        UserError: `engine.deepspeed` has one there.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    for key in given.keys() & {*fields, *(field.alias for field in fields.values())}:
        raise UserError(f"engine.deepspeed.{key} belongs in engine.deepspeed.zero_optimization.{key}.")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward pass through the engine's module, under its autocast; ZeRO 0 to 2.

    torch.autograd.grad may differentiate the output before the backward pass. With `engine(...)` that fails:
    its hooks on the output mistake the first gradient for the backward pass.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization():  # the two calls that `engine(...)` makes in those hooks
        optimizer.clear_backward_seen_flag()
        optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())
    with autocast(engine):
        return engine.module(*args, **kwargs)


def autocast(engine: Any) -> torch.autocast:
    """Autocast in the engine's precision, for losses that are computed outside its module."""
    on = engine.torch_autocast_enabled()
    kind = next(engine.module.parameters()).device.type
    return torch.autocast(kind, dtype=engine.torch_autocast_dtype() if on else torch.bfloat16, enabled=on)


def set_lr_multiplier(engine: Any, multiplier: float) -> None:
    """Set each group's learning rate to `multiplier` x its initial one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["init_lr"] * multiplier


def optimizer_step(engine: Any) -> torch.Tensor | float | None:
    """Clip and update at the end of an accumulation.

    Returns:
        The gradient norm before clipping; None before the last micro-batch of an accumulation.
    """
    boundary = engine.is_gradient_accumulation_boundary()
    norm: torch.Tensor | float | None = None
    if boundary and not engine.zero_optimization():
        limit = engine.unitok_clip or float("inf")  # infinity: measure the norm only
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), limit, foreach=True)
    engine.step()
    if boundary and norm is None:
        norm = engine.get_global_grad_norm()
    return norm


def overwrite_rows(
    engine: Any, parameter: torch.nn.Parameter, rows: torch.Tensor, values: torch.Tensor
) -> None:
    """Overwrite rows of a parameter and of its fp32 master weights, and zero their Adam moments.

    Args:
        parameter: (..., C), the same call on every rank.
        rows: bool mask over the leading dimensions.
        values: (rows that are True, C), the same on every rank.
    """
    with torch.no_grad():
        if not engine.zero_optimization():
            # ZeRO 0: the parameter is its own master copy
            parameter[rows] = values.to(parameter.dtype)
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in engine.optimizer.state.get(parameter, {}):
                    engine.optimizer.state[parameter][moment][rows] = 0.0
            return
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    zero = engine.optimizer
    if zero.optimizer.state and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links moments once, after the first group's first step, and misses those of later groups
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    with torch.no_grad():
        # the master weights are sharded: gather them, change the rows, write each rank's part back
        full = safe_get_full_fp32_param(parameter).clone()  # pyright: ignore
        full[rows] = values.to(full)
        safe_set_full_fp32_param(parameter, full)
        if not hasattr(parameter, "ds_id"):  # ZeRO 1 and 2 have the whole parameter on every rank
            parameter[rows] = values.to(parameter)
        for moment in ("exp_avg", "exp_avg_sq") if zero.optimizer.state else ():
            state = safe_get_full_optimizer_state(parameter, moment)
            if state is not None:
                state = state.clone()
                state[rows] = 0.0
                safe_set_full_optimizer_state(parameter, state, moment)


def clamp_parameter(engine: Any, parameter: torch.nn.Parameter, low: float, high: float) -> None:
    """Clamp a parameter and its fp32 master weights."""
    with torch.no_grad():
        parameter.clamp_(low, high)
        # the next step would overwrite the clamped values from the master weights
        if engine.zero_optimization() and parameter.requires_grad:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, parameter.detach().float())


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass: less memory, more time."""
    # transformers 5.23 renamed the method; 5.17 has the old name only
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def gather_zero3_weights(engine: Any, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """The whole state dict of a ZeRO 3 engine on rank 0; call it on every rank."""
    return engine._zero3_consolidated_16bit_state_dict(trained_only)


def exit_process() -> None:
    """Exit a launched process without the interpreter's shutdown, in which gloo's threads may abort.

    A process without a launcher keeps its process group for the next stage: DeepSpeed caches it.
    """
    if not (dist.is_initialized() and distributed.under_launcher()):
        return
    dist.barrier()
    _leave_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
