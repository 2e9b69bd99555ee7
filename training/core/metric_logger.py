"""What a run tells: a progress bar, one line per phase, metrics.jsonl and TensorBoard."""

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
    """Collects values without waiting for the device; every `every` steps their means become a row.

    A row: {"step", "seconds" (training time of this run so far), "samples_per_second", one mean per name}; on
    a GPU also "gpu_memory_gb", the most that was in use; after `measures`, the speed of the arithmetic.
    Values that are not finite stop the run: at their own step on a CPU, at the next row on a GPU.
    """

    def __init__(
        self,
        folder: RunDir,
        total_steps: int,
        every: int,
        samples_per_step: int,
        title: str,
        quiet: bool = False,
    ):
        self.folder = folder
        self.every = every
        self.samples_per_step = samples_per_step
        self.title = title
        self.quiet = quiet or not distributed.is_main()
        self._total = total_steps
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._notes: dict[str, float] = {}
        self._seconds = 0.0
        self._clock: float | None = None
        self._since = 0.0
        self._bar: tqdm | None = None
        self._board: Any = None
        self._begun = 0
        self._flops = 0.0
        self._peak: float | None = None

    def set_flops(self, flops_per_sample: float, peak_tflops: float | None) -> None:
        """Rows get "tflops_per_second" over all ranks, and "mfu", the share of their peak."""
        self._flops, self._peak = flops_per_sample, peak_tflops

    def info(self, text: str) -> None:
        """One line to the user."""
        if not self.quiet:
            tqdm.write(f"{self.title}: {text}", file=sys.stderr)

    def start(self, step: int) -> None:
        """The loop starts (again) at `step`: rows after it, from a call that was killed, are dropped."""
        if distributed.is_main():
            path = self.folder.path / "metrics.jsonl"
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                write_atomic(path, "".join(line for line in lines if _step_of(line) <= step))
        self._bar = tqdm(
            total=self._total,
            initial=step,
            desc=self.title,
            unit="step",
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )
        self._begun, self._clock = step, time.monotonic()

    def add(self, step: int, values: dict[str, torch.Tensor | float]) -> None:
        """Values of one finished step (0-d tensors or floats), the same names on every rank.

        Raises:
            UserError: a value is NaN or infinite; the message gives the step and every value.
        """
        self._waiting.append((step, values))
        if all(not isinstance(v, torch.Tensor) or v.device.type == "cpu" for v in values.values()):
            _check_finite(step, {name: float(value) for name, value in values.items()}, self.folder)
        if self._bar is not None:
            self._bar.update()
        if step % self.every == 0:
            self.flush()

    def note(self, name: str, value: float) -> None:
        """A value for the next row as it stands (learning rate, usage over a window, ...)."""
        self._notes[name] = float(value)

    def flush(self) -> None:
        """Write what was added since the last row; nothing to do where nothing was."""
        if not self._waiting:
            return
        rows = torch.tensor(
            [[float(v) for v in values.values()] for _, values in self._waiting], dtype=torch.float64
        )
        names = list(self._waiting[0][1])
        for (step, _), row in zip(self._waiting, rows.tolist()):
            _check_finite(step, dict(zip(names, row)), self.folder)
        means = distributed.sum_over_ranks(rows.mean(0)) / distributed.world_size()
        step, count = self._waiting[-1][0], len(self._waiting)
        self._waiting = []
        self._tick()
        passed = max(self._seconds - self._since, 1e-9)
        self._since = self._seconds
        if not distributed.is_main():
            return
        speed = count * self.samples_per_step / passed
        row = {
            "step": step,
            "seconds": round(self._seconds, 3),
            "samples_per_second": round(speed, 2),
            **self._device(speed),
            **dict(zip(names, means.tolist())),
            **self._notes,
        }
        self._notes = {}
        with open(self.folder.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._to_board(row)
        if self._bar is not None and "loss" in row:
            self._bar.set_postfix_str(f"loss {row['loss']:.4g}", refresh=False)

    def log_image(self, step: int, name: str, image: Any) -> None:
        """An image for TensorBoard: uint8 array (H, W, 3)."""
        if distributed.is_main():
            self._writer().add_image(name, image, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs for its rows to go on; refuses NaN and Inf as `add` does."""
        self._tick()
        self._settle()
        return {
            "seconds": self._seconds,
            "since": self._since,
            "waiting": self._waiting,
            "notes": self._notes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._seconds, self._since = state["seconds"], state["since"]
        self._waiting, self._notes = list(state["waiting"]), dict(state["notes"])

    def close(self) -> None:
        """Finish bar and files."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def _settle(self) -> None:
        """Fetch the waiting values from the device and check them."""
        self._waiting = [(step, {n: float(v) for n, v in values.items()}) for step, values in self._waiting]
        for step, values in self._waiting:
            _check_finite(step, values, self.folder)

    def _device(self, samples_per_second: float) -> dict[str, float]:
        """How hard the devices work."""
        found = {}
        if self._flops:
            found["tflops_per_second"] = samples_per_second * self._flops / 1e12
            if self._peak:
                found["mfu"] = found["tflops_per_second"] / (self._peak * distributed.world_size())
        if torch.cuda.is_available():
            found["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    def _tick(self) -> None:
        if self._clock is not None:
            now = time.monotonic()
            self._seconds += now - self._clock
            self._clock = now

    def _writer(self) -> Any:
        if self._board is None:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.folder.path / "tensorboard"), flush_secs=30, purge_step=self._begun + 1
            )
        return self._board

    def _to_board(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer().add_scalar(name, value, row["step"])


def _step_of(line: str) -> float:
    """The step of a row; a line cut off by a kill counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _check_finite(step: int, values: dict[str, float], folder: RunDir) -> None:
    if all(map(math.isfinite, values.values())):
        return
    shown = ", ".join(f"{name}={value:.6g}" for name, value in values.items())
    raise UserError(
        f"Step {step} is not finite ({shown}). The checkpoints in {folder.checkpoints} are intact: begin a "
        "new run from the last one (init_from=...) with a lower optimizer.lr or a longer schedule.warmup."
    )
