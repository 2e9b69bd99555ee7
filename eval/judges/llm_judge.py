"""Language models that grade answers: an OpenAI-compatible endpoint, or a file of replies."""

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
from ..core.benchmark import Options
from ..core.harness import truncate_partial_line

MAX_TRIES = 3  # requests per reply before it counts as failed
MAX_WAIT = 60.0  # seconds, for a server's Retry-After
KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeFailed(Exception):
    """No reply to one request: its sample counts as failed, the others are not affected."""


class JudgeCall(NamedTuple):
    """A request: the prompt for sample `id`, and the run and attempt that it belongs to."""

    id: str
    prompt: str
    temperature: float
    max_tokens: int
    run: int = 0
    attempt: int = 0


class Judge(Protocol):
    """A grader: the name of its model, and its reply to a call."""

    model: str

    def reply(self, call: JudgeCall) -> str:
        """The reply.

        Raises:
            JudgeFailed: there is none.
        """
        ...


def load_judge(scoring: Options, folder: Path) -> Judge | None:
    """The judge of the options, with a cache in `folder/judgements.jsonl`; None if the options name none.

    Raises:
        UserError: an endpoint without a model name, or an unreadable replay file.
    """
    if scoring.judge_replay:
        return ReplayJudge(Path(scoring.judge_replay), scoring.judge or "replayed replies")
    if not scoring.judge and not scoring.judge_url:
        return None
    if not scoring.judge:
        raise UserError("--judge-url needs --judge, the name of the model at that endpoint.")
    url = scoring.judge_url or "https://api.openai.com/v1"
    return CachedJudge(EndpointJudge(url, scoring.judge, scoring.judge_timeout), folder / "judgements.jsonl")


class EndpointJudge:
    """`POST {url}/chat/completions`; the key comes from the environment variable OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, pause: float = 1.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge_url is {url!r}; it must start with http:// or https://.")
        self.url, self.model, self.timeout, self.pause = url.rstrip("/"), model, timeout, pause
        self.failures = 0  # consecutive ones before the first success; -1 after it

    def reply(self, call: JudgeCall) -> str:
        """The reply; a failed request is sent again up to two times.

        Raises:
            JudgeFailed: no reply after all tries, or the endpoint rejects this prompt.
            UserError: the endpoint rejects the key or the model, or has never answered.
        """
        reason = ""
        for attempt in range(MAX_TRIES):
            try:
                text = self._post(call)
                self.failures = -1
                return text
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                # timeouts, rate limits and server errors may pass; other codes will not
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    reason += f": {_error_body(error)}"
                    if error.code in (401, 403, 404):  # key or model: all other requests would fail too
                        raise UserError(
                            f"The judge at {self.url} answered {reason}; check OPENAI_API_KEY and --judge"
                        ) from error
                    break  # this prompt only: too long, or its content is rejected
                # the server's own wait, else exponential back-off
                wait = error.headers.get("Retry-After", "") if error.headers else ""
                time.sleep(min(float(wait) if wait.isdigit() else self.pause * 2**attempt, MAX_WAIT))
            except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                time.sleep(self.pause * 2**attempt)
        # an endpoint that has never answered is a wrong URL, not a bad prompt
        if self.failures >= 0:
            self.failures += 1
            if self.failures >= MAX_TRIES:
                raise UserError(f"The judge at {self.url} has not answered once ({reason}); is it running?")
        raise JudgeFailed(reason)

    def _post(self, call: JudgeCall) -> str:
        """Send one request."""
        body = {
            "model": self.model, "temperature": call.temperature, "max_tokens": call.max_tokens,
            "messages": [{"role": "user", "content": call.prompt}],
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            content = json.loads(response.read())["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise ValueError(f"the reply's content is {content!r}")
        return content


def _error_body(error: urllib.error.HTTPError) -> str:
    """The beginning of an error response, "" if it cannot be read."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


class ReplayJudge:
    """Replies from a file with lines {"id": sample id, "replies": [text, ...]}, in the order of the calls."""

    def __init__(self, path: Path, model: str):
        self.model, self.path, self.replies, self.malformed = model, path, {}, ""
        for i, row in enumerate(read_jsonl_lenient(path)):
            where = f"{path}, line {i + 1}"
            try:
                replies = require_type(list, require_key(row, "replies", where), f"{where}, replies")
                self.replies[str(require_key(row, "id", where))] = list(replies)
            except UserError as error:  # the id may be unknown, so some sample will lack replies
                self.malformed = self.malformed or f" ({error})"

    def reply(self, call: JudgeCall) -> str:
        """The sample's next reply.

        Raises:
            JudgeFailed: there is none left.
        """
        left = self.replies.get(call.id)
        if not left:
            raise JudgeFailed(f"{self.path} has no further reply for {call.id}{self.malformed}")
        return str(left.pop(0))


class CachedJudge:
    """A judge with a cache of replies in a file: no call is sent twice."""

    def __init__(self, judge: Judge, path: Path):
        self.judge, self.model, self.path, self.lock = judge, judge.model, path, threading.Lock()
        self.cache: dict[str, str] = {}
        if path.exists():
            truncate_partial_line(path)
            # a damaged line is judged again
            rows = [row for row in read_jsonl_lenient(path) if isinstance(row, dict)]
            pairs = [(row.get("key"), row.get("reply")) for row in rows]
            self.cache = {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}

    def reply(self, call: JudgeCall) -> str:
        """The cached reply, or a new one."""
        # all that decides a reply; `run` keeps repeated gradings apart
        parts = (self.model, call.prompt, call.temperature, call.max_tokens, call.run, call.attempt)
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if key not in self.cache:
            text = self.judge.reply(call)
            row = {"key": key, "id": call.id, "model": self.model, "temperature": call.temperature}
            row |= {"run": call.run, "attempt": call.attempt, "reply": text}
            # calls run in threads, and a line must be written in one piece
            with self.lock:
                self.cache[key] = text
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return self.cache[key]
