"""`unitok serve` under load: many concurrent clients, killed clients, 10,000 malformed bodies."""

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

CHAT, GENERATE = "/v1/chat/completions", "/v1/images/generations"


@pytest.fixture(scope="module")
def process(folder, tmp_path_factory):
    """`unitok serve` in a separate process; yields (address, process)."""
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "open_unitok", "serve", "--model", str(folder), "--port", "0"]
    with open(log, "w") as file:
        server = subprocess.Popen(command, stderr=file)
    try:
        while "Serving" not in (text := log.read_text()):
            assert server.poll() is None, text
            time.sleep(0.1)
        yield text.split("http://")[1].split("/")[0], psutil.Process(server.pid)
        assert server.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 0
    assert "Stopped." in log.read_text()


def post(connection, path, body):
    """(status, text) over a kept-alive connection."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def metric(address, line):
    """A value from /metrics."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return next(float(row.rpartition(" ")[2]) for row in text.splitlines() if row.startswith(line + " "))


def image(side=48):
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 80).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def bodies(number):
    """Requests of all kinds; each number gives a different one."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image())}},
        {"type": "text", "text": "What?"},
    ]
    ask = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1 + number % 7}
    return [
        (CHAT, ask),
        (CHAT, {**ask, "stream": True}),
        (GENERATE, {"prompt": f"{number} stars", "seed": number}),
    ][number % 3]


@pytest.mark.slow
def test_sixteen_concurrent_clients_get_no_errors(process):
    address, _ = process
    end, statuses = time.monotonic() + 20, []

    def client(number):
        connection = http.client.HTTPConnection(address, timeout=120)
        while time.monotonic() < end:
            status, text = post(connection, *bodies(number))
            statuses.append((status, b'"error"' in text))
            number += 16
        connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) > 32 and set(statuses) == {(200, False)}
    assert metric(address, 'unitok_batch_rows_sum{kind="image"}') > 2 * metric(
        address, 'unitok_batch_rows_count{kind="image"}'
    )


@pytest.mark.slow
def test_requests_of_a_killed_client_are_cancelled(process):
    address, _ = process
    code = f"""
import http.client, json
body = {{"prompt": "a star", "n": 16, "guidance": 2.0}}
# enough images that the server is still generating when the client is killed
connections = [http.client.HTTPConnection({address!r}) for _ in range(12)]
for connection in connections:
    connection.request("POST", {GENERATE!r}, json.dumps(body), {{"content-type": "application/json"}})
print("sent", flush=True)
for connection in connections:
    connection.getresponse().read()
"""
    for _ in range(5):
        client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert client.stdout is not None and client.stdout.readline() == b"sent\n"
        time.sleep(0.03)
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        client.stdout.close()
        deadline = time.monotonic() + 20
        while metric(address, "unitok_running") or metric(address, "unitok_waiting"):
            assert time.monotonic() < deadline
        connection = http.client.HTTPConnection(address, timeout=60)
        assert post(connection, *bodies(2))[0] == 200
        connection.close()
    cancelled = metric(address, 'unitok_requests_total{route="/v1/images/generations",status="499"}')
    assert cancelled >= 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw):
    """A valid request with one random change."""
    path, body = bodies(draw(st.integers(0, 8)))
    whole = {"": json.loads(json.dumps(body))}
    spot, key = whole, ""
    while isinstance(spot[key], (dict, list)) and spot[key] and draw(st.integers(0, 3)):
        spot = spot[key]
        key = draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
    change = draw(st.sampled_from(["replace", "remove", "add"]))
    if change == "replace":
        spot[key] = draw(json_values)
    elif change == "remove" and key != "":
        del spot[key]
    elif isinstance(spot[key], dict):
        spot[key][draw(st.text(max_size=8))] = draw(json_values)
    return path, json.dumps(whole[""]).encode("utf-8", "surrogatepass")


@st.composite
def broken_images(draw):
    """An image with changed bytes, or truncated."""
    content = bytearray(IMAGES[draw(st.integers(0, len(IMAGES) - 1))])
    for _ in range(draw(st.integers(0, 6))):
        content[draw(st.integers(0, min(len(content) - 1, 120)))] = draw(st.integers(0, 255))
    content = content[: draw(st.integers(0, len(content)))]
    url = draw(st.sampled_from(["data:image/png;base64,", "data:image/gif;base64,", "data:,", ""]))
    parts = [{"type": "image_url", "image_url": {"url": url + base64.b64encode(content).decode()}}]
    parts.append({"type": "text", "text": "?"})
    return CHAT, json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 1}).encode()


def images_of_all_formats():
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.effect_noise((9, 7), 80).convert("RGB").save(buffer, kind)
        found.append(buffer.getvalue())
    return found


IMAGES = images_of_all_formats()
paths = st.sampled_from([CHAT, GENERATE])
requests = st.one_of(
    st.tuples(paths, st.binary(max_size=200)),
    st.tuples(paths, json_values.map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))),
    mutated(),
    broken_images(),
)


@pytest.mark.slow
def test_malformed_bodies_cause_neither_5xx_nor_leaks(process):
    address, server = process
    tally, before = {}, []
    connection = http.client.HTTPConnection(address, timeout=60)

    @settings(
        max_examples=10_000, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(requests)
    def flood(request):
        status, text = post(connection, *request)
        assert status < 500, text
        if status != 200:
            assert json.loads(text)["error"]["type"] == "invalid_request_error"
        tally[status] = tally.get(status, 0) + 1
        if not before and sum(tally.values()) == 2000:  # by then all lazy imports and pools are loaded
            before.extend((server.memory_info().rss, server.num_threads()))

    flood()
    connection.close()
    more, threads = server.memory_info().rss - before[0], server.num_threads()
    assert sum(tally.values()) >= 10_000 and tally[400] > 5000, tally
    # the threads that decode large images, at most 4, start with the first such image
    assert threads <= before[1] + 4, "leaked threads"
    assert more < 48 * 2**20, f"{more / 2**20:.0f} MB more"
    assert metric(address, "unitok_running") == 0 and metric(address, "unitok_waiting") == 0
