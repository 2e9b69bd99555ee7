"""The protocol of a decoding backend for images: prefill, decode step, code logits.

A backend runs decoder, visual embedder and depth head of one batch with their KV caches. Classifier-free
guidance and sampling are in `image_sampling`, so a new backend implements only these five methods.

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), n given
visual tokens, K sub-codebooks, V entries per sub-codebook.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """The model state of one batch of images during generation."""

    rows_per_image: int  # 2 under guidance, else 1; known after `prefill`

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """Prefill R prompts of text ids and the given codes (B, n, K); visual token n is predicted next."""
        ...

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K) of the visual token just sampled; the next one is predicted."""
        ...

    def code_logits(self, k: int, previous: Tensor | None) -> Tensor:
        """Logits (R, V) of code k of the predicted visual token, for k = 0 to K-1 in this order.

        Args:
            previous: (B,) the code sampled at k - 1; None for k = 0.
        """
        ...

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor that `step` of `compile_step` reads or writes under this name, with these values."""
        ...

    def compile_step(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """A faster function equivalent to `step`, which samples one visual token; or `step` itself.

        Args:
            step: calls `decode_step` and `code_logits`; reads and writes only tensors of `keep`.
            state: the tensors that `step` reads and then changes, a counter first; trial runs restore them.
        """
        ...
