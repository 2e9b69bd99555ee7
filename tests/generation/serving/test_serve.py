"""`unitok serve` over loopback: the openai client, streams, batches, full queues, clients that leave."""

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
from open_unitok.generation.image_files import KEY
from open_unitok.generation.serving.listen import listen
from open_unitok.generation.serving.metrics import Metrics
from open_unitok.generation.serving.middleware import Limits


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def showing(picture: bytes | str, text="What is it?"):
    url = picture if isinstance(picture, str) else data_url(picture)
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def decoded(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json)))


def test_answers_are_those_of_the_pipeline(client, pipe, photos):
    body = showing(photos[1].read_bytes())
    answer = client.chat.completions.create(model="tiny", **body)
    [choice] = answer.choices
    assert choice.message.content == pipe.answer([photos[1]], ["What is it?"], max_new_tokens=4)[0]
    assert choice.finish_reason in ("stop", "length") and answer.model == "tiny"
    assert answer.usage.prompt_tokens > 9 and answer.usage.completion_tokens <= 4

    talk = [
        *body["messages"],
        {"role": "assistant", "content": "a star"},
        {"role": "user", "content": "Red?"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=talk, max_completion_tokens=5)
    expected = pipe.chat("Red?", photos[1], [("What is it?", "a star")], max_new_tokens=5)
    assert answer.choices[0].message.content == expected


def test_a_streamed_answer_is_the_same(client, photos):
    body = {"model": "tiny", **showing(photos[0].read_bytes()), "max_tokens": 12}
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
    def draw(seed):
        body = {"messages": [{"role": "user", "content": "Say"}], "max_tokens": 10, "temperature": 1.5}
        return client.chat.completions.create(model="tiny", **body, seed=seed).choices[0].message.content

    assert draw(3) == draw(3) and len({draw(seed) for seed in range(4)}) > 1


def test_images_are_those_of_the_pipeline(client, pipe):
    settings = {"seed": 5, "guidance": 2.0, "negative_prompt": "a square"}
    answer = client.images.generate(model="tiny", prompt="a red circle", n=2, extra_body=settings)
    expected = pipe.generate(["a red circle"] * 2, Sampling(guidance=2.0), seed=5, negative="a square")
    assert len(answer.data) == 2
    for i, (entry, image) in enumerate(zip(answer.data, expected)):
        got = decoded(entry)
        assert np.array_equal(np.asarray(got), np.asarray(image))
        record = json.loads(got.text[KEY])
        assert (record["prompt"], record["seed"], record["guidance"]) == ("a red circle", 5 + i, 2.0)
    answer = client.images.generate(
        prompt="a star", size="48x48", response_format="url", output_format="webp"
    )
    assert answer.data[0].url.startswith("data:image/webp;base64,")
    record = json.loads(decoded(client.images.generate(prompt="a star").data[0]).text[KEY])
    assert (record["guidance"], record["temperature"], record["greedy"]) == (5.0, 1.0, False)


def test_a_streamed_image_grows(client, pipe):
    body = {"model": "tiny", "prompt": "a star", "extra_body": {"seed": 1}}
    events = list(client.images.generate(**body, stream=True, partial_images=2))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    growing = list(pipe.stream(["a star"], seed=1))
    for event, (image,) in zip(events, growing, strict=True):
        assert np.array_equal(np.asarray(decoded(event)), np.asarray(image))


def test_requests_that_come_together_share_batches(pipe, serving, ask):
    with serving(pipe, Limits(max_batch_size=8, window=0.3)) as (url, server):
        alone = ask(url, {"prompt": "a star", "seed": 0}, "/v1/images/generations")[1]["data"][0]["b64_json"]
        bodies = [{"prompt": "a star", "seed": i} for i in range(5)]
        results = at_once(lambda body: ask(url, body, "/v1/images/generations"), bodies)
        assert [status for status, _ in results] == [200] * 5
        assert results[0][1]["data"][0]["b64_json"] == alone
        text = server.metrics.text()
    assert 'unitok_batch_rows_count{kind="draw"} 2' in text and "unitok_images_total 6" in text
    assert 'unitok_batch_rows_sum{kind="draw"} 6' in text


def at_once(function, arguments):
    """Results of calls from one thread each."""
    results = [None] * len(arguments)

    def call(i):
        results[i] = function(arguments[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


class Slow:
    """The work of a server that takes a step every 10 ms until told to end."""

    def __init__(self, server):
        self.steps, self.end, self.batches = 0, threading.Event(), []
        server.batcher.work = self

    def __call__(self, jobs):
        self.batches.append(len(jobs))
        while not self.end.is_set():
            self.steps += 1
            time.sleep(0.01)
            yield
        raise RuntimeError("the slow work was told to end")


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def leave_after_sending(url, path, body):
    """A client that sends a request and goes away."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_when_its_client_leaves(pipe, stream, serving):
    with serving(pipe) as (url, server):
        slow = Slow(server)
        body = {"messages": [{"role": "user", "content": "What?"}], "stream": stream}
        connection = leave_after_sending(url, "/v1/chat/completions", body)
        until(lambda: slow.steps > 3)
        connection.close()
        until(lambda: server.batcher.running == 0 and not server.batcher._active)
        steps = slow.steps
        time.sleep(0.05)
        assert slow.steps == steps
        assert "unitok_cancelled_total 1" in server.metrics.text()


def test_a_full_queue_is_429_and_what_waits_is_not_lost(pipe, serving, ask):
    # a batch of 4: with less the guard, which counts requests, would refuse before the queue does
    with serving(pipe, Limits(max_batch_size=4, max_queue_size=2)) as (url, server):
        real, slow = server.batcher.work, Slow(server)
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
        assert "2 images or answers are waiting and 1 more" in answer["error"]["message"]
        status, answer = ask(url, {**body, "stream": True})
        assert status == 429 and "1 more" in answer["error"]["message"]
        status, answer = ask(url, {"prompt": "a star", "n": 2}, "/v1/images/generations")
        assert status == 429 and "2 more" in answer["error"]["message"]
        assert ask(url, path="/health") == (200, {"status": "ok"})
        assert "unitok_waiting 2" in ask(url, path="/metrics")[1]
        server.batcher.work = real
        slow.end.set()
        for thread in threads:
            thread.join(30)
        # the one under way failed, by name; those behind it were answered
        assert sorted(status for status, _ in results) == [200, 200, 500]
        assert next(a for s, a in results if s == 500)["error"]["code"] == "internal_error"


def test_more_requests_than_could_be_queued_are_429_before_their_bodies_are_read(pipe, serving, ask):
    with serving(pipe, Limits(max_batch_size=1, max_queue_size=1)) as (url, server):
        slow = Slow(server)
        connections = [leave_after_sending(url, "/v1/chat/completions", user("What?"))]
        until(lambda: slow.steps > 0)  # before that a second one may be refused too
        connections.append(leave_after_sending(url, "/v1/chat/completions", user("What?")))
        until(lambda: server.batcher.waiting == 1)
        status, answer = ask(url, b"no JSON")
        assert status == 429 and "Too many requests at once" in answer["error"]["message"]
        for connection in connections:
            connection.close()
        until(lambda: server.batcher.running == server.batcher.waiting == 0)


def test_a_request_that_takes_too_long_is_504(pipe, serving, ask):
    with serving(pipe, Limits(timeout=0.3)) as (url, server):
        Slow(server)
        status, answer = ask(url, {"messages": [{"role": "user", "content": "What?"}]})
        assert status == 504 and "0.3 s" in answer["error"]["message"]
        body = {"messages": [{"role": "user", "content": "What?"}], "stream": True}
        status, text = ask(url, body)
        assert status == 200 and '"code": "timeout"' in text
        until(lambda: server.batcher.running == 0)


def test_an_answer_does_not_wait_behind_a_image(pipe, serving, ask):
    with serving(pipe) as (url, server):
        real, slow = server.batcher.work, Slow(server)
        server.batcher.work = lambda jobs: slow(jobs) if jobs[0].key.kind == "draw" else real(jobs)
        connection = leave_after_sending(url, "/v1/images/generations", {"prompt": "a star"})
        until(lambda: slow.steps > 0)
        status, _ = ask(url, {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 3})
        assert status == 200 and server.batcher.running == 1
        connection.close()


def test_a_token_is_asked_for_where_there_is_one(pipe, serving, ask):
    with serving(pipe, token="secret") as (url, _):
        assert ask(url, path="/v1/models")[0] == 401
        assert ask(url, path="/v1/models", authorization="Bearer wrong")[0] == 401
        assert ask(url, path="/v1/models", authorization="secret")[0] == 401
        assert ask(url, path="/v1/models", authorization="Bearer secret")[0] == 200
        assert ask(url, path="/metrics")[0] == 401
        assert ask(url, path="/health")[0] == 200


def test_other_names_than_its_own_are_refused_on_loopback(pipe, serving, ask):
    with serving(pipe, hosts=frozenset({"localhost", "127.0.0.1", "::1"})) as (url, _):
        port = url.rpartition(":")[2]
        assert ask(url, path="/v1/models", host="evil.example")[0] == 403
        assert ask(url, path="/v1/models", host=f"localhost:{port}")[0] == 200
        assert ask(url, path="/v1/models", host=f"[::1]:{port}")[0] == 200


def test_a_counter_of_millions_still_counts():
    metrics = Metrics()
    metrics.counter("tokens_total", "Tokens.")
    metrics.count("tokens_total", 12_345_678)
    metrics.count("tokens_total", 1, kind="prompt")
    assert metrics.text().splitlines()[2:] == ["tokens_total 12345678", 'tokens_total{kind="prompt"} 1']


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "open-unitok"
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])


def test_a_failed_batch_fails_its_requests_and_nothing_else(pipe, monkeypatch, serving, ask):
    with serving(pipe) as (url, server):
        real = server.batcher.work

        def failing(jobs):
            yield
            raise MemoryError("no room")

        server.batcher.work = failing
        assert ask(url, user("a"))[0] == 500
        status, text = ask(url, {**user("a"), "stream": True})
        assert status == 200 and "internal_error" not in text and '"type": "server_error"' in text
        server.batcher.work = real
        assert ask(url, {**user("a"), "max_tokens": 2})[0] == 200


def test_a_server_that_ends_tells_those_who_wait(pipe, serving, ask):
    results = []
    with serving(pipe) as (url, server):
        slow = Slow(server)
        thread = threading.Thread(target=lambda: results.append(ask(url, user("a"))))
        thread.start()
        until(lambda: slow.steps > 0)
        server.batcher.stop()
        thread.join(20)
        assert ask(url, user("b"))[0] == 503
        assert ask(url, path="/health")[0] == 503
    assert results[0][0] == 503


def test_answers_go_out_at_once():
    # head and body are two writes: Nagle's algorithm would hold the second back for 40 ms
    async def sends_at_once():
        found = asyncio.get_running_loop().create_future()

        async def take(_, writer):
            found.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        with listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(take, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                writer.close()
                return await found

    assert asyncio.run(sends_at_once())
