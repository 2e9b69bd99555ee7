"""T2I-CompBench: BLIP-VQA against the public functions, and a run with tiny judges.

`t2i_compbench.json` holds what the functions of its repository return with transformers' modules and spaCy's
en_core_web_sm ("source" names the versions).
"""

import json
import sys
import types

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.judges import blip_vqa
from open_unitok.eval.judges.clip_model import ClipModel

from ..conftest import GOLDEN
from ..metrics.tiny_networks import blocky_image, caption, write_blip, write_clip

VECTORS = json.loads((GOLDEN / "t2i_compbench.json").read_text())


def cases(name):
    assert len(VECTORS[name]) >= 50
    return VECTORS[name]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return write_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def spacy(monkeypatch):
    """A spaCy whose pipeline finds the noun chunks that the real one finds in the stored prompts."""
    known = {prompt: chunks for prompt, chunks, _ in VECTORS["phrases"]}

    def load(name):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model {name!r}.")
        chunk = lambda text: types.SimpleNamespace(text=text)  # noqa: E731
        return lambda prompt: types.SimpleNamespace(noun_chunks=map(chunk, known[prompt]))

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))


def test_the_probability_of_yes_is_the_published_one(blip):
    model = blip_vqa.BlipVqa(str(blip), "cpu")
    rows = cases("blip")
    assert len({row[1] for row in rows}) > 10  # the answers differ
    found = []
    for start in range(0, len(rows), 12):  # the batches of the published run
        seeds = [seed for seed, _, _ in rows[start : start + 12]]
        images = [Image.fromarray(blocky_image(seed)) for seed in seeds]
        found += model.probabilities(images, [f"{caption(seed)}?" for seed in seeds])
    assert found == pytest.approx([value for _, _, value in rows], abs=1e-5)


def test_questions_and_products_are_the_published_ones():
    assert [blip_vqa.normalise_question(text) for text, _ in cases("question")] == [
        q for _, q in cases("question")
    ]
    for values, product in cases("product"):
        assert blip_vqa.blip_score(values) == product, values


def test_noun_phrases_are_the_published_ones(spacy):
    phrases_of = blip_vqa.load_noun_phrases("en_core_web_sm")
    for prompt, _, phrases in cases("phrases"):
        assert phrases_of(prompt) == phrases
    assert any(len(chunks) > len(phrases) == blip_vqa.MOST_PHRASES for _, chunks, phrases in cases("phrases"))


def test_without_spacy_or_its_pipeline_there_is_one_line(spacy, monkeypatch):
    with pytest.raises(UserError, match="--spacy-model de_core cannot be loaded"):
        blip_vqa.load_noun_phrases("de_core")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="spacy download en_core_web_sm"):
        blip_vqa.load_noun_phrases("en_core_web_sm")


COLOR = ("a green bench and a blue bowl", "a dog on the left of a cat")
RELATIONS = ("a red cat on the mat", "the dog and the cup")


def write_release(folder):
    (folder / "examples" / "dataset").mkdir(parents=True)
    (folder / "examples" / "dataset" / "color_val.txt").write_text("\n".join(COLOR) + "\n")
    (folder / "examples" / "dataset" / "non_spatial_val.txt").write_text("\n".join(RELATIONS) + "\n")


def write_images(folder, per_prompt=2):
    for category, prompts in (("color", COLOR), ("non_spatial", RELATIONS)):
        for number in range(len(prompts) * per_prompt):
            path = folder / category / "samples" / f"{prompts[number // per_prompt]}_{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(blocky_image(number)).save(path)


def run(call, tmp_path, *more):
    words = ("--model", tmp_path / "images", "--data", tmp_path / "repository", "--out", tmp_path / "out")
    code, out, err = call("eval", "run", "t2i_compbench", *words, "--images-per-prompt", 2, *more)
    path = tmp_path / "out" / "t2i_compbench" / "results.json"
    return code, out + err, json.loads(path.read_text()) if path.exists() else None


def test_a_run_with_both_judges(call, blip, spacy, tmp_path):
    write_release(tmp_path / "repository")
    write_images(tmp_path / "images")
    code, text, _ = run(call, tmp_path)
    assert code == 2 and "--blip-model for color" in text
    clip = write_clip(tmp_path / "clip")
    code, text, result = run(call, tmp_path, "--clip-model", clip)
    assert code == 0 and list(result["metrics"]) == ["non_spatial"] and "color has no judge" in text
    code, text, result = run(call, tmp_path, "--blip-model", blip)
    assert code == 0, text
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    # by hand
    images = [Image.fromarray(blocky_image(number)) for number in range(4)]
    phrases = [["a green bench", "a blue bowl"]] * 2 + [["a dog", "a cat"]] * 2
    model = blip_vqa.BlipVqa(str(blip), "cpu")
    scores = [
        blip_vqa.blip_score(model.probabilities([image] * 2, [f"{p}?" for p in texts]))
        for image, texts in zip(images, phrases)
    ]
    assert values["color"] == pytest.approx(sum(scores) / 4, abs=1e-4)
    judge = ClipModel(str(clip), "cpu", "--clip-model")
    texts = judge.embed_texts([RELATIONS[0], RELATIONS[0], RELATIONS[1], RELATIONS[1]])
    assert values["non_spatial"] == pytest.approx(
        (judge.embed_images(images) * texts).sum(axis=1).mean(), abs=1e-5
    )
    reason = result["not_comparable_reason"]
    assert (
        "32 pixels, the published one 480" in reason
        and "not ViT-B/32" in reason
        and "2 images per prompt" in reason
    )
    rows = [json.loads(r) for r in (tmp_path / "out/t2i_compbench/scores.jsonl").read_text().splitlines()]
    assert rows[0]["phrases"] == ["a green bench", "a blue bowl"] and rows[0]["group"] == "color"
    assert rows[3]["file"] == "images/color/samples/a dog on the left of a cat_000003.png"
    # from files alone
    assert call("eval", "score", tmp_path / "out" / "t2i_compbench")[0] == 0


def test_a_missing_image_counts_as_zero(call, spacy, blip, tmp_path):
    write_release(tmp_path / "repository")
    write_images(tmp_path / "images")
    (tmp_path / "images" / "color" / "samples" / f"{COLOR[1]}_000002.png").unlink()
    code, text, result = run(call, tmp_path, "--blip-model", blip)
    assert code == 0 and "1 images of color have no score" in text, text
    assert result["metrics"]["color"]["n"] == 4


def test_wrong_models_and_folders_are_named(call, spacy, tmp_path):
    write_release(tmp_path / "repository")
    write_images(tmp_path / "images")
    code, text, _ = run(call, tmp_path, "--blip-model", tmp_path / "no")
    assert code == 2 and "--blip-model must be a BLIP VQA folder" in text
    code, text, _ = run(call, tmp_path, "--blip-model", tmp_path / "images")
    assert code == 2 and "cannot be loaded as BlipForQuestionAnswering" in text
    (tmp_path / "empty").mkdir()
    words = ("--model", tmp_path / "images", "--data", tmp_path / "empty", "--out", tmp_path / "o")
    code, _, err = call("eval", "run", "t2i_compbench", *words)
    assert code == 2 and "color_val.txt" in err
