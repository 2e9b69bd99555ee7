"""visual_positions = learned_2d: vectors of a token's row and column, in every way that codes are read."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, generate_image_codes, image_sampling
from open_unitok.generation.backends import BACKENDS, cuda_graph
from open_unitok.generation.sampling import GumbelNoise, apply_guidance, sample_code
from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.training.core.muon import muon_groups

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95)
OBLONG = {"rows": 2, "columns": 4, "registers": 1}
LEARNED = {"visual_positions": "learned_2d"}


@pytest.fixture(params=["full", "last"])
def placed(request, make_model):
    return make_model(visual_context=request.param, **LEARNED)


def random_codes(images=2):
    return torch.randint(16, (images, 9, 3), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layout", [None, OBLONG])
def test_each_token_gets_its_row_and_its_column(make_model, layout):
    model = make_model(token_layout=layout, **LEARNED)
    plain = make_model(token_layout=layout)
    plain.load_state_dict(model.state_dict(), strict=False)
    embedder, codes = model.visual_embedder, random_codes()
    rows, columns = embedder.row_embedding.weight, embedder.column_embedding.weight
    added = (model.embed_codes(codes) - plain.embed_codes(codes))[0]
    registers, width = (0, 3) if layout is None else (1, 4)
    for n in range(9):
        row, column = divmod(n - registers, width)
        expected = torch.zeros(32) if n < registers else rows[row] + columns[column]
        torch.testing.assert_close(added[n], expected, atol=1e-5, rtol=0)
    assert (len(rows), len(columns)) == ((3, 3) if layout is None else (2, 4))


def test_a_step_starts_at_any_token(placed):
    embedder, codes = placed.visual_embedder, random_codes()
    table = embedder.place_table()
    for pieces in ([1] * 9, [4, 3, 2], [9]):
        cache, start, found = embedder.new_cache(9), 0, []
        for part in codes.split(pieces, dim=1):
            at = torch.tensor([start]) if start % 2 else start  # a number, or a tensor as in a CUDA graph
            found.append(embedder.step(part, cache, at))
            start += part.shape[1]
        vectors = torch.cat(found, dim=1)
        if placed.config.visual_context == "full":
            torch.testing.assert_close(vectors, embedder(codes), atol=2e-4, rtol=0)
        else:
            alone = embedder(codes.flatten(0, 1)[:, None]).view_as(vectors) - table[0]
            torch.testing.assert_close(vectors, alone + table, atol=2e-4, rtol=0)


@torch.no_grad()
def plain_loop(model, prompt, seed):
    """One image without caches: the whole sequence is recomputed for every visual token."""
    config, noise = model.config, GumbelNoise([seed], 3, 16)
    codes = torch.zeros(1, 9, 3, dtype=torch.long)
    for t in range(9):
        gumbel, hidden = noise.sample(), []
        vectors = model.embed_codes(codes)[:, :t]  # causal: later codes, still 0, do not reach it
        if config.visual_context == "last":
            steps = [model.visual_embedder.step(codes[:, i : i + 1], None, i) for i in range(t)]
            vectors = torch.cat([vectors[:, :0], *steps], dim=1)
        for row in (prompt, UNCONDITIONAL):
            embeds = torch.cat([model.get_input_embeddings()(torch.tensor([row])), vectors], dim=1)
            hidden.append(
                model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -1]
            )
        for k in range(3):
            logits = model.depth_head(torch.stack(hidden), codes[:, t].repeat(2, 1))[:, k]
            codes[:, t, k] = sample_code(apply_guidance(logits, 3.0), SAMPLED, gumbel[k])
    return codes[0]


@pytest.mark.parametrize("backend", ["torch", "native", "cuda_graph"])
def test_cached_steps_equal_the_plain_loop_in_every_backend(placed, monkeypatch, backend):
    expected = [plain_loop(placed, prompt, seed) for prompt, seed in zip(PROMPTS, (11, 12, 13))]

    class Uncaptured(cuda_graph.CudaGraph):  # the same static step without a graph
        def compile_step(self, step, state):
            return step

    monkeypatch.setitem(BACKENDS, "cuda_graph", Uncaptured)
    monkeypatch.setattr(image_sampling, "choose_backend", lambda model, *a, **options: backend)
    found = generate_image_codes(placed, PROMPTS, SAMPLED, [11, 12, 13], UNCONDITIONAL)
    assert torch.equal(found, torch.stack(expected))
    # a prefix continues at its place
    again = generate_image_codes(placed, PROMPTS, SAMPLED, [11, 12, 13], UNCONDITIONAL, prefix=found[:, :4])
    assert torch.equal(again, found)


def test_generated_codes_equal_the_teacher_forced_ones(make_model):
    model = make_model(**LEARNED)
    codes = generate_image_codes(model, PROMPTS, Sampling(guidance=1.0, greedy=True), [0, 0, 0])
    mark = model.config.image_token_id
    for prompt, generated in zip(PROMPTS, codes):
        ids = torch.tensor([prompt + [mark] * 9])
        with torch.no_grad():
            output = model(
                input_ids=ids, image_codes=generated[None], labels=torch.where(ids == mark, mark, -100)
            )
        assert torch.equal(output.image_logits.argmax(-1)[0], generated)


def test_places_change_answers_and_images(make_model):
    model, changed = make_model(**LEARNED), make_model(**LEARNED)
    with torch.no_grad():
        changed.visual_embedder.column_embedding.weight.copy_(
            model.visual_embedder.column_embedding.weight.flip(0)
        )
    codes, ids = random_codes(1), torch.tensor([[1, *[model.config.image_token_id] * 9, 5, 6]])
    logits = [m(input_ids=ids, image_codes=codes).logits[0, -1] for m in (model, changed)]
    assert not torch.allclose(*logits)
    images = [generate_image_codes(m, PROMPTS, SAMPLED, [1, 2, 3], UNCONDITIONAL) for m in (model, changed)]
    assert not torch.equal(*images)


def test_folders_keep_it_and_models_without_it_do_not_change(make_model, tmp_path):
    model, plain = make_model(**LEARNED), make_model()
    for name, saved in (("placed", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
        loaded = UniTokForConditionalGeneration.from_pretrained(tmp_path / name)
        assert torch.equal(loaded.embed_codes(random_codes()), saved.embed_codes(random_codes()))
    keys = {name: load_file(tmp_path / name / "model.safetensors").keys() for name in ("placed", "plain")}
    added = {"visual_embedder.row_embedding.weight", "visual_embedder.column_embedding.weight"}
    assert keys["placed"] - keys["plain"] == added and keys["plain"] < keys["placed"]
    stored = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in keys}
    assert stored["placed"]["visual_positions"] == "learned_2d" and "visual_positions" not in stored["plain"]


def test_places_are_trained_as_embeddings_also_by_a_batch_without_images(make_model):
    model = make_model(**LEARNED).train()
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    names = ("row_embedding", "column_embedding")
    places = [getattr(model.visual_embedder, name).weight for name in names]
    assert all(p.grad is not None and not p.grad.any() for p in places)
    groups = muon_groups(model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    by_adam = {id(p) for group in groups if not group["muon"] for p in group["params"]}
    assert by_adam.issuperset(map(id, places))
    mark = model.config.image_token_id
    ids = torch.tensor([[1, *[mark] * 9, 5, 6]])
    model(
        input_ids=ids, image_codes=random_codes(1), labels=ids.masked_fill(ids == mark, -100)
    ).loss.backward()
    assert all(p.grad.abs().sum(1).min() > 0 for p in places)


def test_a_trained_model_gets_vectors_of_a_third_of_the_norm_of_its_visual_vectors(make_model):
    model, codes = make_model(), random_codes(64)
    with torch.no_grad():
        model.visual_embedder.projector[-1].weight *= 300  # as training leaves it
    before = model.embed_codes(codes)
    model.visual_embedder = model.visual_embedder.with_positions()
    assert model.visual_embedder.config.visual_positions == "learned_2d"
    assert list(model.state_dict()) == list(make_model(**LEARNED).state_dict())
    added = model.embed_codes(codes) - before
    torch.testing.assert_close(added[0], model.visual_embedder.place_table(), atol=1e-2, rtol=1e-3)
    assert 0.2 < added.norm(dim=-1).mean() / before.norm(dim=-1).mean() < 0.5


def test_norm_ratio_is_that_to_the_visual_vectors_of_the_given_codes(make_model):
    embedder, codes = make_model().visual_embedder, random_codes(1)[:, :1].expand(1, 9, 3)
    visual = embedder(codes).square().mean().sqrt()
    for ratio in (0.1, 2.0):
        torch.manual_seed(0)
        added = [embedder.with_positions(ratio, c).place_table() for c in (codes, random_codes(64))]
        assert 0.7 < added[0].square().mean().sqrt() / visual / ratio < 1.3
        assert not torch.equal(*added)


def test_added_places_leave_a_refused_model_and_shared_tables_as_they_are(make_model):
    model = make_model(token_layout={"rows": 4, "columns": 4, "tokens": 9})
    with pytest.raises(UserError, match="a set of tokens: omit the key"):
        model.visual_embedder.with_positions()
    assert model.config.visual_positions == "none" and model.visual_embedder.place_table() is None
    shared = {"input_embedder": "tables", "depth_options": {"tables": "shared"}}
    changes = {**shared, "depth_config": {**model.config.depth_config.to_dict(), "hidden_size": 32}}
    tables = make_model(**changes).visual_embedder
    assert tables.with_positions().shared_tables is tables.shared_tables  # which the depth head reads


def test_what_has_no_grid_is_refused(make_model):
    with pytest.raises(UserError, match="visual_positions = 'sine'"):
        make_model(visual_positions="sine")
    with pytest.raises(UserError, match="a set of tokens"):
        make_model(token_layout={"rows": 4, "columns": 4, "tokens": 9}, **LEARNED)
    with pytest.raises(UserError, match="codes of a pyramid"):
        make_model(scales=[1, 2, 3], input_embedder="mlp", **LEARNED)
    with pytest.raises(UserError, match="have 4 visual tokens; visual_positions = 'learned_2d'"):
        make_model(**LEARNED).embed_codes(random_codes()[:, :4])
