"""What is logged about the MLLM beside its losses: accuracy per sub-codebook, text loss per task, speed."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from open_unitok.core import distributed
from open_unitok.mllm.losses import targets

from ..core.flops import MLLMFlops, TokenCounts, peak_tflops
from ..data.collate import Batch
from ..data.sample_kinds import SAMPLE_KINDS


class Progress:
    """Counts between two rows of the log; `take` sums them over ranks and begins anew.

    K sub-codebooks; counts stay on the device until they are taken. Make it before ZeRO-3 takes shapes away.

    Args:
        peak: TFLOP/s that one device could do at most; None looks the GPU up in a table.

    Attributes:
        trained: how many parameters are.
    """

    def __init__(self, model: Any, device: torch.device, peak: float | None = None):
        num_codebooks = model.config.num_codebooks
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.cost, self.device, self.peak = MLLMFlops(model), device, peak or peak_tflops(device)
        self.correct = torch.zeros(num_codebooks, dtype=torch.float64, device=device)  # (K,)
        self.text_sums = torch.zeros(len(SAMPLE_KINDS), dtype=torch.float64, device=device)
        self.text_counts = torch.zeros(len(SAMPLE_KINDS), dtype=torch.float64, device=device)
        self.places = torch.zeros(1, dtype=torch.float64)  # of the batches, padding included
        self.work = torch.zeros(len(TokenCounts._fields), dtype=torch.float64)
        self._clock = time.monotonic()

    def add(self, correct: torch.Tensor, batch: Batch) -> None:
        """One micro-batch: `correct` (K,) of its codes were guessed right."""
        self.correct += correct
        self.places += batch.kinds.numel()
        codes = batch.inputs["image_codes"]
        self.work += torch.tensor(
            TokenCounts(
                tokens=batch.tokens,
                attention_pairs=batch.pairs,
                text_targets=batch.text_targets,
                image_tokens=0 if codes is None else codes.shape[0] * codes.shape[1],
                image_targets=batch.code_targets / len(self.correct),
            ),
            dtype=torch.float64,
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
        """Values by name; what had no sample is left out, and MFU where the device's peak is not known."""
        counts = torch.cat([self.places, self.work])
        places, *work = distributed.sum_over_ranks(counts.to(self.device)).tolist()
        work = TokenCounts(*work)
        correct = distributed.sum_over_ranks(self.correct).tolist()
        text_sums, text_counts = distributed.sum_over_ranks(
            torch.stack([self.text_sums, self.text_counts])
        ).tolist()
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        values = {
            f"text_loss/{kind}": total / count
            for kind, total, count in zip(SAMPLE_KINDS, text_sums, text_counts)
            if count
        }
        if work.image_targets:
            values |= {f"accuracy/{book}": hits / work.image_targets for book, hits in enumerate(correct)}
        values["padding"] = 1 - work.tokens / max(places, 1)
        values["tokens_per_second"] = work.tokens / seconds
        values["tflops_per_second"] = self.cost.flops(work) / seconds / 1e12
        if self.peak:
            values["mfu"] = values["tflops_per_second"] / (self.peak * distributed.world_size())
        self._clock = now
        for tensor in (self.correct, self.text_sums, self.text_counts, self.places, self.work):
            tensor.zero_()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The counts so far (those of texts are taken in the step that makes them)."""
        return {name: getattr(self, name).clone() for name in ("correct", "places", "work")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self._clock = time.monotonic()
