"""Metrics of MLLM training: accuracy per sub-codebook, text loss per sample kind, speed."""

import time
from typing import Any

import torch
import torch.nn.functional as F

from open_unitok.core import distributed
from open_unitok.mllm.losses import Targets
from open_unitok.mllm.positions import to_device

from ..core.flops import TokenCounts, flops_of, peak_tflops
from ..data.collate import Batch
from ..data.sample_kinds import SAMPLE_KINDS


class RunningMetrics:
    """Counts since the last metrics record; `reduce` sums them over ranks and resets them.

    K sub-codebooks. Counts stay on the device until then, so that no step waits for it. Create it before
    ZeRO 3 shards the model, which removes the shapes that FLOPs are computed from.

    Args:
        peak: peak TFLOP/s of one device; None = that of the GPU in `core/gpus.py`.

    Attributes:
        num_trained: trained parameters.
    """

    def __init__(self, model: Any, device: torch.device, peak: float | None = None):
        num_codebooks, self.num_read = model.config.num_codebooks, model.config.num_read
        self.features_per_image = model.config.num_continuous_tokens or 0
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.model_flops, self.device, self.peak = flops_of(model), device, peak or peak_tflops(device)
        self.correct = torch.zeros(num_codebooks, dtype=torch.float64, device=device)  # (K,)
        # one number per sample kind, in the order of SAMPLE_KINDS
        self.text_loss_sums = torch.zeros(len(SAMPLE_KINDS), dtype=torch.float64, device=device)
        self.text_targets = torch.zeros(len(SAMPLE_KINDS), dtype=torch.float64, device=device)
        # on the host, where these counts are computed
        self.positions = torch.zeros(1, dtype=torch.float64)  # of the batches, padding included
        self.counts = torch.zeros(len(TokenCounts._fields), dtype=torch.float64)
        self._clock = time.monotonic()

    def add(self, correct: torch.Tensor, batch: Batch) -> None:
        """Count a micro-batch; `correct` (K,) of its codes were predicted right."""
        self.correct += correct
        self.positions += batch.kinds.numel()
        codes = batch.inputs["image_codes"]
        features = batch.inputs.get("image_features", batch.inputs.get("feature_codes"))
        self.counts += torch.tensor(
            TokenCounts(
                tokens=batch.tokens,
                attention_pairs=batch.attention_pairs,
                text_targets=batch.text_targets,
                image_tokens=0 if codes is None else codes.shape[0] * self.num_read(codes.shape[1]),
                image_targets=batch.code_targets / len(self.correct),
                feature_tokens=0 if features is None else features.shape[0] * self.features_per_image,
            ),
            dtype=torch.float64,
        )

    @torch.no_grad()
    def add_text_losses(self, model: Any, hidden: torch.Tensor, batch: Batch, found: Targets) -> None:
        """Text losses per sample kind; `hidden` (B, L, D) and `found` are of this micro-batch."""
        # a second pass through lm_head, in logged steps only: the forward pass returns just the sum
        losses = F.cross_entropy(
            model.text_logits(hidden.flatten(0, 1)[found.text_before]).float(),
            found.text_ids,
            reduction="none",
        )
        # the kind of the predicted token, one position after the one that predicts it
        kinds = to_device(batch.kinds, hidden.device).flatten()[found.text_before + 1]
        self.text_loss_sums.index_add_(0, kinds, losses.double())
        self.text_targets.index_add_(0, kinds, torch.ones_like(losses, dtype=torch.float64))

    def reduce(self) -> dict[str, float]:
        """Metrics by name over all ranks, without kinds that had no sample and without MFU if the device's
        peak is unknown; resets the counts. Call it on every rank."""
        # reduced on the device, like the other counts
        counts = torch.cat([self.positions, self.counts])
        positions, *counts = distributed.sum_over_ranks(counts.to(self.device)).tolist()
        counts = TokenCounts(*counts)
        correct = distributed.sum_over_ranks(self.correct).tolist()
        text_loss_sums, text_targets = distributed.sum_over_ranks(
            torch.stack([self.text_loss_sums, self.text_targets])
        ).tolist()
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        values = {
            f"text_loss/{kind}": total / count
            for kind, total, count in zip(SAMPLE_KINDS, text_loss_sums, text_targets)
            if count
        }
        if counts.image_targets:
            values |= {f"accuracy/{book}": hits / counts.image_targets for book, hits in enumerate(correct)}
        values["padding"] = 1 - counts.tokens / max(positions, 1)
        values["tokens_per_second"] = counts.tokens / seconds
        values["tflops_per_second"] = self.model_flops.flops(counts) / seconds / 1e12
        if self.peak:
            values["mfu"] = values["tflops_per_second"] / (self.peak * distributed.world_size())
        self._clock = now
        for tensor in (self.correct, self.text_loss_sums, self.text_targets, self.positions, self.counts):
            tensor.zero_()
        return values

    def state_dict(self) -> dict[str, Any]:
        """The counts so far; text losses are added and reduced within one step, so they need no state."""
        return {name: getattr(self, name).clone() for name in ("correct", "positions", "counts")}

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """Of a run that was saved by other ranks: rank 0 takes all counts, which `reduce` sums over ranks."""
        share = float(distributed.is_main())
        return {name: share * sum(state[name] for state in states) for name in states[0]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for name, value in state.items():
            getattr(self, name)[: len(value)].copy_(value)  # earlier versions counted fewer kinds of tokens
        self._clock = time.monotonic()
