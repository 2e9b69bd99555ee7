"""Image generation: cached = uncached = teacher-forced, batched = one by one, guidance 1 = no guidance."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, generate_image_codes, iter_image_codes, kv_cache
from open_unitok.generation.sampling import GumbelNoise, apply_guidance, sample_code

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)
GREEDY = Sampling(guidance=3.0, greedy=True)


@torch.no_grad()
def plain_loop(model, prompt, sampling, seed, unconditional):
    """One image without caches: the whole sequence and the whole depth head are recomputed for every code."""
    config = model.config
    rows = [prompt] if sampling.guidance == 1 else [prompt, unconditional]
    noise = None if sampling.greedy else GumbelNoise([seed], config.num_codebooks, config.codebook_size)
    codes = torch.zeros(1, config.num_image_tokens, config.num_codebooks, dtype=torch.long)
    for t in range(config.num_image_tokens):
        gumbel = noise.sample() if noise else None
        hidden = []
        for row in rows:
            embeds = model.get_input_embeddings()(torch.tensor([row]))
            if t and config.visual_context == "full":
                embeds = torch.cat([embeds, model.embed_codes(codes[:, :t])], dim=1)
            elif t:
                alone = [model.embed_codes(codes[:, i : i + 1]) for i in range(t)]
                embeds = torch.cat([embeds, *alone], dim=1)
            hidden.append(
                model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
            )
        for k in range(config.num_codebooks):
            logits = model.depth_head(torch.stack(hidden), codes[:, t].repeat(len(rows), 1))[:, k]
            logits = apply_guidance(logits, sampling.guidance) if len(rows) == 2 else logits
            codes[:, t, k] = sample_code(logits, sampling, None if gumbel is None else gumbel[k])
    return codes[0]


@pytest.mark.parametrize(
    "sampling", [SAMPLED, GREEDY, Sampling(guidance=1.0)], ids=["sampled", "greedy", "unguided"]
)
def test_cached_batch_equals_the_plain_loop(model, sampling):
    seeds = [11, 12, 13]
    codes = generate_image_codes(model, PROMPTS, sampling, seeds, UNCONDITIONAL)
    assert codes.shape == (3, 9, 3) and codes.unique().numel() > 8
    for prompt, seed, generated in zip(PROMPTS, seeds, codes):
        assert torch.equal(generated, plain_loop(model, prompt, sampling, seed, UNCONDITIONAL))


def test_generated_codes_equal_the_teacher_forced_ones(full_model):
    """In a training pass over prompt and generated codes, each greedy code has the largest logit."""
    codes = generate_image_codes(full_model, PROMPTS, Sampling(guidance=1.0, greedy=True), [0, 0, 0])
    mark = full_model.config.image_token_id
    for prompt, generated in zip(PROMPTS, codes):
        ids = torch.tensor([prompt + [mark] * len(generated)])
        labels = torch.where(ids == mark, mark, -100)
        with torch.no_grad():
            output = full_model(input_ids=ids, image_codes=generated[None], labels=labels)
        assert torch.equal(output.image_logits.argmax(-1)[0], generated)


def test_an_image_depends_only_on_its_own_prompt_and_seed(model):
    together = generate_image_codes(
        model, [*PROMPTS, PROMPTS[1], PROMPTS[1]], SAMPLED, [1, 2, 3, 2, 4], UNCONDITIONAL
    )
    for i in range(3):
        assert torch.equal(
            together[i], generate_image_codes(model, [PROMPTS[i]], SAMPLED, [i + 1], UNCONDITIONAL)[0]
        )
    assert torch.equal(together[1], together[3]) and not torch.equal(together[1], together[4])


def test_equal_prompts_are_prefilled_once(full_model, monkeypatch):
    """Several images of a prompt share its prefill, and so do their unconditional rows."""
    read, whole = [], kv_cache.pad_left
    monkeypatch.setattr(
        kv_cache, "pad_left", lambda rows, *rest: read.append(len(rows)) or whole(rows, *rest)
    )
    generate_image_codes(full_model, [*[PROMPTS[0]] * 3, PROMPTS[1]], SAMPLED, [1, 2, 3, 4], UNCONDITIONAL)
    assert read == [3]


def test_guidance_1_is_unguided(full_model):
    plain = generate_image_codes(full_model, PROMPTS, Sampling(guidance=1.0), [1, 2, 3])
    assert torch.equal(
        plain, generate_image_codes(full_model, PROMPTS, Sampling(guidance=1.0), [1, 2, 3], UNCONDITIONAL)
    )
    nearly = generate_image_codes(
        full_model, PROMPTS, Sampling(guidance=1.0 + 1e-6), [1, 2, 3], UNCONDITIONAL
    )
    assert torch.equal(plain, nearly)
    assert not torch.equal(
        plain, generate_image_codes(full_model, PROMPTS, Sampling(guidance=5.0), [1, 2, 3], UNCONDITIONAL)
    )


def test_the_last_step_yields_the_same_codes(full_model):
    steps = [
        codes.clone() for codes in iter_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    ]
    final = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    assert [step.shape[1] for step in steps] == list(range(1, 10))
    for step in steps:
        assert torch.equal(step, final[:, : step.shape[1]])


def test_an_image_continues_from_its_prefix(model):
    """The first codes of an image as prefix lead to the same image; other codes lead to another image."""
    whole = generate_image_codes(model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    for given in (1, 4, 8):
        continued = generate_image_codes(
            model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL, prefix=whole[:, :given]
        )
        assert torch.equal(continued, whole)
    other = generate_image_codes(
        model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL, prefix=whole[:1, :4].flip(1)
    )
    assert torch.equal(other[:, :4], whole[:1, :4].flip(1).expand(3, -1, -1))
    assert not torch.equal(other[:, 4:], whole[:, 4:])


def test_each_image_has_its_own_negative_prompt(full_model):
    negative = [[1, 90, 91, 3], [1, 70, 71, 72, 73, 3], [1, 5, 3]]
    together = generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], negative)
    for i in range(3):
        assert torch.equal(
            together[i], generate_image_codes(full_model, [PROMPTS[i]], SAMPLED, [i + 1], negative[i])[0]
        )
    assert not torch.equal(
        together, generate_image_codes(full_model, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL)
    )


def test_guidance_schedules(full_model):
    assert Sampling(guidance=5.0).guidances(3) == [5, 5, 5]
    assert Sampling(guidance=5.0, guidance_schedule="linear").guidances(3) == [1, 3, 5]
    cosine = Sampling(guidance=5.0, guidance_schedule="cosine").guidances(5)
    assert cosine[0] == 1 and cosine[-1] == 5 and cosine == sorted(cosine) and cosine[1] < 2
    rising = Sampling(guidance=5.0, guidance_schedule="linear", greedy=True)
    codes = generate_image_codes(full_model, PROMPTS, rising, [0] * 3, UNCONDITIONAL)
    plain = generate_image_codes(full_model, PROMPTS, Sampling(guidance=1.0, greedy=True), [0] * 3)
    full = generate_image_codes(
        full_model, PROMPTS, Sampling(guidance=5.0, greedy=True), [0] * 3, UNCONDITIONAL
    )
    assert torch.equal(codes[:, 0], plain[:, 0]) and not torch.equal(codes, full)


def test_no_prompts_give_no_images(full_model):
    assert generate_image_codes(full_model, [], SAMPLED, [], UNCONDITIONAL).shape == (0, 9, 3)


@pytest.mark.parametrize(
    ("prompts", "seeds", "unconditional", "words"),
    [
        ([[]], [0], UNCONDITIONAL, "Prompt 0 is empty"),
        (
            [[1] * 60],
            [0],
            UNCONDITIONAL,
            r"60 tokens and its image 9.*context of 64: shorten the prompt to 55",
        ),
        ([[1, 3]], [0, 1], UNCONDITIONAL, "2 seeds for 1 prompts"),
        ([[1, 3]], [0], None, "needs unconditional_ids"),
        ([[1, 3]], [0], [[1], [2]], "2 negative prompts for 1 prompts"),
        ([[1, 3]], [0], [1] * 60, "Negative prompt 0 has 60 tokens"),
        ([[1, 3]], [-3], UNCONDITIONAL, "seed is -3"),
    ],
)
def test_invalid_requests_are_rejected(full_model, prompts, seeds, unconditional, words):
    with pytest.raises(UserError, match=words):
        generate_image_codes(full_model, prompts, SAMPLED, seeds, unconditional)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (torch.zeros(1, 9, 3, dtype=torch.long), "at most 8 visual tokens"),
        (torch.zeros(3, 2, 3, dtype=torch.long), "1 or 2 images"),
        (torch.zeros(2, 3, dtype=torch.long), "prefix has shape"),
        (torch.full((1, 2, 3), 16), "allowed: 0 to 15"),
        (torch.zeros(1, 2, 3), "integers"),
    ],
)
def test_invalid_prefixes_are_rejected(full_model, prefix, words):
    with pytest.raises(UserError, match=words):
        generate_image_codes(full_model, PROMPTS[:2], SAMPLED, [0, 1], UNCONDITIONAL, prefix)
