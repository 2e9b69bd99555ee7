"""Depth heads and input embedders of other systems: FQGAN's against its vectors, and every option."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig

from open_unitok.core.errors import UserError
from open_unitok.mllm import DepthHead, UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.convert import save_published

FQGAN = {
    "rotary": "grid",
    "tables": "shared",
    "outputs": "own",
    "output_bias": False,
    "zero_outputs": True,
    "context": "raw",
}
# name -> changes of the config
VARIANTS = {
    "none": {"depth_options": {"rotary": "none"}},
    "grid": {"depth_options": {"rotary": "grid"}},
    "outputs": {"depth_options": {"outputs": "own"}},
    "raw": {"depth_options": {"context": "raw", "output_bias": False}},
    "mlp": {"input_embedder": "mlp"},
    "tables": {"input_embedder": "tables"},
    "fqgan": {"input_embedder": "tables", "depth_options": FQGAN},
    "one_layer": {"depth_config": {"num_hidden_layers": 1}, "depth_options": {"rotary": "none"}},
}
IMAGE = -200


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of queries or keys with pairs (2i, 2i + 1) -> with pairs (i, i + half), as transformers has."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.fixture(scope="module")
def vectors(golden):
    """vectors(case) -> settings and scalars, tensors."""
    folder = golden / "quantizers"
    meta = json.loads((folder / "fqgan.meta.json").read_text())["cases"]
    tensors = load_file(folder / "fqgan.safetensors")

    def find(case):
        found = {key[len(case) + 1 :]: t for key, t in tensors.items() if key.startswith(case + ".")}
        return meta[case], found

    return find


def fqgan_head(settings, tensors) -> DepthHead:
    """A head with the weights of a golden case."""
    width, books, entries, heads = (settings[key] for key in ("D", "K", "V", "heads"))
    grid = settings["grid"]
    layers = {
        "num_hidden_layers": settings["layers"],
        "intermediate_size": settings["mlp_width"],
        "rms_norm_eps": settings["rms_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(settings["rope_base"])},
    }
    text = {"hidden_size": width, "num_attention_heads": heads, "vocab_size": 8, "num_hidden_layers": 1}
    config = UniTokMLLMConfig(
        text_config={**text, "intermediate_size": 8}, depth_config=layers, num_codebooks=books,
        codebook_size=entries, num_image_tokens=grid**2, input_embedder="tables", depth_options=FQGAN,
    )  # fmt: skip
    tables = torch.nn.Embedding(books * entries, width)
    head = DepthHead(config, width, tables)
    weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
    rows = [weights.pop(f"embed.{k}.weight") for k in range(books - 1)]
    tables.weight.data[: (books - 1) * entries] = torch.cat(rows)
    state = {"norm.weight": weights.pop("norm.weight")}
    state |= {f"outputs.{k}.weight": weights.pop(f"output.{k}.weight") for k in range(books)}
    names = {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for key, tensor in weights.items():
        _, layer, name, _ = key.split(".")
        if name == "qkv":
            query, keys, value = tensor.chunk(3)
            parts = {"q_proj": halves(query, heads), "k_proj": halves(keys, heads), "v_proj": value}
            state |= {f"layers.{layer}.self_attn.{part}.weight": t for part, t in parts.items()}
        else:
            state[f"layers.{layer}.{names[name]}.weight"] = tensor
    head.load_state_dict(state, strict=False)
    assert set(state) == set(head.state_dict()) - {"rotary.inv_freq"}
    return head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["far_dual", "far_triple"])
def test_fqgans_head(case, dtype, vectors):
    meta, tensors = vectors(case)
    settings = meta["settings"]
    head = fqgan_head(settings, tensors).to(dtype)
    head._tables[0].to(dtype)
    context = tensors["context"].to(dtype).requires_grad_()
    codes = tensors["codes"].flatten(0, 1)
    logits = head(context.flatten(0, 1), codes)
    for k in range(settings["K"]):
        expected = tensors[f"logits.{k}"].flatten(0, 1).to(dtype)
        torch.testing.assert_close(logits[:, k], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    name = str(dtype).removeprefix("torch.")
    close = 1e-5 if dtype == torch.float32 else 1e-8  # transformers' norm computes in float32
    assert loss.item() == pytest.approx(meta["scalars"]["loss"][name], rel=close)
    (gradient,) = torch.autograd.grad(loss, context)
    expected = tensors["grad_context"].to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    norm = meta["gradient_norms"]["grad_context"][name]
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)
    # step by step
    cache, flat = head.new_cache(), context.detach().flatten(0, 1)
    for k in range(settings["K"]):
        step = head.step(k, flat if k == 0 else codes[:, k - 1], cache)
        torch.testing.assert_close(step, logits[:, k], rtol=1e-5, atol=1e-6)


def test_scores_with_the_context_are_zero(vectors):
    """The context is multiplied by zero in queries and keys; only its value counts."""
    meta, tensors = vectors("far_triple")
    rotary = fqgan_head(meta["settings"], tensors).rotary
    cos, sin = rotary(torch.empty(0), torch.arange(7)[None])
    assert not cos[0, 0].any() and not sin[0, 0].any()
    assert torch.equal(cos[0, 1], torch.ones(8))  # cell 0: turned by 0
    quarter = 2
    assert not sin[0, 2, :quarter].any() and sin[0, 2, quarter : 2 * quarter].all()  # cell 1: its column
    # cell 4 of a grid of 4 columns: row 1, column 0
    assert sin[0, 5, :quarter].all() and not sin[0, 5, quarter : 2 * quarter].any()


def batch(model, images=2):
    """Rows [1, image, 5]: every image is a target, and the text behind it too."""
    config = model.config
    ids = torch.tensor([[1, 7 + i, *[IMAGE] * config.num_codes, 5, 6] for i in range(images)])
    codes = [torch.randint(size, (images, config.num_codes)) for size in config.book_sizes]
    return {"input_ids": ids, "image_codes": torch.stack(codes, dim=-1), "labels": ids}


@pytest.mark.parametrize("sizes", [None, [5, 8, 3]])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_trainable_parameter_learns(name, sizes, tiny):
    model = tiny(**VARIANTS[name], code_sizes=sizes).train()
    if name == "fqgan":  # output layers start from zero, so nothing below them learns in the first step
        assert all(not layer.weight.any() for layer in model.depth_head.outputs)
        for layer in model.depth_head.outputs:
            torch.nn.init.normal_(layer.weight)
    out = model(**batch(model))
    out.loss.backward()
    assert out.loss.isfinite() and out.image_loss > 0
    for key, weight in model.named_parameters():
        assert weight.requires_grad == (key != "visual_embedder.codebooks"), key
        assert not weight.requires_grad or (weight.grad is not None and bool(weight.grad.any())), key
    # without images every parameter still takes part: ZeRO-3 gathers all modules on every rank
    model.zero_grad(set_to_none=True)
    text = torch.tensor([[1, 7, 8]])
    model(input_ids=text, labels=text).loss.backward()
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_saves_and_loads(name, tiny, tmp_path):
    model = tiny(**VARIANTS[name], code_sizes=[5, 8, 3])
    given = batch(model)
    model.save_pretrained(tmp_path)
    again = UniTokForConditionalGeneration.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert again.config.depth == model.config.depth
    assert again.config.input_embedder == model.config.input_embedder
    with torch.no_grad():
        assert torch.equal(model(**given).image_logits, again(**given).image_logits)
    frozen = [key for key, weight in again.named_parameters() if not weight.requires_grad]
    assert frozen == [key for key in state if key == "visual_embedder.codebooks"]


def test_published_heads_are_unchanged(tiny, tiny_config, tmp_path):
    """Defaults leave no trace in config.json, and the same weights in the same order from the same seed."""
    plain = tiny()
    given = tiny(depth_options={"rotary": "1d", "tables": "own", "context": "normed"})
    assert given.config.depth_options is None
    plain.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "depth_options" not in written and "input_embedder" not in written
    state, other = plain.state_dict(), given.state_dict()
    assert list(state) == list(other) and all(torch.equal(state[key], other[key]) for key in state)


def test_options_make_a_difference(tiny):
    """Each option changes the logits of the same weights (or the set of weights)."""
    plain = tiny()
    given = batch(plain)
    with torch.no_grad():
        expected = plain(**given).image_logits
        for options in ({"rotary": "none"}, {"rotary": "grid"}, {"context": "raw"}):
            other = tiny(depth_options=options)
            other.load_state_dict(plain.state_dict())
            assert not torch.allclose(other(**given).image_logits, expected, atol=1e-3), options
            assert torch.equal(other(**given).logits, plain(**given).logits)


def test_the_raw_context_is_what_the_final_norm_reads(tiny):
    model = tiny(depth_options={"context": "raw"})
    given = batch(model)
    ids = given["input_ids"]
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
        embeds = model.embed_inputs(ids, given["image_codes"])
        states = model.context_decoder(inputs_embeds=embeds).last_hidden_state
        torch.testing.assert_close(model.language_model.norm(states), out.last_hidden_state)
        logits = model.depth_head(states[:, 1:5].flatten(0, 1), given["image_codes"].flatten(0, 1))
    torch.testing.assert_close(logits.view_as(out.image_logits), out.image_logits)
    assert not model.language_model.norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"depth_options": {"rotation": "1d"}},
            r"Unknown config key 'depth_options.rotation'\. Allowed: context",
        ),
        ({"depth_options": {"rotary": "2d"}}, "depth_options.rotary = '2d': must be one of 1d, none, grid"),
        ({"depth_options": {"output_bias": 1}}, "depth_options.output_bias = 1: must be one of true, false"),
        (
            {"depth_options": {"tables": "shared"}},
            "tables = 'shared' needs input_embedder = 'tables', whose tables the head shares, not 'projec",
        ),
        (
            {
                "depth_options": {"tables": "shared"},
                "input_embedder": "tables",
                "depth_config": {"hidden_size": 16},
            },
            "a head of the decoder's width 32, not depth_config.hidden_size = 16",
        ),
        (
            {
                "depth_options": {"rotary": "grid"},
                "depth_config": {"hidden_size": 24, "num_attention_heads": 4},
            },
            "depth_config.hidden_size = 24 with 4 heads gives 6",
        ),
        ({"input_embedder": "table"}, r"input_embedder = 'table'\. Did you mean 'tables'"),
        (
            {"input_embedder": "tables", "scales": [1, 2]},
            r"input_embedder = 'tables' has one vector per code, and the scales \[1, 2\] are read as a sum",
        ),
    ],
)
def test_impossible_combinations_are_refused(changes, words, tiny_config):
    with pytest.raises(UserError, match=words) as error:
        tiny_config(**changes)
    assert "\n" not in str(error.value)


def test_a_decoder_without_a_final_norm_is_refused(tiny_config):
    text = {"model_type": "gpt2", "vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = tiny_config(text_config=text, depth_options={"context": "raw"})
    with pytest.raises(UserError, match="needs a decoder with a final `norm`, which a 'gpt2' does not have"):
        UniTokForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["none", "tables"])
def test_the_published_format_has_no_variants(name, tiny, tmp_path):
    model = tiny(**VARIANTS[name])
    with pytest.raises(UserError, match="The published format has UniTok's depth head and input embedder"):
        save_published(model.config, model.state_dict(), None, tmp_path)


def test_a_pyramid_is_read_by_an_mlp(tiny):
    """TokenFlow reads the sum of all scales through Linear-GELU-Linear."""
    model = tiny(input_embedder="mlp", scales=[1, 2], projection_heads=1)
    codes = torch.randint(8, (2, 5, 3))
    embedder = model.visual_embedder
    assert [type(layer).__name__ for layer in embedder.projector] == ["Linear", "GELU", "Linear"]
    summed = embedder.embed(codes)
    assert summed.shape == (2, 4, 12)
    assert torch.equal(model.embed_codes(codes), embedder.projector(summed))
    rows = embedder._rows(codes)
    first = rows[:, :1].expand(-1, 4, -1)
    torch.testing.assert_close(embedder.next_scales(codes), embedder.projector(first))
    guessed = embedder.next_scales(codes, again=1)
    torch.testing.assert_close(guessed, embedder.projector(first + rows[:, 1:]))
    with pytest.raises(UserError, match="next_scales needs scales and input_embedder = 'mlp', not None and"):
        tiny().visual_embedder.next_scales(codes)


def test_fqgans_sizes():
    """FAR-B: 24 layers of width 1024 and a head of 3, over two books of 16,384."""
    layers = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    config = UniTokMLLMConfig(
        text_config={**layers, "num_hidden_layers": 24, "vocab_size": 1001}, num_codebooks=2,
        codebook_size=16384, input_embedder="tables", depth_options=FQGAN,
    )  # fmt: skip
    assert isinstance(config.depth_config, LlamaConfig) and config.depth_config.num_hidden_layers == 3
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(config)
    count = sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()
    assert count / 1e6 == pytest.approx(415, rel=0.01)
