"""Codebook initialisation on encoder outputs, and dead-code reset.

B batch, N visual tokens, K codes per token, V entries per code, C width of a codebook row, R = B*N tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import Quantizer, UniTok
from open_unitok.tokenizer.quantizers.base import places_before
from open_unitok.tokenizer.quantizers.kmeans import kmeans

from ..core import deepspeed_engine
from ..data import seeding


@torch.no_grad()
def init_codebooks(model: UniTok, pixels: Tensor, seed: int, kind: str = "latents") -> None:
    """Set all codebook entries by encoder outputs of (B, 3, H, W) pixels, the same on every rank.

    Args:
        kind: "latents" takes some of them, "kmeans" their k-means.
    """
    model.eval()
    latents = torch.cat([model.encode_latents(piece) for piece in pixels.split(64)]).flatten(0, 1)
    start = start_kmeans if kind == "kmeans" else init_codebooks_from_latents
    start(model.quantizer, latents, seed)


@torch.no_grad()
def start_kmeans(quantizer: Quantizer, latents: Tensor, seed: int, iterations: int = 10) -> None:
    """Set all entries by k-means on (R, latent_dim) latents, from R random ones by (seed, code).

    Raises:
        UserError: fewer latents than entries, or the quantiser's rows have no unit norm.
    """
    books, entries, _ = _codebooks(quantizer).shape
    if len(latents) < entries:
        raise UserError(
            f"codebooks.init is kmeans with {len(latents)} latents, fewer than {entries} entries: raise "
            "codebooks.init_images."
        )
    own = getattr(quantizer, "start_kmeans", None)
    if own is None and quantizer.row_norm != "unit":
        raise UserError(
            f"codebooks.init is kmeans, which is by cosine, but the rows of {type(quantizer).__name__} have "
            "no unit norm: set it to latents."
        )
    indices = torch.stack(
        [
            torch.randperm(len(latents), generator=seeding.torch_generator(seed, "kmeans", book))[:entries]
            for book in range(books)
        ]
    ).to(latents.device)
    if own is not None:
        own(latents, indices, iterations)
        return
    features, table = quantizer.split(latents), _codebooks(quantizer)
    rows = [kmeans(features[:, book], table[book], indices[book], iterations) for book in range(books)]
    every = torch.ones(table.shape[:2], dtype=torch.bool, device=table.device)
    quantizer.reset_codes(every, torch.cat(rows))


@torch.no_grad()
def init_codebooks_from_latents(quantizer: Quantizer, latents: Tensor, seed: int) -> None:
    """Set all entries to rows of (R, latent_dim) latents, sampled independently for each of the K codes.

    If R < V, rows are repeated with a little noise.
    """
    codebooks = _codebooks(quantizer)
    books, entries, width = codebooks.shape
    rows = quantizer.split(latents)
    values = []
    for book in range(books):
        generator = seeding.torch_generator(seed, "init codebook", book)
        order = torch.randperm(len(rows), generator=generator)
        repeated = torch.randint(len(rows), (max(0, entries - len(rows)),), generator=generator)
        chosen = torch.cat([order[:entries], repeated]).to(rows.device)
        noise = torch.randn(entries, width, generator=generator).to(rows.device) * 0.01
        noise[: min(entries, len(rows))] = 0  # only repeated rows need noise, to differ from the originals
        values.append(rows[chosen, book] + noise)
    every = _entries(quantizer).to(codebooks.device)
    # rows behind a smaller codebook's last entry are never used
    quantizer.reset_codes(every, torch.cat(values)[every[:books].flatten()])


class DeadCodes:
    """Finds entries that no latent was assigned to for `reset_after` steps and sets them to current latents.

    Random numbers are keyed by (seed, step) and by position in the global batch: any number of ranks resets
    the same entries to the same values.

    Args:
        reset_after: steps without use; 0 turns resets off.
        last_step: the last step with a reset.

    Attributes:
        order: images of the coming micro-batch by their position in the batch before it was reordered.
    """

    order: Sequence[int] | None = None

    def __init__(self, quantizer: Quantizer, reset_after: int, last_step: int, seed: int):
        self.quantizer = quantizer
        self.reset_after = reset_after
        self.last_reset = last_step if reset_after else 0
        self.seed = seed
        self.step = 0
        self.last_hit = torch.zeros_like(quantizer.usage, dtype=torch.int32)  # (K, V)
        self._latents: Tensor | None = None
        if self.last_reset:
            _codebooks(quantizer)
            # the model does not return latents: a hook sees them together with their codes
            quantizer.register_forward_hook(self._record)

    def _record(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        # gradient checkpointing runs the forward pass twice, first without gradients
        if self.step >= self.last_reset or not torch.is_grad_enabled():
            return
        self._latents = self.quantizer.reset_latents(inputs[0].detach())
        if self.order is not None:
            # undo the reordering: `_latent_rows` indexes the global batch in its own order
            self._latents = self._latents[places_before(tuple(self.order), self._latents.device)]
        books = torch.arange(output.codes.shape[-1], device=output.codes.device)
        self.last_hit[books.expand_as(output.codes), output.codes] = self.step + 1

    def reset_codes(self, step: int, engine: Any) -> Tensor | None:
        """Reset dead entries after `step` optimiser steps, ten times per `reset_after` steps.

        Returns:
            (K, V) bool, True where an entry was reset; None if none was.
        """
        self.step = step
        due = self.reset_after and step % max(1, self.reset_after // 10) == 0
        if not due or step > self.last_reset or self._latents is None:
            return None
        if distributed.world_size() > 1:
            # an entry is dead only if no rank used it
            torch.distributed.all_reduce(self.last_hit, op=torch.distributed.ReduceOp.MAX)
        dead = (step - self.last_hit >= self.reset_after) & _entries(self.quantizer).to(self.last_hit.device)
        count = int(dead.sum())
        if count:
            books = dead.nonzero()[:, 0]
            # do not change the key "restart": the random numbers of existing runs depend on it
            generator = seeding.torch_generator(self.seed, "restart", step)
            rows = self._latent_rows(torch.randint(2**62, (count,), generator=generator), books)
            self.quantizer.reset_codes(dead, rows, partial(deepspeed_engine.overwrite_rows, engine))
            self.last_hit[dead] = step  # the new entry has `reset_after` steps to be used
        self._latents = None
        return dead if count else None

    def _latent_rows(self, numbers: Tensor, books: Tensor) -> Tensor:
        """(n, C) rows of the global batch's latents: token `numbers` (modulo their count), code `books`."""
        assert self._latents is not None
        rows = self.quantizer.split(self._latents).flatten(0, 1)
        local = len(rows)
        # `numbers` are the same on every rank and count tokens of the global batch
        index = (numbers % (local * distributed.world_size())).to(rows.device)
        chosen = rows[index % local, books]
        # each row comes from the rank that has it; zeros elsewhere make the sum a broadcast
        chosen[index // local != distributed.rank()] = 0
        return distributed.sum_over_ranks(chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "last_hit": self.last_hit.cpu()}

    @staticmethod
    def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of every rank of a run that was saved by other ranks: an entry's last hit on any."""
        hits = torch.stack([state["last_hit"] for state in states])
        return {**states[0], "last_hit": hits.amax(dim=0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.last_hit.copy_(state["last_hit"])


def _codebooks(quantizer: Quantizer) -> nn.Parameter:
    if quantizer.codebooks is None:
        raise UserError(
            f"{type(quantizer).__name__} has no codebook rows to initialise or reset: set "
            "codebooks.init_images and codebooks.reset_after to 0."
        )
    return quantizer.codebooks


def _entries(quantizer: Quantizer) -> Tensor:
    """(K, V) bool, True for the entries of each code; a code with fewer than V has False at the end, and one
    without rows, which come after those with rows, False alone."""
    sizes = torch.tensor(quantizer.code_sizes)
    sizes[len(_codebooks(quantizer)) :] = 0
    return torch.arange(quantizer.usage.shape[1]) < sizes[:, None]


def usage_and_perplexity(
    usage: Tensor, code_sizes: Sequence[int] | None = None
) -> tuple[list[float], list[float]]:
    """(K, V) running frequencies -> per code, per cent of entries in use and perplexity.

    Args:
        code_sizes: entries of each code; None = V.
    """
    frequency = usage.double() / usage.sum(-1, keepdim=True).clamp_min(1e-12)
    sizes = torch.tensor(code_sizes or [usage.shape[1]] * len(usage), device=usage.device).double()
    # in use: more than 1 % of the uniform frequency 1 / V
    used = 100 * (frequency > 0.01 / sizes[:, None]).double().sum(-1) / sizes
    entropy = -(frequency * frequency.clamp_min(1e-12).log()).sum(-1)
    return used.tolist(), entropy.exp().tolist()
