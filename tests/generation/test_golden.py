"""Greedy codes and answers are equal to those of the published UniTok, in both visual contexts."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.convert import to_ours

RUNS = [
    "t2i_cfg1",
    "t2i_cfg5",
    "t2i_cfg5_single",
    "t2i_cfg7_top",
    "t2i_cache_cfg1_single",
    "t2i_nocache_cfg1_single",
    "t2i_nocache_cfg5_equal",
]


@pytest.fixture(scope="module")
def tiny(golden):
    """(model, vectors, numbers) of the tiny published model."""
    numbers = json.loads((golden / "mllm" / "tiny.meta.json").read_text())
    sizes = numbers["config"]
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    fields += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    config = UniTokMLLMConfig(
        text_config={name: sizes[name] for name in fields},
        num_codebooks=sizes["cb"]["K"],
        codebook_size=sizes["cb"]["V"],
        codebook_dim=sizes["cb"]["C"],
        visual_hidden_size=sizes["cb"]["mid"],
        num_image_tokens=sizes["L"],
    )
    model = UniTokForConditionalGeneration(config).eval()
    model.load_state_dict(to_ours(load_file(golden / "mllm" / "tiny.weights.safetensors")))
    return model, load_file(golden / "mllm" / "tiny.outputs.safetensors"), numbers


@pytest.mark.parametrize("run", RUNS)
def test_greedy_codes_equal_the_published_ones(tiny, run, monkeypatch):
    model, vectors, numbers = tiny
    settings = numbers[f"{run}.info"]
    monkeypatch.setattr(model.visual_embedder, "context", "last" if settings["cached"] else "full")
    expected = vectors[f"{run}.codes"].transpose(1, 2)  # published: (B, K, N)
    ids, mask = vectors[f"{run}.input_ids"], vectors[f"{run}.attention_mask"].bool()
    rows = [row[there].tolist() for row, there in zip(ids, mask)]  # prompts, then unconditional rows
    count = len(expected)
    sampling = Sampling(guidance=settings["cfg_scale"], temperature=settings["temperature"], greedy=True)
    unconditional = rows[count] if len(rows) > count else None
    assert torch.equal(
        generate_image_codes(model, rows[:count], sampling, [0] * count, unconditional), expected
    )


@pytest.mark.parametrize("run", ["vqa_gen0", "vqa_gen1"])
def test_greedy_answers_equal_the_published_ones(tiny, run, monkeypatch):
    model, vectors, _ = tiny
    mark = model.config.image_token_id
    ids = vectors[f"{run}.input_ids"][0].tolist()
    place = ids.index(mark)
    ids[place : place + 1] = [mark] * model.config.num_image_tokens
    codes = vectors[f"{run}.image"][0].transpose(1, 2)
    expected = vectors[f"{run}.output_ids"][0].tolist()
    assert generate_text_ids(model, [ids], [codes], max_new_tokens=len(expected)) == [expected]
    monkeypatch.setattr(model.generation_config, "eos_token_id", expected[5])
    ended = vectors[f"{run}.output_ids_when_eos_is_6th_token"][0].tolist()
    assert generate_text_ids(model, [ids], [codes], max_new_tokens=len(expected)) == [ended[:-1]]
