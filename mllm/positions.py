"""Position ids of padded and packed batches. B batch, L sequence."""

from typing import Any

import torch


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, L) mask -> (B, L) positions that count each row's real tokens from 0; 0 on left padding."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def sequence_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """(B, L) positions that restart from 0 with each sample -> FlashAttention's arguments for the flattened
    batch: cumulative sequence lengths and the maximum length."""
    flat = position_ids.flatten()
    # every 0 starts a sequence: each padding token (position 0) becomes a sequence of length 1
    starts = (flat == 0).nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}
