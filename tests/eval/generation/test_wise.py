"""WISE: grades and tables against the public functions, and runs with replies from a file and an endpoint."""

import base64
import io
import json
import urllib.request

import numpy as np
import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.generation import wise
from open_unitok.eval.judges import llm_judge
from open_unitok.eval.judges.llm_judge import CachedJudge, EndpointJudge, JudgeCall

from ..conftest import GOLDEN

VECTORS = json.loads((GOLDEN / "public_scorers.json").read_text(encoding="utf-8"))
# the shape of WISE's script, in other words
SCRIPT = '''
import openai
raise RuntimeError("this file must never run")

def build_evaluation_messages(prompt_data, image_base64):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You grade images."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": f"""Three grades, please.
PROMPT: "{prompt_data['Prompt']}"
EXPLANATION: "{prompt_data['Explanation']}"
Thanks."""},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image_base64}"}},
            ],
        },
    ]
'''
NUMBERS = {"cultural_common_sense.json": (1, 2), "spatio-temporal_reasoning.json": (401, 568),
           "natural_science.json": (701, 801, 901)}  # fmt: skip
ALL = [n for numbers in NUMBERS.values() for n in numbers]


@pytest.mark.parametrize("scorer", ["official", "lmms"])
def test_grades_are_read_as_by_the_repository_and_by_lmms_eval(scorer):
    cases = VECTORS["wise_reply"]
    assert len(cases) >= 50
    for reply, official, lmms in cases:
        assert wise.parse_grades(reply, scorer) == (official if scorer == "official" else lmms), reply


def test_the_table_is_that_of_lmms_eval():
    # six tables of 12 to 200 images each
    assert sum(len(rows) for rows, _, _ in VECTORS["wise_table"]) >= 50
    for rows, categories, overall in VECTORS["wise_table"]:
        gradings = [wise.Grading(dict(zip(wise.WISE_GRADES, grades)), "x") for _, *grades in rows]
        found = wise.wise_metrics([g.score for g in gradings], [wise.wise_category(n) for n, *_ in rows])
        assert found["overall"].value == pytest.approx(overall, abs=1e-12)
        values = {name: found[f"category/{name}"].value for name in categories}
        assert values == pytest.approx(categories, abs=1e-12)


def write_wise(folder, script=SCRIPT):
    (folder / "data").mkdir(parents=True)
    for name, numbers in NUMBERS.items():
        rows = [
            {
                "prompt_id": n,
                "Prompt": f"thing {n}",
                "Explanation": f"a {n}",
                "Category": "c",
                "Subcategory": "s",
            }
            for n in numbers
        ]
        (folder / "data" / name).write_text(json.dumps(rows))
    if script:
        (folder / "gpt_eval.py").write_text(script)


def write_images(folder, numbers=ALL):
    folder.mkdir()
    for number in numbers:
        Image.new("RGB", (8, 8), (number % 255, 0, 0)).save(folder / f"{number}.png")


def write_replies(path, replies):
    path.write_text("".join(json.dumps({"id": str(n), "replies": r}) + "\n" for n, r in replies.items()))


def grades(c, r, a):
    return f"Consistency: {c}\nRealism: {r}\nAesthetic Quality: {a}"


def run(call, tmp_path, *more):
    words = ("--model", tmp_path / "images", "--data", tmp_path / "wise", "--out", tmp_path / "out")
    code, out, err = call("eval", "run", "wise", *words, *more)
    path = tmp_path / "out" / "wise" / "results.json"
    return code, err + out, json.loads(path.read_text()) if path.exists() else None


def test_a_run_with_replies(call, tmp_path):
    write_wise(tmp_path / "wise")
    write_images(tmp_path / "images")
    code, text, result = run(call, tmp_path)
    assert code == 0 and result["metrics"] == {} and "gpt_eval.py (--image_dir)" in text
    replies = {n: [grades(2, 2, 2)] for n in ALL} | {
        1: [grades(1, 0, 2)],
        401: ["Consistency: 2"],
        901: ["no"],
    }
    write_replies(tmp_path / "replies.jsonl", replies)
    code, text, result = run(call, tmp_path, "--judge-replay", tmp_path / "replies.jsonl")
    assert code == 0, text
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values["category/culture"] == pytest.approx((0.45 + 1) / 2) and values["category/chemistry"] == 0
    assert values["category/time"] == pytest.approx(0.7)
    expected = 0.4 * 0.725 + 0.167 * 0.7 + 0.133 + 0.1 + 0.1
    assert result["metric"] == "overall" and result["value"] == pytest.approx(expected)
    assert values["grade/consistency"] == pytest.approx((1 + 2 * 5) / 7)
    assert "2 replies lack a grade" in text and not result["comparable"]
    assert "the published one is gpt-4o-2024-05-13" in result["not_comparable_reason"]
    low, high = result["metrics"]["overall"]["interval"]
    assert low <= result["value"] <= high


def test_lmms_asks_three_times_for_all_grades(call, tmp_path):
    write_wise(tmp_path / "wise")
    write_images(tmp_path / "images")
    replies = {n: [grades(2, 2, 2)] for n in ALL}
    replies |= {1: ["well", "Consistency: 1", "2\n1\n0"], 2: ["Consistency: 2"] * 3}
    write_replies(tmp_path / "replies.jsonl", replies)
    flags = ("--judge-replay", tmp_path / "replies.jsonl", "--scorer", "lmms")
    code, text, result = run(call, tmp_path, *flags)
    assert code == 0, text
    assert result["metrics"]["category/culture"]["value"] == pytest.approx((0.7 + 0.1 + 0) / 2)


def test_missing_images_and_grades_count_as_zero(call, tmp_path):
    write_wise(tmp_path / "wise")
    write_images(tmp_path / "images", [n for n in ALL if n != 701])
    write_replies(tmp_path / "replies.jsonl", {n: [grades(2, 2, 2)] for n in ALL if n != 801})
    flags = ("--judge-replay", tmp_path / "replies.jsonl", "--judge", "gpt-4o-2024-05-13")
    code, text, result = run(call, tmp_path, *flags)
    assert code == 0, text
    values = {name: metric["value"] for name, metric in result["metrics"].items()}
    assert values["category/biology"] == values["category/physics"] == 0
    assert "1 images could not be graded, the first 801" in text and "1 prompts have no image" in text
    assert not result["comparable"] and "published scores are of 1,000" in result["not_comparable_reason"]


@pytest.mark.parametrize(
    ("script", "message"),
    [("", "expected gpt_eval.py"), ("def f(:", "not valid Python"), ("x = 1", "no messages of the judge"),
     (SCRIPT.replace("['Explanation']", "['Hint']"), "a field other than Prompt and Explanation")],
)  # fmt: skip
def test_the_judges_prompt_is_required(call, tmp_path, script, message):
    write_wise(tmp_path / "wise", script)
    write_images(tmp_path / "images")
    write_replies(tmp_path / "replies.jsonl", {})
    code, text, _ = run(call, tmp_path, "--judge-replay", tmp_path / "replies.jsonl")
    assert code == 2 and message in text


def test_the_prompt_is_read_from_the_script_without_running_it(tmp_path):
    write_wise(tmp_path)
    prompt = wise.read_judge_prompt(tmp_path / "data")  # the script lies above
    assert prompt.system == "You grade images."
    text = prompt.text({"Prompt": "a {b}", "Explanation": "c"})
    assert text == 'Three grades, please.\nPROMPT: "a {b}"\nEXPLANATION: "c"\nThanks.'


def test_an_incomplete_release_is_refused(tmp_path, call):
    write_wise(tmp_path / "wise")
    (tmp_path / "wise" / "data" / "natural_science.json").unlink()
    write_images(tmp_path / "images")
    code, text, _ = run(call, tmp_path)
    assert code == 2 and "natural_science.json" in text


def test_the_endpoint_gets_the_image_and_the_cache_knows_it(tmp_path, monkeypatch):
    sent = []

    def reply(request, timeout):
        sent.append(json.loads(request.data))
        return io.BytesIO(json.dumps({"choices": [{"message": {"content": "2"}}]}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", reply)
    judge = CachedJudge(EndpointJudge("http://x/v1", "m"), tmp_path / "judgements.jsonl")
    image = tmp_path / "a.png"
    for shade in (1, 1, 2):
        Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(image)
        assert judge.reply(JudgeCall("1", "grade", 0.0, 9, system="be strict", image=image)) == "2"
    assert len(sent) == 2  # another image is another call
    system, user = sent[0]["messages"]
    assert system == {"role": "system", "content": "be strict"}
    text, shown = user["content"]
    assert text == {"type": "text", "text": "grade"}
    head, _, data = shown["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert found.getpixel((0, 0)) == (1, 1, 1)


@pytest.mark.parametrize(("name", "options"), [("a.webp", {"lossless": True}), ("a.PNG", {}), ("b.jpg", {})])
def test_the_endpoint_gets_the_kind_that_the_bytes_are(tmp_path, name, options):
    """Whatever the suffix says; other kinds and transparent images as the loader reads them."""
    kind = "WEBP" if name == "a.webp" else "JPEG" if name == "a.PNG" else "PNG"
    mode, colour = ("RGBA", (0, 0, 0, 0)) if name == "b.jpg" else ("RGB", "white")
    Image.new(mode, (8, 8), colour).save(tmp_path / name, kind, **options)
    (message,) = llm_judge._messages(JudgeCall("1", "grade", 0.0, 9, image=tmp_path / name))
    head, _, data = message["content"][1]["image_url"]["url"].partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as found:
        assert head == f"data:image/{found.format.lower()};base64" and found.format in ("PNG", "JPEG")
        assert found.mode == "RGB" and found.getpixel((0, 0)) == (255, 255, 255)


def test_a_wrong_prompt_id_is_malformed(tmp_path, call):
    write_wise(tmp_path / "wise")
    path = tmp_path / "wise" / "data" / "natural_science.json"
    path.write_text(path.read_text().replace('"prompt_id": 901', '"prompt_id": 9010'))
    write_images(tmp_path / "images")
    write_replies(tmp_path / "replies.jsonl", {n: [grades(2, 2, 2)] for n in ALL})
    code, text, result = run(call, tmp_path, "--judge-replay", tmp_path / "replies.jsonl")
    assert code == 0 and result["malformed"] == 1 and "prompt_id is 9010" in text
    with pytest.raises(UserError, match="another kind of file"):
        wise.load(_renumbered(tmp_path), wise_settings())


def _renumbered(tmp_path):
    folder = tmp_path / "other"
    write_wise(folder)
    for name in NUMBERS:
        (folder / "data" / name).write_text(json.dumps([{"prompt_id": 0, "Prompt": "a", "Explanation": "b"}]))
    return folder


def wise_settings():
    from open_unitok.eval.registry import find_benchmark

    return find_benchmark("wise").resolve({})[0]
