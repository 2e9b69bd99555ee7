"""A stand-in for DeepSpeed at ZeRO 0 on one device, where DeepSpeed is not installed.

It has what training/core/deepspeed_engine.py uses and no more: fp32 weights, bf16 by torch's autocast, AdamW,
accumulation. Rows that it measured say so.
"""

import importlib.util
import sys
from typing import Any

import torch

from open_unitok.training.core import deepspeed_engine

from .report import Report


class PlainEngine:
    """One module and its optimiser, under the methods of a DeepSpeedEngine."""

    def __init__(self, module: Any, groups: Any, optimizer: Any, options: Any, micro_batch: int):
        self.module, self.accumulation, self.done = module, options.accumulation, 0
        self.bf16 = options.dtype != "fp32"
        made = [{**group, "lr": optimizer.lr * group.get("lr_factor", 1.0)} for group in groups]
        self.optimizer = torch.optim.AdamW(made, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        for group in self.optimizer.param_groups:
            group["init_lr"] = group["lr"]
        self.unitok_clip = optimizer.clip_grad

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with deepspeed_engine.autocast(self):
            return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.done + 1) % self.accumulation == 0

    def zero_optimization(self) -> bool:
        return False

    def torch_autocast_enabled(self) -> bool:
        return self.bf16

    def torch_autocast_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def get_global_grad_norm(self) -> None:
        return None


def use_plain_engine(report: Report) -> str:
    """Put `PlainEngine` in DeepSpeed's place if that is missing; returns the name of the engine."""
    if importlib.util.find_spec("deepspeed") is not None:
        return "DeepSpeed"
    device = torch.device(report.device)
    deepspeed_engine.init_distributed = lambda options, seed: device
    deepspeed_engine.shard_to_device = lambda module, *_: module.to(device)
    deepspeed_engine.build_engine = PlainEngine
    print("training by a plain loop, as DeepSpeed is not installed", file=sys.stderr)
    return "plain loop instead of DeepSpeed"
