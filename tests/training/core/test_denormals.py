"""Training on a CPU flushes denormal numbers, which cost a step half of its time."""

import subprocess
import sys

CODE = """
import torch
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions

device = deepspeed_engine.init_distributed(EngineOptions(threads=2), 0)
assert torch.get_num_threads() == 2
moments = torch.full((8_000_000,), 1e-30, device=device, requires_grad=True)
decayed = moments * 1e-10
decayed.backward(torch.full((8_000_000,), 1e-30))
print(int(decayed.count_nonzero()), int(moments.grad.count_nonzero()))
"""


def test_denormals_are_flushed_in_every_thread():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]
