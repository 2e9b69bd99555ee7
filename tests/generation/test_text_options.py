"""Options of transformers' `generate` work, or end in one line; weights that are not finite are noticed."""

import pytest
import torch

from open_unitok import Pipeline
from open_unitok.core.errors import UserError

QUESTIONS = ["What color is the circle?", "How many stars are there?"]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained("scenes", device="cpu")


@pytest.fixture(scope="module")
def images(pipe):
    return pipe.generate(["a red circle", "three blue stars"], seed=1)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.5},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "temperature": 0.1},
        {"repetition_penalty": 1.1},
        {"use_cache": False},
        {"bad_words_ids": [[1]]},
    ],
)
def test_options_that_keep_a_sure_answer(pipe, images, options):
    assert pipe.answer(images, QUESTIONS, max_new_tokens=4, seed=0, **options) == ["red", "3"]


def test_penalties_see_the_prompt(pipe, images):
    """Logits processors get the ids of the whole prompt, images as id 0."""
    model, processor = pipe.model, pipe.processor
    ids = processor.question_ids(QUESTIONS[0])
    inputs = {"input_ids": torch.tensor([ids]), "image_codes": pipe.encode_for_reading(images[:1]).codes}
    seen = []

    def look(given, scores):
        seen.append(given[0].tolist())
        return scores

    new = model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=[look])
    assert len(seen[0]) == len(ids) and seen[0][:2] == ids[:2] and new.shape[1] <= 2


def test_assisted_decoding_of_text(tiny_text_model):
    model, ids = tiny_text_model
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=model, **options), expected)
    empty = torch.empty(0, 4, 3, dtype=torch.long)
    found = model.generate(ids, image_codes=empty, prompt_lookup_num_tokens=2, **options)
    assert torch.equal(found, expected[:, ids.shape[1] :])


@pytest.fixture
def tiny_text_model():
    from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig

    torch.manual_seed(0)
    text = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    config = UniTokMLLMConfig(text_config=text, num_codebooks=3, codebook_size=8, codebook_dim=4,
                              visual_hidden_size=24, num_image_tokens=4)  # fmt: skip
    return UniTokForConditionalGeneration(config).eval(), torch.randint(5, 90, (1, 9))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 0.5}, "Did you mean 'temperature'"),
        ({"max_length": 4}, "no option 'max_length'"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "temperature": 0}, "Options do_sample, temperature are not valid"),
        ({"do_sample": True, "top_k": "x"}, "top_k is 'x'"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha needs code from a hub"),
        ({"custom_generate": "a/b"}, "no option 'custom_generate'"),
        ({"stop_strings": ["e"]}, "tokenizer"),
        ({"guidance_scale": "a"}, "guidance_scale"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"prompt_lookup_num_tokens": 3}, "Assisted decoding is for text alone"),
    ],
)
def test_wrong_options_end_in_one_line(pipe, images, options, words):
    with pytest.raises(UserError, match=words) as error:
        pipe.answer(images, QUESTIONS, max_new_tokens=4, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("part", ["language_model.layers.2.mlp.up_proj", "depth_head.layers.1.mlp.down_proj"])
def test_nan_weights_are_noticed_at_the_first_logits(backend, part):
    pipe = Pipeline.from_pretrained("scenes", device="cpu", backend=backend)
    with torch.no_grad():
        pipe.model.get_submodule(part).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=rf"{part}.weight holds NaN"):
        list(pipe.stream(["a red circle"], pipe.sampling, [1]))
    if part.startswith("depth_head"):  # answers do not use it
        return
    for options in ({}, {"do_sample": True}):
        with pytest.raises(UserError, match=rf"{part}.weight holds NaN"):
            list(pipe.chat_stream("hi", [], [], max_new_tokens=5, **options))
        with pytest.raises(UserError, match=rf"{part}.weight holds NaN"):
            pipe.chat("hi", [], [], max_new_tokens=5, **options)
