"""Generation with the depth heads and input embedders of other systems: cached = uncached = teacher-forced,
in every backend, or a refusal in one line."""

from contextlib import nullcontext

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, generate_image_codes
from open_unitok.generation.backends import BACKENDS, choose_backend, native_library
from open_unitok.generation.backends.cuda_graph import CudaGraph
from open_unitok.generation.sampling import GumbelNoise, apply_guidance, sample_code

FQGAN = {"rotary": "grid", "tables": "shared", "outputs": "own", "output_bias": False, "context": "raw"}
VARIANTS = {
    "none": {"depth_options": {"rotary": "none"}},
    "grid": {"depth_options": {"rotary": "grid"}},
    "outputs": {"depth_options": {"outputs": "own", "output_bias": False}},
    "raw": {"depth_options": {"context": "raw"}},
    "mlp": {"input_embedder": "mlp"},
    "tables": {"input_embedder": "tables"},
    "fqgan": {"input_embedder": "tables", "depth_options": FQGAN},
}
REFUSED = {
    "raw": "its depth head reads normed states, and this model has depth_options.context = 'raw'",
    "mlp": "it runs input_embedder = 'projection', and this model has 'mlp'",
    "tables": "it runs input_embedder = 'projection', and this model has 'tables'",
    "fqgan": "it runs input_embedder = 'projection', and this model has 'tables'",
}
PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)
SIZES = [16, 9, 5]

needs_compiler = pytest.mark.skipif(native_library.load_library() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, make_model):
    """name, a model of unequal code sizes."""
    return request.param, make_model(code_sizes=SIZES, **VARIANTS[request.param])


@torch.no_grad()
def uncached(model, prompt, sampling, seed):
    """One image, the whole sequence recomputed for every code."""
    config = model.config
    noise = GumbelNoise([seed], config.num_codebooks, config.codebook_size)
    codes = torch.zeros(1, config.num_image_tokens, config.num_codebooks, dtype=torch.long)
    rows = [prompt, UNCONDITIONAL]
    for t in range(config.num_image_tokens):
        gumbel, states = noise.sample(), []
        for row in rows:
            embeds = model.get_input_embeddings()(torch.tensor([row]))
            if t:
                embeds = torch.cat([embeds, model.embed_codes(codes[:, :t])], dim=1)
            states.append(
                model.context_decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
            )
        for k in range(config.num_codebooks):
            logits = model.depth_head(torch.stack(states), codes[:, t].repeat(len(rows), 1))[:, k]
            codes[:, t, k] = sample_code(apply_guidance(logits, sampling.guidance), sampling, gumbel[k])
    return codes[0]


def test_cached_equals_uncached(variant):
    _, model = variant
    codes = generate_image_codes(model, PROMPTS, SAMPLED, [11, 12], UNCONDITIONAL, backend="torch")
    assert codes.unique().numel() > 8 and (codes < torch.tensor(SIZES)).all()
    for prompt, seed, generated in zip(PROMPTS, [11, 12], codes):
        assert torch.equal(generated, uncached(model, prompt, SAMPLED, seed))
    prefix = generate_image_codes(
        model, PROMPTS, SAMPLED, [11, 12], UNCONDITIONAL, codes[:, :4], backend="torch"
    )
    assert torch.equal(prefix, codes)


def test_generated_codes_are_the_teacher_forced_ones(variant):
    _, model = variant
    greedy = Sampling(guidance=1.0, greedy=True)
    mark = model.config.image_token_id
    for prompt, codes in zip(PROMPTS, generate_image_codes(model, PROMPTS, greedy, [0, 0], backend="torch")):
        ids = torch.tensor([prompt + [mark] * len(codes)])
        labels = torch.where(ids == mark, mark, -100)
        with torch.no_grad():
            output = model(input_ids=ids, image_codes=codes[None], labels=labels)
        assert torch.equal(output.image_logits.argmax(-1)[0], codes)


@torch.no_grad()
def logits_along(backend, codes):
    """Logits (N, K, R, V), teacher-forced on codes (B, N, K)."""
    backend.prefill([*PROMPTS, *[UNCONDITIONAL] * len(PROMPTS)], codes[:, :1])
    found = []
    for t in range(1, codes.shape[1]):
        if t > 1:
            backend.decode_step(codes[:, t - 1])
        for k in range(codes.shape[2]):
            found.append(backend.code_logits(k, None if k == 0 else codes[:, t, k - 1]).float().clone())
    return torch.stack(found)


@needs_compiler
def test_the_native_backend_runs_it_or_says_why_not(variant):
    name, model = variant
    refused = REFUSED.get(name)
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        assert choose_backend(model, "native") == "native"
    assert choose_backend(model) == ("torch" if refused else "native")
    if refused:
        return
    codes = torch.stack([torch.randint(size, (2, 9)) for size in SIZES], dim=-1)
    expected = logits_along(BACKENDS["torch"](model), codes)
    torch.testing.assert_close(logits_along(BACKENDS["native"](model), codes), expected, rtol=2e-5, atol=4e-5)
    native = generate_image_codes(model, PROMPTS, SAMPLED, [1, 2], UNCONDITIONAL, backend="native")
    assert torch.equal(
        native, generate_image_codes(model, PROMPTS, SAMPLED, [1, 2], UNCONDITIONAL, backend="torch")
    )


def test_the_static_caches_give_the_same_logits(variant):
    """The step that a CUDA graph captures, run without a capture."""
    _, model = variant
    codes = torch.stack([torch.randint(size, (2, 9)) for size in SIZES], dim=-1)
    expected = logits_along(BACKENDS["torch"](model), codes)
    torch.testing.assert_close(logits_along(CudaGraph(model), codes), expected, rtol=2e-5, atol=4e-5)
