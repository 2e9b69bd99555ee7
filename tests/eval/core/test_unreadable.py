"""No benchmark turns images that are missing or unreadable into a number: every entry of the registry."""

import json

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.core.benchmark import Sample
from open_unitok.eval.core.generated_images import ExternalImages
from open_unitok.eval.core.image_files import refuse_unreadable
from open_unitok.eval.registry import BENCHMARKS
from open_unitok.training.scenes.dataset import SceneConfig, write_scenes

from ..conftest import run_named
from ..generation.test_external_images import write_geneval
from ..generation.test_generated_images import write_dpg, write_genai
from ..generation.test_t2i_compbench import write_release
from ..generation.test_wise import write_wise
from . import hub_releases
from .test_end_to_end import BUILDERS, releases


class Untouched:
    """A model that must not be asked anything."""

    device, kind = "cpu", "mllm"

    def describe(self):
        return {"path": "untouched", "kind": self.kind, "fingerprint": "0"}

    def answer(self, *arguments):
        raise AssertionError("asked")

    generate = reconstruct = embed_images = embed_texts = features = answer


def classes(folder):
    for part in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            for i in range(3):
                releases.write_image(folder / part / wnid / f"{i}.JPEG", i)


def captions(folder):
    rows = [{"file": f"{i}.jpg", "captions": [f"number {i}"]} for i in range(3)]
    releases.write(folder / "captions.json", rows)
    for row in rows:
        releases.write_image(folder / row["file"])


def mjhq(folder):
    releases.write(folder / "meta_data.json", {"ab": {"category": "art", "prompt": "p"}})


def image_set(folder):
    releases.write(folder / "prompts.txt", "a cup\na dog\n")


def positions(folder, **options):
    config = SceneConfig(train=4, shard=4, test=6, pope=2, prompts=2, text_lines=20, questions=1, **options)
    write_scenes(config, folder, progress=False)


def emoji(folder):
    """A split without its neighbours would have no originals: its parent has itself as "train"."""
    labels = {"prompt": "A, B style", "name": "A", "style": "B", "category": "C"}
    asked = [{"kind": "name", "question": "What is this?", "answer": "A"}]
    rows = [{"file": f"{i}.png", "questions": asked, **labels} for i in range(3)]
    releases.write(folder / "items.json", rows)
    releases.write(folder.parent / "train" / "items.json", rows)
    for row in rows:
        releases.write_image(folder / row["file"])


def imagenet_generation(folder):
    releases.write(folder / "VIRTUAL_imagenet256_labeled.npz", "")


MAKERS = {
    "reconstruction": classes, "zeroshot": classes, "linear_probe": classes, "retrieval": captions,
    "geneval": write_geneval, "positions": positions,
    "scene_attributes": lambda folder: positions(folder, textures=("plain", "dotted")),
    "scene_classes": lambda folder: positions(folder, classes=True, max_objects=1),
    "emoji": emoji, "emoji_reconstruction": emoji, "emoji_questions": emoji,
    "genai_bench": write_genai, "dpg_bench": write_dpg,
    "mjhq": mjhq, "imagenet_generation": imagenet_generation, "wise": write_wise, "image_set": image_set,
    "t2i_compbench": write_release,
    **{name: lambda folder, build=build: build(folder, False) for name, build in BUILDERS.items()},
    **hub_releases.HUB_BUILDERS,
}  # fmt: skip


def test_every_benchmark_has_a_maker():
    assert set(MAKERS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_images_that_cannot_be_read_never_become_a_number(tmp_path, name, monkeypatch):
    monkeypatch.setattr(hub_releases, "jpeg", lambda shade: b"<html>404 Not Found</html>")
    data, theirs = tmp_path / "data", tmp_path / "theirs"
    MAKERS[name](data)
    for path in data.rglob("*"):
        # what a download leaves of an image that is gone, or a Git LFS pointer
        image = path.suffix.lower() in (".jpg", ".jpeg", ".png", "") or path.parent.name.endswith("images")
        if path.is_file() and image:
            path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        elif path.suffix == ".tsv":
            head, *rows = path.read_text().splitlines()
            column = head.split("\t").index("image")
            cells = [row.split("\t") for row in rows]
            lines = ["\t".join([*c[:column], "aGVsbG8=", *c[column + 1 :]]) for c in cells]
            path.write_text("\n".join([head, *lines]) + "\n")
    model = Untouched()
    if BENCHMARKS[name].needs == "generator":
        releases.write_image(theirs / "something.png")
        model = ExternalImages(theirs)
    with pytest.raises(UserError, match=r"of \d+ images can be read|holds none of its \d+ images"):
        run_named(name, model, data, tmp_path / "out", {"limit": 3}, quiet=True)
    assert not (tmp_path / "out").exists()


def test_half_of_the_images_may_be_missing_and_no_more(tmp_path):
    samples = [Sample(i, i, "q", tmp_path / f"{i}.png") for i in range(200)]
    for i in range(100):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    refuse_unreadable("x", samples, ())
    (tmp_path / "0.png").unlink()
    with pytest.raises(
        UserError, match=r"x: only 99 of 200 images can be read, the first problem: .*0\.png does"
    ):
        refuse_unreadable("x", samples, ())
    # images of answered samples are not needed any more
    refuse_unreadable("x", samples, {s.key for s in samples[100:]})


def test_a_run_without_one_answer_has_no_result(tmp_path):
    """The images are fine, and the model rejects every question."""
    BUILDERS["vizwiz"](tmp_path / "data", False)

    class Rejects(Untouched):
        def answer(self, *arguments):
            raise UserError("too long for the model")

    with pytest.raises(UserError, match="not one of 5 samples could be answered, the first because too long"):
        run_named("vizwiz", Rejects(), tmp_path / "data", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "results.json").exists()
    assert len((tmp_path / "out" / "answers-00000.jsonl").read_text().splitlines()) == 5

    class Answers(Untouched):
        def answer(self, images, questions, length):
            return [f"soup {i}" for i in range(len(questions))]

    # the same command asks them again
    result = run_named("vizwiz", Answers(), tmp_path / "data", tmp_path / "out", quiet=True)
    assert result["value"] == 1.0 and result["comparable"] and result["failed"] == 0
    assert not any("twice" in problem for problem in result["problems"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [f"soup {i}" for i in range(5)]
