"""The result of `UniTokForConditionalGeneration.forward`.

B batch, L sequence, N visual tokens per image, K sub-codebooks, V entries per sub-codebook, D decoder width,
J target images, T target text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput


@dataclass
class UniTokMLLMOutput(ModelOutput):
    """Losses, logits and states; None where a part was not requested.

    With `reduction="sum"` the losses are sums over tokens and codes, for a training loop that divides by
    global counts; with "mean", `loss` is their sum divided by `text_tokens + image_codes`. The first fields
    are those of transformers' causal models, in their order, because tuples are read by position.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # (B, L or fewer, vocabulary), of text
    past_key_values: Any = None
    hidden_states: tuple[torch.Tensor, ...] | None = None  # (B, L, D) each: inputs, then after every layer
    attentions: tuple[torch.Tensor, ...] | None = None  # (B, heads, L, L and cached) per layer
    text_loss: torch.Tensor | None = None
    image_loss: torch.Tensor | None = None  # z-loss included
    image_z_loss: torch.Tensor | None = None  # the z-loss alone, weighted
    text_tokens: torch.Tensor | None = None  # T, int64
    image_codes: torch.Tensor | None = None  # J*N*K, int64: every code counts as one token
    image_correct: torch.Tensor | None = None  # (K,) int64: target codes whose logit was the largest
    image_logits: torch.Tensor | None = None  # (J, N, K, V); None with return_logits = False
    last_hidden_state: torch.Tensor | None = None  # (B, L, D), after the final norm

    @property
    def losses(self) -> dict[str, torch.Tensor]:
        """The parts of the training loss by name, each of which needs a weight; empty without labels."""
        named = {"text": self.text_loss, "image": self.image_loss}
        return {name: value for name, value in named.items() if value is not None}


# fields that transformers' Trainer must not collect as predictions: `predict` returns the logits
NOT_PREDICTIONS = [name for name in UniTokMLLMOutput.__dataclass_fields__ if name not in ("loss", "logits")]
