"""What requests may hold: OpenAI's shapes, with their ranges, and our own settings of drawing beside them.

A field that is not named here is refused by its name, as OpenAI's servers do; what they know and a model of
this kind has no use for is taken and changes nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import SCHEDULES

MAX_CHARACTERS = 32_000  # of one text; far more than any context holds
MAX_TURNS = 200
MAX_ROWS = 16  # images of one request, drawn or shown

Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Share = Annotated[float, Field(gt=0, le=1)]
StopText = Annotated[str, Field(max_length=200)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Ignored = Any  # known to OpenAI's clients, without a meaning here


class Strict(BaseModel):
    """No unknown fields, no numbers for strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(Strict):
    """Where an image is: a data: URL."""

    url: str
    detail: Ignored = None


class ImagePart(Strict):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    """A piece of text within a message."""

    type: Literal["text"]
    text: Text


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=2 * MAX_ROWS)]
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None

    def parts(self) -> list[TextPart | ImagePart]:
        """The content as a list."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class TextFormat(Strict):
    """The only form of an answer."""

    type: Literal["text"]


class ChatRequest(Strict):
    """POST /v1/chat/completions. Temperature 0, the default, takes the likeliest words."""

    model: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=100_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: Share | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = 0
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are one setting: give only one of them")
        return self

    @property
    def limit(self) -> int | None:
        """The most new tokens that the client wants."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer is cut."""
        stop = self.stop or []
        return [stop] if isinstance(stop, str) else stop


class ImageRequest(Strict):
    """POST /v1/images/generations, with the settings of `Sampling` and a negative prompt beside OpenAI's."""

    model: Text | None = None
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    n: Annotated[int, Field(ge=1, le=MAX_ROWS)] | None = 1
    size: Text | None = "auto"
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=64)] | None = 0
    seed: Seed | None = None
    negative_prompt: Text | None = None
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    guidance_schedule: Literal[*SCHEDULES] | None = None  # type: ignore[valid-type]
    temperature: Annotated[float, Field(ge=0.01, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    top_p: Share | None = None
    greedy: bool | None = None
    user: Ignored = None
    quality: Ignored = None
    style: Ignored = None
    background: Ignored = None
    moderation: Ignored = None
    output_compression: Ignored = None
