"""The plain loop of drawing that benchmarks/generation.py measures against; it shares no step with ours."""


def plain_loop(model, prompts, free, images, guidance):
    """The published way: transformers' growing cache, the depth head again on its whole prefix for each code,
    its output layer on all of them, a multinomial draw (here of a one-hot, to compare codes)."""
    import torch
    from transformers import DynamicCache

    rows = [*prompts, *[[0] * (len(prompts[0]) - len(free)) + free] * images]
    ids = torch.tensor(rows, device=model.device)
    mask = torch.ones_like(ids)
    mask[images:, : -len(free)] = 0
    cache, seen = DynamicCache(config=model.config.text_config), model.visual_embedder.new_cache(256)
    embeds, codes = model.get_input_embeddings()(ids), []
    head = model.depth_head
    while True:
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            hidden = model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            token = torch.zeros(images, 0, dtype=torch.long, device=model.device)
            for k in range(model.config.num_codebooks):
                given = head.embeddings(token + torch.arange(k, device=token.device) * head.codebook_size)
                state = torch.cat([hidden.unsqueeze(1), given.repeat(2, 1, 1)], dim=1)
                places = torch.arange(k + 1, device=token.device)[None]
                for layer in head.layers:
                    state = layer(state, position_embeddings=head.rotary(state, places))
                wanted, other = head.output(head.norm(state))[:, -1].float().chunk(2)
                guided = other + guidance * (wanted - other)
                shares = torch.nn.functional.one_hot(guided.argmax(-1), guided.shape[-1]).float().softmax(-1)
                shares = torch.where(guided == guided.amax(-1, keepdim=True), shares, 0.0)
                token = torch.cat([token, torch.multinomial(shares, 1)], dim=1)
            codes.append(token)
        yield torch.stack(codes, dim=1)
        with torch.no_grad():
            embeds = model.visual_embedder.step(token.unsqueeze(1), seen).to(embeds.dtype).repeat(2, 1, 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
