"""The kernels that a piece of work spends its time in."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .report import Report

COUNT = 15


def top_kernels(report: Report, work: Callable[[], Any]) -> dict[str, Any]:
    """Name -> milliseconds of the operators with the most time on the device, and their share of it."""
    if not report.toy:
        work()
    on_gpu = report.device == "cuda" and not report.toy
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = {event.key: getattr(event, clock) / 1000 for event in profiler.key_averages()}
    total = sum(found.values())
    top = sorted(found, key=lambda name: -found[name])[:COUNT]
    return {
        "total": report.measured(ms=total),
        "ms": {name[:80]: report.measured(ms=found[name])["ms"] for name in top},
        "share_of_top": report.measured(share=sum(found[name] for name in top) / (total or 1.0))["share"],
    }
