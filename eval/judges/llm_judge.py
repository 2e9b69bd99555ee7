"""Models that grade answers: an OpenAI-compatible endpoint or a file of replies; every reply is kept."""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple, Protocol

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_jsonl_lenient

from ..core.annotations import require_key, require_type
from ..core.harness import Scoring, truncate_partial_line

TRIES = 3  # requests per reply before it counts as failed
LONGEST_WAIT = 60.0  # seconds, when the server asks for patience
KEY = "OPENAI_API_KEY"


class JudgeFailed(Exception):
    """No reply to one request; the sample is counted as failed, the others go on."""


class Call(NamedTuple):
    """One request: a prompt for sample `id`, its place among the runs and tries of that sample."""

    id: str
    prompt: str
    temperature: float
    max_tokens: int
    run: int = 0
    attempt: int = 0


class Judge(Protocol):
    """What grades: the model's name, and the text of its reply to a call."""

    model: str

    def reply(self, call: Call) -> str:
        """The reply.

        Raises:
            JudgeFailed: there is none.
        """
        ...


def judge_of(scoring: Scoring, folder: Path) -> Judge | None:
    """The judge asked for, with the replies of `folder/judgements.jsonl`; None where none is asked for.

    Raises:
        UserError: an endpoint without a model's name, or a replay file that is none.
    """
    if scoring.judge_replay:
        return Replay(Path(scoring.judge_replay), scoring.judge or "replayed replies")
    if not scoring.judge and not scoring.judge_url:
        return None
    if not scoring.judge:
        raise UserError("--judge-url needs --judge, the name of the model there.")
    url = scoring.judge_url or "https://api.openai.com/v1"
    return Kept(Endpoint(url, scoring.judge, scoring.judge_timeout), folder / "judgements.jsonl")


class Endpoint:
    """`POST {url}/chat/completions`; the key comes from the environment variable OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, pause: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge_url is {url!r}; it must begin with http:// or https://.")
        self.url, self.model, self.timeout, self.pause = url.rstrip("/"), model, timeout, pause
        self.failures = 0  # in a row, before the first success

    def reply(self, call: Call) -> str:
        """The reply; a few failed requests are sent again.

        Raises:
            JudgeFailed: no reply after some tries, or the endpoint refuses this prompt.
            UserError: the endpoint refuses the key or the model, or has never answered.
        """
        reason = ""
        for attempt in range(TRIES):
            try:
                text = self.post(call)
                self.failures = -1
                return text
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    reason += f": {body_of(error)}"
                    if error.code in (401, 403, 404):  # the key or the model: no other answer fares better
                        raise UserError(f"The judge at {self.url} refused with {reason}") from error
                    break  # this prompt alone: it is too long, or its content is refused
                wait = error.headers.get("Retry-After", "") if error.headers else ""
                time.sleep(min(float(wait) if wait.isdigit() else self.pause * 2**attempt, LONGEST_WAIT))
            except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                time.sleep(self.pause * 2**attempt)
        if self.failures >= 0:
            self.failures += 1
            if self.failures >= TRIES:
                raise UserError(f"The judge at {self.url} has not answered once ({reason}); is it running?")
        raise JudgeFailed(reason)

    def post(self, call: Call) -> str:
        """One request."""
        body = {
            "model": self.model, "temperature": call.temperature, "max_tokens": call.max_tokens,
            "messages": [{"role": "user", "content": call.prompt}],
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = json.loads(response.read())["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise ValueError(f"the reply's content is {content!r}")
        return content


def body_of(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of its refusal, "" where it does not get that far."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


class Replay:
    """Replies from a file, a line {"id": sample id, "replies": [text, ...]}, in the order of the calls."""

    def __init__(self, path: Path, model: str):
        self.model, self.path, self.replies, self.malformed = model, path, {}, ""
        for i, row in enumerate(read_jsonl_lenient(path)):
            where = f"{path}, line {i + 1}"
            try:
                replies = require_type(list, require_key(row, "replies", where), f"{where}, replies")
                self.replies[str(require_key(row, "id", where))] = list(replies)
            except UserError as error:  # whose replies these are is not known: theirs are missed
                self.malformed = self.malformed or f" ({error})"

    def reply(self, call: Call) -> str:
        """The sample's next reply.

        Raises:
            JudgeFailed: there is none left.
        """
        left = self.replies.get(call.id)
        if not left:
            raise JudgeFailed(f"{self.path} has no (more) reply for {call.id}{self.malformed}")
        return str(left.pop(0))


class Kept:
    """A judge whose replies are kept in a file, keyed by all that decides them, and never asked for twice."""

    def __init__(self, judge: Judge, path: Path):
        self.judge, self.model, self.path, self.lock = judge, judge.model, path, threading.Lock()
        self.known: dict[str, str] = {}
        if path.exists():
            truncate_partial_line(path)
            # a broken line is judged again
            rows = [row for row in read_jsonl_lenient(path) if isinstance(row, dict)]
            pairs = [(row.get("key"), row.get("reply")) for row in rows]
            self.known = {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}

    def reply(self, call: Call) -> str:
        """The kept reply, or a new one."""
        parts = (self.model, call.prompt, call.temperature, call.max_tokens, call.run, call.attempt)
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if key not in self.known:
            text = self.judge.reply(call)
            row = {"key": key, "id": call.id, "model": self.model, "temperature": call.temperature}
            row |= {"run": call.run, "attempt": call.attempt, "reply": text}
            with self.lock:
                self.known[key] = text
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return self.known[key]
