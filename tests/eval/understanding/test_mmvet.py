"""MM-Vet's prompts, replies and report against the golden vectors; judges that fail, refuse or dawdle."""

import hashlib
import http.server
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.judges import llm_judge
from open_unitok.eval.understanding import mmvet

from ..conftest import run_named, score_folder

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "eval" / "mmvet.json").read_text())


def question(name):
    row = GOLDEN["mm-vet.json"][name]
    return mmvet.MmvetQuestion(name, row["question"], row["answer"], tuple(row["capability"]))


def test_prompts_are_the_published_ones():
    for scorer, name in (("official", "official"), ("lmms", "lmms_eval")):
        digest = hashlib.sha256(mmvet.judge_examples(scorer).encode()).hexdigest()
        assert digest == GOLDEN["judge_prompt_prefix_sha256"][name]
    for row in GOLDEN["judge_prompts"]:
        asked, answer = question(row["id"]), GOLDEN["results"][row["id"]]
        prompt = mmvet.judge_prompt(asked, answer)
        assert prompt == mmvet.judge_examples() + row["official_prompt_suffix"]
        assert prompt + mmvet.RETRY_PROMPT == mmvet.judge_examples() + row["official_retry_prompt_suffix"]
        assert mmvet.judge_prompt(asked, answer, "lmms").endswith(row["lmms_prompt_suffix"])


@pytest.mark.parametrize("row", GOLDEN["judge_reply_parsing"], ids=lambda row: str(row["replies"]))
def test_replies_are_read_as_published(row):
    replies, temperatures = list(row["replies"]), []

    def ask(prompt, temperature, attempt):
        temperatures.append(temperature)
        assert prompt.endswith(mmvet.RETRY_PROMPT) == bool(attempt)
        return replies.pop(0)

    assert mmvet.grade_answer(ask, "?") == (row["score"], row["content"], row["calls"])
    assert temperatures == row["temperatures"]


def test_nan_is_no_grade():
    assert (
        mmvet.parse_grade("nan") is None
        and mmvet.parse_grade("inf") is None
        and mmvet.parse_grade("") is None
    )


def test_report_equals_the_golden_one():
    names = list(GOLDEN["mm-vet.json"])
    grades = np.array([GOLDEN["grade_file"][name]["score"] for name in names])
    found, expected = (
        mmvet.mmvet_summary([question(n).capabilities for n in names], grades),
        GOLDEN["expected"],
    )
    means = dict(expected["per_capability_mean_over_runs"])
    assert found["total"] == pytest.approx(means.pop("total"), abs=1e-9)
    assert found["per_capability"] == pytest.approx(means, abs=1e-9)
    assert found["std_over_runs"] == expected["total_std_over_runs_round1"]
    assert found["run_totals"] == expected["total_runs_round1"]
    assert found["per_capability_set"] == pytest.approx(
        expected["per_capability_integration_rounded1"], abs=0.05
    )


class Answerer:
    def describe(self):
        return {"path": "scripted", "kind": "mllm", "fingerprint": "0"}

    def answer(self, images, questions, max_new_tokens):
        return [f"answer to {q}" for q in questions]


@pytest.fixture
def data(tmp_path):
    from PIL import Image

    rows = dict(list(GOLDEN["mm-vet.json"].items())[:5])
    folder = tmp_path / "mm-vet"
    (folder / "images").mkdir(parents=True)
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    for row in rows.values():
        Image.new("RGB", (8, 8)).save(folder / "images" / row["imagename"])
    return folder


@pytest.fixture
def server():
    """A test endpoint; `behaviour`: (number of the request, its body) -> (status, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(body)
            status, content = self.server.behaviour(len(self.server.asked), body)
            if not status:  # only a body
                self.wfile.write(content.encode())
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *words):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked, found.behaviour = [], lambda number, body: (200, said("0.5"))
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{found.server_address[1]}/v1"
    yield found
    found.shutdown()
    found.server_close()


def said(text):
    return json.dumps({"choices": [{"message": {"content": text}}]})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    real = llm_judge.EndpointJudge.__init__
    monkeypatch.setattr(
        llm_judge.EndpointJudge, "__init__", lambda self, *a, **k: real(self, *a, **k, pause=0.0)
    )


def test_grades_come_from_an_endpoint_once_and_are_kept(data, server, tmp_path):
    scoring = {"judge": "gpt-4-0613", "judge_url": server.url, "judge_runs": 2}
    result = run_named("mmvet", Answerer(), data, tmp_path / "o", options=scoring, quiet=True)
    assert result["value"] == 0.5 and result["comparable"] and len(server.asked) == 10
    assert server.asked[0]["max_tokens"] == 3 and server.asked[0]["temperature"] == 0.0
    kept = (tmp_path / "o" / "judgements.jsonl").read_text().splitlines()
    assert len(kept) == 10
    (tmp_path / "o" / "judgements.jsonl").write_text("\n".join(kept)[:-5])  # a kill cut the last line off
    again = score_folder(tmp_path / "o", options=scoring)
    assert again["metrics"] == result["metrics"] and len(server.asked) == 11
    other = score_folder(tmp_path / "o", options={"judge": "other", "judge_url": server.url})
    assert not other["comparable"] and "the judge is other" in other["not_comparable_reason"]
    assert len(server.asked) == 16


def test_failures_of_the_judge_are_counted_and_never_help(data, server, tmp_path):
    def behaviour(number, body):
        if "41-1?" in body["messages"][0]["content"]:
            return 503, "busy"
        if "41-2?" in body["messages"][0]["content"]:
            return 200, said("I like it")
        return 200, said("1.0") if number % 5 else "no json"

    server.behaviour = behaviour
    run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    scoring = {"judge": "gpt-4-0613", "judge_url": server.url}
    result = score_folder(tmp_path / "o", options=scoring)
    assert result["value"] == pytest.approx(3 / 5) and not result["comparable"]
    words = " ".join(result["problems"])
    assert "1 answers got no grade in six replies" in words
    assert "1 answers could not be judged, the first v1_1 because HTTP 503" in words
    server.behaviour = lambda number, body: (200, said("1.0"))
    result = score_folder(tmp_path / "o", options=scoring)  # failed calls are sent again, replies are kept
    assert result["value"] == pytest.approx(4 / 5)


def test_a_prompt_that_the_judge_refuses_is_counted_alone(data, server, tmp_path):
    """Too long, or its content: the other answers are graded all the same."""

    def behaviour(number, body):
        refused = "41-1?" in body["messages"][0]["content"]
        return (400, "the prompt is too long") if refused else (200, said("1.0"))

    server.behaviour = behaviour
    run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    result = score_folder(tmp_path / "o", options={"judge": "gpt-4-0613", "judge_url": server.url})
    assert result["value"] == pytest.approx(4 / 5) and not result["comparable"]
    assert "HTTP 400: the prompt is too long (counted as 0)" in " ".join(result["problems"])


def test_malformed_replies_are_missed_by_their_answers_alone(data, tmp_path):
    run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    rows = [json.dumps({"id": f"v1_{i}", "replies": ["1.0"]}) for i in range(3)]
    path = tmp_path / "replies.jsonl"
    path.write_text("\n".join([*rows, "{oops", '{"id": "v1_4", "replies": "1.0"}']) + "\n")
    result = score_folder(tmp_path / "o", options={"judge_replay": str(path)})
    assert result["value"] == pytest.approx(3 / 5)
    words = " ".join(result["problems"])
    assert "2 answers could not be judged, the first v1_3" in words and "line 4, is not valid JSON" in words


def test_a_judge_that_refuses_dawdles_or_is_not_there(data, server, tmp_path):
    run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    server.behaviour = lambda number, body: (401, "wrong key")
    with pytest.raises(UserError, match="answered HTTP 401: wrong key"):
        score_folder(tmp_path / "o", options={"judge": "m", "judge_url": server.url})

    def late(number, body):
        time.sleep(0.5)
        return 200, said("1.0")

    server.behaviour = late
    with pytest.raises(UserError, match="has never replied"):
        score_folder(tmp_path / "o", options={"judge": "m", "judge_url": server.url, "judge_timeout": 0.1})
    with pytest.raises(UserError, match="has never replied"):
        score_folder(tmp_path / "o", options={"judge": "m", "judge_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(UserError, match="must start with http"):
        score_folder(tmp_path / "o", options={"judge": "m", "judge_url": "localhost:8000"})
    with pytest.raises(UserError, match="needs --judge"):
        score_folder(tmp_path / "o", options={"judge_url": server.url})


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("nonsense\r\n\r\n", "BadStatusLine"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "IncompleteRead"),
        ("HTTP/1.1 400 No\r\nContent-Length: 500\r\n\r\nbad", "HTTP 400"),
    ],
)
def test_a_judge_that_speaks_half_of_http_fails_one_answer(data, server, tmp_path, reply, why):
    run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    spoilt = "| answer to Synthetic question 41-2?"
    server.behaviour = lambda number, body: (
        (0, reply) if spoilt in body["messages"][0]["content"] else (200, said("0.5"))
    )
    result = score_folder(tmp_path / "o", options={"judge": "m", "judge_url": server.url})
    assert result["value"] == pytest.approx(4 * 0.5 / 5) and why in result["problems"][0]


def test_without_a_judge_the_answers_are_laid_out(data, tmp_path):
    result = run_named("mmvet", Answerer(), data, tmp_path / "o", quiet=True)
    assert result["value"] is None and "no --judge" in result["problems"][0]
    laid_out = json.loads((tmp_path / "o" / "submission" / "mmvet_results.json").read_text())
    assert laid_out["v1_0"] == "answer to Synthetic question 41-0?"
