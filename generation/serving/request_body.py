"""The body of a request: JSON to a validated model, with one-line errors that name the field."""

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from open_unitok.core.errors import did_you_mean

from .schema import UNION_TAGS

# Python needs about 100 bytes per value: 20 MB of brackets would become a gigabyte
_MAX_VALUES = 200_000
# "": clients without a content-type send JSON too; curl and urllib send a form's unless they are told
_MEDIA_TYPES = ("application/json", "", "application/x-www-form-urlencoded")
_Model = TypeVar("_Model", bound=BaseModel)


class InvalidBody(Exception):
    """The body is not a valid request; `param` is the field, "" = the whole body."""

    def __init__(self, message: str, param: str = "", code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def parse_body(data: bytes, content_type: str, model: type[_Model]) -> _Model:
    """The request in `data`. Takes up to 0.1 s: call it on a thread.

    Raises:
        InvalidBody: not JSON, too many values, or not what `model` allows.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type not in _MEDIA_TYPES and not media_type.endswith("+json"):
        raise InvalidBody(
            f"The content-type is {media_type[:60]!r}; it must be 'application/json'.",
            code="unsupported_content_type",
        )
    return _validated(_parse_json(data), model)


def _parse_json(data: bytes) -> Any:
    if not data:
        raise InvalidBody("The body is empty; it must be a JSON object.", code="json_invalid")
    # counting bytes is 100 times as fast as parsing; base64 has none of these
    values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MAX_VALUES:
        raise InvalidBody(f"The body has {values} commas and brackets; at most {_MAX_VALUES} are allowed.")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidBody(f"The body is not valid UTF-8: byte {error.start}.", code="json_invalid") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidBody(
            f"The body is not valid JSON: {error.msg} ({where}).", code="json_invalid"
        ) from error
    except ValueError as error:  # Python's limit on the digits of an integer
        message = "The body is not valid JSON: a number has too many digits."
        raise InvalidBody(message, code="json_invalid") from error
    except RecursionError as error:
        raise InvalidBody(
            "The body is not valid JSON: it is nested too deeply.", code="json_invalid"
        ) from error


def _validated(value: Any, model: type[_Model]) -> _Model:
    if not isinstance(value, dict):
        raise InvalidBody(f"The body is {_kind(value)}; it must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"])
        # our own checks of several fields name them
        subject = param or ("" if first["type"] == "value_error" else "The body")
        message = " ".join(f"{subject} {_reason(first, model)}".split())
        # unknown names are text of the client: limit their length, and lone surrogates cannot be sent
        message = message[:500].encode("utf-8", "replace").decode()
        raise InvalidBody(message.rstrip(".?") + ".", param[:200], first["type"]) from error


def _path(loc: Iterable[int | str]) -> str:
    """messages[0].content[1].text"""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in UNION_TAGS:
            path += f".{part[:60]}" if path else part[:60]
    return path.encode("utf-8", "replace").decode()


def _reason(error: Any, model: type[BaseModel]) -> str:
    """What is wrong with the field, to follow its name."""
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        known = model.model_fields if len(error["loc"]) == 1 else ()
        guess = did_you_mean(str(error["loc"][-1])[:60], known)
        return "is not a field of this request" + (f":{guess}" if "Did" in guess else "")
    if kind == "string_too_long":
        return f"has {len(value)} characters; at most {limits['max_length']} are allowed"
    if kind == "too_long":
        return f"has {len(value)} entries; at most {limits['max_length']} are allowed"
    if kind in ("too_short", "string_too_short"):
        return "is empty"
    if kind == "string_unicode":
        return "holds half of a surrogate pair, which is not text"
    if kind == "value_error":  # of our validators, which start with the verb or name the fields
        return str(limits["error"])
    if kind == "part_type":
        return error["msg"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"is {_kind(value)}; it must be an object" + (
            ' such as {"url": "data:image/png;base64,..."}' if error["loc"][-1] == "image_url" else ""
        )
    if kind in ("string_type", "list_type", "int_type", "float_type", "bool_type"):
        wanted = {"string": "a string", "list": "a list", "int": "a whole number", "float": "a number"}
        return f"is {_kind(value)}; it must be {wanted.get(kind.removesuffix('_type'), 'true or false')}"
    reason = error["msg"].removeprefix("Input should be ")
    return f"is {_shown(value)}; it must be {reason}" if reason != error["msg"] else f"is not valid: {reason}"


def _kind(value: Any) -> str:
    """The JSON type of a value, with its article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60] if isinstance(value, (str, int, float, bool, type(None))) else _kind(value)
