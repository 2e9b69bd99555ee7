"""benchmarks/binding.py: answers follow from scenes, kinds are balanced, chance is right, runs resume."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from open_unitok.core.errors import UserError


@pytest.fixture
def script(monkeypatch):
    """benchmarks/binding.py as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("binding")


@pytest.fixture
def data(script):
    """benchmarks/binding_scenes.py as a module."""
    return script.data


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def objects_of(data, scenes, i):
    """{pair: (row, column)} of a scene."""
    rows = zip(scenes.pairs[i].tolist(), scenes.cells[i].tolist())
    return {pair: divmod(cell, data.GRID) for pair, cell in list(rows)[: int(scenes.count[i])]}


def expected_answer(data, words, objects):
    """The answer to a question, from its words alone and the scene's objects."""
    kind, names = words[0], words[1 : words.index("answer")]
    names = [name for name in names if not name.startswith("filler")]
    numbers = [int(name.rpartition(" ")[2]) for name in names]
    if kind == "read":
        cells = {row * data.GRID + column: pair for pair, (row, column) in objects.items()}
        return f"colour {cells[numbers[0]] // data.SHAPES}"
    if kind == "colour":
        (pair,) = [pair for pair in objects if pair % data.SHAPES == numbers[0]]
        return f"colour {pair // data.SHAPES}"
    pairs = [color * data.SHAPES + shape for color, shape in zip(numbers[::2], numbers[1::2])]
    if kind == "exist":
        return "yes" if pairs[0] in objects else "no"
    row, column = objects[pairs[0]]
    if kind in ("left_right", "above_below"):
        axis = kind == "left_right"
        assert objects[pairs[0]][axis] != objects[pairs[1]][axis]  # else there is no right answer
    return {
        "row": ("top", "bottom")[row], "column": ("left", "right")[column],
        "left_right": ("left", "right")[column], "above_below": ("above", "below")[row],
    }[kind]  # fmt: skip


def words_of(data, ids):
    return [data.WORDS[i] for i in ids.tolist() if i != data.PAD]


@pytest.mark.parametrize("describe", [False, True])
def test_answers_follow_from_the_scene(data, describe):
    random, n = rng(), 600
    scenes = data.sample_scenes(n, random)
    kinds = torch.arange(n) % len(data.KINDS)
    texts = data.ask(scenes, kinds, random, filler=3, describe=describe).compact()
    asked = dict.fromkeys(data.KINDS, 0)
    for i in range(n):
        words, objects = words_of(data, texts.ids[i]), objects_of(data, scenes, i)
        asked[words[0]] += 1
        assert words[-1] == "end" and words[-2] == expected_answer(data, words, objects)
        learned = words_of(data, texts.ids[i][texts.learned[i]])
        assert learned == words[words.index("answer") + 1 :]
        assert words_of(data, texts.ids[i][texts.value[i]]) == learned[:-1]
        places = [f"cell {row * 2 + column}" for row, column in objects.values()]
        shown = learned[:-2]
        assert len(shown) == (0 if not describe or words[0] in data.KINDS[:3] else 1 + ("_" in words[0]))
        assert set(shown) <= set(places)
    assert min(asked.values()) > n / len(data.KINDS) / 2


def test_kinds_follow_their_shares(data):
    scenes = data.sample_scenes(4000, rng())
    full = scenes.take(scenes.count == data.CELLS)  # four objects allow every kind but some of "colour"
    shares = (3.0, 0.0, 1.0, 1.0, 2.0, 1.0, 2.0)
    ids = data.converse(full, rng(1), shares).ids[:, 0] - data.ID[data.KINDS[0]]
    found = torch.bincount(ids, minlength=len(shares)) / len(ids)
    assert (found - torch.tensor(shares) / sum(shares)).abs().max() < 0.05


def test_the_best_constant_answer_is_chance(script, data):
    setting = script.Setting()
    for kind, (_, texts) in script.build_exam(setting, script.Source(setting)).items():
        assert len(texts.ids) == script.QUESTIONS and set(words_of(data, texts.ids[:, 0])) == {kind}
        best = torch.bincount(texts.ids[texts.value]).max() / script.QUESTIONS
        assert float(best) == pytest.approx(data.CHANCE[kind], abs=0.1)


def test_conversations_have_up_to_so_many_questions(data):
    scenes = data.sample_scenes(300, rng())
    texts = data.converse(scenes, rng(1), (1.0,) * len(data.KINDS), turns=3, filler=2)
    turns = (texts.ids == data.ID["end"]).sum(1)
    assert sorted(set(turns.tolist())) == [1, 2, 3]
    assert torch.equal(texts.value.sum(1), turns)
    padding = (texts.ids == data.PAD).int()
    assert (padding.diff(dim=1) >= 0).all()  # padding is at the end alone


def test_captions_name_every_object_and_its_place(data):
    scenes = data.sample_scenes(200, rng())
    for placed in (0.0, 1.0):
        texts = data.caption(scenes, rng(1), placed)
        for i in range(200):
            words, objects = words_of(data, texts.ids[i]), objects_of(data, scenes, i)
            step = 4 if placed else 2
            parts = [words[1:-1][j : j + step] for j in range(0, len(words) - 2, step)]
            found = {}
            for color, shape, *place in parts:
                pair = int(color[-1]) * data.SHAPES + int(shape[-1])
                found[pair] = place
            names = {
                pair: [("top", "bottom")[row], ("left", "right")[column]] if placed else []
                for pair, (row, column) in objects.items()
            }
            assert (words[0], words[-1]) == ("caption", "end") and found == names
            assert int(texts.value[i].sum()) == (2 * len(objects) if placed else 0)


def test_held_out_arrangements_are_not_in_training(data):
    train, held_out = data.sample_scenes(2000, rng()), data.sample_scenes(500, rng(), held_out=True)
    assert len(train.count) == 2000 and len(held_out.count) == 500
    seen = set(map(tuple, train.grid.tolist()))
    assert not seen & set(map(tuple, held_out.grid.tolist()))
    assert sorted(set(held_out.count.tolist())) == [1, 2, 3, 4]
    assert int(data.sample_scenes(50, rng(), most=1).count.max()) == 1


def test_symbols_are_the_objects_in_reading_order(data):
    scenes = data.sample_scenes(100, rng())
    joint = data.symbols(scenes, "joint", 4).view(100, 4, 4)
    factored = data.symbols(scenes, "factored", 1)
    for i in range(100):
        objects = {place: pair for pair, place in objects_of(data, scenes, i).items()}
        for row in range(4):
            for column in range(4):
                assert joint[i, row, column] == objects.get((row // 2, column // 2), data.PAIRS)
        for cell in range(4):
            pair = objects.get(divmod(cell, 2))
            expected = (data.COLORS, data.SHAPES) if pair is None else divmod(pair, data.SHAPES)
            assert tuple(factored[i, cell].tolist()) == expected


def test_rendered_scenes_show_the_objects(data, tmp_path):
    scenes = data.rendered_scenes(6, True, tmp_path)
    assert scenes.codes.shape == (6, 16, 8)
    config = data.load_config("configs/scenes/scenes.yaml")
    for i, scene in enumerate(data.as_images(scenes, config, data.Random(1))):
        found = {
            (config.color_names.index(o.color) * data.SHAPES + config.shape_names.index(o.shape)): o.cell
            for o in scene.objects
        }
        assert found == objects_of(data, scenes, i)
    again = data.rendered_scenes(6, True, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(scenes, again))


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_positions_have_the_norm_of_the_visual_vectors(script, kind):
    setting = script.Setting(positions=kind, tokens=4, position_norm=2.0)
    torch.manual_seed(0)
    model = script.Decoder(setting)
    codes = script.Source(setting).sample(64, rng()).codes
    plain = model.visual(codes).detach().square().mean().sqrt()
    model.init_positions(codes)
    places = (model.embed(codes) - model.visual(codes)).detach()
    assert float(places.square().mean().sqrt() / plain) == pytest.approx(2.0, rel=0.15)
    assert len(places[0].unique(dim=0)) == 16
    assert model.row_embedding.requires_grad == (kind == "learned")


def test_words_after_the_image_do_not_reach_it_and_the_image_sees_itself_only_if_asked(script):
    for bidirectional in (False, True):
        torch.manual_seed(0)
        model = script.Decoder(script.Setting(width=32, depth=2, bidirectional=bidirectional)).eval()
        codes = torch.tensor([[[1], [2], [3], [4]], [[1], [2], [3], [9]]])
        ids = torch.full((2, 3), script.ID["answer"])
        boi, eoi = (torch.full((2, 1), script.ID[word]) for word in ("boi", "eoi"))
        states = model(boi, codes, torch.cat([eoi, ids], dim=1))
        assert torch.equal(states[0, 0], states[1, 0])
        assert torch.allclose(states[0, 1:4], states[1, 1:4]) != bidirectional  # sees the last token?
        assert not torch.allclose(states[0, 4:], states[1, 4:])
        # an image that is generated stays causal
        logits = model.generate(ids, codes)
        assert torch.allclose(logits[0, :4], logits[1, :4], atol=1e-6)


@pytest.mark.parametrize("code", ["joint", "scenes"])
def test_a_word_does_not_see_the_words_behind_it(script, code):
    torch.manual_seed(0)
    model = script.Decoder(script.Setting(width=32, depth=2, code=code, tokens=4, embedder="projection"))
    codes = torch.randint(0, 24, (1, 16, model.books))
    ids = torch.arange(2, 12)[None]
    changed = ids.clone()
    changed[:, 5:] += 9
    states, other = (model.read(codes, x) for x in (ids, changed))
    torch.testing.assert_close(states[:, :6], other[:, :6])
    assert not torch.allclose(states[:, 6], other[:, 6])


TOY = {"width": 32, "depth": 1, "batch": 8, "steps": 4}


@pytest.mark.parametrize(
    "changes",
    [{},
     {"optimizer": "adamw", "code": "factored", "tokens": 4, "positions": "learned", "bidirectional": True},
     {"captions": 0.25, "images": 0.5, "turns": 2, "filler": 2, "describe": True, "one_object": 2}],
)  # fmt: skip
def test_a_row_is_measured_once(script, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(script, "EVERY", 2)
    monkeypatch.setattr(script, "QUESTIONS", 16)
    monkeypatch.setitem(script.SWEEPS, "toy", [{**TOY, **changes}])
    out = tmp_path / "binding.json"
    script.main(["--sweep", "toy", "--out", str(out)])
    ((name, row),) = json.loads(out.read_text()).items()
    curves = row["curves"]
    assert name.endswith("| seed 0") and list(row["learnt"]) == list(script.KINDS)
    assert all(len(curve) == 2 for curve in curves.values())
    assert ("captions" in curves and "images" in curves) == ("images" in changes)
    monkeypatch.setattr(script, "train", None)  # a stored row is not trained again
    script.main(["--sweep", "toy", "--out", str(out)])


def test_a_learnt_kind_ends_a_run(script, monkeypatch):
    monkeypatch.setattr(script, "EVERY", 2)
    monkeypatch.setattr(script, "evaluate", lambda model, exam: dict.fromkeys(script.KINDS, 0.95))
    row = script.train(script.Setting(**{**TOY, "steps": 100}), 0)
    assert row["steps"] == 2 and set(row["learnt"].values()) == {2}


def test_the_table_shows_seeds_that_learnt_and_that_did_not(script, monkeypatch):
    monkeypatch.setattr(script, "SWEEPS", {"a": [{}]})

    def row(step, best):
        return {
            "learnt": dict.fromkeys(script.KINDS, step),
            "curves": {kind: [50, best] for kind in script.KINDS},
        }

    rows = {"base | seed 0": row(300, 92), "base | seed 1": row(None, 61), "base | seed 2": row(500, 90)}
    assert "| base | 3 | 400 (300 to 500), 1x never: 61 % |" in script.table(rows, ["a"])


def test_a_wrong_setting_is_refused(script):
    assert script.parse_setting(["lr=0.01", "describe=True", "shares=1/0/0/0/0/0/0"]).shares[0] == 1
    with pytest.raises(UserError, match="'learning_rate' is not one of"):
        script.parse_setting(["learning_rate=1"])
    with pytest.raises(UserError, match="expected int"):
        script.parse_setting(["batch=many"])
