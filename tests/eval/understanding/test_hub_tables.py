"""The same questions as released and as a data set of the hub: the same prompts, images and scores."""

import base64
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.registry import detect_benchmarks, find_benchmark
from open_unitok.eval.understanding.mme import MME_TASKS

from ..conftest import run_named
from ..core import releases

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def image(path, stored=None):
    """The cell of an image; `path` may be bytes."""
    return {"bytes": path if isinstance(path, bytes) else path.read_bytes(), "path": stored}


def table(path, rows, images=("image",), lists=()):
    """Write rows as the hub does; columns of images have its type."""
    columns = {}
    for name in rows[0]:
        kind = IMAGE if name in images else pyarrow.list_(IMAGE) if name in lists else None
        columns[name] = pyarrow.array([row[name] for row in rows], kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=4)


def read(path):
    return json.loads(path.read_text())


def vqav2(release, hub):
    content = read(release / "v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    notes = {a["question_id"]: a for a in read(release / "v2_mscoco_val2014_annotations.json")["annotations"]}
    rows = [
        notes[q["question_id"]] | q
        | {"image": image(release / "val2014" / f"COCO_val2014_{q['image_id']:012d}.jpg")}
        for q in content
    ]  # fmt: skip
    table(hub / "data" / "validation-00000-of-00002.parquet", rows[:3])
    table(hub / "data" / "validation-00001-of-00002.parquet", rows[3:])


def gqa(release, hub):
    content = read(release / "testdev_balanced_questions.json")
    rows = [
        {"id": name} | row | {"entailed": str(row["entailed"]), "equivalent": ""}
        for name, row in content.items()
    ]
    table(hub / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    names = sorted({row["imageId"] for row in rows}, reverse=True)
    pictures = [{"id": name, "image": image(release / "images" / f"{name}.jpg")} for name in names]
    table(hub / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", pictures)


def textvqa(release, hub):
    words = {
        row["image_id"]: row["ocr_tokens"]
        for row in read(release / "TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    }
    rows = [
        row
        | {
            "ocr_tokens": words[row["image_id"]],
            "image": image(release / "train_images" / f"{row['image_id']}.jpg"),
        }
        for row in read(release / "TextVQA_0.5.1_val.json")["data"]
    ]
    table(hub / "data" / "validation-00000-of-00001.parquet", rows)
    table(hub / "data" / "train-00000-of-00001.parquet", rows[:1])
    table(hub / "data" / "test-00000-of-00001.parquet", [row | {"answers": [""] * 10} for row in rows])


def pope(release, hub):
    rows = []
    for category in ("adversarial", "popular", "random"):
        path = release / "coco" / f"coco_pope_{category}.json"
        for row in map(json.loads, path.read_text().splitlines()):
            rows.append({
                "id": str(len(rows)), "question_id": str(row["question_id"]), "question": row["text"],
                "answer": row["label"], "image_source": Path(row["image"]).stem,
                "image": image(release / "coco" / "val2014" / row["image"]), "category": category,
            })  # fmt: skip
    table(hub / "data" / "test-00000-of-00001.parquet", rows)
    for category in ("adversarial", "popular", "random"):  # the same rows once more
        part = [row for row in rows if row["category"] == category]
        table(hub / "Full" / f"{category}-00000-of-00001.parquet", part)


def mme(release, hub):
    rows = []
    for task in reversed(MME_TASKS):
        for path in sorted((release / task).rglob("*.txt"), reverse=True):
            file = next((release / task).rglob(f"{path.stem}.jpg"))
            for question, answer in (line.split("\t") for line in path.read_text().splitlines()):
                name = f"{task}/{file.name}"
                rows.append({
                    "question_id": name, "image": image(file), "question": question, "answer": answer,
                    "category": task,
                })  # fmt: skip
    table(hub / "data" / "test-00000-of-00001-53ae1794f93b1e35.parquet", rows)


def mmvet(release, hub):
    rows = [
        {"question_id": name, "image": image(release / "images" / row["imagename"]),
         "question": row["question"],
         "answer": row["answer"], "image_source": "s", "capability": ",".join(row["capability"])}
        for name, row in read(release / "mm-vet.json").items()
    ]  # fmt: skip
    table(hub / "data" / "test-00000-of-00001.parquet", rows)


def vizwiz(release, hub):
    rows = [
        {"question_id": row["image"], "image": image(release / "val" / row["image"]),
         "question": row["question"],
         "answers": [a["answer"] for a in row["answers"]], "category": row["answer_type"]}
        for row in read(release / "val.json")
    ]  # fmt: skip
    table(hub / "data" / "val-00000-of-00001-7775fd61bc6a3d98.parquet", rows)
    table(hub / "data" / "test-00000-of-00001.parquet", [row | {"answers": []} for row in rows])


def seedbench(release, hub):
    rows = []
    for row in read(release / "SEED-Bench.json")["questions"]:
        if row["data_type"] == "image":
            frames = [image(release / "SEED-Bench-image" / row["data_id"])]
        else:  # the middle frame is the one that the release names by question
            other = image(release / "SEED-Bench-image" / "d_1")
            frames = [other, image(release / "SEED-Bench-video-image" / f"{row['question_id']}.png"), other]
        rows.append(
            row | {"question_type_id": str(row["question_type_id"]), "image": frames, "segment": None}
        )
    table(hub / "data" / "test-00000-of-00001.parquet", rows, (), ("image",))


def scienceqa(release, hub):
    rows = [
        row | {"image": image(release / "test" / name / "image.png", "image.png") if row["image"] else None}
        for name, row in read(release / "problems.json").items()
    ]
    table(hub / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows)
    table(hub / "ScienceQA-FULL" / "validation-00000-of-00001.parquet", rows[:2])
    table(hub / "ScienceQA-IMG" / "test-00000-of-00001.parquet", [row for row in rows if row["image"]])


def mmbench(release, hub):
    head, *body = (
        line.split("\t") for line in (release / "mmbench_dev_20230712.tsv").read_text().splitlines()
    )
    rows = [dict(zip(head, cells)) for cells in body]
    rows = [
        row | {"index": int(row["index"]), "image": image(base64.b64decode(row["image"]))} for row in rows
    ]
    rows = [row | {"L2-category": row.pop("l2-category"), "D": None} for row in rows]
    table(hub / "en" / "dev-00000-of-00001.parquet", rows)
    table(hub / "cn" / "dev-00000-of-00001.parquet", rows)


TABLES = {
    f.__name__: f for f in (vqav2, gqa, textvqa, pope, mme, mmvet, vizwiz, seedbench, scienceqa, mmbench)
}


class Scripted:
    """Answers by the text of the question, and keeps what it was asked."""

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens):
        for shown, question in zip(images, questions):
            self.asked.append((question, None if shown is None else np.asarray(shown).tobytes()))
        return [next(r for key, r in self.replies.items() if key in q) for q in questions]


@pytest.mark.parametrize("name", TABLES)
def test_the_hub_gives_what_the_release_gives(name, tmp_path):
    replies, value = releases.BUILDERS[name](tmp_path / "release", False)
    TABLES[name](tmp_path / "release", tmp_path / "hub")
    options = {"judge_replay": str(tmp_path / "release" / "replies.jsonl")} if name == "mmvet" else {}
    models = [Scripted(replies) for _ in "ab"]
    found = [
        run_named(name, model, tmp_path / layout, tmp_path / "out" / layout, options, quiet=True)
        for model, layout in zip(models, ("release", "hub"))
    ]
    assert models[0].asked == models[1].asked and models[0].asked
    assert found[0]["value"] == found[1]["value"] == pytest.approx(value)
    for key in ("metrics", "n", "missing", "failed", "malformed", "prompt_template", "details", "comparable"):
        assert found[0][key] == found[1][key], key
    rows = [
        [json.loads(line) for line in (tmp_path / "out" / layout / "scores.jsonl").read_text().splitlines()]
        for layout in ("release", "hub")
    ]
    for a, b in zip(*rows, strict=True):
        for key in ("id", "group", "question", "answer", "truth", "score"):
            assert a[key] == b[key], key
        assert ".parquet#" in b["image"] or not a["image"]


def load(name, data, **options):
    return find_benchmark(name).code.load(data, find_benchmark(name).resolve(options)[0])


def test_splits_and_configurations_are_chosen_by_name(tmp_path):
    for name in ("vqav2", "textvqa", "vizwiz", "scienceqa", "mmbench", "gqa"):
        releases.BUILDERS[name](tmp_path / "release" / name, False)
        TABLES[name](tmp_path / "release" / name, tmp_path / name)
    test = load("textvqa", tmp_path / "textvqa", split="test")
    assert test.metadata["split"] == "test" and not any(q.answers for q in test.truth)
    assert load("textvqa", tmp_path / "textvqa", split="val").metadata["split"] == "val"
    assert not any(q.answers for q in load("vizwiz", tmp_path / "vizwiz", split="test").truth)
    assert load("vqav2", tmp_path / "vqav2", split="mscoco_val2014").metadata["split"] == "mscoco_val2014"
    image_part = load("scienceqa", tmp_path / "scienceqa" / "ScienceQA-IMG")
    assert image_part.metadata["split"] == "test, ScienceQA-IMG" and len(image_part.samples) == 3
    assert len(load("scienceqa", tmp_path / "scienceqa", split="val").samples) == 2
    chinese = load("mmbench", tmp_path / "mmbench", split="cn/dev")
    assert chinese.metadata["split"] == "dev_cn" and chinese.metadata["prompt_template"] == "letter-cn"
    questions = tmp_path / "gqa" / "testdev_balanced_instructions"
    assert len(load("gqa", questions).samples) == len(load("gqa", next(questions.glob("*"))).samples) == 5
    with pytest.raises(UserError, match="train_balanced_instructions does not exist"):
        load("gqa", tmp_path / "gqa", split="train_balanced")


def test_all_runs_the_tables_in_folders_named_after_benchmarks(tmp_path):
    for name in ("pope", "gqa"):
        releases.BUILDERS[name](tmp_path / "release" / name, False)
        TABLES[name](tmp_path / "release" / name, tmp_path / "hub" / name)
    assert detect_benchmarks(tmp_path / "hub") == ["gqa", "pope"]


def test_a_table_of_something_else_is_refused(tmp_path):
    releases.BUILDERS["pope"](tmp_path / "release", False)
    pope(tmp_path / "release", tmp_path / "pope")
    for name in ("vqav2", "textvqa", "mmvet", "vizwiz", "seedbench", "scienceqa", "mmbench"):
        with pytest.raises(UserError, match=r"the columns .* are missing; there are id, question_id"):
            load(name, tmp_path / "pope" / "data")
    with pytest.raises(UserError, match="row 0: category is 'adversarial'; allowed: existence"):
        load("mme", tmp_path / "pope")
    with pytest.raises(UserError, match="there are no questions of the categories popular, adversarial"):
        load("pope", tmp_path / "pope" / "Full" / "random-00000-of-00001.parquet")
    assert len(load("pope", tmp_path / "pope" / "Full").samples) == 15
