"""Invariants for any weights: incremental = full pass, padded = alone, packed = separate, saved = loaded."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig

IMAGE = -200


def a_row(text_before: int, images: int, text_after: int, image_targets: bool, seed: int):
    """Ids and labels of random text around images of 4 tokens; targets are the images or the text after."""
    generator = torch.Generator().manual_seed(seed)
    before, after = (
        torch.randint(5, 90, (n,), generator=generator).tolist() for n in (text_before, text_after)
    )
    placeholders = [IMAGE] * 4 * images
    labels = (
        [-100] * len(before)
        + [IMAGE if image_targets else -100] * len(placeholders)
        + (after if not image_targets else [4, *after[1:]])
    )
    return before + placeholders + after, labels


ROWS = [a_row(3, 1, 5, False, 1), a_row(7, 1, 1, True, 2), a_row(4, 0, 4, False, 3), a_row(2, 2, 2, True, 4)]


@pytest.fixture
def codes():
    return torch.randint(0, 8, (4, 4, 3), generator=torch.Generator().manual_seed(5))


IMAGES = [slice(0, 1), slice(1, 2), slice(2, 2), slice(2, 4)]  # of each row in ROWS


@pytest.mark.parametrize("context", ["full", "last"])
def test_embedder_step_by_step(tiny, codes, context):
    embedder = tiny(visual_context=context).visual_embedder
    whole = embedder(codes)
    for pieces in ([1, 1, 1, 1], [2, 1, 1], [4]):
        cache = embedder.new_cache(4)
        starts = [sum(pieces[:i]) for i in range(len(pieces))]
        parts = zip(codes.split(pieces, dim=1), starts)
        steps = torch.cat([embedder.step(part, cache, start) for part, start in parts], dim=1)
        if context == "full":
            torch.testing.assert_close(steps, whole)
        else:
            torch.testing.assert_close(steps, embedder(codes.flatten(0, 1)[:, None]).view_as(whole))
            assert cache is None and (steps - whole)[:, 1:].abs().max() > 1e-2


def test_images_are_embedded_independently(tiny, codes):
    model = tiny()
    torch.testing.assert_close(model.embed_codes(codes)[2:], model.embed_codes(codes[2:]))
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 8
    same = (model.embed_codes(codes) - model.embed_codes(changed)).abs().amax(dim=(0, 2))
    assert (same[:2] == 0).all() and (same[2:] > 0).all()


@pytest.mark.parametrize("depth", [{}, {"hidden_size": 16, "num_attention_heads": 2}])
def test_depth_head_step_by_step(tiny, codes, depth):
    head = tiny(depth_config={"num_hidden_layers": 3, **depth}).depth_head
    hidden, wanted = torch.randn(16, 32), codes.flatten(0, 1)
    whole = head(hidden, wanted)
    cache, steps = head.new_cache(), []
    for k in range(3):
        steps.append(head.step(k, hidden if k == 0 else wanted[:, k - 1], cache))
    torch.testing.assert_close(torch.stack(steps, dim=1), whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_depth_head_is_causal_with_every_attention(tiny, codes, attention):
    model = tiny()
    model.set_attn_implementation(attention)
    changed = codes.flatten(0, 1).clone()
    before = model.depth_head(torch.ones(16, 32), changed)
    changed[:, 1] = (changed[:, 1] + 1) % 8
    same = (model.depth_head(torch.ones(16, 32), changed) - before).abs().amax(dim=(0, 2))
    assert same[0] == same[1] == 0 and same[2] > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("context", ["full", "last"])
def test_padded_rows_equal_rows_alone(tiny, codes, pad_rows, side, context):
    model = tiny(visual_context=context)
    inputs = pad_rows(ROWS, side)
    together = model(**inputs, image_codes=codes, reduction="sum", return_logits=True)
    sums = torch.zeros(2)
    counts = torch.zeros(2)
    for r, (row, images) in enumerate(zip(ROWS, IMAGES)):
        alone = model(**pad_rows([row]), image_codes=codes[images], reduction="sum", return_logits=True)
        real = inputs["attention_mask"][r].bool()
        torch.testing.assert_close(together.logits[r][real], alone.logits[0], atol=2e-5, rtol=1e-4)
        sums += torch.stack([alone.text_loss, alone.image_loss]).detach()
        counts += torch.stack([alone.text_tokens, alone.image_codes])
    found = torch.stack([together.text_loss, together.image_loss]).detach()
    torch.testing.assert_close(found, sums, atol=1e-4, rtol=1e-5)
    assert [together.text_tokens.item(), together.image_codes.item()] == counts.tolist()
    mean = model(**inputs, image_codes=codes)
    torch.testing.assert_close(mean.loss, sums.sum() / counts.sum(), atol=1e-5, rtol=1e-5)


def test_packed_rows_equal_rows_alone(tiny, codes, pad_rows):
    model = tiny()
    ids = torch.tensor([[*itertools.chain(*(ids for ids, _ in ROWS)), 0, 0]])
    labels = torch.tensor([[*itertools.chain(*(labels for _, labels in ROWS)), -100, -100]])
    positions = torch.tensor([[i for ids, _ in ROWS for i in range(len(ids))] + [0, 0]])
    labels[0, len(ROWS[0][0])] = 7  # the first token of the second sample must not be predicted
    packed = model(
        ids, image_codes=codes, labels=labels, position_ids=positions, reduction="sum", return_logits=True
    )
    apart = model(**pad_rows(ROWS), image_codes=codes, reduction="sum")
    torch.testing.assert_close(packed.loss, apart.loss)
    assert packed.text_tokens == apart.text_tokens
    lone = model(**pad_rows(ROWS[1:2]), image_codes=codes[1:2], return_logits=True).logits[0]
    start = len(ROWS[0][0])
    torch.testing.assert_close(packed.logits[0, start : start + len(lone)], lone, atol=2e-5, rtol=1e-4)


def test_the_first_token_is_never_a_target(tiny, pad_rows):
    ids = [5, 6, 7]
    for side in ("left", "right"):
        found = tiny()(**pad_rows([(ids, ids), (ids * 2, ids * 2)], side))
        assert found.text_tokens == 2 + 5


def test_text_logits_equal_those_of_the_plain_decoder(tiny):
    model = tiny()
    plain = LlamaForCausalLM(copy.deepcopy(model.config.text_config)).eval()
    plain.model.load_state_dict(model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(0, 90, (2, 9))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    torch.testing.assert_close(model(ids, labels=ids).loss, plain(ids, labels=ids).loss)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": ids * 0 + 1}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("kind", ["text", "read", "generated"])
def test_every_parameter_gets_a_gradient_in_every_batch(tiny, codes, pad_rows, kind):
    model = tiny().train()
    row, images = {"text": (2, None), "read": (0, codes[:1]), "generated": (1, codes[1:2])}[kind]
    model(**pad_rows([ROWS[row]]), image_codes=images).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert model.visual_embedder.codebooks.grad is None
    used = model.visual_embedder.projector[1].weight.grad.abs().max() > 0
    assert used == (kind != "text")
    assert (model.depth_head.output.weight.grad.abs().max() > 0) == (kind == "generated")


def test_a_batch_without_targets_has_loss_zero(tiny, pad_rows):
    found = tiny().train()(**pad_rows([([5, 6, 7], [-100] * 3)]))
    assert found.loss == 0 and found.text_tokens == found.image_codes == 0
    found.loss.backward()


def test_gradient_checkpointing_changes_nothing(tiny, codes, pad_rows):
    grads = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.depth_head.layers[0].gradient_checkpointing
        model(**pad_rows(ROWS), image_codes=codes).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_accuracy_per_sub_codebook(tiny, codes, pad_rows):
    found = tiny()(**pad_rows([ROWS[1]]), image_codes=codes[1:2])
    assert found.image_logits.shape == (1, 4, 3, 8)
    right = (found.image_logits.argmax(-1) == codes[1:2]).sum(dim=(0, 1))
    assert torch.equal(found.image_correct, right)


def test_save_and_load(tiny, codes, pad_rows, tmp_path):
    model = tiny()
    before = model(**pad_rows(ROWS), image_codes=codes, return_logits=True)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, UniTokMLLMConfig)
    assert config.depth_config.to_dict() == model.config.depth_config.to_dict()
    for load in (AutoModelForCausalLM.from_pretrained, UniTokForConditionalGeneration.from_pretrained):
        again = load(tmp_path).eval()
        assert type(again) is UniTokForConditionalGeneration
        assert not again.visual_embedder.codebooks.requires_grad
        for (name, ours), theirs in zip(model.named_buffers(), again.buffers()):
            assert torch.equal(ours, theirs), name
        after = again(**pad_rows(ROWS), image_codes=codes, return_logits=True)
        assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)
    half = UniTokForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16
    loss = half(**pad_rows(ROWS), image_codes=codes).loss
    assert loss.dtype == torch.float32 and abs(loss - before.loss) < 0.1


def test_folders_with_missing_weights_are_rejected(tiny, tmp_path):
    tiny().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_heads.weight"] = state.pop("lm_head.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"\(1 missing: lm_head\.weight; 1 unexpected: lm_heads\.weight\)"):
        UniTokForConditionalGeneration.from_pretrained(tmp_path)


def test_resized_embeddings_do_not_change_images(tiny, codes, pad_rows):
    model = tiny()
    before = model(**pad_rows(ROWS), image_codes=codes, return_logits=True)
    model.resize_token_embeddings(97)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 97
    after = model(**pad_rows(ROWS), image_codes=codes, return_logits=True)
    torch.testing.assert_close(after.logits[..., :90], before.logits)
    torch.testing.assert_close(after.image_loss, before.image_loss)


def test_generate_in_a_left_padded_batch_equals_one_by_one(tiny, codes, pad_rows):
    model = tiny()
    rows = [(ids, [-100] * len(ids)) for ids, _ in ROWS]
    inputs = pad_rows(rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(
        inputs["input_ids"], image_codes=codes, attention_mask=inputs["attention_mask"], **options
    )
    for r, (ids, _) in enumerate(rows):
        alone = model.generate(torch.tensor([ids]), image_codes=codes[IMAGES[r]], **options)
        assert torch.equal(together[r], alone[0])
    beams = model.generate(
        inputs["input_ids"],
        image_codes=codes,
        attention_mask=inputs["attention_mask"],
        num_beams=2,
        **options,
    )
    assert beams.shape == together.shape


def test_errors(tiny, codes, pad_rows, tmp_path):
    model = tiny()
    ids = torch.tensor([ROWS[0][0]])
    with pytest.raises(UserError, match=r"4 image placeholders, but no image_codes"):
        model(ids)
    with pytest.raises(UserError, match=r"4 image placeholders, but image_codes hold 2 images of 4"):
        model(ids, image_codes=codes[:2])
    with pytest.raises(UserError, match=r"image_codes have shape \(1, 4\)"):
        model(ids, image_codes=codes[0, None, :, 0])
    with pytest.raises(UserError, match=r"image_codes range from 0 to 8; allowed: 0 to 7"):
        model(ids, image_codes=torch.tensor([0, 8, 1]).expand(1, 4, 3))
    with pytest.raises(UserError, match=r"The sequence has 65 tokens .* context is 64"):
        model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(UserError, match=r"The prompt with one new token has 65 tokens .* context is 64"):
        model.generate(torch.ones(1, 64, dtype=torch.long))
    first = torch.tensor([[IMAGE] * 4 + [5]])
    with pytest.raises(UserError, match=r"cannot be a target: put a token before it"):
        model(first, image_codes=codes[:1], labels=first)
    part = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE]])
    with pytest.raises(UserError, match=r"only part of an image"):
        model(part, image_codes=codes[:1], labels=torch.tensor([[5, IMAGE, -100, IMAGE, IMAGE]]))
    with pytest.raises(UserError, match=r"has no config.json"):
        UniTokForConditionalGeneration.from_pretrained(tmp_path)
    for kind, words in (("unitok", "That is a visual tokenizer"), ("mini_gemini", "unitok convert mllm")):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
        with pytest.raises(UserError, match=words):
            UniTokForConditionalGeneration.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_codebooks": 0}, "num_codebooks = 0"),
        ({"visual_context": "ful"}, "Did you mean 'full'"),
        ({"projection_heads": 5}, "5 heads, which do not divide 24"),
        ({"image_token_id": 3}, "image_token_id = 3 is also boi"),
        ({"depth_config": {"hidden_size": 18}}, "set depth_config.num_attention_heads too"),
        ({"text_config": {"model_type": "lama"}}, "text_config.model_type = 'lama'"),
    ],
)
def test_invalid_fields_are_named(tiny_config, changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)


def test_the_published_7b_has_the_published_shapes(golden):
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(UniTokMLLMConfig.named("unitok_mllm_7b"))
    assert sum(p.numel() for p in model.parameters()) == 7_508_651_264
    parts = {"depth_head.layers": 607_150_080, "visual_embedder.projection": 7_615_744}
    parts |= {"visual_embedder.projector": 20_981_760, "depth_head.embeddings": 117_440_512}
    for name, count in parts.items():
        assert sum(p.numel() for p in model.get_submodule(name).parameters()) == count, name
    with pytest.raises(UserError, match=r"'7b' is not an MLLM size"):
        UniTokMLLMConfig.named("7b")
