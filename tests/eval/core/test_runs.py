"""Runs from files to score with scripted models: known scores, kills, duplicates, gaps, bad images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.eval.core.benchmark import Sample
from open_unitok.eval.core.harness import AnswerStore
from open_unitok.eval.core.model import Reconstructions
from open_unitok.training.scenes.dataset import SceneConfig, write_scenes

from ..conftest import run_named, score_folder

QUIET = {"quiet": True}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "data"
    config = SceneConfig(train=4, shard=4, test=40, pope=6, prompts=6, text_lines=20, questions=3)
    write_scenes(config, folder, progress=False)
    return folder


class Scripted:
    """Answers and generates from a table; reconstructions have a little noise."""

    def __init__(self, data, right=lambda i: True):
        self.right, self.asked = right, 0
        questions = json.loads((data / "test" / "v2_OpenEnded_scenes_test_questions.json").read_text())
        annotations = json.loads((data / "test" / "v2_scenes_test_annotations.json").read_text())
        truth = {a["question_id"]: a["multiple_choice_answer"] for a in annotations["annotations"]}
        self.truth = {
            (self.name(data, q["image_id"]), q["question"]): truth[q["question_id"]]
            for q in questions["questions"]
        }

    @staticmethod
    def name(data, image_id):
        with Image.open(data / "test" / "images" / f"scenes_test_{image_id:012d}.png") as image:
            return image.convert("RGB").tobytes()

    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens=16):
        result = []
        for image, question in zip(images, questions):
            truth = self.truth.get((image.tobytes(), question), "yes")
            result.append(truth if self.right(self.asked) else "nonsense")
            self.asked += 1
        return result

    def reconstruct(self, images, reencode=False):
        originals = np.stack([np.asarray(image) for image in images])
        codes = np.arange(len(images) * 8).reshape(len(images), 4, 2) % 8
        return Reconstructions(originals, originals ^ 1, codes, 8)

    def embed_images(self, images):
        return np.stack([self.mean_colour(image) for image in images])

    @staticmethod
    def mean_colour(image):
        pixels = np.asarray(image).reshape(-1, 3) / 255
        vector = pixels.min(axis=0) - pixels.min(axis=0).mean() + 1e-3
        return vector / np.linalg.norm(vector)

    def embed_texts(self, texts):
        return np.stack([np.eye(3)[hash_of(t) % 3] for t in texts])

    def generate(self, prompts, seeds):
        self.asked += len(prompts)
        return [Image.fromarray(np.full((32, 32, 3), 240, np.uint8)) for _ in prompts]


def hash_of(text):
    return sum(map(ord, text))


def test_known_vqa_score_comes_out_of_the_command(data, tmp_path):
    result = run_named("vqav2", Scripted(data), data, tmp_path / "a", **QUIET)
    assert result["metrics"]["accuracy"]["value"] == 1.0 and result["n"] > 60
    assert result["complete"] and not result["problems"] and result["metadata"]["prompt_template"] == "plain"
    result = run_named("vqav2", Scripted(data, lambda i: i % 4 != 0), data, tmp_path / "b", **QUIET)
    assert result["value"] == pytest.approx(1 - np.ceil(result["n"] / 4) / result["n"])
    low, high = result["metrics"]["accuracy"]["interval"]
    assert low < result["value"] < high
    for kind, constant in result["details"]["constant"].items():
        margin = result["metrics"][f"type/{kind}"]["value"] - constant["accuracy"]
        assert result["details"]["above_constant"][kind] == pytest.approx(margin)


def test_reconstruction_and_codebook_use(data, tmp_path):
    result = run_named("reconstruction", Scripted(data), data, tmp_path, **QUIET)
    assert result["metrics"]["psnr"]["value"] == pytest.approx(20 * np.log10(255), abs=1e-6)
    assert result["details"]["usage"] == [
        0.5,
        0.5,
    ]  # the script's codes are even in one book, odd in the other
    assert result["details"]["perplexity"] == pytest.approx([4.0, 4.0])
    assert len(list((tmp_path / "images").glob("*.png"))) == 40


def test_generated_images_and_their_ceiling(data, tmp_path):
    result = run_named("geneval", Scripted(data), data, tmp_path / "g", **QUIET)
    assert result["value"] == 0.0  # empty images show nothing
    assert result["details"]["ceiling_overall"] == 1.0  # the detector knows real images with a little noise
    assert set(result["details"]["ceiling"]) <= {m.removeprefix("tag/") for m in result["metrics"]}
    layout = sorted((tmp_path / "g" / "images").glob("*/samples/0000.png"))
    assert len(layout) == len(list((tmp_path / "g" / "images").glob("*/metadata.jsonl")))
    result = run_named("positions", Scripted(data), data, tmp_path / "p", **QUIET)
    assert result["value"] == 0.0 and result["metrics"]["ceiling"]["value"] == 1.0


def test_detections_of_another_detector_are_scored(data, tmp_path):
    settings = {"detector": "none", "images_per_prompt": 2}
    with pytest.raises(UserError, match="have no detections"):
        run_named("geneval", Scripted(data), data, tmp_path, settings, **QUIET)
    rows = [json.loads(line) for line in (tmp_path / "answers-00000.jsonl").read_text().splitlines()]
    found = [{"index": row["index"], "detections": {}, "colors": {}} for row in rows]
    (tmp_path / "detections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    result = score_folder(tmp_path)
    assert result["value"] == 0.0 and not result["comparable"]
    assert "a detector without a name" in result["not_comparable_reason"]
    named = [row | {"detector": "mmdet Mask2Former"} for row in found]
    (tmp_path / "detections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    assert score_folder(tmp_path)["comparable"]


def test_zeroshot_runs_over_all_pairs(data, tmp_path):
    result = run_named("zeroshot", Scripted(data), data, tmp_path, **QUIET)
    assert result["details"]["chance"] == pytest.approx(1 / 24)
    assert 0 <= result["metrics"]["top1"]["value"] <= result["metrics"]["top5"]["value"] <= 1


def test_pope_counts_a_yes_sayer(data, tmp_path):
    result = run_named("pope", Scripted(data), data, tmp_path, **QUIET)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(0.5)
    assert result["value"] == pytest.approx(2 / 3)


def test_a_killed_run_is_resumed(data, tmp_path):
    class Killed(Scripted):
        def answer(self, images, questions, max_new_tokens=16):
            if self.asked >= 20:
                raise KeyboardInterrupt
            return super().answer(images, questions, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        run_named("vqav2", Killed(data), data, tmp_path / "a", batch_size=10, **QUIET)
    path = tmp_path / "a" / "answers-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-9] + "é".encode()[:1])  # the kill cut the last line off
    with pytest.raises(UserError, match=r"samples have no answer.*--partial"):
        score_folder(tmp_path / "a")
    partial = score_folder(tmp_path / "a", partial=True)
    assert partial["missing"] == partial["n"] - 19 and not partial["complete"]
    assert partial["value"] == pytest.approx(19 / partial["n"])  # missing answers are wrong
    model = Scripted(data)
    again = run_named("vqav2", model, data, tmp_path / "a", batch_size=7, **QUIET)
    assert model.asked == again["n"] - 19
    whole = run_named("vqav2", Scripted(data), data, tmp_path / "b", **QUIET)
    assert again == whole
    for name in ("results.json", "scores.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_finished_run_asks_nothing_and_scores_the_same(data, tmp_path):
    first = run_named("vqav2", Scripted(data), data, tmp_path, **QUIET)
    model = Scripted(data)
    assert run_named("vqav2", model, data, tmp_path, **QUIET) == first and model.asked == 0
    assert score_folder(tmp_path) == first


def test_other_settings_or_model_are_refused(data, tmp_path):
    run_named("vqav2", Scripted(data), data, tmp_path, {"limit": 5}, **QUIET)
    with pytest.raises(UserError, match=r"setting limit = 5, this run has 6"):
        run_named("vqav2", Scripted(data), data, tmp_path, {"limit": 6}, **QUIET)
    other = Scripted(data)
    other.describe = lambda: Scripted.describe(other) | {"fingerprint": "1"}
    with pytest.raises(UserError, match="model fingerprint = '0', this run has '1'"):
        run_named("vqav2", other, data, tmp_path, {"limit": 5}, **QUIET)


def test_duplicate_and_unknown_records_are_found(tmp_path):
    store, samples = AnswerStore(tmp_path, "vqav2"), [Sample(0, "a", "q"), Sample(1, "b", "r")]
    store.append(samples, [{"text": "x"}, {"text": "y"}])
    store.append(samples[:1], [{"text": "z"}])
    store.append([Sample(7, "c", "s"), Sample(1, "b", "another prompt")], [{"text": "u"}, {"text": "v"}])
    answers = store.gather(samples)
    assert (answers.records[0]["text"], answers.duplicates, answers.unknown) == ("x", 1, 2)
    (tmp_path / "answers-00001.jsonl").write_text('{"index": 3}\n')
    with pytest.raises(UserError, match="line 1 is not a valid answer record"):
        store.gather(samples)


def test_unreadable_images_are_counted_and_never_help(data, tmp_path):
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    (mine / "test" / "images" / "scenes_test_000000000000.png").write_bytes(b"no image")
    (mine / "test" / "images" / "scenes_test_000000000001.png").unlink()
    model = Scripted(data)
    result = run_named("vqav2", model, mine, tmp_path / "v", **QUIET)
    broken = 6  # three questions about each
    assert result["failed"] == broken and result["value"] == pytest.approx(1 - broken / result["n"])
    assert (
        "samples could not be answered" in result["problems"][0]
        and "000000000000.png" in result["problems"][0]
    )
    result = run_named("reconstruction", model, mine, tmp_path / "r", **QUIET)
    assert result["failed"] == 1 and result["metrics"]["psnr"]["n"] == 38
    positions = run_named("pope", model, mine, tmp_path / "p", **QUIET)
    assert positions["failed"] == 12 and positions["value"] < 2 / 3


def test_a_question_that_the_model_refuses_is_named_alone(data, tmp_path):
    class Strict(Scripted):
        def answer(self, images, questions, max_new_tokens=16):
            if any("How many" in q for q in questions):
                raise UserError("too long for the model")
            return super().answer(images, questions, max_new_tokens)

    result = run_named("vqav2", Strict(data), data, tmp_path, **QUIET)
    assert 0 < result["failed"] < result["n"]
    assert result["metrics"]["type/count"]["value"] == 0.0
    assert result["metrics"]["type/colour"]["value"] == 1.0


def test_bad_requests_are_one_line(data, tmp_path):
    with pytest.raises(UserError, match="Did you mean 'vqav2'"):
        run_named("vqa2", Scripted(data), data, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        run_named("vqav2", Scripted(data), tmp_path / "nowhere", tmp_path / "o")
    with pytest.raises(UserError, match="does not exist"):
        score_folder(tmp_path)
    with pytest.raises(UserError, match="Did you mean 'plain'"):
        run_named("vqav2", Scripted(data), data, tmp_path / "o", {"prompt_template": "plane"})
    assert not (tmp_path / "o").exists()  # nothing half-written


def as_rank(monkeypatch, rank, world):
    """This process plays one of several, without a group: it waits for nobody."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_shares_of_ranks_that_died_are_taken_up_by_any_number_of_others(data, tmp_path, monkeypatch):
    whole = run_named("vqav2", Scripted(data), data, tmp_path / "one", **QUIET)
    asked = []
    for rank, world in ((2, 3), (1, 3), (1, 2), (0, 1)):  # rank 0 of three died before its first answer
        as_rank(monkeypatch, rank, world)
        model = Scripted(data)
        result = run_named("vqav2", model, data, tmp_path / "many", batch_size=7, **QUIET)
        assert (result is None) == (rank > 0)
        asked.append(model.asked)
    assert result == whole and sum(asked) == whole["n"] and min(asked) > 0
    for name in ("results.json", "scores.jsonl", "run.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_memory_stays_flat_however_many_answers(tmp_path):
    """What a batch leaves behind is on disk alone: 4,000 long answers take less than a tenth of it."""
    import tracemalloc

    from open_unitok.eval.core.harness import answer_samples

    samples = [Sample(i, i, f"question {i}") for i in range(4_000)]
    store = AnswerStore(tmp_path, "vqav2")
    tracemalloc.start()
    answer_samples(store, samples[:100], lambda batch: [{"text": "x" * 5000}] * len(batch), 100, quiet=True)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    answer_samples(store, samples, lambda batch: [{"text": "x" * 5000}] * len(batch), 100, quiet=True)
    grown = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert (tmp_path / "answers-00000.jsonl").stat().st_size > 20_000_000
    assert grown < 2_000_000


def test_empty_answers_are_counted_and_named(data, tmp_path):
    class Silent(Scripted):
        def answer(self, images, questions, max_new_tokens=16):
            return ["" for _ in questions]

    result = run_named("vqav2", Silent(data), data, tmp_path, **QUIET)
    assert result["value"] == 0.0 and f"{result['n']} answers are empty" in result["problems"][0]
