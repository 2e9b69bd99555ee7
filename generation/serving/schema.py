"""Request schemas: OpenAI's fields with their ranges, and the sampling settings of image generation.

Unknown fields are rejected by name, as in OpenAI's API. OpenAI's fields without a meaning here are ignored;
those that would change the answer are accepted with their neutral value only.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from ..sampling import SCHEDULES

MAX_IMAGES = 16  # input or output images of one request
MAX_CHOICES = 16  # answers to one request
MAX_CHARACTERS = 32_000  # of one text; much longer than the context
_MAX_MESSAGES = 200
_MAX_IGNORED = 1000  # values in an ignored field
# tags of unions; left out of the path of an error
UNION_TAGS = frozenset({"(string)", "(list)", "(text)", "(image)", "(refusal)"})


def _within_limit(value: Any) -> Any:
    """Limit the size of an ignored field, which may hold anything."""
    values, pending = 0, [value]
    while pending:
        entry = pending.pop()
        values += 1
        if isinstance(entry, dict):
            pending += [*entry, *entry.values()]
        elif isinstance(entry, list):
            pending += entry
        elif isinstance(entry, str) and len(entry) > MAX_CHARACTERS:
            raise ValueError(f"has a text of {len(entry)} characters; at most {MAX_CHARACTERS} are allowed")
        if values + len(pending) > _MAX_IGNORED:
            raise ValueError(f"holds more than {_MAX_IGNORED} values")
    return value


def _empty(value: Any) -> Any:
    if value:
        raise ValueError("is not supported by this server: leave it out")
    return value


def _string_or_list(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(string)"


def _kind_of_part(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    tags = {"text": "(text)", "image_url": "(image)", "refusal": "(refusal)"}
    return tags.get(kind) if isinstance(kind, str) else None


_Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_Probability = Annotated[float, Field(gt=0, le=1)]
_StopText = Annotated[str, Field(max_length=200)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Ignored = Annotated[Any, AfterValidator(_within_limit)]  # clients may send the field; it has no effect here
_Absent = Annotated[Any, AfterValidator(_empty)]  # null, 0, "", [] and {} mean the same as leaving it out


class _StrictModel(BaseModel):
    """Rejects unknown fields, numbers for strings, and NaN."""

    # strict: "5" is not 5 and True is not 1
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(_StrictModel):
    """The URL of an image: data:, or file: if the server was started with a folder for it."""

    url: str
    detail: _Ignored = None


class ImagePart(_StrictModel):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: _Ignored = None


class TextPart(_StrictModel):
    """A text in a message."""

    type: Literal["text"]
    text: _Text
    prompt_cache_breakpoint: _Ignored = None


class RefusalPart(_StrictModel):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: _Text


_Part = Annotated[
    Annotated[TextPart, Tag("(text)")]
    | Annotated[ImagePart, Tag("(image)")]
    | Annotated[RefusalPart, Tag("(refusal)")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part_type",
        custom_error_message="must be an object whose 'type' is 'text' or 'image_url'",
    ),
]
_Parts = Annotated[list[_Part], Field(min_length=1, max_length=2 * MAX_IMAGES)]
_Content = Annotated[
    Annotated[_Text, Tag("(string)")] | Annotated[_Parts, Tag("(list)")], Discriminator(_string_or_list)
]
_Stop = Annotated[
    Annotated[_StopText, Tag("(string)")] | Annotated[list[_StopText], Field(max_length=4), Tag("(list)")],
    Discriminator(_string_or_list),
]


class Message(_StrictModel):
    """One turn of a conversation; an assistant's `content` may be empty or null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content | None = None
    name: _Ignored = None
    # an answer of the client's library, sent back as it came
    refusal: _Text | None = None
    annotations: _Ignored = None
    audio: _Absent = None
    function_call: _Absent = None
    tool_calls: _Absent = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"needs 'content', a text or a list of parts: its role is {self.role}")
        return self

    @property
    def text(self) -> str:
        """All texts of the content, one per line."""
        if not isinstance(self.content, list):
            return self.content or self.refusal or ""
        texts = [getattr(part, "text", getattr(part, "refusal", None)) for part in self.content]
        return "\n".join(text for text in texts if text is not None)

    @property
    def image_urls(self) -> list[str]:
        """The URLs of the content's images."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(_StrictModel):
    """Additional content of a stream."""

    include_usage: bool | None = False
    include_obfuscation: _Ignored = None


class TextFormat(_StrictModel):
    """The only response format: plain text."""

    type: Literal["text"]


class ChatRequest(_StrictModel):
    """POST /v1/chat/completions. The default temperature 0 is greedy decoding."""

    model: _Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    # OpenAI's default is 1; here it is greedy decoding, as in `unitok ask`
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: _Probability | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = 0
    seed: _Seed | None = None
    stop: _Stop | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    # accepted with their neutral value only
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _Absent = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    logit_bias: _Absent = None
    tools: _Ignored = None
    tool_choice: _Ignored = None
    functions: _Ignored = None
    function_call: _Ignored = None
    audio: _Absent = None
    prediction: _Absent = None
    web_search_options: None = None
    # without a meaning here
    parallel_tool_calls: bool | None = None
    reasoning_effort: _Text | None = None
    verbosity: _Text | None = None
    service_tier: _Text | None = None
    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    safety_identifier: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_retention: _Ignored = None
    prompt_cache_options: _Ignored = None
    moderation: _Ignored = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError(
                "max_tokens and max_completion_tokens are the same setting: give only one of them"
            )
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream = true")
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            chosen = getattr(self, choice)
            # tools that may not be called have no effect
            if getattr(self, tools) and chosen != "none":
                raise ValueError(f"{tools} is not supported: this model calls no tools. Leave it out")
            if chosen not in (None, "none", "auto"):
                raise ValueError(f"{choice} must be 'none' or 'auto': this model calls no tools")
        return self

    @property
    def limit(self) -> int | None:
        """max_completion_tokens, or its older name max_tokens."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        stop = self.stop or []
        return [stop] if isinstance(stop, str) else stop


class ImageRequest(_StrictModel):
    """POST /v1/images/generations, extended with a negative prompt and the settings of `Sampling`."""

    model: _Text | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = 1
    size: _Text | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=64)] | None = 0
    seed: _Seed | None = None
    negative_prompt: _Text | None = None
    # None = the model's sampling.json
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    guidance_schedule: Literal[*SCHEDULES] | None = None  # type: ignore[valid-type]
    temperature: Annotated[float, Field(ge=0.01, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    top_p: _Probability | None = None
    greedy: bool | None = None
    user: _Ignored = None
    quality: _Ignored = None
    style: _Ignored = None
    background: _Ignored = None
    moderation: _Ignored = None
    output_compression: _Ignored = None
    complexity: _Ignored = None
    safety_identifier: _Ignored = None
