"""The torch backend: eager operators, for every device and decoder.

B images, R rows of the batch (B, or 2B under guidance: conditional rows, then unconditional ones), n given
visual tokens, K sub-codebooks, V entries per sub-codebook, D decoder width.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..kv_cache import prefill


class Eager:
    """See `base.Backend`; the other backends inherit from this one and share its prefill.

    Attributes:
        hidden: (R, D) decoder states that predict the next visual token.
        num_read: number of visual tokens so far.
    """

    def __init__(self, model: Any):
        self.model = model

    def prefill(self, rows: Sequence[Sequence[int]], prefix: Tensor) -> None:
        """Prefill R prompts of text ids and the given codes (B, n, K)."""
        num_tokens = self.model.config.num_image_tokens
        self.rows_per_image = len(rows) // len(prefix)
        self.decoder: Any = prefill(self.model, rows, self.steps_to_reserve(prefix.shape[1]))
        self.embedder_cache: Any = self.model.visual_embedder.new_cache(num_tokens)
        self.hidden, self.num_read = self.decoder.hidden, prefix.shape[1]
        if self.num_read:
            self._feed(prefix, 0)

    def steps_to_reserve(self, num_given: int) -> int:
        """Capacity of the KV cache beyond the prompt."""
        return self.model.config.num_image_tokens - 1  # the last visual token is never an input

    def decode_step(self, codes: Tensor) -> None:
        """Feed the codes (B, K) of the visual token just sampled."""
        self._feed(codes.unsqueeze(1), self.num_read)
        self.num_read += 1

    def _feed(self, codes: Tensor, start: int | Tensor) -> None:
        """Embed the codes (B, n, K) of the next n visual tokens, of which `start` is the index of the first,
        and run the decoder on them."""
        vectors = self.model.visual_embedder.step(codes, self.embedder_cache, start).to(self.hidden.dtype)
        # conditional and unconditional rows get the same image
        self.hidden = self.decoder.decode_step(vectors.repeat(self.rows_per_image, 1, 1))

    def code_logits(self, k: int, previous: Tensor | None) -> Tensor:
        """Logits (R, V) of code k, in order; `previous` (B,) holds the codes k - 1, None for k = 0."""
        head = self.model.depth_head
        if previous is None:  # k = 0 starts a new visual token: the depth head's cache spans one token
            self.depth_cache = head.new_cache()
            return head.step(0, self.hidden, self.depth_cache)
        return head.step(k, previous.repeat(self.rows_per_image), self.depth_cache)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def compile_step(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """Return `step` unchanged."""
        return step
