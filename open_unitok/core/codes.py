"""The integer type of stored codes."""

from collections.abc import Sequence

import numpy as np

# In core, not in tokenizer: `data check` and config reading must stay free of torch.


def code_dtype(code_sizes: Sequence[int]) -> np.dtype:
    """The integer type that stores codes in files: uint16 up to 65,536 entries, uint32 above."""
    return np.dtype(np.uint16 if max(code_sizes) <= 1 << 16 else np.uint32)
