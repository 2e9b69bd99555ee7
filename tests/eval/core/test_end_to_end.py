"""Every benchmark of understanding through the whole command, in both layouts, with answers from a script."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.eval.core import bootstrap, model
from open_unitok.eval.registry import BENCHMARKS

from .hub_releases import HUB_BUILDERS

spec = importlib.util.spec_from_file_location("releases", Path(__file__).with_name("releases.py"))
releases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(releases)
BUILDERS = releases.BUILDERS


class Scripted:
    """A model whose answers are looked up by the question that a prompt begins with or holds."""

    replies, asked = {}, 0

    def __init__(self, folder, *options):
        pass

    def check_needs(self, needs, benchmark):
        assert needs == "mllm"

    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens):
        Scripted.asked += len(questions)
        found = []
        for question in questions:
            fits = [reply for key, reply in self.replies.items() if key in question]
            assert len(fits) == 1, question
            found.append(fits[0])
        return found


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    monkeypatch.setattr(model, "Model", Scripted)


def call(capsys, *words):
    """Exit code, stdout, stderr of a command."""
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    output = capsys.readouterr()
    return code, output.out, output.err


def run(capsys, name, folder, out, *more):
    words = ["eval", "run", name, "--model", "m", "--data", folder, "--out", out]
    if name == "mmvet":
        words += ["--judge-replay", folder / "replies.jsonl"]
    return call(capsys, *words, *more)


def result_of(out, name):
    return json.loads((out / name / "results.json").read_text())


def test_every_benchmark_has_a_release():
    names = {name for name, b in BENCHMARKS.items() if b.module.startswith("understanding.")}
    # the emoji are written by `unitok data emoji`
    assert set(BUILDERS) | set(HUB_BUILDERS) == names - {"emoji_questions"}


@pytest.mark.parametrize("layout", ["original", "llava"])
@pytest.mark.parametrize("name", BUILDERS)
def test_five_samples_give_the_known_score(capsys, tmp_path, name, layout):
    Scripted.replies, expected = BUILDERS[name](tmp_path / name, layout == "llava")
    # DATA may hold a folder per benchmark
    flags = [] if name == "mmbench" else ["--layout", layout]  # LLaVA reads MMBench's own table
    code, out, err = (
        run(capsys, name, tmp_path, tmp_path / "o", *flags, "--batch-size", 2)
        if (name != "mmvet")
        else run(capsys, name, tmp_path / name, tmp_path / "o", *flags)
    )
    assert code == 0, err
    result = result_of(tmp_path / "o", name)
    assert result["value"] == pytest.approx(expected, abs=1e-9)
    assert f"{name}  ({result['n']} samples, 0 missing)" in out
    metric = result["metrics"][result["metric"]]
    assert metric["interval"][0] <= result["value"] <= metric["interval"][1]
    assert result["complete"] and result["scorer"] == BENCHMARKS[name].scorers[0]
    assert result["split"] and result["decoding"] == "greedy" and result["versions"]["torch"]
    assert result["prompt_template"].startswith(
        ("as in", "letter after") if layout == "llava" and name != "mmbench" else ""
    )
    assert result["comparable"] == (name != "mmvet")
    rows = [json.loads(line) for line in (tmp_path / "o" / name / "scores.jsonl").read_text().splitlines()]
    assert all(row["cluster"] and row["question"] and "answer" in row for row in rows)
    before = (tmp_path / "o" / name / "results.json").read_bytes()
    asked = Scripted.asked
    words = ["--judge-replay", tmp_path / name / "replies.jsonl"] if name == "mmvet" else []
    code, _, err = call(capsys, "eval", "score", tmp_path / "o" / name, *words)
    assert code == 0 and Scripted.asked == asked, err
    assert (tmp_path / "o" / name / "results.json").read_bytes() == before


def submission(tmp_path, name, file):
    return json.loads((tmp_path / "o" / name / "submission" / file).read_text())


def test_prompts_and_submissions_are_the_published_ones(capsys, tmp_path):
    for name, builder in BUILDERS.items():
        Scripted.replies, _ = builder(tmp_path / name, False)
        assert run(capsys, name, tmp_path / name, tmp_path / "o")[0] == 0

    def prompts(name):
        lines = (tmp_path / "o" / name / "answers-00000.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    short, letter = releases.SHORT, releases.LETTER
    assert prompts("vqav2")[0] == f"What is thing 0?{short}"
    assert prompts("textvqa")[0] == f"What does sign 0 say?\nReference OCR token: A1, nokia{short}"
    assert prompts("mme")[0] == f"Is existence image 0 right?{short}"
    assert prompts("mme")[2] == f"Is existence image 1 right?{short}"
    assert prompts("mmvet")[0] == "Explain joke 0."
    unanswerable = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert prompts("vizwiz")[0] == f"What is can 0?{unanswerable}{short}"
    assert prompts("seedbench")[0] == f"Which seed 0?\nA. w\nB. x\nC. y\nD. z{letter}"
    assert prompts("scienceqa")[0] == f"Context: A hint.\nWhich science 0?\nA. ape\nB. bee{letter}"
    assert prompts("mmbench")[0] == f"A hint\nWhich image 0?\nA. ape\nB. bee\nC. cat{letter}"
    assert prompts("mmbench")[3] == f"Which image 1?\nA. ape\nB. bee\nC. cat{letter}"

    assert submission(tmp_path, "vqav2", "vqav2_answers.json")[:2] == [
        {"question_id": 10, "answer": "red"}, {"question_id": 11, "answer": "2"},
    ]  # fmt: skip
    predictions = submission(tmp_path, "gqa", "testdev_balanced_predictions.json")
    assert predictions[0] == {"questionId": "00", "prediction": "yes"}
    assert submission(tmp_path, "textvqa", "textvqa_answers.json")[2]["answer"] == "mcdonald 's"
    assert submission(tmp_path, "vizwiz", "vizwiz_answers.json")[0] == {
        "image": "VizWiz_val_00000000.jpg", "answer": "soup 0",
    }  # fmt: skip
    assert submission(tmp_path, "scienceqa", "scienceqa_results.json")["results"]["3"] == -1
    text = (tmp_path / "o" / "mme" / "submission" / "OCR.txt").read_text()
    assert text.splitlines()[0] == "0000.jpg\tIs OCR image 0 right? Please answer yes or no.\tYes\tYes"
    sheet = tmp_path / "o" / "mmbench" / "submission" / "mmbench_dev_20230712.xlsx"
    cells = zipfile.ZipFile(sheet).read("xl/worksheets/sheet1.xml").decode()
    assert cells.count("<row ") == 16 and "<v>2000004</v>" in cells


def test_textvqa_without_ocr_words_is_another_prompt_template(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["textvqa"](tmp_path / "d", False)
    (tmp_path / "d" / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    code, _, err = run(capsys, "textvqa", tmp_path / "d", tmp_path / "o")
    assert code == 2 and "--prompt-template short, which scores about ten points lower" in err
    assert run(capsys, "textvqa", tmp_path / "d", tmp_path / "o", "--prompt-template", "short")[0] == 0
    assert result_of(tmp_path / "o", "textvqa")["prompt_template"] == "short"


def test_a_split_without_answers_gives_the_submission_alone(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["vqav2"](tmp_path / "d", True)
    for path in (tmp_path / "d").glob("v2_*"):
        path.unlink()
    asked = tmp_path / "d" / "llava_vqav2_mscoco_val2014.jsonl"
    asked = asked.rename(asked.with_name("llava_vqav2_mscoco_test-dev2015.jsonl"))
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    releases.lines(
        asked.with_name("llava_vqav2_mscoco_test2015.jsonl"), [{"question_id": 3, "text": "?"}, *rows]
    )
    code, out, err = run(capsys, "vqav2", tmp_path / "d", tmp_path / "o")
    assert code == 0 and "no score: upload the submission file" in out, err
    content = submission(tmp_path, "vqav2", "vqav2_answers.json")
    assert (
        content[0] == {"question_id": 3, "answer": ""} and content[1]["answer"] == "red" and len(content) == 6
    )
    assert result_of(tmp_path / "o", "vqav2")["value"] is None


def test_the_lmms_or_lenient_scorer_is_named_and_others_are_refused(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["gqa"](tmp_path / "d", False)
    code, _, err = run(capsys, "gqa", tmp_path / "d", tmp_path / "o", "--scorer", "lenint")
    assert (
        code == 2
        and "gqa: scorer is 'lenint'. Did you mean 'lenient'?" in err
        and not (tmp_path / "o").exists()
    )
    assert run(capsys, "gqa", tmp_path / "d", tmp_path / "o")[0] == 0
    assert call(capsys, "eval", "score", tmp_path / "o" / "gqa", "--scorer", "lenient")[0] == 0
    result = result_of(tmp_path / "o", "gqa")
    assert result["scorer"] == "lenient" and result["value"] == 3 / 4  # "no!" counts there


@pytest.mark.parametrize("name", BUILDERS)
def test_missing_images_and_files_never_help(capsys, tmp_path, name):
    Scripted.replies, _ = BUILDERS[name](tmp_path / "d", False)
    code, _, err = run(capsys, name, tmp_path / "nowhere", tmp_path / "o")
    assert code == 2 and "does not exist" in err
    (tmp_path / "empty").mkdir()
    releases.lines(tmp_path / "empty" / "replies.jsonl", [])
    code, _, err = run(capsys, name, tmp_path / "empty", tmp_path / "o")
    assert code == 2 and err.count("\n") == 1, err
    files = [tmp_path / "d" / "mmbench_dev_20230712.tsv"]  # keeps its images in its table
    if name != "mmbench":
        files = sorted(p for p in (tmp_path / "d").rglob("*") if p.suffix in (".jpg", ".png", ""))
        files = [path for path in files if path.is_file()]
    before = {path: path.read_bytes() for path in files}

    def spoil(paths, content):
        for path in paths:
            if path.suffix == ".tsv":
                head, *rows = before[path].decode().splitlines()
                rows = [row.replace(row.split("\t")[9], content or "nan") for row in rows]
                path.write_text("\n".join([head, *rows]) + "\n")
            elif content:
                path.write_text(content)
            else:
                path.unlink()

    for content in ("", "aGVsbG8="):  # missing, and there but no image
        spoil(files, content)
        asked = Scripted.asked
        code, _, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
        assert code == 2 and "images can be read, the first problem" in err and err.count("\n") == 1, err
        assert Scripted.asked == asked and not (tmp_path / "o").exists()
        for path, content in before.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "mmbench"])
def test_one_missing_image_is_counted_and_asked_again(capsys, tmp_path, name):
    Scripted.replies, expected = BUILDERS[name](tmp_path / "d", False)
    images = [p for p in (tmp_path / "d").rglob("*") if p.suffix in (".jpg", ".png", "") and p.is_file()]
    away = sorted(images)[0].rename(tmp_path / "away")
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
    result = result_of(tmp_path / "o", name)
    assert code == 0 and result["failed"] > 0 and not result["comparable"], err
    assert f"{result['failed']} samples could not be asked" in result["not_comparable_reason"]
    assert f"{result['failed']} samples could not be answered, the first because" in out
    assert result["value"] <= expected
    away.rename(sorted(images)[0])
    asked = Scripted.asked
    code, out, err = run(capsys, name, tmp_path / "d", tmp_path / "o")
    again = result_of(tmp_path / "o", name)
    assert code == 0 and Scripted.asked == asked + result["failed"], err
    assert again["value"] == pytest.approx(expected) and again["failed"] == 0
    assert again["comparable"] == (name != "mmvet") and "twice" not in out


def test_unknown_split_layout_and_image_are_one_line(capsys, tmp_path):
    for name, option, value, message in (
        ("seedbench", "--split", "audio", "allowed: image, video"),
        ("mme", "--split", "smell", "split is 'smell'"),
        ("scienceqa", "--split", "exam", "split is 'exam'"),
        ("textvqa", "--split", "test", "of split test, found TextVQA_0.5.1_val.json"),
        ("gqa", "--layout", "lava", "layout is 'lava'"),
        ("vqav2", "--prompt-template", "ocr", "prompt_template is 'ocr'"),
        ("vizwiz", "--layout", "llava", "expected one LLaVA question file"),
    ):
        BUILDERS[name](tmp_path / name, False)
        code, _, err = run(capsys, name, tmp_path / name, tmp_path / "o", option, value)
        assert code == 2 and message in err and err.count("\n") == 1, err


def test_all_runs_what_is_there(capsys, tmp_path):
    Scripted.replies, _ = BUILDERS["vizwiz"](tmp_path / "vizwiz", False)
    replies, _ = BUILDERS["seedbench"](tmp_path / "seedbench", False)
    Scripted.replies |= replies
    code, out, err = run(capsys, "all", tmp_path, tmp_path / "o")
    assert code == 0 and "vizwiz  (5" in out and "seedbench  (5" in out, err
    code, _, err = run(capsys, "all", tmp_path / "vizwiz" / "val", tmp_path / "o")
    assert code == 2 and "holds no benchmark's files" in err
    assert issubclass(UserError, ValueError)


def test_questions_about_one_image_are_resampled_together(capsys, tmp_path):
    """MMBench's and MM-Vet's too, whose questions name images by content and by file."""
    Scripted.replies, _ = BUILDERS["mmbench"](tmp_path / "mmbench", False)
    replies, _ = BUILDERS["mmvet"](tmp_path / "mmvet", False)
    Scripted.replies |= replies
    path = tmp_path / "mmvet" / "mm-vet.json"
    path.write_text(path.read_text().replace("v1_1.jpg", "v1_0.jpg"))
    for name in ("mmbench", "mmvet"):
        assert run(capsys, name, tmp_path / name, tmp_path / "o")[0] == 0
        lines = (tmp_path / "o" / name / "scores.jsonl").read_text().splitlines()
        clusters = [json.loads(line)["cluster"] for line in lines]
        assert clusters[0] == clusters[1] and len(set(clusters)) == 4, name
        scores, metric = [json.loads(line)["score"] for line in lines], result_of(tmp_path / "o", name)
        interval = metric["metrics"][metric["metric"]]["interval"]
        assert interval == bootstrap.bootstrap(bootstrap.mean_columns(scores), clusters), name
        assert interval != bootstrap.bootstrap(bootstrap.mean_columns(scores)), name


def test_seedbenchs_repeated_id_is_two_questions(capsys, tmp_path):
    """The released table holds the id 49914 twice; LLaVA's file and upload follow it."""
    for layout in ("original", "llava"):
        folder = tmp_path / layout
        Scripted.replies, expected = BUILDERS["seedbench"](folder, layout == "llava")
        content = json.loads((folder / "SEED-Bench.json").read_text())
        content["questions"][1]["question_id"] = "500"
        releases.write(folder / "SEED-Bench.json", content)
        if layout == "llava":
            path = folder / "llava-seed-bench.jsonl"
            path.write_text(path.read_text().replace('"question_id": "501"', '"question_id": "500"'))
        code, _, err = run(capsys, "seedbench", folder, tmp_path / "o" / layout, "--layout", layout)
        result = result_of(tmp_path / "o" / layout, "seedbench")
        assert code == 0 and result["value"] == pytest.approx(expected) and result["comparable"], err
        assert result["malformed"] == 0
        upload = tmp_path / "o" / layout / "seedbench" / "submission" / "seedbench_predictions.jsonl"
        rows = [json.loads(line) for line in upload.read_text().splitlines()]
        assert [(row["question_id"], row["prediction"]) for row in rows[:2]] == [("500", "A"), ("500", "B")]
        assert len(rows) == 5


@pytest.mark.parametrize("hint", ["", None, "N/A", " n/a "])
def test_scienceqas_prompt_has_no_context_without_a_hint(capsys, tmp_path, hint):
    Scripted.replies, _ = BUILDERS["scienceqa"](tmp_path / "d", False)
    problems = json.loads((tmp_path / "d" / "problems.json").read_text())
    problems["0"]["hint"] = hint
    releases.write(tmp_path / "d" / "problems.json", problems)
    assert run(capsys, "scienceqa", tmp_path / "d", tmp_path / "o")[0] == 0
    lines = (tmp_path / "o" / "scienceqa" / "answers-00000.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    assert prompts[0] == f"Which science 0?\nA. ape\nB. bee{releases.LETTER}"
    assert prompts[1].startswith("Context: A hint.\nWhich science 1?")


def test_mmbench_without_its_rotations_has_no_circular_accuracy(capsys, tmp_path):
    Scripted.replies, expected = BUILDERS["mmbench"](tmp_path / "d", False)
    table = tmp_path / "d" / "mmbench_dev_20230712.tsv"
    head, *rows = table.read_text().splitlines()
    # one question lacks one of its three rotations: it counts as wrong
    kept = [row for row in rows if not row.startswith("1000000\t")]
    table.write_text("\n".join([head, *kept]) + "\n")
    assert run(capsys, "mmbench", tmp_path / "d", tmp_path / "o")[0] == 0
    result = result_of(tmp_path / "o", "mmbench")
    assert result["metric"] == "circular" and result["value"] == pytest.approx(expected - 1 / 5)
    reason = "1 questions lack some of their rotations (wrong in circular accuracy)"
    assert not result["comparable"] and result["not_comparable_reason"] == reason
    # an export of the plain questions
    plain = [row for row in rows if int(row.split("\t")[0]) < 1_000_000]
    table.write_text("\n".join([head, *plain]) + "\n")
    assert run(capsys, "mmbench", tmp_path / "d", tmp_path / "p")[0] == 0
    result = result_of(tmp_path / "p", "mmbench")
    assert result["metric"] == "vanilla" and not any("circular" in name for name in result["metrics"])
    assert not result["comparable"] and "has no rotated questions" in result["not_comparable_reason"]
    assert result["value"] == 4 / 5


def test_annotation_files_of_windows_are_read(capsys, tmp_path):
    """A byte-order mark, CRLF and blank lines, in the released file and in LLaVA's."""
    for layout in ("original", "llava"):
        Scripted.replies, expected = BUILDERS["vqav2"](tmp_path / layout, layout == "llava")
        for path in (tmp_path / layout).glob("*.json*"):
            content = path.read_bytes().replace(b"\n", b"\r\n")
            path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n" * 2)
        code, _, err = run(capsys, "vqav2", tmp_path / layout, tmp_path / "o" / layout, "--layout", layout)
        assert code == 0, err
        result = result_of(tmp_path / "o" / layout, "vqav2")
        assert result["value"] == pytest.approx(expected) and result["malformed"] == 0
