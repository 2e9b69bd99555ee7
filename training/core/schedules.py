"""Learning-rate and weight schedules of the published recipe (arXiv 2502.20321, section 4.1)."""

import math
import re

from open_unitok.core.errors import UserError, did_you_mean

SCHEDULE_KINDS = ("cos", "lin", "lin0", "lin00", "lin<THRESHOLD>", "exp", "constant")


def check_schedule_kind(kind: str) -> None:
    """Raises UserError for an unknown schedule; `lin0.3` falls in two slopes that meet at 0.3."""
    if kind in SCHEDULE_KINDS and kind != "lin<THRESHOLD>":
        return
    if _threshold(kind) is None:
        raise UserError(f"schedule.kind is {kind!r}.{did_you_mean(kind, SCHEDULE_KINDS)}")


def lr_multiplier(
    kind: str, step: float, total: float, warmup: float = 0.0, start: float = 0.0, end: float = 0.1
) -> float:
    """Factor on the learning rate at `step` (from 0) of `total`; `warmup` may be a fraction.

    It rises linearly from `start` to 1 over `warmup` steps, then falls to `end` at step total - 1.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    span = total - warmup - 1  # the last step is total - 1
    progress = min(1.0, (step - warmup) / span) if span > 0 else 0.0
    return _decay(kind, progress, end)


def _decay(kind: str, progress: float, end: float) -> float:
    """From 1 at progress 0 to `end` at progress 1."""
    rest = 1 - progress
    if kind == "constant":
        return 1.0
    if kind == "cos":
        return end + (1 - end) * (0.5 + 0.5 * math.cos(math.pi * progress))
    if kind in ("lin", "lin0"):
        # constant for the first 15 or 5 per cent
        flat = 0.15 if kind == "lin" else 0.05
        return 1.0 if progress < flat else end + (1 - end) * rest / (1 - flat)
    if kind == "lin00":
        return end + (1 - end) * rest
    if kind == "exp":  # constant for 15 per cent, then exponential
        return 1.0 if progress < 0.15 else math.exp((progress - 0.15) / 0.85 * math.log(end))
    knee = _threshold(kind)
    if knee is None:
        check_schedule_kind(kind)
        raise AssertionError(kind)
    # value at the knee: the mean of 1 and of the straight line from 1 to `end`
    middle = (1 + end + (1 - end) * (1 - knee)) / 2
    return 1 + (middle - 1) * progress / knee if progress < knee else end + (middle - end) * rest / (1 - knee)


def _threshold(kind: str) -> float | None:
    """0.3 for "lin0.3"; None for other names."""
    found = re.fullmatch(r"lin(0?\.\d+)", kind)
    value = float(found[1]) if found else 0.0
    return value if 0 < value < 1 else None


def linear_ramp(step: float, length: float) -> float:
    """step / length, clamped to [0, 1]; 1 if `length` is 0."""
    return 1.0 if length <= 0 else max(0.0, min(1.0, step / length))
