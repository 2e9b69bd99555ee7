"""What is logged about the MLLM beside its losses: accuracy per sub-codebook, text loss per task, speed."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from open_unitok import ranks
from open_unitok.mllm.loss import targets

from .collate import KINDS, Batch


class Progress:
    """Counts between two rows of the log; `take` sums them over ranks and begins anew.

    K sub-codebooks; counts stay on the device until they are taken.
    """

    def __init__(self, num_codebooks: int, device: torch.device):
        self.correct = torch.zeros(num_codebooks, dtype=torch.float64, device=device)  # (K,)
        self.text_sums = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        self.text_counts = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        self.counts = torch.zeros(
            3, dtype=torch.float64
        )  # visual tokens learnt, tokens, places in the batches
        self._clock = time.monotonic()

    def add(self, correct: torch.Tensor, batch: Batch) -> None:
        """One micro-batch: `correct` (K,) of its codes were guessed right."""
        self.correct += correct
        places = batch.kinds.numel()
        self.counts += torch.tensor(
            [batch.code_targets / len(self.correct), batch.tokens, places], dtype=torch.float64
        )

    @torch.no_grad()
    def add_texts(self, model: Any, hidden: torch.Tensor, batch: Batch, inputs: dict[str, Any]) -> None:
        """Text losses per task, from the (B, L, D) hidden states of one micro-batch."""
        found = targets(
            inputs["labels"],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
            None,
            model.config.image_token_id,
        )
        losses = F.cross_entropy(
            model.text_logits(hidden.flatten(0, 1)[found.text_before]).float(),
            found.text_ids,
            reduction="none",
        )
        kinds = batch.kinds.to(hidden.device).flatten()[found.text_before + 1]
        self.text_sums.index_add_(0, kinds, losses.double())
        self.text_counts.index_add_(0, kinds, torch.ones_like(losses, dtype=torch.float64))

    def take(self) -> dict[str, float]:
        """Values by name; what had no sample is left out."""
        counts = ranks.sum_over_ranks(self.counts.to(self.correct.device)).tolist()
        correct = ranks.sum_over_ranks(self.correct).tolist()
        text_sums, text_counts = ranks.sum_over_ranks(
            torch.stack([self.text_sums, self.text_counts])
        ).tolist()
        visual_tokens, tokens, places = counts
        now = time.monotonic()
        values = {
            f"text_loss/{kind}": total / n for kind, total, n in zip(KINDS, text_sums, text_counts) if n
        }
        if visual_tokens:
            values |= {f"accuracy/{book}": hits / visual_tokens for book, hits in enumerate(correct)}
        values["padding"] = 1 - tokens / max(places, 1)
        values["tokens_per_second"] = tokens / max(now - self._clock, 1e-9)
        self._clock = now
        for tensor in (self.correct, self.text_sums, self.text_counts, self.counts):
            tensor.zero_()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The counts so far (those of texts are taken in the step that makes them)."""
        return {"correct": self.correct.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.correct.copy_(state["correct"])
        self.counts.copy_(state["counts"])
        self._clock = time.monotonic()
