"""What `unitok serve` refuses: malformed, too large, too slow, images that are none, files of others."""

import base64
import contextlib
import io
import socket
import zlib

import pytest
from PIL import Image


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def showing(image: bytes | str, text="What is it?"):
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
    """A PNG of 30,000 x 30,000 pixels in a few bytes: the header is true, the data is missing."""
    content = bytearray(png())
    content[16:24] = (30_000).to_bytes(4) + (30_000).to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


CHAT, DRAW = "/v1/chat/completions", "/v1/images/generations"


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
        (CHAT, user("a <image> b"), "marks images"),
        (CHAT, user("\ud800"), "messages"),
        (CHAT, user(7), "messages"),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "role"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, "take turns"),
        (CHAT, {"messages": user("a")["messages"] * 2}, "take turns"),
        (CHAT, {"messages": [{"role": "system", "content": "a"}]}, "last message"),
        (CHAT, {**user("a"), "max_tokens": 0}, "max_tokens"),
        (CHAT, {**user("a"), "max_tokens": 60}, "context of 64"),
        (CHAT, {**user("a"), "max_tokens": 5000}, "at most 1024"),
        (CHAT, {**user("a"), "max_tokens": 5, "max_completion_tokens": 5}, "one setting"),
        (CHAT, {**user("a"), "temperature": float("nan")}, "temperature"),
        (CHAT, {**user("a"), "temperature": True}, "temperature"),
        (CHAT, {**user("a"), "top_p": 0}, "top_p"),
        (CHAT, {**user("a"), "n": 2}, "n"),
        (CHAT, {**user("a"), "tools": []}, "tools"),
        (CHAT, {**user("a"), "seed": 2**70}, "seed"),
        (CHAT, showing("http://127.0.0.1/a.png"), "nothing is fetched"),
        (CHAT, showing("file:///etc/passwd"), "nothing is fetched"),
        (CHAT, showing("/etc/passwd"), "nothing is fetched"),
        (CHAT, showing("data:image/png;base64,@@"), "base64"),
        (CHAT, showing("data:text/html;base64,aaaa"), "data:image"),
        (CHAT, showing(b""), "cannot be read"),
        (CHAT, showing(b"no image"), "cannot be read: it is none of PNG"),
        (CHAT, showing(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of PNG"),
        (CHAT, showing(truncated()), "cannot be read"),
        (CHAT, showing(bomb()), "900000000 pixels"),
        (CHAT, showing(png(1, 1001)), "1 x 1001"),
        (CHAT, {**showing(png()), "messages": showing(png())["messages"] * 20}, "take turns"),
        (DRAW, {"prompt": ""}, "prompt"),
        (DRAW, {"prompt": " "}, "not empty"),
        (DRAW, {"prompt": "word " * 90}, "shorten the prompt"),
        (DRAW, {"prompt": "a", "negative_prompt": "word " * 90}, "shorten the prompt"),
        (DRAW, {"prompt": "a", "n": 0}, "n"),
        (DRAW, {"prompt": "a", "n": 1000}, "n"),
        (DRAW, {"prompt": "a", "size": "1024x1024"}, "48x48"),
        (DRAW, {"prompt": "a", "seed": -1}, "seed"),
        (DRAW, {"prompt": "a", "seed": 2**63 - 1, "n": 2}, "seed"),
        (DRAW, {"prompt": "a", "guidance": float("inf")}, "guidance"),
        (DRAW, {"prompt": "a", "guidance": "5"}, "guidance"),
        (DRAW, {"prompt": "a", "guidence": 5}, "guidence"),
        (DRAW, {"prompt": "a", "top_k": 1.5}, "top_k"),
        (DRAW, {"prompt": "a", "stream": True, "n": 2}, "n = 1"),
        (DRAW, {"prompt": ["a"]}, "prompt"),
    ],
)
def test_bad_requests_are_400_and_say_why(server, path, body, words, ask):
    status, answer = ask(server[0], body, path)
    assert status == 400, answer
    assert words in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_routes_and_methods_have_the_same_shape(server, ask):
    url = server[0]
    for path, status in (("/v1/nothing", 404), ("/v1/chat/completions", 405), ("/docs", 404)):
        found, answer = ask(url, path=path)
        assert found == status and answer["error"]["type"] == "invalid_request_error"
    assert ask(url, user("a"), **{"content-type": "text/plain"})[0] == 400


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
        with contextlib.suppress(ConnectionError):  # the server answers and closes while we still send
            for _ in range(30):
                connection.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert ask(url, user("still there?"))[0] == 200


def test_files_are_read_from_the_allowed_folder_alone(pipe, photos, tmp_path, serving, ask):
    folder, outside = tmp_path / "open", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(png())
    (folder / "a b.png").write_bytes(photos[0].read_bytes())
    (folder / "link.png").symlink_to(outside)
    with serving(pipe, files=folder) as (url, _):
        status, answer = ask(url, showing(f"file://{folder}/a%20b.png"))
        assert status == 200
        expected = pipe.answer([photos[0]], ["What is it?"], max_new_tokens=4)[0]
        assert answer["choices"][0]["message"]["content"] == expected
        for path in (outside, folder / "link.png", f"{folder}/../secret.png", folder / "gone.png", folder,
                     f"{folder}/%2e%2e/secret.png", f"{folder}/a%00.png", "/etc/passwd"):  # fmt: skip
            status, answer = ask(url, showing(f"file://{path}"))
            assert status == 400 and "may read" in answer["error"]["message"], path
        assert ask(url, showing("http://127.0.0.1/a.png"))[0] == 400
