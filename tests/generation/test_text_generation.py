"""Answers: batched = one by one = a plain loop without cache, with and without images and eos."""

import copy

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.generation import generate_text_ids, iter_text_ids, text_generation
from open_unitok.generation.backends import text_samplers
from open_unitok.generation.text_generation import truncate_at_eos


@torch.no_grad()
def plain_loop(model, prompt, codes, count):
    """Greedy ids; the whole sequence is recomputed for each."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), image_codes=codes if len(codes) else None).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def asked(full_model):
    """Prompts of different lengths with 0, 1 or 2 images, and the images' codes."""
    mark, count = full_model.config.image_token_id, full_model.config.num_image_tokens
    image = [mark] * count
    prompts = [[1, 5, *image, 6, 7], [1, 8, 9], [1, *image, 10, *image, 11], [1, *image, 12, 13, 14, 15, 16]]
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(16, (n, count, 3), generator=generator) for n in (1, 0, 2, 1)]
    return prompts, codes


def test_batch_equals_one_by_one_and_the_plain_loop(full_model, asked):
    prompts, codes = asked
    answers = generate_text_ids(full_model, prompts, codes, max_new_tokens=8)
    assert len({tuple(answer) for answer in answers}) > 1
    assert answers == generate_text_ids(full_model, prompts, codes, max_new_tokens=8, batch_size=2)
    for prompt, code, answer in zip(prompts, codes, answers):
        assert generate_text_ids(full_model, [prompt], [code], max_new_tokens=8) == [answer]
        assert truncate_at_eos(plain_loop(full_model, prompt, code, 8), {2}) == answer


def test_an_adapted_output_layer_is_applied(make_model, asked):
    class Adapted(torch.nn.Linear):
        def forward(self, input):
            return -super().forward(input)

    model, (prompts, codes) = make_model(), asked
    adapted = Adapted(32, 512, bias=False)
    adapted.weight = model.lm_head.weight
    model.lm_head = adapted
    answer = generate_text_ids(model, prompts[:1], codes[:1], max_new_tokens=8)[0]
    assert truncate_at_eos(plain_loop(model, prompts[0], codes[0], 8), {2}) == answer


def test_an_answer_ends_at_eos(full_model, asked, monkeypatch):
    prompts, codes = asked
    long = generate_text_ids(full_model, prompts, codes, max_new_tokens=8)
    end = long[0][2]
    monkeypatch.setattr(full_model.generation_config, "eos_token_id", [end, 2])
    expected = [truncate_at_eos(row, {end, 2}) for row in long]
    assert len(expected[0]) < 3
    assert generate_text_ids(full_model, prompts, codes, max_new_tokens=8) == expected


def test_questions_about_one_image_share_its_prefill(full_model, asked, monkeypatch):
    """Two images with two and three questions, one question without image: equal answers, less prefill."""
    (_, image), mark = (asked[1][0], asked[1][3]), full_model.config.image_token_id
    start = [1, 5, *[mark] * 9, 6]
    prompts = [[*start, 7, 8], [*start, 9], [1, 20, 21], [*start, 7, 10, 11], [*start, 12], [*start, 7, 13]]
    codes = [asked[1][0], image, asked[1][1], image, asked[1][0], image]
    read = []
    embed = full_model.embed_inputs
    monkeypatch.setattr(
        full_model, "embed_inputs", lambda ids, *a, **c: read.append(ids.numel()) or embed(ids, *a, **c)
    )
    for options in ({}, {"num_beams": 2}):
        read.clear()
        shared = generate_text_ids(full_model, prompts, codes, max_new_tokens=8, **options)
        # eager: three prefixes padded to 12 ids; native: each prefix, then the rests of its prompts
        assert read == [3 * 12] or (not options and read == [12, 3 * 3, 12, 2 * 2, 3])
        single = [generate_text_ids(full_model, [p], [c], 8, **options)[0] for p, c in zip(prompts, codes)]
        assert shared == single
        assert shared == generate_text_ids(full_model, prompts, codes, 8, share_prefix=False, **options)
    assert len({tuple(answer) for answer in shared}) > 3


@pytest.mark.parametrize("native", [True, False])
def test_streamed_ids_are_the_greedy_answers(full_model, asked, monkeypatch, native):
    prompts, codes = asked
    end = generate_text_ids(full_model, prompts, codes, max_new_tokens=8)[0][2]
    for ends in ([2], [end, 2]):
        monkeypatch.setattr(full_model.generation_config, "eos_token_id", ends)
        want = generate_text_ids(full_model, prompts, codes, max_new_tokens=8)
        rows = [[] for _ in prompts]
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr(text_generation, "choose_backend", lambda model, *a, **options: "torch")
            for new in iter_text_ids(full_model, prompts, codes, max_new_tokens=8):
                for row, token in zip(rows, new):
                    row += [] if token is None else [token]
        assert rows == want


def test_sampling_follows_its_seed(full_model, asked):
    prompts, codes = asked
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 50}
    first = generate_text_ids(full_model, prompts, codes, seed=3, **options)
    state = torch.get_rng_state()
    assert first == generate_text_ids(full_model, prompts, codes, seed=3, **options)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is unchanged
    assert first != generate_text_ids(full_model, prompts, codes, seed=4, **options)
    steps = [list(iter_text_ids(full_model, prompts, codes, seed=s, **options)) for s in (3, 3, 4)]
    assert steps[0] == steps[1] != steps[2]


def test_noise_of_bf16_models_is_sampled_in_fp32(full_model, asked, monkeypatch):
    seen = []
    sample_code = text_samplers.sample_code

    def watched(logits, *rest):
        seen.append(logits.dtype)
        return sample_code(logits, *rest)

    monkeypatch.setattr(text_samplers, "sample_code", watched)
    model = copy.deepcopy(full_model).to(torch.bfloat16)
    list(iter_text_ids(model, *asked, max_new_tokens=3, do_sample=True, seed=0))
    assert len(seen) > 1 and set(seen) == {torch.float32}


def test_beams_and_sampling_run(full_model, asked):
    prompts, codes = asked
    assert len(generate_text_ids(full_model, prompts, codes, max_new_tokens=3, num_beams=2)) == 4
    assert len(generate_text_ids(full_model, prompts, codes, max_new_tokens=3, do_sample=True, top_k=5)) == 4


@pytest.mark.parametrize("beams", [0, -1, 1.5, True, None])
def test_num_beams_must_be_a_whole_number(full_model, asked, beams):
    with pytest.raises(UserError, match="num_beams is"):
        generate_text_ids(full_model, *asked, max_new_tokens=2, num_beams=beams)


@pytest.mark.parametrize(
    ("prompts", "tokens", "words"),
    [
        ([[]], 4, "Question 0 is empty"),
        ([[1] * 61], 4, "61 tokens.*context of 64"),
        ([[1]], 0, "max_new_tokens is 0"),
        ([[1]], 2.5, "max_new_tokens is 2.5"),
    ],
)
def test_invalid_requests_are_rejected(full_model, prompts, tokens, words):
    with pytest.raises(UserError, match=words):
        generate_text_ids(full_model, prompts, [torch.empty(0, 9, 3)], max_new_tokens=tokens)
