"""Parity with the published MLLM on random weights: embeddings, states, logits, losses, gradients, greedy
codes and ids. "truecb" has the published 8 x 4096 codes and widths 64 -> 1024."""

import pytest
import torch

from open_unitok.mllm.convert import to_published
from open_unitok.mllm.prompts import expand_images

BATCHES = ["text", "vqa", "vqa_dt0", "t2i", "mixed", "twoimg"]
NAMES = ["tiny", "truecb"]


@pytest.fixture(scope="module", params=NAMES)
def published(request, reference):
    return reference(request.param)


def test_embedder(published):
    codes = published.out["embed.indices"].transpose(1, 2)
    embedder = published.model.visual_embedder
    torch.testing.assert_close(embedder.embed(codes), published.out["embed.dequant"], atol=1e-6, rtol=0)
    vectors = published.model.embed_codes(codes)
    torch.testing.assert_close(vectors, published.out["embed.out"], atol=2e-5, rtol=0)
    alone = embedder.step(codes[:, -1:], None, 0)
    torch.testing.assert_close(alone, published.out["embed.out_last_token_alone"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_batch(published, batch_of, name):
    model, out, losses = published.model, published.out, published.meta[f"{name}.losses"]
    inputs = batch_of(out, name)
    real = out[f"{name}.prep.attention_mask"]
    assert torch.equal(inputs["attention_mask"].bool(), real)
    model.visual_embedder.codebooks.requires_grad_(True)
    model.zero_grad()
    model.train()
    result = model(**inputs, return_logits=True)
    result.loss.backward()
    model.eval()

    # the golden states are fp32: up to 2e-5 (of 4.8) from ours in float64; ours in fp32, 2.3e-5 with AVX-512
    hidden = out[f"{name}.hidden"][real]
    atol = 1e-5 * hidden.abs().max().item()
    torch.testing.assert_close(result.last_hidden_state[real], hidden, atol=atol, rtol=0)
    if f"{name}.text_logits" in out:
        torch.testing.assert_close(result.logits[real], out[f"{name}.text_logits"][real], atol=2e-5, rtol=0)
    _check_image_logits(result.image_logits, out, name)
    assert result.loss.item() == pytest.approx(losses["loss"], abs=1e-5)
    assert result.text_loss.item() == pytest.approx(losses["text_loss"], abs=1e-5)
    assert result.text_tokens.item() == losses["num_text_tokens"]
    assert result.image_codes.item() == losses["num_image_tokens"]
    assert result.image_loss.item() == pytest.approx(losses.get("image_loss", 0.0), abs=1e-5)
    assert result.image_z_loss.item() == pytest.approx(losses.get("image_z_loss", 0.0), abs=1e-8)

    gradients = {n: p.new_zeros(p.shape) if p.grad is None else p.grad for n, p in model.named_parameters()}
    norms = {n: g.norm().item() for n, g in to_published(gradients, model.config.codebook_size).items()}
    for key, expected in published.meta[f"{name}.grad_norms"].items():
        assert norms[key] == pytest.approx(expected, rel=1e-5, abs=1e-9), key


def _check_image_logits(logits, out, name):
    """Compare (J, N, K, V) with the parts of the published (J, K, N, V) that the file stores."""
    if logits is None:
        assert f"{name}.image_logits_argmax" not in out and f"{name}.image_logits_BKLV" not in out
        return
    logits = logits.transpose(1, 2)
    if f"{name}.image_logits_BKLV" in out:
        torch.testing.assert_close(logits, out[f"{name}.image_logits_BKLV"], atol=2e-5, rtol=0)
    else:
        assert torch.equal(logits.argmax(-1), out[f"{name}.image_logits_argmax"])
        torch.testing.assert_close(
            logits.logsumexp(-1), out[f"{name}.image_logits_logsumexp"], atol=2e-5, rtol=0
        )
        first = out[f"{name}.image_logits_BKLV_first2pos_first64"]
        torch.testing.assert_close(logits[:, :, :2, :64], first, atol=2e-5, rtol=0)


@torch.no_grad()
def generate_greedily(model, ids, mask, guidance, context):
    """Greedy codes (B, N, K) by the model's incremental parts, the states (rows, N, D) that predict each, and
    the logits after guidance of the first three (B, 3, K, V)."""
    embedder, head = model.visual_embedder, model.depth_head
    embedder.context = context
    guided = guidance > 1
    count = len(ids) // 2 if guided else len(ids)
    length = model.config.num_image_tokens
    output = model(input_ids=ids, attention_mask=mask, use_cache=True)
    cache = embedder.new_cache(length)
    states, codes, logits = [], [], []
    for _ in range(length):
        hidden = output.last_hidden_state[:, -1]
        entry, depth_cache, steps, chosen = hidden, head.new_cache(), [], []
        for k in range(model.config.num_codebooks):
            step = head.step(k, entry, depth_cache)
            step = step[count:] + guidance * (step[:count] - step[count:]) if guided else step
            steps.append(step)
            chosen.append(step.argmax(-1))
            entry = chosen[-1].repeat(2) if guided else chosen[-1]
        states.append(hidden)
        codes.append(torch.stack(chosen, dim=1))
        logits.append(torch.stack(steps, dim=1))
        vectors = embedder.step(codes[-1][:, None], cache, len(codes) - 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            inputs_embeds=vectors.repeat(2, 1, 1) if guided else vectors,
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return torch.stack(codes, dim=1), torch.stack(states, dim=1), torch.stack(logits[:3], dim=1)


@pytest.mark.parametrize(
    "case",
    [
        "cfg1",
        "cfg5",
        "cfg5_single",
        "cfg7_top",
        "cache_cfg1_single",
        "nocache_cfg1_single",
        "nocache_cfg5_equal",
    ],
)
def test_greedy_codes(published, case):
    out, info = published.out, published.meta[f"t2i_{case}.info"]
    codes, states, logits = generate_greedily(
        published.model,
        out[f"t2i_{case}.input_ids"],
        out[f"t2i_{case}.attention_mask"],
        info["cfg_scale"],
        "last" if info["cached"] else "full",
    )
    assert torch.equal(codes.transpose(1, 2), out[f"t2i_{case}.codes"])
    torch.testing.assert_close(states, out[f"t2i_{case}.hidden_steps"], atol=1e-4, rtol=0)
    if f"t2i_{case}.logits_first3steps" in out:
        expected = out[f"t2i_{case}.logits_first3steps"]
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    if f"t2i_{case}.logits_step0_first64" in out:
        expected = out[f"t2i_{case}.logits_step0_first64"]
        torch.testing.assert_close(logits[:, 0, :, :64], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("context", ["full", "last"])
def test_generation_in_a_left_padded_batch_equals_one_by_one(reference, context):
    model = reference("tiny").model
    rows = [[1, 50, 60, 70, 3], [1, 80, 3], [1, 20, 30, 40, 50, 60, 3]]
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in rows])
    codes, states, _ = generate_greedily(model, ids, mask, 1.0, context)
    for r, row in enumerate(rows):
        alone, state, _ = generate_greedily(
            model, torch.tensor([row]), torch.ones(1, len(row)).long(), 1.0, context
        )
        assert torch.equal(alone[0], codes[r])
        torch.testing.assert_close(state[0], states[r], atol=1e-4, rtol=0)


def test_generation_step_by_step_equals_one_pass(reference):
    model = reference("tiny").model
    prompt = torch.tensor([[1, 50, 60, 3]])
    codes, states, logits = generate_greedily(model, prompt, torch.ones_like(prompt), 1.0, "full")
    ids = torch.cat([prompt, torch.full((1, 16), -200)], dim=1)
    labels = torch.where(ids == -200, ids, -100)
    whole = model(ids, image_codes=codes, labels=labels)
    torch.testing.assert_close(whole.last_hidden_state[:, 3:-1], states, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.image_logits[:, :3], logits, atol=1e-4, rtol=1e-4)
    assert (whole.image_correct == 16).all()


@pytest.mark.parametrize("case", ["vqa_gen0", "vqa_gen1"])
def test_greedy_answers(published, case):
    model, out = published.model, published.out
    ids = expand_images(out[f"{case}.input_ids"][0].tolist(), -200, [[-200] * 16])
    inputs = {"input_ids": torch.tensor([ids]), "image_codes": out[f"{case}.image"][0].transpose(1, 2)}
    inputs |= {"max_new_tokens": 16, "do_sample": False}
    result = model.generate(
        **inputs, eos_token_id=None, output_scores=True, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(result.sequences, out[f"{case}.output_ids"])
    torch.testing.assert_close(torch.stack(result.logits, dim=1), out[f"{case}.scores"], atol=1e-4, rtol=0)
    eos = int(out[f"{case}.output_ids"][0, 5])
    stopped = model.generate(**inputs, eos_token_id=eos)
    assert torch.equal(stopped, out[f"{case}.output_ids_when_eos_is_6th_token"])


def test_greedy_text(published):
    model, out = published.model, published.out
    ids = out["text_gen.input_ids"]
    result = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(result[:, ids.shape[1] :], out["text_gen.output_ids"])
