"""The integer types of codes: as stored in files, and as computed with."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# In core, not in tokenizer: `data check` and config reading must stay free of torch.


def code_dtype(code_sizes: Sequence[int]) -> np.dtype:
    """The integer type that stores codes in files: uint16 up to 65,536 entries, uint32 above."""
    return np.dtype(np.uint16 if max(code_sizes) <= 1 << 16 else np.uint32)


def as_int64(codes: Any) -> Any:
    """A tensor of codes of any integer dtype as int64; other tensors unchanged, to be rejected by checks."""
    # torch.uint16, as codes are stored, has neither min() nor indexing
    return codes.long() if "int" in str(codes.dtype) else codes
