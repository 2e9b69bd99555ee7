"""Codes: their integer types, as stored in files and as computed with, and their range."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import UserError

# In core, not in tokenizer: `data check` and config reading must stay free of torch.


def code_dtype(code_sizes: Sequence[int]) -> np.dtype:
    """The integer type that stores codes in files: uint16 up to 65,536 entries, uint32 above."""
    return np.dtype(np.uint16 if max(code_sizes) <= 1 << 16 else np.uint32)


def as_int64(codes: Any) -> Any:
    """A tensor of codes of any integer dtype as int64; other tensors unchanged, to be rejected by checks."""
    # torch.uint16, as codes are stored, has neither min() nor indexing
    return codes.long() if "int" in str(codes.dtype) else codes


def check_codes(codes: Any, sizes: Sequence[int]) -> None:
    """
    Args:
        codes: a tensor.
        sizes: entries of each of the K sub-codebooks.

    Raises:
        UserError: codes are not (B, N, K) int64, or one is not an entry of its sub-codebook.
    """
    if codes.dim() != 3 or codes.shape[2] != len(sizes) or str(codes.dtype) != "torch.int64":
        raise UserError(
            f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected integers of shape "
            f"(images, visual tokens, {len(sizes)} sub-codebooks)."
        )
    if codes.numel() and (codes.min() < 0 or (codes >= codes.new_tensor(sizes)).any()):
        allowed = f"0 to {max(sizes) - 1}" if len(set(sizes)) == 1 else f"less than {sizes} per sub-codebook"
        raise UserError(f"codes range from {codes.min()} to {codes.max()}; allowed: {allowed}.")
