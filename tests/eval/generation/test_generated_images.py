"""Generation benchmarks in their released layouts, with a scripted generator through the command line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.generation import dpg_bench, genai_bench
from open_unitok.eval.metrics import inception, inception_features, inception_weights, vqascore
from open_unitok.generation import Sampling

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


class ScriptedGenerator:
    """Draws one colour per prompt; refuses prompts that say "refuse"."""

    device, sampling = "cpu", Sampling()

    def __init__(self, folder="scripted", *options):
        pass

    def check_needs(self, needs, benchmark):
        pass

    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def generate(self, prompts, seeds):
        if any("refuse" in p for p in prompts):
            raise UserError("this prompt is too long")
        return [Image.fromarray(random_image(p, seed)) for p, seed in zip(prompts, seeds)]


def random_image(prompt, seed, size=16):
    random = np.random.default_rng([len(prompt), seed])
    return random.integers(0, 255, (size, size, 3), np.uint8)


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.setattr("open_unitok.eval.core.model.Model", ScriptedGenerator)


@pytest.fixture
def quick_net(monkeypatch, tmp_path):
    """A fast replacement for Inception; returns a placeholder for its weight file."""

    def net(images):
        pooled = np.stack([p[:2, :2].reshape(-1).astype(np.float32) for p in images])
        return inception_weights.Features(pooled, pooled[:, :5] / 50, pooled[:, :7])

    monkeypatch.setattr(inception, "load_extractor", lambda variant, file, device: net)
    for name in (inception_weights.TORCH_FIDELITY_FILE, "inception-2015-12-05.pt"):
        (tmp_path / name).write_bytes(b"weights")
    return tmp_path


class Judge:
    """Sure of even sums of pixels."""

    def __init__(self, folder, device):
        self.about = {"model": "scripted", "fingerprint": "f" * 64}

    def probabilities(self, images, questions, answer):
        assert answer == "Yes" and all(q.startswith('Does this figure show "') for q in questions)
        return [0.25 + 0.5 * (np.asarray(p).mean() > 0) for p in images]

    def answers(self, images, questions, words=5):
        return ["Yes." if "1" in q else "No" for q in questions]


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr("open_unitok.eval.judges.vqa_model.VqaModel", Judge)


def result_of(folder, name):
    return json.loads((folder / name / "results.json").read_text())


def run(call, name, data, out, *more):
    return call("eval", "run", name, "--model", "m", "--data", data, "--out", out, *more)


# ----------------------------------------------------------------------------------------------- GenAI-Bench


def test_genai_summary_equals_the_published_one():
    golden = json.loads((GOLDEN / "genai_bench.json").read_text())
    found = genai_bench.summarise_skills(golden["scores"], range(1, 528), golden["genai_skills.json"])
    assert found.keys() == golden["expected"].keys()
    for tag, row in golden["expected"].items():
        assert found[tag] == pytest.approx(row, abs=1e-5), tag


def test_vqascore_equals_the_published_formula():
    for case in json.loads((GOLDEN / "genai_bench.json").read_text())["vqascore_cases"]:
        found = vqascore.vqascore(np.array(case["logits"]), case["labels"])
        assert found == pytest.approx(case["score"], abs=1e-5)
    with pytest.raises(UserError, match="at least one label"):
        vqascore.vqascore(np.zeros((1, 3)), [-100])


def write_genai(folder, prompts=("a", "b", "refuse", "d", "e")):
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    skills = {"counting": [1, 3], "advanced": [1, 3, 4], "scene": [5], "basic": [5]}
    (folder / "genai_skills.json").write_text(json.dumps(skills))


def test_genai_bench_through_the_command_line(call, generator, judge, tmp_path):
    write_genai(tmp_path / "data")
    code, _, err = run(call, "genai_bench", tmp_path / "data", tmp_path)
    assert code == 2 and "but not judged. Run again with --vqa-model" in err
    code, out, err = run(call, "genai_bench", tmp_path / "data", tmp_path, "--vqa-model", tmp_path)
    assert code == 0, err
    result = result_of(tmp_path, "genai_bench")
    values = {k: m["value"] for k, m in result["metrics"].items()}
    assert values["advanced"] == result["value"] == pytest.approx(0.5)  # the rejected prompt counts as 0
    assert values["all"] == pytest.approx(0.75 * 3 / 4) and values["counting"] == pytest.approx(0.375)
    assert values["scene"] == pytest.approx(0.75)
    assert result["failed"] == 1 and "1 images have no score" in out and "too long" in out
    assert not result["comparable"] and "not by clip-flant5-xxl" in result["not_comparable_reason"]
    folder = tmp_path / "genai_bench"
    with Image.open(folder / "images" / "00001.jpg") as image:
        assert image.format == "JPEG"
    assert call("eval", "score", folder)[1] == out  # from files alone
    lines = [{"index": i, "score": 1.0} for i in range(5)]
    (folder / "vqascore.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call("eval", "score", folder)[0] == 0 and result_of(tmp_path, "genai_bench")["value"] == 1.0
    (folder / "vqascore.jsonl").write_text('{"index": 0, "score": 7}')
    code, _, err = call("eval", "score", folder)
    assert code == 2 and "line 1: score is 7" in err


def test_genai_bench_names_bad_files(call, generator, tmp_path):
    write_genai(tmp_path / "data", ("a", "b"))
    code, _, err = run(call, "genai_bench", tmp_path / "data", tmp_path)
    assert code == 2 and "'counting' lists prompt 3" in err
    (tmp_path / "data" / "prompts.txt").unlink()
    code, _, err = run(call, "genai_bench", tmp_path / "data", tmp_path)
    assert code == 2 and "prompts.txt or genai_image.json" in err
    (tmp_path / "data" / "genai_image.json").write_text('{"1": {"text": "a"}}')
    code, _, err = run(call, "genai_bench", tmp_path / "data", tmp_path)
    assert code == 2 and "the key 'prompt' is missing" in err


# ------------------------------------------------------------------------------------------------- DPG-Bench


@pytest.fixture(scope="module")
def dpg_golden():
    golden = json.loads((GOLDEN / "dpg_bench.json").read_text())
    items: dict[str, list[dpg_bench.DpgQuestion]] = {}
    for row in golden["csv_rows"]:
        fields = dict(zip(golden["csv_header"], map(str, row)))
        items.setdefault(fields["item_id"], []).append(dpg_bench._parse_question(fields, "here"))
    return golden, items


def test_dpg_scores_equal_the_published_ones(dpg_golden):
    golden, items = dpg_golden
    averages, chosen, last = [], [], []
    for row in golden["items"]:
        questions = items[row["item_id"]]
        scores = [dpg_bench.image_score(questions, answers) for answers in row["answers_per_picture"]]
        assert scores == pytest.approx(row["expected_per_picture"], abs=1e-9)
        assert np.mean(scores) == pytest.approx(row["expected_average"], abs=1e-9)
        raw = dpg_bench.raw_scores(questions, row["answers_per_picture"][-1])
        assert raw == {int(k): v for k, v in row["expected_raw_scores_last_picture"].items()}
        averages.append(np.mean(scores))
        chosen.append(dpg_bench.DpgItem(row["item_id"], "", tuple(questions)))
        last.append(row["answers_per_picture"][-1])
    assert 100 * np.mean(averages) == pytest.approx(golden["expected_dpg_score"], abs=1e-9)
    levels = dpg_bench.category_scores(chosen, last)
    for level in ("l1", "l2"):
        found = {name: 100 * np.mean(v) for name, v in levels[level].items()}
        assert found == pytest.approx(golden[f"expected_{level}"], abs=1e-9)


def write_dpg(folder, prompts=("p", "q", "refuse", "s", "t")):
    folder.mkdir(parents=True)
    header = json.loads((GOLDEN / "dpg_bench.json").read_text())["csv_header"]
    with open(folder / "dpg_bench.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerow(header)  # the released table repeats its header
        for k, prompt in enumerate(prompts):
            for number, parents, words in ((1, "0", "1?"), (2, "1", "2?"), (3, "2", "is 1 so?")):
                kind = "entity - whole (x)" if number == 1 else "attribute - color (x, y)"
                table.writerow([f"item{k}", prompt, "", number, parents, "", "", kind, words])


def test_dpg_bench_through_the_command_line(call, generator, judge, tmp_path):
    write_dpg(tmp_path / "data")
    words = (call, "dpg_bench", tmp_path / "data", tmp_path, "--images-per-prompt", 2)
    code, _, err = run(*words)
    assert code == 2 and "but not judged" in err
    code, out, err = run(*words, "--vqa-model", tmp_path)
    assert code == 0, err
    result = result_of(tmp_path, "dpg_bench")
    # question 1 yes, 2 no, 3 yes but its parent is no: a third, in four of five prompts
    assert result["value"] == pytest.approx(100 / 3 * 4 / 5)
    assert result["metrics"]["l1/entity"]["value"] == pytest.approx(80)
    assert result["metrics"]["l2/attribute - color"]["value"] == pytest.approx(40)
    assert result["metrics"]["l1/entity"]["interval"] == pytest.approx(
        [40, 100]
    )  # by prompt, one of five is 0
    assert "2 images have no answers (counted as 0)" in out and result["failed"] == 2
    assert result["metrics"]["dpg"]["n"] == 5 and "not by mPLUG-large" in result["not_comparable_reason"]
    folder = tmp_path / "dpg_bench"
    assert call("eval", "score", folder)[1] == out
    rows = [{"index": i, "answers": {"1": "yes", "2": "yes", "3": "yes"}} for i in range(10)]
    (folder / "vqa_answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call("eval", "score", folder)[0] == 0 and result_of(tmp_path, "dpg_bench")["value"] == 100.0
    assert not result_of(tmp_path, "dpg_bench")["comparable"]
    rows = [row | {"model": "mPLUG-large"} for row in rows]
    (folder / "vqa_answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call("eval", "score", folder)[0] == 0
    # the judge is the published one, but two images are missing
    assert result_of(tmp_path, "dpg_bench")["not_comparable_reason"] == "2 samples could not be asked"


def test_dpg_bench_names_bad_lines(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text("item_id,text\n")
    with pytest.raises(UserError, match="no column 'proposition_id'"):
        dpg_bench.read_dpg_items(tmp_path)
    lines = ",".join(dpg_bench.COLUMNS), "a,b,one,0,x,y"
    (tmp_path / "dpg_bench.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 2: proposition_id and dependency"):
        dpg_bench.read_dpg_items(tmp_path)


# --------------------------------------------------------------------------------- MJHQ and class-conditional


def write_mjhq(folder, size=16, n=5):
    meta = {
        f"id{i}": {"category": "art" if i % 2 else "food", "prompt": f"prompt {'x' * i}"} for i in range(n)
    }
    for i, (name, row) in enumerate(meta.items()):
        path = folder / "mjhq30k_imgs" / row["category"] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(row["prompt"], i, size)).save(path, "PNG")
    (folder / "meta_data.json").write_text(json.dumps(meta))


def test_mjhq_through_the_command_line(call, generator, quick_net, tmp_path):
    write_mjhq(tmp_path / "data")
    words = (call, "mjhq", tmp_path / "data", tmp_path, "--image-format", "png")
    code, _, err = run(*words)
    assert code == 2 and "no Inception features (clean)" in err and "--inception-weights PATH" in err
    code, out, err = run(*words, "--inception-weights", quick_net)
    assert code == 0, err
    result = result_of(tmp_path, "mjhq")
    # the scripted generator returns the released images
    assert result["value"] == pytest.approx(0.0, abs=1e-6) and result["comparable"]
    assert result["metrics"].keys() == {"fid", "fid/art", "fid/food"}
    assert result["metrics"]["fid/art"]["n"] == 2 and result["metrics"]["fid"]["interval"] is None
    assert result["details"]["fid"]["variant"] == "clean" and "5 images are few" in out
    folder = tmp_path / "mjhq"
    assert call("eval", "score", folder)[1] == out
    # the statistics of this run serve the next one, but not another variant
    statistics = folder / "reference.npz"
    code, _, err = run(*words, "--inception-weights", quick_net, "--reference", statistics)
    assert code == 0 and result_of(tmp_path, "mjhq")["value"] == pytest.approx(0.0, abs=1e-6), err
    code, _, err = run(
        *words,
        "--inception-weights",
        quick_net,
        "--reference",
        statistics,
        "--inception-variant",
        "pytorch-fid",
    )
    assert code == 2 and "not comparable" in err


def test_mjhq_counts_what_is_missing_and_scales_real_images(call, generator, quick_net, tmp_path):
    write_mjhq(tmp_path / "data", size=32)
    (tmp_path / "data" / "mjhq30k_imgs" / "art" / "x.jpg").write_bytes(b"broken")
    meta = json.loads((tmp_path / "data" / "meta_data.json").read_text())
    meta["bad"] = {"category": "art", "prompt": "refuse"}
    (tmp_path / "data" / "meta_data.json").write_text(json.dumps(meta))
    code, out, err = run(call, "mjhq", tmp_path / "data", tmp_path, "--inception-weights", quick_net)
    assert code == 0, err
    assert "1 released images could not be read" in out and "1 images are missing from the FID" in out
    (tmp_path / "data" / "meta_data.json").write_text('{"a": {"prompt": "x"}}')
    code, _, err = run(call, "mjhq", tmp_path / "data", tmp_path / "o")
    assert code == 2 and "the key 'category' is missing" in err


def test_mjhq_goes_on_after_an_unreadable_first_image(call, generator, quick_net, tmp_path):
    write_mjhq(tmp_path / "data")
    words = (call, "mjhq", tmp_path / "data", tmp_path, "--image-format", "png")
    assert run(*words)[0] == 2  # the images are generated, there is no network yet
    images = sorted((tmp_path / "mjhq" / "images").rglob("*.png"))
    records = (tmp_path / "mjhq" / "answers-00000.jsonl").read_text().splitlines()
    first = tmp_path / "mjhq" / json.loads(records[0])["file"]
    before = first.read_bytes()
    first.write_bytes(b"broken")
    code, out, err = run(*words, "--inception-weights", quick_net)
    assert code == 0 and "1 images could not be read" in out, err
    result = result_of(tmp_path, "mjhq")
    assert result["metrics"]["fid"]["n"] == 4 and not result["comparable"]
    assert result["not_comparable_reason"] == "1 images are missing from the FID"
    first.write_bytes(before)
    assert run(*words, "--inception-weights", quick_net)[0] == 0
    assert result_of(tmp_path, "mjhq")["comparable"]
    for path in images:
        path.write_bytes(b"broken")
    code, _, err = run(*words, "--inception-weights", quick_net)
    assert code == 2 and "Not one of 5 generated images can be read" in err and err.count("\n") == 1


def test_class_conditional_through_the_command_line(call, generator, quick_net, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    images = np.stack([random_image("real", i) for i in range(6)])
    x = images[:, :2, :2].reshape(6, -1).astype(np.float64)
    means = {"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)}
    spatial = {"mu_s": x[:, :7].mean(0), "sigma_s": np.cov(x[:, :7], rowvar=False)}
    np.savez(data / "VIRTUAL_imagenet256_labeled.npz", arr_0=images, **means, **spatial)
    np.savez(tmp_path / "samples.npz", arr_0=images[:5])
    words = (
        "eval",
        "run",
        "imagenet_generation",
        "--data",
        data,
        "--inception-weights",
        quick_net,
        "--limit",
        5,
    )
    code, _, err = call(*words, "--model", tmp_path / "samples.npz", "--out", tmp_path / "a")
    assert code == 0, err
    result = result_of(tmp_path / "a", "imagenet_generation")
    a, b = (inception_features.fid.compute_moments([rows]) for rows in (x[:5], x))
    values = {k: m["value"] for k, m in result["metrics"].items()}
    assert values["gfid"] == pytest.approx(inception_features.fid.frechet_distance(a, b), rel=1e-5)
    assert values["precision"] == 1.0 and values["recall"] >= 5 / 6 and values["sfid"] >= 0
    assert (
        result["metrics"]["precision"]["interval"] == [1.0, 1.0] and result["metrics"]["recall"]["interval"]
    )
    assert result["metrics"]["gfid"]["interval"] is result["metrics"]["inception_score"]["interval"] is None
    assert "replaced by our port" in result["not_comparable_reason"]
    assert "class names" not in result["not_comparable_reason"]
    code, _, err = call(*words, "--model", "m", "--out", tmp_path / "b")
    assert code == 0, err
    result = result_of(tmp_path / "b", "imagenet_generation")
    assert "generated from class names as prompts" in result["not_comparable_reason"]
    assert result["metrics"].keys() == {"gfid", "sfid", "inception_score", "precision", "recall"}
    assert result["submission"] == ["samples.npz"]
    with np.load(tmp_path / "b" / "imagenet_generation" / "submission" / "samples.npz") as file:
        assert file["arr_0"].shape == (5, 16, 16, 3)
    code, _, err = call(*words, "--model", "m", "--out", tmp_path / "b", "--inception-variant", "clean")
    assert code == 2 and "allows only 'adm'" in err
    (data / "VIRTUAL_imagenet256_labeled.npz").rename(data / "x.npz")
    code, _, err = call(*words, "--model", "m", "--out", tmp_path / "c")
    assert code == 2 and "ADM's reference batch" in err


def test_images_of_another_system_replace_a_model(call, judge, tmp_path):
    write_genai(tmp_path / "data")
    for number in (1, 2, 4, 5):
        path = tmp_path / "theirs" / f"{number:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random_image("a", number)).save(path)
    words = ("--data", tmp_path / "data", "--model", tmp_path / "theirs", "--out", tmp_path)
    code, out, err = call("eval", "run", "genai_bench", *words, "--vqa-model", tmp_path)
    assert code == 0, err
    result = result_of(tmp_path, "genai_bench")
    assert result["value"] == pytest.approx(0.5) and "has no image 00003" in out
    assert result["model"]["kind"] == "external images"
    code, _, err = call("eval", "run", "pope", *words)
    assert code == 2 and "holds images" in err


def test_images_of_another_system_may_be_in_grids(call, judge, tmp_path):
    write_dpg(tmp_path / "data", ("p", "q", "r", "s", "t"))
    (tmp_path / "theirs").mkdir()
    for k in range(4):  # the fourth is too small for its lower half, the fifth is not there
        four = [random_image(f"{k}", j) for j in range(4)]
        grid = np.concatenate([np.concatenate(four[:2], axis=1), np.concatenate(four[2:], axis=1)])
        Image.fromarray(grid[:20] if k == 3 else grid).save(tmp_path / "theirs" / f"item{k}.png")
    words = ("dpg_bench", "--data", tmp_path / "data", "--model", tmp_path / "theirs", "--out", tmp_path)
    code, out, err = call("eval", "run", *words, "--grid", 16, "--vqa-model", tmp_path)
    assert code == 0, err
    for j in range(4):
        with Image.open(tmp_path / "dpg_bench" / "images" / "item1" / f"{j}.png") as image:
            assert np.array_equal(np.asarray(image), random_image("1", j))
    result = result_of(tmp_path, "dpg_bench")
    assert result["value"] == pytest.approx(100 / 3 * (3 + 2 / 4) / 5) and result["failed"] == 6
    assert "32 x 20 pixels have no cell 3 of side 16" in out
    for name, more, message in (
        ("dpg_bench", ("--grid", 0), "grid is 0; it must be at least 1"),
        ("genai_bench", ("--grid", 16), "--grid is not an option of genai_bench; it is one of dpg_bench"),
    ):
        code, _, err = call("eval", "run", name, *words[1:-1], tmp_path / "o", *more)
        assert code == 2 and message in err
    words = ("dpg_bench", "--data", tmp_path / "data", "--model", "m", "--out", tmp_path / "o")
    code, _, err = call("eval", "run", *words, "--grid", 16)
    assert code == 2 and "--grid is for external images" in err
