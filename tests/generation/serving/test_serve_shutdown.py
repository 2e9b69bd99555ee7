"""The end of `unitok serve`: what runs is finished, what waits gets 503, a second signal quits."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from open_unitok.generation.serving.limits import Limits

CHAT, GENERATE = "/v1/chat/completions", "/v1/images/generations"
QUESTION = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_a_shutdown_finishes_what_runs_and_rejects_what_waits(pipe, serving, ask):
    answers, threads = {}, []

    def start(name, *arguments):
        def call():
            answers[name] = ask(url, *arguments)

        threads.append(threading.Thread(target=call))
        threads[-1].start()

    with serving(pipe, Limits(max_batch_size=2, batch_window=0.0, timeout=60)) as (url, server):
        real, resume = server.batcher.run_batch, threading.Event()

        def held(jobs):
            while not resume.is_set():
                time.sleep(0.005)
                yield
            yield from real(jobs)

        server.batcher.run_batch = held
        start("chat", QUESTION)
        # two of the three images run; the third belongs to a request that runs
        start("images", {"prompt": "a star", "n": 3, "seed": 1}, GENERATE)
        until(lambda: server.batcher.running == 3 and server.batcher.waiting == 1)
        start("waiting image", {"prompt": "a star"}, GENERATE)
        start("waiting chat", {**QUESTION, "max_tokens": 3})
        until(lambda: server.batcher.waiting == 3)
        start("waiting stream", {**QUESTION, "stream": True})
        until(lambda: server.batcher.waiting == 4)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as half:
            half.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{{".encode())
            until(lambda: server.bodies._incomplete)
            server.http_server.should_exit = True
            assert half.recv(100).startswith(b"HTTP/1.1 503")
        until(lambda: len(answers) == 3)
        assert not server.batcher.alive and server.batcher.running == 3
        resume.set()
        for thread in threads:
            thread.join(20)
    for name in ("waiting image", "waiting chat"):
        assert answers[name][0] == 503 and answers[name][1]["error"]["code"] == "shutting_down", name
    # its status had been sent
    assert answers["waiting stream"][0] == 200 and "shutting down" in answers["waiting stream"][1]
    assert answers["chat"][0] == 200 and answers["chat"][1]["choices"]
    assert answers["images"][0] == 200 and len(answers["images"][1]["data"]) == 3


def test_a_decoding_that_waits_is_rejected_at_shutdown(pipe, serving, ask, monkeypatch):
    with serving(pipe) as (url, server):
        resume, answers = threading.Event(), []
        monkeypatch.setattr(server.parser, "parse_chat", lambda body: resume.wait(20))
        thread = threading.Thread(target=lambda: answers.append(ask(url, QUESTION)))
        thread.start()
        until(lambda: server.executor._threads and server.executor._work_queue.empty())
        server.http_server.should_exit = True
        thread.join(20)
        resume.set()
    assert answers[0][0] == 503


# `unitok` whose answers never end
ENDLESS = """
import sys, time
from open_unitok.cli.main import main
from open_unitok.generation.serving.worker import ModelWorker

def endless(self, jobs):
    print("running", file=sys.stderr, flush=True)
    while True:
        time.sleep(0.01)
        yield

ModelWorker.__call__ = endless
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_signals(folder, tmp_path, second):
    log = tmp_path / "log"
    options = ["serve", "--model", str(folder), "--port", "0"]
    for first in (signal.SIGTERM, signal.SIGINT):
        with open(log, "w") as file:
            process = subprocess.Popen([sys.executable, "-c", ENDLESS, *options], stderr=file)
        try:
            until(lambda: "Serving" in log.read_text(), 60)
            port = int(log.read_text().partition("/v1")[0].rpartition(":")[2])
            if first == second:  # a graceful end without requests
                process.send_signal(first)
                assert process.wait(30) == 0 and "Stopped." in log.read_text()
                continue
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", CHAT, json.dumps(QUESTION), {"content-type": "application/json"})
            until(lambda: "running" in log.read_text())
            process.send_signal(first)
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(second)
            assert process.wait(10) == 128 + second
            assert "Traceback" not in log.read_text()
        finally:
            process.kill()
            process.wait()
