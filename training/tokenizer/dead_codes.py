"""Keeping every codebook entry in use: begin on encoder outputs, and move unused entries onto them.

B batch, N visual tokens, K sub-codebooks, V entries per sub-codebook, C width of one code, R = B*N rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_unitok.core import distributed

from ..core import deepspeed_engine as engine
from ..data import seeding
from .config import CodebookOptions


def init_codebooks(codebooks: nn.Parameter, latents: torch.Tensor, seed: int) -> None:
    """Set all entries to rows of encoder outputs, drawn for each sub-codebook on its own.

    Args:
        codebooks: (K, V, C).
        latents: (R, K*C), the same on every rank; where R < V rows come again with a little noise.
    """
    books, entries, width = codebooks.shape
    rows = F.normalize(latents.float().unflatten(-1, (books, width)), dim=-1)
    with torch.no_grad():
        for book in range(books):
            generator = seeding.torch_generator(seed, "init codebook", book)
            order = torch.randperm(len(rows), generator=generator)
            again = torch.randint(len(rows), (max(0, entries - len(rows)),), generator=generator)
            picked = torch.cat([order[:entries], again]).to(rows.device)
            noise = torch.randn(entries, width, generator=generator).to(rows.device) * 0.01
            noise[: min(entries, len(rows))] = 0
            codebooks[book] = (rows[picked, book] + noise).to(codebooks)


class Restarts:
    """Moves entries that no latent chose for `reset_after` steps onto latents of the current batch.

    A hook on the quantiser sees latents and codes. Draws are keyed by (seed, step) and by place in the
    global batch: any number of ranks decides alike.

    Attributes:
        order: places in the micro-batch of the images that come next, where they were put in another order.
    """

    order: Sequence[int] | None = None

    def __init__(self, quantizer: nn.Module, options: CodebookOptions, steps: int, seed: int):
        self.codebooks: nn.Parameter = quantizer.codebooks  # type: ignore[assignment]
        self.after = options.reset_after
        self.until = round(options.reset_share * steps) if self.after else 0
        self.seed = seed
        self.step = 0
        self.last_hit = torch.zeros(self.codebooks.shape[:2], dtype=torch.int32, device=self.codebooks.device)
        self._latents: torch.Tensor | None = None
        if self.until:
            quantizer.register_forward_hook(self._see)

    def _see(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        if self.step >= self.until or not torch.is_grad_enabled():
            return
        self._latents = inputs[0].detach()
        if self.order is not None:
            self._latents = self._latents[torch.tensor(self.order).argsort().to(self._latents.device)]
        books = torch.arange(output.codes.shape[-1], device=output.codes.device)
        self.last_hit[books.expand_as(output.codes), output.codes] = self.step + 1

    def after_step(self, step: int, deepspeed_engine: Any) -> torch.Tensor | None:
        """Call when `step` steps are done: now and then, unused entries move.

        Returns:
            (K, V) bool, True where an entry moved; None if none did.
        """
        self.step = step
        if step > self.until or not self.after or step % max(1, self.after // 10) or self._latents is None:
            return None
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(self.last_hit, op=torch.distributed.ReduceOp.MAX)
        unused = step - self.last_hit >= self.after
        count = int(unused.sum())
        if count:
            owners = unused.nonzero()[:, 0]
            generator = seeding.torch_generator(self.seed, "restart", step)
            values = self._rows(torch.randint(2**62, (count,), generator=generator), owners)
            engine.overwrite_rows(deepspeed_engine, self.codebooks, unused, values)
            self.last_hit[unused] = step
        self._latents = None
        return unused if count else None

    def _rows(self, picked: torch.Tensor, books: torch.Tensor) -> torch.Tensor:
        """(n, C) normalised chunks of the global batch: row `picked` (modulo their number) of each book."""
        assert self._latents is not None
        width = self.codebooks.shape[-1]
        chunks = F.normalize(self._latents.float().flatten(0, 1).unflatten(-1, (-1, width)), dim=-1)
        mine = len(chunks)
        place = (picked % (mine * distributed.world_size())).to(chunks.device)
        found = chunks[place % mine, books]
        found[place // mine != distributed.rank()] = 0
        return distributed.sum_over_ranks(found)

    def state_dict(self) -> dict[str, Any]:
        return {"last_hit": self.last_hit.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_hit.copy_(state["last_hit"])


def spread(usage: torch.Tensor) -> tuple[list[float], list[float]]:
    """(K, V) running frequencies -> per sub-codebook, per cent of entries in use and perplexity."""
    frequency = usage.double() / usage.sum(-1, keepdim=True).clamp_min(1e-12)
    used = 100 * (frequency > 0.01 / usage.shape[1]).double().mean(-1)
    entropy = -(frequency * frequency.clamp_min(1e-12).log()).sum(-1)
    return used.tolist(), entropy.exp().tolist()
