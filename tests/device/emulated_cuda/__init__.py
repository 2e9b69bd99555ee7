"""CUDA devices on a build of torch without CUDA: real numbers, CUDA's refusals, no GPU.

Tensors say `cuda:0` and compute on the CPU; autograd, checkpointing and CUDA's autocast apply. What CUDA
refuses is refused: operands or generators of different devices, `.numpy()`, a host synchronisation while a
graph is captured. Host synchronisations are counted by source line, graphs are recorded and replayed.
FakeTensor does not do: a CPU build aborts in autograd on its CUDA tensors, and the code branches on values.

Not emulated: kernels and their precision (TF32), memory, races between streams, torch.compile, NCCL.

A process has it from the moment it imports torch, and so have its children: see ../on_emulated_cuda.py.
"""

from .functions import host_copy
from .log import LOG, measure
from .runtime import install
from .tensor import CUDATensor, DeviceMismatchError

__all__ = ["LOG", "CUDATensor", "DeviceMismatchError", "host_copy", "install", "measure"]
