"""Requests a second of `unitok serve` with many clients against one, in one run.

    python benchmarks/serving.py --model runs/demo/finetune/model

One client asks for --alone seconds, then --clients ask at once for --seconds, each sending its next request
when the last one is answered; both send the same requests: images to draw and questions about a
image in turn. Printed: requests a second, their ratio, seconds a request, errors, and the server's memory.
"""

import argparse
import base64
import http.client
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
from PIL import Image, ImageDraw

Request = tuple[str, dict[str, Any]]


def picture() -> str:
    """A red circle as a data: URL."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def requests_of(kind: str) -> list[Request]:
    """What clients send, in turn."""
    asked = [{"type": "image_url", "image_url": {"url": picture()}}]
    questions = ("What is in the image?", "How many objects are there?", "What colour is the circle?")
    prompts = ("a red circle", "two blue squares", "a green star and a yellow circle")
    draw = [("/v1/images/generations", {"prompt": prompt, "seed": i}) for i, prompt in enumerate(prompts)]
    ask = [
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": [*asked, {"type": "text", "text": text}]}],
                "max_tokens": 32,
            },
        )
        for text in questions
    ]
    return {"draw": draw, "ask": ask, "mixed": [x for pair in zip(draw, ask) for x in pair]}[kind]


def client(
    address: str, requests: list[Request], first: int, end: float, seconds: list[float], errors: list[str]
):
    """One client until `end`; each request's seconds, and what went wrong."""
    connection = http.client.HTTPConnection(address, timeout=300)
    number = first
    while time.monotonic() < end:
        path, body = requests[number % len(requests)]
        started = time.monotonic()
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        seconds.append(time.monotonic() - started)
        if answer.status != 200:
            errors.append(f"{answer.status}: {text[:200]!r}")
        number += 1
    connection.close()


def measure(address: str, requests: list[Request], clients: int, duration: float) -> dict[str, Any]:
    """Requests a second and seconds a request of so many clients."""
    seconds: list[float] = []
    errors: list[str] = []
    started = time.monotonic()
    threads = [
        threading.Thread(target=client, args=(address, requests, i, started + duration, seconds, errors))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    ordered = sorted(seconds)
    return {
        "clients": clients,
        "requests": len(seconds),
        "requests_per_second": round(len(seconds) / took, 2),
        "median_seconds": round(statistics.median(ordered), 3),
        "p95_seconds": round(ordered[int(0.95 * (len(ordered) - 1))], 3),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def main() -> None:
    """Start the server, measure, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--alone", type=float, default=20)
    parser.add_argument("--kinds", nargs="+", default=["mixed"], choices=["draw", "ask", "mixed"])
    args = parser.parse_args()
    command = [sys.executable, "-m", "open_unitok", "serve", "--model", args.model, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        address = ""
        for line in server.stderr:
            if "http://" in line:
                address = line.split("http://")[1].split("/")[0]
                break
        process = psutil.Process(server.pid)
        for kind in args.kinds:
            requests = requests_of(kind)
            measure(address, requests, 1, 2.0)  # warm
            one = measure(address, requests, 1, args.alone)
            memory, threads = process.memory_info().rss, process.num_threads()
            many = measure(address, requests, args.clients, args.seconds)
            print(
                json.dumps(
                    {
                        "kind": kind,
                        "one": one,
                        "many": many,
                        "ratio": round(many["requests_per_second"] / one["requests_per_second"], 2),
                        "server_mb_before": memory >> 20,
                        "server_mb_after": process.memory_info().rss >> 20,
                        "server_threads": [threads, process.num_threads()],
                        "load": [round(x, 1) for x in os.getloadavg()],
                    },
                    indent=2,
                ),
                flush=True,
            )
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


if __name__ == "__main__":
    main()
