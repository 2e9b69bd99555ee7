"""`unitok serve` over loopback: the openai client, streams, batches, full queues, disconnecting clients."""

import asyncio
import base64
import io
import json
import socket
import threading
import time

import numpy as np
import openai
import pytest
from PIL import Image

from open_unitok.generation import Sampling
from open_unitok.generation.image_files import RECORD_KEY
from open_unitok.generation.serving.limits import Limits
from open_unitok.generation.serving.listen import allowed_hosts, listen
from open_unitok.generation.serving.metrics import ServerMetrics


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def question_about(image: bytes | str, text="What is it?"):
    url = image if isinstance(image, str) else data_url(image)
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def decoded(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def test_answers_equal_those_of_the_pipeline(client, pipe, photos):
    body = question_about(photos[1].read_bytes())
    answer = client.chat.completions.create(model="tiny", **body)
    [choice] = answer.choices
    assert choice.message.content == pipe.answer([photos[1]], ["What is it?"], max_new_tokens=4)[0]
    assert choice.finish_reason in ("stop", "length") and answer.model == "tiny"
    assert answer.usage.prompt_tokens > 9 and answer.usage.completion_tokens <= 4

    conversation = [
        *body["messages"],
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "Red?"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=conversation, max_completion_tokens=5)
    expected = pipe.chat("Red?", photos[1], [("What is it?", "a star")], max_new_tokens=5)
    assert answer.choices[0].message.content == expected


def test_a_streamed_answer_is_the_same(client, photos):
    body = {"model": "tiny", **question_about(photos[0].read_bytes()), "max_tokens": 12}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_stop_text_ends_the_answer_before_it(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 20}
    whole = client.chat.completions.create(**body).choices[0].message.content
    assert len(whole) > 6
    stop = whole[4:6]
    expected = whole[: whole.find(stop)].rstrip()
    cut = client.chat.completions.create(**body, stop=[stop]).choices[0]
    assert cut.message.content == expected and cut.finish_reason == "stop"
    chunks = client.chat.completions.create(**body, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_sampled_answers_with_a_seed_repeat(client):
    def sample(seed):
        body = {"messages": [{"role": "user", "content": "Say"}], "max_tokens": 10, "temperature": 1.5}
        return client.chat.completions.create(model="tiny", **body, seed=seed).choices[0].message.content

    assert sample(3) == sample(3) and len({sample(seed) for seed in range(4)}) > 1


def test_images_equal_those_of_the_pipeline(client, pipe):
    settings = {"seed": 5, "guidance": 2.0, "negative_prompt": "a square"}
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, extra_body=settings)
    expected = pipe.generate(["a red circle"] * 2, Sampling(guidance=2.0), seed=5, negative_prompt="a square")
    assert len(answer.data) == 2
    for i, (entry, image) in enumerate(zip(answer.data, expected)):
        got = decoded(entry)
        assert np.array_equal(np.asarray(got), np.asarray(image))
        record = json.loads(got.text[RECORD_KEY])
        assert (record["prompt"], record["seed"], record["guidance"]) == ("a red circle", 5 + i, 2.0)
    answer = client.images.generate(
        prompt="a star", size="48x48", response_format="url", output_format="webp"
    )
    assert answer.data[0].url.startswith("data:image/webp;base64,")
    record = json.loads(decoded(client.images.generate(prompt="a star").data[0]).text[RECORD_KEY])
    assert (record["guidance"], record["temperature"], record["greedy"]) == (5.0, 1.0, False)


def test_a_streamed_image_sends_previews(client, pipe):
    body = {"model": "tiny", "prompt": "a star", "extra_body": {"seed": 1}}
    events = list(client.images.generate(**body, stream=True, partial_images=2))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    previews = list(pipe.stream(["a star"], seed=1))
    for event, (image,) in zip(events, previews, strict=True):
        assert np.array_equal(np.asarray(decoded(event)), np.asarray(image))


def test_concurrent_requests_share_batches(pipe, serving, ask):
    with serving(pipe, Limits(max_batch_size=8, batch_window=0.3)) as (url, server):
        alone = ask(url, {"prompt": "a star", "seed": 0}, "/v1/images/generations")[1]["data"][0]["b64_json"]
        bodies = [{"prompt": "a star", "seed": i} for i in range(5)]
        results = concurrently(lambda body: ask(url, body, "/v1/images/generations"), bodies)
        assert [status for status, _ in results] == [200] * 5
        assert results[0][1]["data"][0]["b64_json"] == alone
        text = server.metrics.text()
    assert 'unitok_batch_rows_count{kind="image"} 2.0' in text and "unitok_images_total 6.0" in text
    assert 'unitok_batch_rows_sum{kind="image"} 6.0' in text


def concurrently(function, arguments):
    """The results of calls, each on its own thread."""
    results = [None] * len(arguments)

    def call(i):
        results[i] = function(arguments[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


class SlowWorker:
    """A substitute for a server's worker: one step every 10 ms until `end` is set."""

    def __init__(self, server):
        self.steps, self.end, self.batches = 0, threading.Event(), []
        server.batcher.run_batch = self

    def __call__(self, jobs):
        self.batches.append(len(jobs))
        while not self.end.is_set():
            self.steps += 1
            time.sleep(0.01)
            yield
        raise RuntimeError("the slow worker ended")


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def send_without_reading(url, path, body):
    """Send a request; the caller closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_batch_stops_when_its_client_disconnects(pipe, stream, serving):
    with serving(pipe) as (url, server):
        slow = SlowWorker(server)
        body = {"messages": [{"role": "user", "content": "What?"}], "stream": stream}
        connection = send_without_reading(url, "/v1/chat/completions", body)
        until(lambda: slow.steps > 3)
        connection.close()
        until(lambda: server.batcher.running == 0 and not server.batcher._active)
        steps = slow.steps
        time.sleep(0.05)
        assert slow.steps == steps
        assert "unitok_cancelled_total 1.0" in server.metrics.text()


def test_a_full_queue_is_429_and_waiting_requests_are_kept(pipe, serving, ask):
    # batch size 4: with a smaller one the middleware, which counts requests, rejects before the queue is full
    with serving(pipe, Limits(max_batch_size=4, max_queue_size=2)) as (url, server):
        real, slow = server.batcher.run_batch, SlowWorker(server)
        body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
        results = []
        threads = [threading.Thread(target=lambda: results.append(ask(url, body))) for _ in range(3)]
        threads[0].start()
        until(lambda: slow.steps > 0)
        for thread in threads[1:]:
            thread.start()
        until(lambda: server.batcher.waiting == 2)
        status, answer = ask(url, body)
        assert status == 429 and answer["error"]["code"] == "queue_full"
        assert "The queue holds 2 images or answers; 1 more" in answer["error"]["message"]
        status, answer = ask(url, {**body, "stream": True})
        assert status == 429 and "1 more" in answer["error"]["message"]
        status, answer = ask(url, {"prompt": "a star", "n": 2}, "/v1/images/generations")
        assert status == 429 and "2 more" in answer["error"]["message"]
        assert ask(url, path="/health") == (200, {"status": "ok"})
        assert "unitok_waiting 2.0" in ask(url, path="/metrics")[1]
        server.batcher.run_batch = real
        slow.end.set()
        for thread in threads:
            thread.join(30)
        # the running one failed, the waiting ones were answered
        assert sorted(status for status, _ in results) == [200, 200, 500]
        assert next(a for s, a in results if s == 500)["error"]["code"] == "internal_error"


def test_too_many_concurrent_requests_are_429_before_their_bodies_are_read(pipe, serving, ask):
    with serving(pipe, Limits(max_batch_size=1, max_queue_size=1)) as (url, server):
        slow = SlowWorker(server)
        connections = [send_without_reading(url, "/v1/chat/completions", user("What?"))]
        until(lambda: slow.steps > 0)  # before that the second one may be rejected too
        connections.append(send_without_reading(url, "/v1/chat/completions", user("What?")))
        until(lambda: server.batcher.waiting == 1)
        status, answer = ask(url, b"no JSON")
        assert status == 429 and "Too many concurrent requests" in answer["error"]["message"]
        for connection in connections:
            connection.close()
        until(lambda: server.batcher.running == server.batcher.waiting == 0)


def test_a_request_that_times_out_is_504(pipe, serving, ask):
    with serving(pipe, Limits(timeout=0.3)) as (url, server):
        SlowWorker(server)
        status, answer = ask(url, {"messages": [{"role": "user", "content": "What?"}]})
        assert status == 504 and "0.3 s" in answer["error"]["message"]
        body = {"messages": [{"role": "user", "content": "What?"}], "stream": True}
        status, text = ask(url, body)
        assert status == 200 and '"code": "timeout"' in text
        until(lambda: server.batcher.running == 0)


def test_an_answer_does_not_wait_for_an_image(pipe, serving, ask):
    with serving(pipe) as (url, server):
        real, slow = server.batcher.run_batch, SlowWorker(server)
        server.batcher.run_batch = lambda jobs: slow(jobs) if jobs[0].key.kind == "image" else real(jobs)
        connection = send_without_reading(url, "/v1/images/generations", {"prompt": "a star"})
        until(lambda: slow.steps > 0)
        status, _ = ask(url, {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 3})
        assert status == 200 and server.batcher.running == 1
        connection.close()


def test_requests_need_the_token(pipe, serving, ask):
    with serving(pipe, token="secret") as (url, _):
        assert ask(url, path="/v1/models")[0] == 401
        assert ask(url, path="/v1/models", authorization="Bearer wrong")[0] == 401
        assert ask(url, path="/v1/models", authorization="secret")[0] == 401
        assert ask(url, path="/v1/models", authorization="Bearer secret")[0] == 200
        assert ask(url, path="/metrics")[0] == 401
        assert ask(url, path="/health")[0] == 200


def test_web_pages_of_other_sites_are_rejected_on_loopback(pipe, serving, ask):
    with serving(pipe, hosts=allowed_hosts("127.0.0.1")) as (url, _):
        port = url.rpartition(":")[2]
        for host in (
            "evil.example",
            "localhost.evil.example",
            f"127.0.0.1:{port}@evil.example",
            "localhost.",
            "",
        ):
            status, answer = ask(url, path="/v1/models", host=host)
            assert status == 403 and answer["error"]["code"] == "wrong_host", host
        for host in (f"localhost:{port}", f"[::1]:{port}", "LOCALHOST", "127.0.0.1"):
            assert ask(url, path="/v1/models", host=host)[0] == 200
        # a cross-site POST needs no permission if it has no content-type
        for origin in ("http://evil.example", "null", "http://localhost.evil.example", "file://", "http://["):
            status, answer = ask(url, user("a"), origin=origin)
            assert status == 403 and answer["error"]["code"] == "wrong_origin", origin
        assert ask(url, {**user("a"), "max_tokens": 1}, origin="http://localhost:3000")[0] == 200


def test_the_names_a_server_accepts():
    assert allowed_hosts("0.0.0.0") is None and allowed_hosts("myhost") is None
    assert allowed_hosts("::1") == allowed_hosts("localhost") == {"localhost", "127.0.0.1", "::1"}
    assert allowed_hosts("127.0.0.5") == {"localhost", "127.0.0.1", "::1", "127.0.0.5"}
    assert "me.example" in allowed_hosts("127.0.0.1", ["Me.Example"])
    assert allowed_hosts("0.0.0.0", ["me.example"]) >= {"me.example"}


def test_two_servers_have_separate_metrics():
    busy, idle = ServerMetrics(lambda: 3, lambda: 1), ServerMetrics(lambda: 0, lambda: 0)
    busy.tokens.labels("prompt").inc(12_345_677)
    busy.tokens.labels("prompt").inc()
    text = busy.text()
    for line in (
        'unitok_tokens_total{kind="prompt"} 1.2345678e+07',
        "unitok_waiting 3.0",
        "unitok_running 1.0",
    ):
        assert f"\n{line}\n" in text
    assert 'kind="prompt"' not in idle.text() and "_created" not in text


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "open-unitok"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])


def test_a_failed_batch_fails_only_its_requests(pipe, monkeypatch, serving, ask):
    with serving(pipe) as (url, server):
        real = server.batcher.run_batch

        def failing(jobs):
            yield
            raise MemoryError("out of memory")

        server.batcher.run_batch = failing
        assert ask(url, user("a"))[0] == 500
        status, text = ask(url, {**user("a"), "stream": True})
        assert status == 200 and "internal_error" not in text and '"type": "server_error"' in text
        server.batcher.run_batch = real
        assert ask(url, {**user("a"), "max_tokens": 2})[0] == 200


def test_shutdown_fails_waiting_requests_with_503(pipe, serving, ask):
    results = []
    with serving(pipe) as (url, server):
        slow = SlowWorker(server)
        thread = threading.Thread(target=lambda: results.append(ask(url, user("a"))))
        thread.start()
        until(lambda: slow.steps > 0)
        server.batcher.stop()
        thread.join(20)
        assert ask(url, user("b"))[0] == 503
        assert ask(url, path="/health")[0] == 503
    assert results[0][0] == 503


def test_responses_are_not_delayed_by_nagle():
    # head and body are two writes: Nagle's algorithm would delay the second by 40 ms
    async def no_delay():
        found = asyncio.get_running_loop().create_future()

        async def accept(_, writer):
            found.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        with listen("127.0.0.1", 0) as sock:
            async with await asyncio.start_server(accept, sock=sock):
                _, writer = await asyncio.open_connection(*sock.getsockname())
                writer.close()
                return await found

    assert asyncio.run(no_delay())
