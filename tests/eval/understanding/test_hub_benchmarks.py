"""AI2D, MMStar, RealWorldQA, MMMU, ChartQA and OCRBench from files to score, in every layout that is read."""

import json

import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.understanding import ai2d, chartqa, mmmu, mmstar, realworldqa

from ..conftest import run_named, score_folder
from ..core import hub_releases
from ..core.hub_releases import HUB_BUILDERS


class Replies:
    """Answers the questions in their order; keeps what it was asked."""

    device = "cpu"

    def __init__(self, replies):
        self.replies, self.asked = list(replies), []

    def describe(self):
        return {"path": "replies", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens):
        self.asked += [(image, question, max_new_tokens) for image, question in zip(images, questions)]
        return [self.replies.pop(0) for _ in questions]


def run(name, folder, out, replies, **options):
    model = Replies(replies)
    return run_named(name, model, folder, out, options, quiet=True), model


def values(result):
    return {name: metric["value"] for name, metric in result["metrics"].items()}


@pytest.mark.parametrize("name", HUB_BUILDERS)
def test_a_few_samples_give_the_known_score(tmp_path, name):
    replies, expected = HUB_BUILDERS[name](tmp_path / "data")
    result, model = run(name, tmp_path / "data", tmp_path / "out", replies)
    if expected is not None:
        assert result["value"] == pytest.approx(expected)
    assert result["n"] == len(replies) == len(model.asked) and not result["failed"]
    # a part of a data set, or another split, is not what is published
    assert not result["comparable"] and result["not_comparable_reason"]
    before = (tmp_path / "out" / "results.json").read_text()
    score_folder(tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == before


LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = {
    "ai2d": f"Which part 0?\nA. sun\nB. sea\nC. sky\nD. sand{LETTER}",
    "mmstar": f"Which 0?\nOptions: A: one, B: two, C: three, D: four{LETTER.removesuffix('.')}",
    "realworldqa": "",  # the question holds its instruction
    "mmmu": f"Art_Theory: what is in <image 1>?\nA. cat\nB. dog's\n{LETTER}",
    "chartqa": "human 0?\nAnswer the question with a single word.",
    "ocrbench": "IIIT5K?",
}


@pytest.mark.parametrize("name", HUB_BUILDERS)
def test_the_prompt_and_the_length_are_those_of_lmms_eval(tmp_path, name):
    replies, _ = HUB_BUILDERS[name](tmp_path / "data")
    _, model = run(name, tmp_path / "data", tmp_path / "out", replies)
    if PROMPTS[name]:
        assert model.asked[0][1] == PROMPTS[name]
    else:
        assert model.asked[0][1].startswith("Which way?\n\nA. Left.") and model.asked[0][1].endswith("else.")
    length = 16 if name in ("ai2d", "realworldqa", "chartqa") else 128
    assert {asked[2] for asked in model.asked} == {length}


def test_mmmu_reads_all_subjects_several_images_and_guesses_as_published(tmp_path):
    replies, _ = hub_releases.mmmu(tmp_path / "data")
    result, model = run("mmmu", tmp_path / "data", tmp_path / "out", replies)
    # subjects in the order of their names; the dev split is left out
    assert [q.split(":")[0] for _, q, _ in model.asked] == ["Art_Theory"] * 3 + ["Math"] * 3
    assert model.asked[2][1].endswith("\n\nAnswer the question using a single word or phrase.")
    images, question, _ = model.asked[1]
    shades = [image.getpixel((0, 0))[0] for image in images]
    assert len(images) == 3 and shades == pytest.approx([20, 30, 40], abs=3) and "A. <image 3>" in question
    # random.seed(42); random.choice(["A", "B"]) is "A", so the answer without a letter is right
    scores = [
        json.loads(line)["score"] for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()
    ]
    assert scores == [1, 1, 1, 1, 1, 0]
    assert values(result)["accuracy"] == pytest.approx(5 / 6)
    assert values(result)["domain/Science"] == pytest.approx(2 / 3)
    assert values(result)["kind/open"] == 0.5 and values(result)["subject/Art_Theory"] == 1
    assert not result["comparable"] and "28 of 30 subjects are missing" in result["not_comparable_reason"]
    assert any("1 answers hold no letter" in problem for problem in result["problems"])


def test_mmmu_in_one_configuration_and_without_public_answers(tmp_path):
    rows = hub_releases.mmmu_rows("Music", "test") + hub_releases.mmmu_rows("Art", "test")
    for row in rows:
        row["answer"] = "?"
    hub_releases.parquet(tmp_path / "data" / "data" / "test-00000-of-00001.parquet", rows)
    replies = ["B", "A", "5", "(B)", "nothing at all", "ten"]
    result, _ = run("mmmu", tmp_path / "data", tmp_path / "out", replies, split="test")
    assert result["metrics"] == {} and result["submission"] == ["mmmu_answers.json"]
    content = json.loads((tmp_path / "out" / "submission" / "mmmu_answers.json").read_text())
    assert content["test_Music_1"] == "B" and content["test_Art_3"] == "ten"
    assert content["test_Art_2"] in ("A", "B")  # a guess
    with pytest.raises(UserError, match="found data/test"):
        run("mmmu", tmp_path / "data", tmp_path / "other", replies)


def test_mmstar_of_lmms_averages_finer_categories(tmp_path):
    replies, _ = hub_releases.mmstar(tmp_path / "data")
    replies[1] = "A"
    result, _ = run("mmstar", tmp_path / "data", tmp_path / "out", replies, scorer="lmms")
    # geometry 1/2, statistics 1, diagrams 1
    assert result["metric"] == "average" and result["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert values(result)["category/math"] == pytest.approx(0.75)
    assert values(result)["category/reasoning"] == 1 and values(result)["l2/geometry"] == 0.5


def test_mmstar_from_the_table_of_vlmevalkit(tmp_path):
    hub_releases.mmstar_table(tmp_path / "data")
    result, model = run("mmstar", tmp_path / "data", tmp_path / "out", ["A", "B", "C", "A"])
    assert result["value"] == 0.75 and model.asked[3][0].getpixel((0, 0))[0] == pytest.approx(3, abs=3)
    assert model.asked[0][1].startswith("Which 0?\nA. one\nB. two\nC. three\nD. four\nAnswer with")


@pytest.mark.parametrize("layout", ["lmms-lab", "HuggingFaceM4"])
def test_chartqa_as_parquet(tmp_path, layout):
    rows = [
        {"type": "human_test", "question": "h?", "answer": "10", "image": 1},
        {"type": "augmented_test", "question": "a?", "answer": "2019", "image": 2},
    ]
    if layout == "HuggingFaceM4":
        rows = [
            {"query": r["question"], "label": [r["answer"]], "human_or_machine": i, "image": r["image"]}
            for i, r in enumerate(rows)
        ]
    hub_releases.parquet(tmp_path / "data" / "data" / "test-00000-of-00001.parquet", rows)
    result, _ = run("chartqa", tmp_path / "data", tmp_path / "out", ["10.6", "2019"])
    assert values(result) == {"relaxed_accuracy": 0.5, "kind/human": 0.0, "kind/augmented": 1.0}


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (ai2d, "AI2D_SIZE"),
        (mmstar, "MMSTAR_SIZE"),
        (realworldqa, "REALWORLDQA_SIZE"),
        (chartqa, "CHARTQA_SIZE"),
    ],
)
def test_a_whole_data_set_is_comparable(tmp_path, monkeypatch, module, size):
    monkeypatch.setattr(module, size, 4)
    name = module.__name__.rsplit(".", 1)[1]
    replies, _ = HUB_BUILDERS[name](tmp_path / "data")
    result, _ = run(name, tmp_path / "data", tmp_path / "out", replies)
    assert result["comparable"]


def test_ocrbench_counts_points_and_is_comparable_only_when_whole(tmp_path):
    replies, _ = hub_releases.ocrbench(tmp_path / "data")
    result, _ = run("ocrbench", tmp_path / "data", tmp_path / "out", replies)
    found = values(result)
    assert found["score"] == 3 and found["group/Text Recognition"] == 1
    assert found["group/Key Information Extraction"] == 0 and found["type/Regular Text Recognition"] == 1
    assert not result["comparable"] and "of 1,000" in result["not_comparable_reason"]


def test_ocrbench_as_parquet(tmp_path):
    rows = [{"dataset": "svt", "question": "q?", "question_type": "Irregular Text Recognition",
             "answer": ["no", "yes"], "image": 1}]  # fmt: skip
    hub_releases.parquet(tmp_path / "data" / "data" / "test-00000-of-00001.parquet", rows * 2)
    result, _ = run("ocrbench", tmp_path / "data", tmp_path / "out", ["YES", "maybe"])
    assert values(result)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ai2d", "data/test-00000-of-00001.parquet"),
        ("mmstar", "MMStar"),
        ("realworldqa", "data/test-00000"),
        ("mmmu", "data/validation-00000"),
        ("chartqa", "test_human.json"),
        ("ocrbench", "OCRBench.json"),
    ],
)
def test_a_wrong_folder_says_what_was_looked_for(tmp_path, name, expected):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=expected):
        run(name, tmp_path / "data", tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_a_malformed_row_is_counted_and_wrong(tmp_path):
    rows = [
        {"question": f"Which part {i}?", "options": ["sun", "sea"], "answer": label, "image": image}
        for i, (label, image) in enumerate([("0", 1), ("7", 2), ("1", None), ("1", 4), ("0", 5)])
    ]
    hub_releases.parquet(tmp_path / "data" / "data" / "test-00000-of-00001.parquet", rows)
    result, model = run("ai2d", tmp_path / "data", tmp_path / "out", ["A", "B", "A"])
    assert result["value"] == pytest.approx(3 / 5) and result["malformed"] == 2 and not result["comparable"]
    assert len(model.asked) == 3
    assert "answer is '7'" in " ".join(result["problems"])
    hub_releases.parquet(tmp_path / "bad" / "data" / "test-00000-of-00001.parquet", rows[1:3])
    with pytest.raises(UserError, match="another kind of file"):
        run("ai2d", tmp_path / "bad", tmp_path / "out2", [])


def test_options_of_mmmu_may_hold_latex(recwarn):
    row = hub_releases.mmmu_rows("Math")[0] | {"options": r"['$\sin x$', '$\frac{1}{2}$', \"it's\"]"}
    row["options"] = row["options"].replace('\\"', '"')
    found = mmmu.read_mmmu_row(row | {"image_1": "image"}, "row 1")
    assert found.question.options == (r"$\sin x$", r"$" + "\frac{1}{2}$", "it's")  # \f is Python's form feed
    assert not recwarn.list
    with pytest.raises(UserError, match="options is 'A, B'"):
        mmmu.read_mmmu_row(row | {"options": "A, B"}, "row 1")
