"""Request schemas: OpenAI's fields with their ranges, and the sampling settings of image generation.

Unknown fields are rejected by name, as in OpenAI's API; OpenAI's fields without a meaning here are ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import SCHEDULES

MAX_IMAGES = 16  # input or output images of one request
_MAX_CHARACTERS = 32_000  # of one text; much longer than the context
_MAX_MESSAGES = 200

_Text = Annotated[str, Field(max_length=_MAX_CHARACTERS)]
_Probability = Annotated[float, Field(gt=0, le=1)]
_Stop = Annotated[str, Field(max_length=200)]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Ignored = Any  # OpenAI's clients may send the field; it has no effect here


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


class TextPart(_StrictModel):
    """A text in a message."""

    type: Literal["text"]
    text: _Text


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[_Part], Field(min_length=1, max_length=2 * MAX_IMAGES)]
    name: _Ignored = None
    refusal: _Ignored = None
    annotations: _Ignored = None

    def parts(self) -> list[TextPart | ImagePart]:
        """The content as a list."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content


class StreamOptions(_StrictModel):
    """Additional content of a stream."""

    include_usage: bool = False
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
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = 1
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    # accepted with their neutral value only
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0.0
    user: _Ignored = None
    metadata: _Ignored = None
    store: _Ignored = None
    safety_identifier: _Ignored = None
    prompt_cache_key: _Ignored = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError(
                "max_tokens and max_completion_tokens are the same setting: give only one of them"
            )
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
    prompt: Annotated[str, Field(min_length=1, max_length=_MAX_CHARACTERS)]
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
