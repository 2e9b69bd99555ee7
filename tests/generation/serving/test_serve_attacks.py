"""`unitok serve` under attack: files, image bombs, huge JSON, held connections, floods of log lines."""

import base64
import contextlib
import errno
import io
import json
import logging
import os
import socket
import threading
import time

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation.serving import image_urls, request_body
from open_unitok.generation.serving.image_urls import Cancelled, ImageLoader, read_data_url, read_file_url
from open_unitok.generation.serving.limits import Limits
from open_unitok.generation.serving.listen import listen
from open_unitok.generation.serving.log_limit import RateLimit
from open_unitok.generation.serving.request_body import InvalidBody, parse_body
from open_unitok.generation.serving.schema import ChatRequest

CHAT, GENERATE = "/v1/chat/completions", "/v1/images/generations"


def png(width=8, height=8):
    buffer = io.BytesIO()
    Image.new("L", (width, height), 200).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def question_about(*contents, **fields):
    parts = [{"type": "image_url", "image_url": {"url": data_url(content)}} for content in contents]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 2, **fields}


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.fixture
def open_folder(tmp_path):
    """A folder that a server may read, with everything in it that it may not."""
    folder, outside = tmp_path / "open", tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(png())
    (folder / "a.png").write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "dir").symlink_to("/etc")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(3 << 30)
    return folder


def test_only_regular_files_below_the_folder_are_read(open_folder):
    folder = open_folder
    for url in (f"file://{folder}/a.png", f"FILE://localhost{folder}/a.png", "file:a.png", "file:a.png?x#y",
                "file:./inside.png", f"file:{folder}/../open/a.png"):  # fmt: skip
        assert read_file_url(url, folder, 10_000) == png(), url
    descriptors = len(os.listdir("/proc/self/fd"))
    for url in ("file:" + "a" * 5000, "file:" + "a/" * 5000, "file://[/a.png", "file:loop", "file:fifo",
                "file:.", "file:", "file:link.png", "file:dir/passwd", "file:../secret.png",
                "file:%2e%2e/secret.png",
                "file:a.png%00", "file:gone.png", f"file://evil{folder}/a.png", "file:///dev/zero",
                "file:a.png/b.png", "file:\ud800.png", "file:a%FF.png"):  # fmt: skip
        with pytest.raises(UserError, match="may read"):
            read_file_url(url, folder, 10_000)
    with pytest.raises(UserError, match="3,221,225,472 bytes; at most 10,000 are read"):
        read_file_url("file:huge.png", folder, 10_000)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_file_urls_of_a_server(pipe, open_folder, serving, ask):
    def status(url):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        return ask(address, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})[0]

    with serving(pipe, files=open_folder) as (address, _):
        assert status("file:a.png") == 200 and status(data_url(png())) == 200
        for url in ("file:" + "a" * 5000, "file://[/a.png", "file:loop", "file:fifo", "file:huge.png"):
            assert status(url) == 400, url


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "//a.png", "data:", "data:,", "data:image/png,AAAA", "data:image/png;base64",
     "data:text/html;base64,AAAA", "data:image/png;base64,A", "data:image/png;base64,\u0663",
     "data:;base64,@@", "data:image/png;base64,AA=A", "data:" + ";a" * 9000 + ";base64,AAAA", ""],
)  # fmt: skip
def test_other_urls_are_rejected(url):
    with pytest.raises(UserError, match="image_url"):
        read_data_url(url)


def loader(pipe, **limits):
    return ImageLoader(
        pipe.processor, **{"max_side": 1000, "max_pixels": 50_000, "max_bytes": 10_000, **limits}
    )


def test_the_pixels_of_a_request_are_limited_before_decoding(pipe, monkeypatch):
    monkeypatch.setattr(image_urls, "open_image", None)  # would decode
    images = loader(pipe)
    urls = [data_url(png(100, 40))] * 5  # padded to 100 x 100
    contents, pixels = images.read(urls)
    assert pixels == 50_000 and contents == [png(100, 40)] * 5
    with pytest.raises(UserError, match="more than 50,000 pixels together"):
        images.read([*urls, data_url(png(1, 1))])
    with pytest.raises(UserError, match="Image 1: The image has 1 x 1001 pixels"):
        images.read([data_url(png()), data_url(png(1, 1001))])
    with pytest.raises(UserError, match="mage"):
        images.read([data_url(b"GIF89a")])
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", progressive=True)
    assert len(images.read([data_url(buffer.getvalue())])[0]) == 1
    with pytest.raises(UserError, match="JPEG scans"):
        images.read([data_url(buffer.getvalue() + b"\xff\xda" * 100)])


def test_decoding_ends_when_it_is_cancelled(pipe, monkeypatch):
    cancelled, opened = threading.Event(), []

    def open_image(content, *_):
        opened.append(content)
        cancelled.set()
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(image_urls, "open_image", open_image)
    with pytest.raises(Cancelled):
        loader(pipe).decode([png()] * 3, cancelled)
    assert len(opened) == 1


def test_large_images_stop_neither_others_nor_their_decoding_outlives_the_client(
    pipe, serving, ask, monkeypatch
):
    real, resume, opened = image_urls.open_image, threading.Event(), []

    def slow(content, *others):
        if content == large:
            opened.append(1)
            assert resume.wait(30)
        return real(content, *others)

    large = png(2100, 2100)  # more than the small ones that share a thread
    monkeypatch.setattr(image_urls, "open_image", slow)
    with serving(pipe) as (url, server):
        threads = server.decoders._max_workers
        host, port = url.removeprefix("http://").split(":")
        connections = []
        for _ in range(threads + 2):
            body = json.dumps(question_about(large, large)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            connections.append(socket.create_connection((host, int(port))))
            connections[-1].sendall(head + body)
        until(lambda: len(opened) == threads)
        # all decoder threads are busy: texts, small images and image generation go on
        assert ask(url, {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 1})[0] == 200
        assert ask(url, question_about(png()))[0] == 200
        assert ask(url, {"prompt": "a star"}, GENERATE)[0] == 200
        for connection in connections:
            connection.close()
        left = f'unitok_requests_total{{route="{CHAT}",status="499"}} {threads + 2}.0'
        until(lambda: left in server.metrics.text())
        resume.set()
        assert ask(url, question_about(large))[0] == 200
    # the first image of each running request and the last question; the waiting ones were never begun
    assert len(opened) == threads + 1


def test_json_of_many_values_is_rejected_unparsed(monkeypatch):
    monkeypatch.setattr(request_body.json, "loads", None)
    for piece in (b"[],", b"{},", b"0,"):
        body = b'{"messages":[],"user":[' + piece * (4 * 10**6 // len(piece)) + b"0]}"
        with pytest.raises(InvalidBody, match="commas and brackets; at most 200000"):
            parse_body(body, "", ChatRequest)


def test_a_body_of_many_values_does_not_stop_the_server(pipe, serving, ask):
    with serving(pipe) as (url, _):
        body = b'{"prompt":"a","user":[' + b"[]," * (6 * 10**6) + b"0]}"
        status, answer = ask(url, body, GENERATE)
        assert status == 400 and "commas and brackets" in answer["error"]["message"]
        status, answer = ask(url, {"prompt": "a", "user": {"a": [[]] * 5000}}, GENERATE)
        assert status == 400 and "user holds more than 1000 values" in answer["error"]["message"]
        assert ask(url, {"prompt": "a", "user": "me"}, GENERATE)[0] == 200


@contextlib.contextmanager
def connections_to(url, count, data=b""):
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(count)
        ]
        for connection in found:
            connection.sendall(data)
        yield found


def is_closed(connection):
    try:
        return connection.recv(100_000) == b""
    except ConnectionError:
        return True


HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
HALF_BODY = HALF_HEAD + b"content-length: 1000\r\n\r\n{"
QUICK = Limits(idle_timeout=0.3, body_timeout=0.3, max_connections=12)


@pytest.mark.parametrize("data", [b"", b"GET", HALF_HEAD, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_idle_and_half_sent_connections_are_closed(pipe, serving, data):
    with serving(pipe, QUICK) as (url, _), connections_to(url, 2, data) as connections:
        for connection in connections:
            connection.settimeout(10)
            while not is_closed(connection):  # after the response of a complete request
                pass


def test_slow_heads_and_bodies_are_ended(pipe, serving):
    with serving(pipe, QUICK) as (url, _):
        # one byte at a time, each before a timeout that starts anew with every byte
        for data, ending in ((HALF_HEAD, b""), (HALF_BODY, b"HTTP/1.1 408"), (
            b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n", b"HTTP/1.1 200",
        )):  # fmt: skip
            with connections_to(url, 1, data) as [connection]:
                connection.settimeout(10)
                end, got = time.monotonic() + 10, b""
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() < end:
                        connection.sendall(b"x")
                        time.sleep(0.05)
                assert time.monotonic() < end
                with contextlib.suppress(ConnectionError):
                    got = connection.recv(100)
                assert got.startswith(ending) or got == b""


def test_clients_that_do_not_read_are_disconnected(pipe, serving):
    with serving(pipe, QUICK) as (url, server), socket.socket() as connection:
        # small buffers, which few responses fill; connections inherit the listening socket's
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        [listener] = server.http_server.servers[0].sockets
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        host, port = url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.settimeout(1)
        with contextlib.suppress(OSError):  # closed, or full
            connection.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n" * 200)
        until(lambda: 'route="/metrics"' in server.metrics.text())
        until(lambda: not server.http_server.server_state.connections)


@pytest.mark.parametrize("data", [b"", HALF_HEAD, HALF_BODY], ids=["idle", "half a head", "half a body"])
def test_held_connections_do_not_keep_out_others(pipe, serving, ask, data):
    limits = Limits(idle_timeout=30, body_timeout=30, max_connections=12, max_batch_size=2, max_queue_size=2)
    with serving(pipe, limits) as (url, server), connections_to(url, 40, data):
        until(lambda: len(server.http_server.server_state.connections) <= 12)
        for _ in range(3):
            assert ask(url, {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 1})[0] == 200


def test_connections_beyond_the_limit_are_refused_while_all_are_working(pipe, serving, ask):
    with serving(pipe, Limits(max_connections=2)) as (url, server):
        end = threading.Event()

        def slow(jobs):
            while not end.is_set():
                time.sleep(0.01)
                yield
            for job in jobs:
                job.fail(UserError("ended"))

        server.batcher.run_batch = slow
        body = b'{"messages":[{"role":"user","content":"a"}]}'
        data = HALF_HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body
        with connections_to(url, 2, data) as connections:
            until(lambda: server.batcher.running + server.batcher.waiting == 2)
            assert ask(url, path="/health")[0] == 503
            end.set()
            assert all(connection.recv(100).startswith(b"HTTP/1.1 400") for connection in connections)


def test_without_descriptors_connections_are_closed_and_accepting_goes_on(monkeypatch):
    real, errors = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept(self):
        if errors:
            raise errors.pop()
        return real(self)

    with listen("127.0.0.1", 0) as listener:
        with connections_to("http://%s:%s" % listener.getsockname(), 1) as [first]:  # noqa: UP031
            monkeypatch.setattr(socket.socket, "accept", accept)
            with pytest.raises(BlockingIOError):
                listener.accept()
            assert is_closed(first)
        with connections_to("http://%s:%s" % listener.getsockname(), 1):  # noqa: UP031
            listener.accept()[0].close()


def test_equal_log_lines_are_limited():
    records, limit = [], RateLimit(lines=3, seconds=0.2)

    def log(text, *arguments):
        record = logging.LogRecord("a", logging.WARNING, "", 0, text, arguments, None)
        if limit.filter(record):
            records.append(record.getMessage())

    for number in range(100):
        log("number %d", number)
    log("another")
    for number in range(100):  # as asyncio does
        log(f"Exception in callback <at 0x{number:08x}>\nhandle")
    assert records[:4] == ["number 0", "number 1", "number 2", "another"] and len(records) == 7
    time.sleep(0.25)
    log("number %d", 100)
    assert records[-1] == "number 100 (97 more such lines left out)"


def test_floods_of_invalid_requests_write_few_lines(pipe, serving, caplog):
    with serving(pipe) as (url, _), caplog.at_level(logging.WARNING, "uvicorn.error"):
        for _ in range(60):
            with connections_to(url, 1, b"\x16\x03\x01\r\n\r\n") as [connection]:
                while not is_closed(connection):
                    pass
    assert len(caplog.records) <= 11
