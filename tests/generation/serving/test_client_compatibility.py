"""Requests as OpenAI's clients send them: accepted as by OpenAI's API, or 400 with field and reason."""

import base64
import http.client
import io
import json

import openai
import pytest
from PIL import Image

CHAT, GENERATE = "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def user(content):
    return {"role": "user", "content": content}


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def encoded(kind="PNG", size=(20, 12)):
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def text_of(answer):
    return answer.choices[0].message.content


def test_an_answer_is_sent_back_as_it_came(client):
    first = client.chat.completions.create(model="tiny", messages=[user("What?")], max_tokens=3)
    # with its fields that are null, as `model_dump` writes them
    history = [user("What?"), first.choices[0].message.model_dump(), user("Red?")]
    answer = client.chat.completions.create(model="tiny", messages=history, max_tokens=3)
    short = [user("What?"), {"role": "assistant", "content": text_of(first)}, user("Red?")]
    assert text_of(answer) == text_of(
        client.chat.completions.create(model="tiny", messages=short, max_tokens=3)
    )


@pytest.mark.parametrize(
    "assistant",
    [
        {"content": ""},
        {"content": None},
        {},
        {"content": [{"type": "text", "text": ""}]},
        {"content": None, "refusal": "", "tool_calls": [], "function_call": None, "audio": None},
    ],
)
def test_an_empty_answer_in_the_history_is_accepted(client, pipe, assistant):
    messages = [user("What?"), {"role": "assistant", **assistant}, user("Red?")]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert text_of(answer) == pipe.chat("Red?", None, [("What?", "")], max_new_tokens=4)


def test_neighbouring_messages_of_one_side_are_one_turn(client, pipe):
    def ask(*messages):
        return text_of(client.chat.completions.create(model="tiny", messages=messages, max_tokens=4))

    answer = {"role": "assistant", "content": "a"}
    assert ask(user("One."), user("Two?")) == pipe.chat("One.\nTwo?", max_new_tokens=4)
    expected = pipe.chat("Two?", None, [("One?", "a\na")], max_new_tokens=4)
    assert ask(user("One?"), answer, answer, user("Two?")) == expected
    # system messages anywhere belong to the question that follows, else to the last one
    system = {"role": "system", "content": "Be brief."}
    expected = pipe.chat("Be brief.\nTwo?", None, [("One?", "a")], max_new_tokens=4)
    assert ask(user("One?"), answer, system, user("Two?")) == expected
    assert ask(system, user("Two?")) == pipe.chat("Be brief.\nTwo?", max_new_tokens=4)
    assert ask(user("Two?"), {**system, "role": "developer"}) == pipe.chat(
        "Two?\nBe brief.", max_new_tokens=4
    )
    # a greeting is an answer without a question
    expected = pipe.chat("One?", None, [("", "a")], max_new_tokens=4)
    assert ask(answer, user("One?")) == expected


def test_an_image_needs_no_text(client, pipe):
    url = f"data:image/png;base64,{encoded()}"
    answer = client.chat.completions.create(model="tiny", messages=[user([image_part(url)])], max_tokens=4)
    assert answer.usage.prompt_tokens >= 9
    pair = [user([image_part(url)]), user("What?")]
    expected = pipe.chat("What?", base64.b64decode(encoded_part(url)), max_new_tokens=4)
    assert text_of(client.chat.completions.create(model="tiny", messages=pair, max_tokens=4)) == expected


def encoded_part(url):
    return url.partition(",")[2]


def test_several_answers_to_one_request(client, pipe):
    greedy = client.chat.completions.create(model="tiny", messages=[user("What?")], max_tokens=5, n=3)
    expected = pipe.chat("What?", max_new_tokens=5)
    assert [(c.index, c.message.content) for c in greedy.choices] == [(i, expected) for i in range(3)]
    one = client.chat.completions.create(model="tiny", messages=[user("What?")], max_tokens=5)
    assert greedy.usage.prompt_tokens == one.usage.prompt_tokens
    assert greedy.usage.completion_tokens == 3 * one.usage.completion_tokens

    settings = {"model": "tiny", "messages": [user("Say")], "max_tokens": 8, "temperature": 1.5, "seed": 4}
    several = client.chat.completions.create(**settings, n=3)
    alone = [client.chat.completions.create(**{**settings, "seed": 4 + i}) for i in range(3)]
    assert [c.message.content for c in several.choices] == [text_of(a) for a in alone]
    texts, finished = ["", "", ""], {}
    for chunk in client.chat.completions.create(**settings, n=3, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in several.choices]
    assert [finished[i] for i in range(3)] == [c.finish_reason for c in several.choices]


def test_neutral_values_are_accepted(client):
    body = {"model": "tiny", "messages": [user("What?")], "max_tokens": 3}
    expected = text_of(client.chat.completions.create(**body))
    neutral = {
        "tools": [], "tool_choice": "none", "logit_bias": {}, "reasoning_effort": "low", "verbosity": "low",
        "response_format": {"type": "text"}, "parallel_tool_calls": True, "service_tier": "auto",
        "modalities": ["text"], "top_logprobs": 0, "logprobs": False, "frequency_penalty": 0,
        "presence_penalty": 0.0, "n": 1, "stop": [], "metadata": {"a": "b"}, "store": False, "user": "me",
        "safety_identifier": "a", "prompt_cache_key": "b", "stream": False, "functions": [],
        "function_call": "auto", "audio": None, "prediction": None, "web_search_options": None,
    }  # fmt: skip
    for name, value in neutral.items():
        assert text_of(client.chat.completions.create(**body, extra_body={name: value})) == expected, name
    assert text_of(client.chat.completions.create(**body, extra_body=neutral)) == expected
    assert text_of(client.chat.completions.create(**body, extra_body=dict.fromkeys(neutral))) == expected
    # tools that may not be called have no effect
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    answer = client.chat.completions.create(**body, tools=[tool], tool_choice="none")
    assert text_of(answer) == expected


def test_the_usage_of_a_stream(client):
    body = {"model": "tiny", "messages": [user("What?")], "max_completion_tokens": 3, "stream": True}
    chunks = list(client.chat.completions.create(**body, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens <= 3
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**body, stream_options=None))


DATA = encoded()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + "\n".join(DATA[i : i + 76] for i in range(0, len(DATA), 76)),
        "data:image/png;base64," + "\r\n".join(DATA[i : i + 64] for i in range(0, len(DATA), 64)) + "\r\n",
        f"data:;base64,{DATA}",
        f"data:image/jpeg;base64,{DATA}",  # the content says what it is
        f"data:application/octet-stream;base64,{DATA}",
        f"data:image/png;charset=utf-8;base64,{DATA}",
        f"DATA:IMAGE/PNG;BASE64,{DATA}",
        f"  data:image/png;base64,{DATA}\n",
        f"data:image/png;base64,{DATA.rstrip('=')}",
        "data:image/png;base64," + DATA.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
    ids=["lines", "crlf", "untyped", "jpeg", "octets", "charset", "upper", "spaces", "unpadded", "quoted"],
)  # fmt: skip
def test_data_urls_of_all_kinds(client, pipe, url):
    body = {"model": "tiny", "messages": [user([image_part(url), {"type": "text", "text": "What?"}])]}
    expected = pipe.chat("What?", base64.b64decode(DATA), max_new_tokens=3)
    assert text_of(client.chat.completions.create(**body, max_tokens=3)) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"])
def test_image_formats(client, pipe, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(kind)
    url = f"data:image/{kind.lower()};base64,{data}"
    body = {"model": "tiny", "messages": [user([image_part(url), {"type": "text", "text": "What?"}])]}
    expected = pipe.chat("What?", base64.b64decode(data), max_new_tokens=3)
    assert text_of(client.chat.completions.create(**body, max_tokens=3)) == expected


def chat(content="What?", **fields):
    return {"messages": [user(content)], "max_tokens": 2, **fields}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (chat("x" * 32_001), "messages[0].content", "has 32001 characters; at most 32000 are allowed"),
        (
            chat([{"type": "text", "text": "x" * 32_001}]),
            "messages[0].content[0].text",
            "has 32001 characters; at most 32000 are allowed",
        ),
        (
            chat([{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}]),
            "messages[0].content[0].image_url",
            'is a string; it must be an object such as {"url":',
        ),
        (chat([{"type": "image_url"}]), "messages[0].content[0].image_url", "is missing"),
        (
            chat([{"type": "image_url", "image_url": {}}]),
            "messages[0].content[0].image_url.url",
            "is missing",
        ),
        (chat([{"type": "input_audio"}]), "messages[0].content[0]", "'type' is 'text' or 'image_url'"),
        (chat([{"type": {}}]), "messages[0].content[0]", "'type' is 'text' or 'image_url'"),
        (chat(tool_choice={"type": "function"}), "", "tool_choice must be 'none' or 'auto'"),
        (chat(["What?"]), "messages[0].content[0]", "must be an object whose 'type' is"),
        (chat([]), "messages[0].content", "is empty"),
        (chat(7), "messages[0].content", "is a number; it must be a string"),
        (chat(stop=["a", "b", "c", "d", "e"]), "stop", "has 5 entries; at most 4 are allowed"),
        (chat(stop=["a" * 201]), "stop[0]", "has 201 characters; at most 200"),
        (chat(stop=5), "stop", "is a number; it must be a string"),
        (chat(temperature=3), "temperature", "is 3; it must be less than or equal to 2"),
        (chat(temperature=True), "temperature", "is a boolean; it must be a number"),
        (chat(temperature="1"), "temperature", "is a string; it must be a number"),
        (chat(n=0), "n", "is 0; it must be greater than or equal to 1"),
        (chat(tools=[{"type": "function"}]), "", "tools is not supported: this model calls no tools"),
        (chat(tool_choice="required"), "", "tool_choice must be 'none' or 'auto'"),
        (chat(logit_bias={"5": 1}), "logit_bias", "is not supported by this server"),
        (chat(frequency_penalty=1), "frequency_penalty", "it must be less than or equal to 0"),
        (chat(logprobs=True), "logprobs", "it must be False"),
        (chat(response_format={"type": "json_object"}), "response_format.type", "it must be 'text'"),
        (chat(modalities=["text", "audio"]), "modalities[1]", "it must be 'text'"),
        (chat(stream_options={"include_usage": True}), "", "only allowed together with stream = true"),
        (chat(temprature=1), "temprature", "is not a field of this request: Did you mean 'temperature'"),
        (chat(**{"\ud800": 1}), "", "The body holds half of a surrogate pair"),
        (chat(user={"\ud800": 1}, model="\ud800"), "model", "holds half of a surrogate pair"),
        (chat(user="x" * 40_000), "user", "has a text of 40000 characters"),
        (chat(metadata={"a": [0] * 2000}), "metadata", "holds more than 1000 values"),
        ({"messages": "What?"}, "messages", "is a string; it must be a list"),
        ({"messages": ["What?"]}, "messages[0]", "is a string; it must be an object"),
        ([], "", "The body is a list; it must be a JSON object"),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_the_reason(server, ask, body, param, message):
    status, answer = ask(server[0], json.dumps(body).encode())
    assert status == 400 and message in answer["error"]["message"], answer
    assert (answer["error"]["param"] or "") == param and answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["message"].endswith(".") and ".." not in answer["error"]["message"].strip(".")[-3:]


def send(url, data, kind):
    """(status, answer) of a body with this content-type; None = without one."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", CHAT, data, {} if kind is None else {"content-type": kind})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize(
    "kind",
    [None, "", "application/json; charset=utf-8", "Application/JSON", "application/x-www-form-urlencoded"],
)
def test_json_without_a_content_type_is_accepted(server, kind):
    assert send(server[0], json.dumps(chat()).encode(), kind)[0] == 200


TEXT = json.dumps(chat())


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"\xef\xbb\xbf" + TEXT.encode(), 200, ""),  # a byte order mark
        (TEXT.encode("utf-16"), 400, "not valid UTF-8"),
        ('{"messages": "café"}'.encode("latin-1"), 400, "not valid UTF-8"),
        (b"", 400, "The body is empty"),
        (b"{", 400, "not valid JSON"),
        (TEXT[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
        (TEXT[:-1].encode() + b', "temperature": NaN}', 400, "temperature"),
        (TEXT[:-1].encode() + b', "temperature": 1e999}', 400, "temperature"),
        (b'{"messages": [], ' + TEXT[1:].encode(), 200, ""),  # the last of equal keys counts
        (b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, ""),
        (b"[" * 150_000, 400, "nested too deeply"),
        (b'{"a":' * 30_000, 400, "nested too deeply"),
        (TEXT.replace("What?", "\\ud83d").encode(), 400, "messages[0].content"),
        (TEXT.replace("What?", "\\u200b\\u007f").encode(), 200, ""),
        (TEXT.replace("What?", "a\\u0000").encode(), 400, "remove it"),
        (TEXT.replace("What?", " \\u00a0").encode(), 400, "messages[0] has no text and no image"),
    ],
)  # fmt: skip
def test_bodies_that_are_odd(server, data, status, message):
    found, answer = send(server[0], data, "application/json")
    assert found == status, answer
    assert status == 200 or message in answer["error"]["message"]
