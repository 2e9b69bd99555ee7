"""Metrics of a run: progress bar, status lines, metrics.jsonl and TensorBoard."""

import json
import math
import os
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_atomic

from .run_dir import RunDir


class MetricLogger:
    """Averages metrics over `every` steps and over ranks, and writes them as one record.

    A record: {"step", "seconds" (training time of this run so far), "samples_per_second", one mean per name};
    on a GPU also "gpu_memory_gb" (peak); after `set_flops` also "tflops_per_second" and "mfu". Values stay on
    the device until a record is written. A value that is not finite stops the run: on a CPU at its own step,
    on a GPU at the next record.
    """

    def __init__(
        self,
        run_dir: RunDir,
        total_steps: int,
        every: int,
        samples_per_step: int,
        title: str,
        quiet: bool = False,
    ):
        self.run_dir = run_dir
        self.every = every
        self.samples_per_step = samples_per_step
        self.title = title
        self.quiet = quiet or not distributed.is_main()
        self._total = total_steps
        self._pending: list[tuple[int, dict[str, Any]]] = []  # (step, metrics) since the last record
        self._notes: dict[str, float] = {}  # for the next record
        self._seconds = 0.0  # training time of all calls so far
        self._clock: float | None = None  # when `_seconds` was last updated
        self._since = 0.0  # `_seconds` at the last record
        self._bar: tqdm | None = None
        self._tensorboard: Any = None
        self._first_step = 0
        self._flops_per_sample = 0.0
        self._peak_tflops: float | None = None

    def set_flops(self, flops_per_sample: float, peak_tflops: float | None) -> None:
        """Add "tflops_per_second" over all ranks to records, and "mfu" if a rank's peak is known."""
        self._flops_per_sample, self._peak_tflops = flops_per_sample, peak_tflops

    def info(self, text: str) -> None:
        """Print one status line."""
        if not self.quiet:
            tqdm.write(f"{self.title}: {text}", file=sys.stderr)

    def start(self, step: int) -> None:
        """Start or resume at `step`: drop later records, of a call that was killed after its checkpoint."""
        # metrics of a checkpoint that are not in a record yet will be in the next one
        recorded = self._pending[0][0] - 1 if self._pending else step
        path = self.run_dir.path / "metrics.jsonl"
        if distributed.is_main() and path.exists():
            *lines, _cut = path.read_bytes().split(b"\n")
            kept = [line + b"\n" for line in lines if _step_of(line) <= recorded]
            write_atomic(path, b"".join(kept))
        self._bar = tqdm(
            total=self._total,
            initial=step,
            desc=self.title,
            unit="step",
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,  # a log file gets few updates
        )
        self._first_step, self._clock = step, time.monotonic()

    def add(self, step: int, values: dict[str, torch.Tensor | float]) -> None:
        """Metrics of one step (0-d tensors or floats), the same names on every rank.

        Raises:
            UserError: a value is NaN or infinite; the message has the step and every value.
        """
        self._pending.append((step, values))
        # reading a value from a GPU would synchronise with it in every step
        if all(not isinstance(v, torch.Tensor) or v.device.type == "cpu" for v in values.values()):
            _check_finite(step, {name: float(value) for name, value in values.items()}, self.run_dir)
        if self._bar is not None:
            self._bar.update()
        if step % self.every == 0:
            self.flush()

    def note(self, name: str, value: float) -> None:
        """A value that goes into the next record as it is (learning rate, codebook usage, ...)."""
        self._notes[name] = float(value)

    def flush(self) -> None:
        """Write a record of the steps since the last one, if there are any."""
        if not self._pending:
            return
        # (steps, names)
        table = torch.tensor(
            [[float(v) for v in values.values()] for _, values in self._pending], dtype=torch.float64
        )
        names = list(self._pending[0][1])
        for (step, _), row in zip(self._pending, table.tolist()):
            _check_finite(step, dict(zip(names, row)), self.run_dir)
        # every rank has the same names and steps: the mean of means is the mean of the global batch
        means = distributed.sum_over_ranks(table.mean(0)) / distributed.world_size()
        step, count = self._pending[-1][0], len(self._pending)
        self._pending = []
        # wall-clock time: checkpoints and logging count too
        self._tick()
        elapsed = max(self._seconds - self._since, 1e-9)
        self._since = self._seconds
        if not distributed.is_main():
            return
        speed = count * self.samples_per_step / elapsed
        record = {
            "step": step,
            "seconds": round(self._seconds, 3),
            "samples_per_second": round(speed, 2),
            **self._device_metrics(speed),
            **dict(zip(names, means.tolist())),
            **self._notes,
        }
        self._notes = {}
        with open(self.run_dir.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._write_tensorboard(record)
        if self._bar is not None and "loss" in record:
            self._bar.set_postfix_str(f"loss {record['loss']:.4g}", refresh=False)

    def log_image(self, step: int, name: str, image: Any) -> None:
        """An image for TensorBoard: uint8 array (H, W, 3)."""
        if distributed.is_main():
            self._writer().add_image(name, image, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """State with which a resumed run continues its records; rejects NaN and Inf as `add` does."""
        self._tick()
        # raises on NaN: no checkpoint is written from such a step
        self._fetch()
        return {
            "seconds": self._seconds,
            "since": self._since,
            "pending": self._pending,
            "notes": self._notes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds, self._since = state["seconds"], state["since"]
        self._pending, self._notes = list(state["pending"]), dict(state["notes"])

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of every rank of a run that was saved by other ranks: records hold means over ranks."""
        pending = []
        for of_step in zip(*(state["pending"] for state in states), strict=True):
            step, names = of_step[0][0], of_step[0][1]
            means = {name: sum(values[name] for _, values in of_step) / len(states) for name in names}
            pending.append((step, means))
        return {**states[0], "pending": pending}

    def close(self) -> None:
        """Close progress bar and TensorBoard."""
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _fetch(self) -> None:
        """Fetch pending values from the device and check them."""
        self._pending = [(step, {n: float(v) for n, v in values.items()}) for step, values in self._pending]
        for step, values in self._pending:
            _check_finite(step, values, self.run_dir)

    def _device_metrics(self, samples_per_second: float) -> dict[str, float]:
        """FLOP/s, their share of the devices' peak, and memory."""
        metrics = {}
        if self._flops_per_sample:
            metrics["tflops_per_second"] = samples_per_second * self._flops_per_sample / 1e12
            if self._peak_tflops:
                metrics["mfu"] = metrics["tflops_per_second"] / (self._peak_tflops * distributed.world_size())
        if torch.cuda.is_available():
            metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics

    def _tick(self) -> None:
        if self._clock is not None:
            now = time.monotonic()
            self._seconds += now - self._clock
            self._clock = now

    def _writer(self) -> Any:
        if self._tensorboard is None:
            # tensorboard imports TensorFlow, if installed, which logs warnings
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides events of steps that this call repeats
            self._tensorboard = SummaryWriter(
                str(self.run_dir.path / "tensorboard"), flush_secs=30, purge_step=self._first_step + 1
            )
        return self._tensorboard

    def _write_tensorboard(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer().add_scalar(name, value, record["step"])


def _step_of(line: bytes) -> float:
    """The step of a record; infinity for a line that is none, such as one that a kill cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf


def _check_finite(step: int, values: dict[str, float], run_dir: RunDir) -> None:
    if all(map(math.isfinite, values.values())):
        return
    shown = ", ".join(f"{name}={value:.6g}" for name, value in values.items())
    raise UserError(
        f"Step {step} is not finite ({shown}). The checkpoints in {run_dir.checkpoints} are intact: start a "
        "new run from the last one (init_from=...) with a lower optimizer.lr or a longer schedule.warmup."
    )
