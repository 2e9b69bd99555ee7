"""Decoders other than LLaMA, adapters, and transformers' attention implementations and device maps."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from open_unitok.mllm import UniTokForConditionalGeneration

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
FAMILIES = {
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, **SIZES},
    "gemma": {"model_type": "gemma", "head_dim": 8, **SIZES},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        **SIZES,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        **SIZES,
    },
}
IDS = torch.tensor([[7, 8, -200, -200, -200, -200, 9, 10, 11], [20, 21, 22, -200, -200, -200, -200, 4, 2]])
LABELS = torch.tensor([[-100] * 6 + [9, 10, 11], [-100] * 3 + [-200] * 4 + [4, 2]])


@pytest.fixture
def codes():
    return torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_decoders(tiny, codes, family, tmp_path):
    model = tiny(text_config=FAMILIES[family])
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    plain.get_decoder().load_state_dict(model.language_model.state_dict())
    plain.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    text = torch.randint(5, 90, (2, 12))
    torch.testing.assert_close(model(text).logits, plain(text).logits)

    found = model.train()(IDS, image_codes=codes, labels=LABELS)
    found.loss.backward()
    assert found.text_tokens == 5 and found.image_codes == 12
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]

    model.eval().save_pretrained(tmp_path)
    again = UniTokForConditionalGeneration.from_pretrained(tmp_path).eval()
    again_loss = again(IDS, image_codes=codes, labels=LABELS).loss
    torch.testing.assert_close(again_loss, model(IDS, image_codes=codes, labels=LABELS).loss)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    new = model.generate(IDS, image_codes=codes, **options)
    assert torch.equal(new, again.generate(IDS, image_codes=codes, **options)) and new.shape == (2, 4)
    if model.config.tie_word_embeddings:
        assert again.lm_head.weight is again.get_input_embeddings().weight


def test_visual_vectors_are_not_scaled_by_gemma(tiny, codes):
    model = tiny(text_config=FAMILIES["gemma"])
    vectors = model.embed_inputs(IDS, codes)
    torch.testing.assert_close(vectors[0, 2:6], model.visual_embedder(codes)[0])
    text = model.get_input_embeddings().weight[7] * 32**0.5
    torch.testing.assert_close(vectors[0, 0], text)


def test_the_depth_head_has_the_decoders_widths_by_default(tiny_config):
    depth = tiny_config(text_config=FAMILIES["qwen3"]).depth_config
    assert (depth.hidden_size, depth.intermediate_size, depth.num_key_value_heads) == (32, 48, 2)
    assert depth.model_type == "llama" and depth.rope_parameters["rope_theta"] > 0
    own = tiny_config(depth_config={"hidden_size": 16, "num_hidden_layers": 1}).depth_config
    assert (own.hidden_size, own.head_dim, own.num_key_value_heads, own.num_hidden_layers) == (16, 4, 4, 1)


def test_attention_implementations_agree(tiny, codes):
    model = tiny()
    expected = model(IDS, image_codes=codes, labels=LABELS).loss
    model.set_attn_implementation("eager")
    assert model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(IDS, image_codes=codes, labels=LABELS).loss, expected)


def test_lora(tiny, codes, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny()
    plain = base(IDS, image_codes=codes, labels=LABELS).loss
    wanted = LoraConfig(
        r=2, target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["projector"]
    )
    model = get_peft_model(copy.deepcopy(base), wanted)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n or "projector" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = model(input_ids=IDS, image_codes=codes, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < plain
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    inputs = {"input_ids": IDS, "image_codes": codes, "labels": LABELS}
    torch.testing.assert_close(loaded(**inputs).loss, model(**inputs).loss)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).loss, model(**inputs).loss, atol=1e-4, rtol=1e-4)
    new = model.generate(input_ids=IDS, image_codes=codes, max_new_tokens=3, do_sample=False)
    assert new.shape[1] <= 3


def test_device_map_and_meta_loading(tiny, codes, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    mapped = UniTokForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    expected = model(IDS, image_codes=codes, labels=LABELS).loss
    torch.testing.assert_close(mapped(IDS, image_codes=codes, labels=LABELS).loss, expected)
