"""Baseline of benchmarks/generation.py: the published sampling loop in eager PyTorch.

As in the published code: transformers' growing KV cache, the depth head recomputed on its whole prefix for
every code, its output layer applied to all of the prefix, and a multinomial sample (here of a one-hot
distribution, so that codes can be compared). It shares no decoding step with the package.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


def iter_baseline_codes(
    model: Any, prompts: Sequence[Sequence[int]], unconditional: Sequence[int], guidance: float
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after every visual token; B prompts of equal length."""
    images, length = len(prompts), len(prompts[0])
    # conditional rows, then unconditional ones with left padding
    rows = [*prompts, *[[0] * (length - len(unconditional)) + list(unconditional)] * images]
    ids = torch.tensor(rows, device=model.device)
    mask = torch.ones_like(ids)
    # padding is masked, and positions count from the first real token
    mask[images:, : -len(unconditional)] = 0
    cache = DynamicCache(config=model.config.text_config)
    embedder_cache = model.visual_embedder.new_cache(256)
    embeds, codes = model.get_input_embeddings()(ids), []
    while True:
        with torch.no_grad():
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            hidden = model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            token = _sample_visual_token(model, hidden, guidance)
            codes.append(token)
        yield torch.stack(codes, dim=1)
        with torch.no_grad():
            embeds = model.visual_embedder.step(token.unsqueeze(1), embedder_cache, len(codes) - 1)
            # both halves get the same image
            embeds = embeds.to(hidden.dtype).repeat(2, 1, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)


def _sample_visual_token(model: Any, hidden: Tensor, guidance: float) -> Tensor:
    """(2B, D) hidden states -> (B, K) codes, one after the other."""
    head, device = model.depth_head, hidden.device
    token = torch.zeros(len(hidden) // 2, 0, dtype=torch.long, device=device)
    for k in range(model.config.num_codebooks):
        previous = head.embeddings(token + torch.arange(k, device=device) * head.codebook_size)
        state = torch.cat([hidden.unsqueeze(1), previous.repeat(2, 1, 1)], dim=1)
        positions = torch.arange(k + 1, device=device)[None]
        for layer in head.layers:
            state = layer(state, position_embeddings=head.rotary(state, positions))
        conditional, unconditional = head.output(head.norm(state))[:, -1].float().chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        # all probability on the maximum: multinomial becomes greedy at the same cost as sampling
        probabilities = F.one_hot(guided.argmax(-1), guided.shape[-1]).float().softmax(-1)
        probabilities = torch.where(guided == guided.amax(-1, keepdim=True), probabilities, 0.0)
        token = torch.cat([token, torch.multinomial(probabilities, 1)], dim=1)
    return token
