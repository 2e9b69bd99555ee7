"""Requests that `unitok serve` rejects: malformed, too large, too slow, corrupt images, other files."""

import base64
import contextlib
import io
import socket
import zlib

import pytest
from PIL import Image


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def question_about(image: bytes | str, text="What is it?"):
    url = image if isinstance(image, str) else data_url(image)
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def png(width=8, height=8):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def truncated():
    buffer = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(buffer, "PNG")
    return buffer.getvalue()[:400]


def bomb():
    """A decompression bomb: a PNG header of 30,000 x 30,000 pixels without the data."""
    content = bytearray(png())
    content[16:24] = (30_000).to_bytes(4) + (30_000).to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


CHAT, GENERATE = "/v1/chat/completions", "/v1/images/generations"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, b"", "body"),
        (CHAT, b"{", "JSON"),
        (CHAT, b"[" * 50_000, "body"),
        (CHAT, b'{"messages": "\xff"}', "body"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, user(""), "no text"),
        (CHAT, user("word " * 90), "context"),
        (CHAT, user("x" * 40_000), "32000"),
        (CHAT, user("a <image> b"), "reserved for images"),
        (CHAT, user("\ud800"), "messages"),
        (CHAT, user(7), "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "role"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, "last message must have role user"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0] needs 'content'"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (CHAT, {**user("a"), "max_tokens": 0}, "max_tokens"),
        (CHAT, {**user("a"), "max_tokens": 60}, "context of 64"),
        (CHAT, {**user("a"), "max_tokens": 5000}, "max_tokens is 5000; this server allows at most 1024"),
        (CHAT, {**user("a"), "max_completion_tokens": 60}, "lower max_completion_tokens"),
        (CHAT, {**user("a"), "max_tokens": 5, "max_completion_tokens": 5}, "same setting"),
        (CHAT, {**user("a"), "temperature": float("nan")}, "temperature"),
        (CHAT, {**user("a"), "temperature": True}, "temperature"),
        (CHAT, {**user("a"), "top_p": 0}, "top_p"),
        (CHAT, {**user("a"), "n": 17}, "n is 17; it must be less than or equal to 16"),
        (CHAT, {**user("a"), "n": 7}, "n is 7; the queue of this server holds 6"),
        (CHAT, {**user("a"), "n": 2, "seed": 2**63 - 1, "temperature": 1}, "seed"),
        (CHAT, {**user("a"), "seed": 2**70}, "seed"),
        (CHAT, question_about("http://127.0.0.1/a.png"), "not fetched"),
        (CHAT, question_about("file:///etc/passwd"), "not fetched"),
        (CHAT, question_about("/etc/passwd"), "not fetched"),
        (CHAT, question_about("data:image/png;base64,@@"), "base64"),
        (CHAT, question_about("data:text/html;base64,aaaa"), "data:image"),
        (CHAT, question_about(b""), "not a readable image"),
        (CHAT, question_about(b"no image"), "not a readable image: it is not one of PNG"),
        (CHAT, question_about(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not one of PNG"),
        (CHAT, question_about(truncated()), "not a readable image"),
        (CHAT, question_about(bomb()), "900000000 pixels"),
        (CHAT, question_about(png(1, 1001)), "1 x 1001"),
        (
            CHAT,
            {**question_about(png()), "messages": question_about(png())["messages"] * 20},
            "20 images; at most 16",
        ),
        (GENERATE, {"prompt": ""}, "prompt"),
        (GENERATE, {"prompt": " "}, "not empty"),
        (GENERATE, {"prompt": "word " * 90}, "shorten the prompt"),
        (GENERATE, {"prompt": "a", "negative_prompt": "word " * 90}, "shorten the prompt"),
        (GENERATE, {"prompt": "a", "n": 0}, "n"),
        (GENERATE, {"prompt": "a", "n": 1000}, "n"),
        (GENERATE, {"prompt": "a", "size": "1024x1024"}, "48x48"),
        (GENERATE, {"prompt": "a", "seed": -1}, "seed"),
        (GENERATE, {"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed"),
        (GENERATE, {"prompt": "a", "guidance": float("inf")}, "guidance"),
        (GENERATE, {"prompt": "a", "guidance": "5"}, "guidance"),
        (GENERATE, {"prompt": "a", "guidence": 5}, "guidence"),
        (GENERATE, {"prompt": "a", "top_k": 1.5}, "top_k"),
        (GENERATE, {"prompt": "a", "stream": True, "n": 2}, "n = 1"),
        (GENERATE, {"prompt": ["a"]}, "prompt"),
    ],
)
def test_invalid_requests_are_400_with_the_reason(server, path, body, words, ask):
    status, answer = ask(server[0], body, path)
    assert status == 400, answer
    assert words in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_errors_of_unknown_routes_and_methods_have_the_same_format(server, ask):
    url = server[0]
    for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405), ("/docs", 404)):
        found, answer = ask(url, path=path)
        assert found == status and answer["error"]["type"] == "invalid_request_error"
        assert f"{path} is " in answer["error"]["message"]
    for kind in ("text/plain", "multipart/form-data; boundary=a"):
        status, answer = ask(url, user("a"), **{"content-type": kind})
        assert status == 400 and f"{kind.partition(';')[0]!r}; it must be" in answer["error"]["message"]
        assert answer["error"]["code"] == "unsupported_content_type"
    # not a redirect, which a client follows without its body
    assert ask(url, user("a"), "/v1/chat/completions/")[0] == 404


def test_bodies_are_limited_in_size_and_time(server, ask):
    url = server[0]
    assert ask(url, b"x" * 300_000)[0] == 413
    host, port = url.removeprefix("http://").split(":")
    for head, status in (("content-length: 99999999999", "413"), ("content-length: 50", "408")):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(
            ConnectionError
        ):  # the server responds and closes while the client still sends
            for _ in range(30):
                connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(url, user("still there?"))[0] == 200


def test_only_files_of_the_allowed_folder_are_read(pipe, photos, tmp_path, serving, ask):
    folder, outside = tmp_path / "open", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(png())
    (folder / "a b.png").write_bytes(photos[0].read_bytes())
    (folder / "link.png").symlink_to(outside)
    with serving(pipe, files=folder) as (url, _):
        status, answer = ask(url, question_about(f"file://{folder}/a%20b.png"))
        assert status == 200
        expected = pipe.answer([photos[0]], ["What is it?"], max_new_tokens=4)[0]
        assert answer["choices"][0]["message"]["content"] == expected
        for path in (outside, folder / "link.png", f"{folder}/../secret.png", folder / "gone.png", folder,
                     f"{folder}/%2e%2e/secret.png", f"{folder}/a%00.png", "/etc/passwd"):  # fmt: skip
            status, answer = ask(url, question_about(f"file://{path}"))
            assert status == 400 and "may read" in answer["error"]["message"], path
        assert ask(url, question_about("http://127.0.0.1/a.png"))[0] == 400
