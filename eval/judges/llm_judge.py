"""Language models that grade answers: an OpenAI-compatible endpoint, or replies from a file."""

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import read_json, read_json_lines

from ..core.annotations import require_key, require_type
from ..core.benchmark import Options
from ..core.harness import truncate_partial_line

MAX_TRIES = 3  # requests per call before it counts as failed
MAX_WAIT = 60.0  # seconds; upper limit of the server's Retry-After
KEY_VARIABLE = "OPENAI_API_KEY"


class JudgeFailed(Exception):
    """A call without reply: its sample counts as failed, the run continues."""


class JudgeCall(NamedTuple):
    """A request to grade sample `id`; `run` numbers repeated gradings, `attempt` retries within one.

    Attributes:
        system: the system message, if there is one.
        image: an image file shown after the prompt, if there is one.
    """

    id: str
    prompt: str
    temperature: float
    max_tokens: int
    run: int = 0
    attempt: int = 0
    system: str = ""
    image: Path | None = None


class Judge(Protocol):
    """The judge protocol: the name of the model, and its reply to a call."""

    model: str

    def reply(self, call: JudgeCall) -> str:
        """The reply to one call.

        Raises:
            JudgeFailed: there is none.
        """
        ...


def load_judge(scoring: Options, folder: Path) -> Judge | None:
    """The judge selected by the options, cached in `folder/judgements.jsonl`; None if there is no judge.

    Raises:
        UserError: an endpoint without a model name, or an unreadable replay file.
    """
    if scoring.judge_replay:
        return ReplayJudge(Path(scoring.judge_replay), scoring.judge)
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
        self.failures = 0  # failed calls before the first success; -1 after it

    def reply(self, call: JudgeCall) -> str:
        """The reply; a failed request is retried up to two times.

        Raises:
            JudgeFailed: no reply after all tries, or the endpoint rejects this prompt.
            UserError: the endpoint rejects the key or the model, or has failed on the first three calls.
        """
        reason = ""
        for attempt in range(MAX_TRIES):
            try:
                text = self._post(call)
                self.failures = -1
                return text
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                # retry timeouts, rate limits and server errors; other errors are permanent
                if error.code not in (408, 409, 425, 429) and error.code < 500:
                    reason += f": {_error_body(error)}"
                    if error.code in (401, 403, 404):  # key or model: every request would fail
                        raise UserError(
                            f"The judge at {self.url} answered {reason}; check OPENAI_API_KEY and --judge"
                        ) from error
                    break  # only this prompt, e.g. too long or rejected by a content filter
                # the server's Retry-After, else exponential back-off
                wait = error.headers.get("Retry-After", "") if error.headers else ""
                time.sleep(min(float(wait) if wait.isdecimal() else self.pause * 2**attempt, MAX_WAIT))
            # LookupError, TypeError, ValueError: the body is not a chat completion
            except (OSError, http.client.HTTPException, LookupError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                time.sleep(self.pause * 2**attempt)
        # an endpoint that has never replied is probably a wrong URL
        if self.failures >= 0:
            self.failures += 1
            if self.failures >= MAX_TRIES:
                raise UserError(f"The judge at {self.url} has never replied ({reason}); is it running?")
        raise JudgeFailed(reason)

    def _post(self, call: JudgeCall) -> str:
        """Send one request."""
        body = {
            "model": self.model, "temperature": call.temperature, "max_tokens": call.max_tokens,
            "messages": _messages(call),
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


def _messages(call: JudgeCall) -> list[dict[str, Any]]:
    """The messages of a call; an image goes along as a data URL."""
    content: Any = call.prompt
    if call.image is not None:
        url = _data_url(call.image)
        content = [{"type": "text", "text": call.prompt}, {"type": "image_url", "image_url": {"url": url}}]
    system = [{"role": "system", "content": call.system}] if call.system else []
    return [*system, {"role": "user", "content": content}]


def _data_url(path: Path) -> str:
    """An image file as it is where every endpoint reads it alike, else what `load_image` reads as PNG."""
    # loads torch, which scoring answers of other programs does without
    from open_unitok.tokenizer.images import image_errors, is_plain, load_image, open_image_file

    with image_errors(path), open_image_file(path) as image:
        kind, data = (image.format or "").lower(), path.read_bytes()
        if kind not in ("png", "jpeg") or not is_plain(image):
            buffer = io.BytesIO()
            load_image(path).save(buffer, "PNG")
            kind, data = "png", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _error_body(error: urllib.error.HTTPError) -> str:
    """The first 300 bytes of an error response, "" if it cannot be read."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def is_grade_file(content: Any) -> bool:
    """Whether a JSON value is a grade file of MM-Vet's evaluator: {id: {"model", "content", "score"}}."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(row, dict) and isinstance(row.get("score"), list) for row in content.values())
    )


def _json_or_none(path: Path) -> Any:
    """The value of a JSON file; None for JSON lines."""
    with contextlib.suppress(UserError):
        return read_json(path)
    return None


class ReplayJudge:
    """Replies in the order of the calls, from a file.

    The file holds JSON lines {"id": sample id, "replies": [text, ...]}, or is a grade file of MM-Vet's
    evaluator, which also names the judge.

    Raises:
        UserError: the grades are of another judge than `model`.
    """

    def __init__(self, path: Path, model: str = ""):
        self.model, self.path, self.replies, self.malformed = model or "replayed replies", path, {}, ""
        self.runs = 0  # gradings per answer in a grade file
        if is_grade_file(content := _json_or_none(path)):
            self._read_grades(content, model)
            return
        for i, row in enumerate(read_json_lines(path, lenient=True)):
            where = f"{path}, line {i + 1}"
            try:
                replies = require_type(list, require_key(row, "replies", where), f"{where}, replies")
                self.replies[str(require_key(row, "id", where))] = list(replies)
            # not fatal: the sample of this line fails later and quotes the error
            except UserError as error:
                self.malformed = self.malformed or f" ({error})"

    def _read_grades(self, content: dict[str, Any], model: str) -> None:
        """Take the grades as replies: the contents are what the evaluator could read of them."""
        for name, row in content.items():
            self.replies[name] = [str(grade) for grade in row["score"]]
        self.runs = max(map(len, self.replies.values()))
        names = sorted({str(name) for row in content.values() for name in row.get("model", ())})
        # a name without its date, "gpt-4", may be any of its versions: the user knows which
        if model and not all(model == name or model.startswith(f"{name}-") for name in names):
            raise UserError(f"{self.path} holds grades of {', '.join(names)}, not of {model}.")
        self.model = model or ", ".join(names) or self.model

    def reply(self, call: JudgeCall) -> str:
        """The next reply of the sample.

        Raises:
            JudgeFailed: there is none left.
        """
        left = self.replies.get(call.id)
        if not left:
            raise JudgeFailed(f"{self.path} has no further reply for {call.id}{self.malformed}")
        return str(left.pop(0))


class CachedJudge:
    """A judge with a cache of replies in a file, so that no call is sent twice."""

    def __init__(self, judge: Judge, path: Path):
        self.judge, self.model, self.path, self.lock = judge, judge.model, path, threading.Lock()
        self.cache: dict[str, str] = {}
        if path.exists():
            truncate_partial_line(path)
            # damaged lines are ignored: their calls are sent again
            rows = [row for row in read_json_lines(path, lenient=True) if isinstance(row, dict)]
            pairs = [(row.get("key"), row.get("reply")) for row in rows]
            self.cache = {key: text for key, text in pairs if isinstance(key, str) and isinstance(text, str)}

    def reply(self, call: JudgeCall) -> str:
        """The cached reply, or a new one."""
        # everything that determines a reply; `run` distinguishes repeated gradings
        parts = [self.model, call.prompt, call.temperature, call.max_tokens, call.run, call.attempt]
        if call.image is not None:
            parts += [call.system, hashlib.sha256(call.image.read_bytes()).hexdigest()]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        if key not in self.cache:
            text = self.judge.reply(call)
            row = {"key": key, "id": call.id, "model": self.model, "temperature": call.temperature}
            row |= {"run": call.run, "attempt": call.attempt, "reply": text}
            # calls run in threads: write whole lines
            with self.lock:
                self.cache[key] = text
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return self.cache[key]
