"""Features of transformers: Auto classes, device maps with offload, packed rows under flash attention,
quantised loading, .bin shards, and placeholders within the vocabulary."""

import copy
import itertools
import json
import shutil

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoProcessor,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import flash_attention_mask

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor

IDS = torch.tensor([[7, 8, -200, -200, -200, -200, 9, 10, 11], [20, 21, 22, -200, -200, -200, -200, 4, 2]])
LABELS = torch.tensor([[-100] * 6 + [9, 10, 11], [-100] * 3 + [-200] * 4 + [4, 2]])


@pytest.fixture
def codes():
    return torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))


def test_auto_classes(tiny, golden, tmp_path):
    tiny().save_pretrained(tmp_path)
    text_tokenizer = golden / "mllm" / "tokenizer.model"
    UniTokProcessor.from_text_tokenizer(text_tokenizer, template="plain").save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is UniTokForConditionalGeneration
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is UniTokProcessor and processor.template == "plain"
    assert processor.encode_text("A photo") == [1, 368, 348]


def test_layers_may_be_offloaded_to_disk(tiny, codes, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    device_map = {name: "cpu" for name, _ in model.named_children() if name != "language_model"}
    device_map |= {f"language_model.{name}": "cpu" for name, _ in model.language_model.named_children()}
    del device_map["language_model.layers"]
    device_map |= {"language_model.layers.0": "cpu", "language_model.layers.1": "disk"}
    mapped = UniTokForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    ).eval()
    assert mapped.language_model.layers[1].mlp.up_proj.weight.is_meta
    inputs = {"input_ids": IDS, "image_codes": codes}
    torch.testing.assert_close(mapped(**inputs, labels=LABELS).loss, model(**inputs, labels=LABELS).loss)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(mapped.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.fixture
def by_lengths():
    """An attention function that, like flash attention, gets cu_seqlens instead of a mask."""

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, **kwargs):
        assert mask is None and query.shape[0] == 1
        assert kwargs["max_length_q"] == (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max()
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling
            )
            for a, b in itertools.pairwise(cu_seq_lens_q.tolist())
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_by_lengths", attend)
    AttentionMaskInterface.register("flash_by_lengths", flash_attention_mask)
    return "flash_by_lengths"


def test_packed_rows_do_not_leak_under_flash_attention(tiny, codes, by_lengths):
    """Two packed rows with two samples each, the first sample of each with an image."""
    model = tiny()
    ids = torch.cat([IDS, torch.tensor([[30, 31, 32], [40, 41, 42]])], dim=1)
    labels = torch.cat([LABELS, torch.tensor([[30, 31, 32], [40, 41, 42]])], dim=1)
    positions = torch.tensor([[*range(9), *range(3)]] * 2)
    inputs = {"image_codes": codes, "labels": labels, "position_ids": positions, "return_logits": True}
    expected = model(ids, **inputs)
    model.language_model.config._attn_implementation = by_lengths
    found = model(ids, **inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.last_hidden_state.shape == (2, 12, 32)


def test_quantised_loading_skips_modules_that_read_weights_directly(tiny, tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    wanted = BitsAndBytesConfig(load_in_8bit=True)
    seen = {}
    with monkeypatch.context() as patch:
        original = PreTrainedModel.from_pretrained.__func__

        def look(cls, path, **kwargs):
            seen.update(kwargs)
            return original(cls, path, output_loading_info=True)

        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(look))
        UniTokForConditionalGeneration.from_pretrained(tmp_path, quantization_config=wanted)
    assert seen["quantization_config"].llm_int8_skip_modules == ["visual_embedder", "lm_head"]
    assert wanted.llm_int8_skip_modules is None


def test_missing_packages_raise_a_one_line_error(tiny, tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(UserError, match=r"cannot be loaded with these arguments: .*[Ff]lash") as error:
        UniTokForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    assert "\n" not in str(error.value)


def test_published_shards_as_bin(reference, golden, tmp_path):
    published = reference("tiny")
    shutil.copy(golden / "mllm" / "config.json", tmp_path)
    names = sorted(published.weights)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        torch.save({key: published.weights[key].clone() for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = UniTokForConditionalGeneration.from_pretrained(
        tmp_path, dtype="bfloat16", attn_implementation="eager"
    )
    assert model.dtype == torch.bfloat16 and model.config.visual_context == "last"
    assert model.language_model.config._attn_implementation == "eager"
    expected = published.model.lm_head.weight.bfloat16()
    assert torch.equal(model.lm_head.weight, expected)


def test_a_placeholder_within_the_vocabulary_changes_nothing(tiny, codes):
    """The placeholder is an id that no text uses; logits and losses equal those of the plain decoder."""
    outside, inside = tiny(), tiny(image_token_id=89)
    inside.load_state_dict(outside.state_dict())
    ids, labels = (torch.where(x == -200, 89, x) for x in (IDS, LABELS))
    one = outside(IDS, image_codes=codes, labels=LABELS, return_logits=True)
    other = inside(ids, image_codes=codes, labels=labels, return_logits=True)
    assert torch.equal(one.logits, other.logits) and torch.equal(one.loss, other.loss)
    plain = LlamaForCausalLM(copy.deepcopy(inside.config.text_config)).eval()
    plain.model.load_state_dict(inside.language_model.state_dict())
    plain.lm_head.load_state_dict(inside.lm_head.state_dict())
    text = torch.randint(5, 80, (2, 9))
    torch.testing.assert_close(inside(text, labels=text).loss, plain(text, labels=text).loss)
