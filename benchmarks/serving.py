"""Throughput of `unitok serve`: many concurrent clients against one, in one run.

    python benchmarks/serving.py --model runs/demo/finetune/model

First one client sends requests for --baseline-seconds, then --clients clients for --seconds, each sending its
next request when the last one is answered. Both send the same requests: image generation and questions about
an image, alternating. Printed as JSON: requests per second, their ratio, latencies, errors, server memory.
"""

import argparse
import base64
import http.client
import io
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
from harness import load_average, processor_name
from PIL import Image, ImageDraw

Request = tuple[str, dict[str, Any]]
PROMPTS = ("a red circle", "two blue squares", "a green star and a yellow circle")
QUESTIONS = ("What is in the image?", "How many objects are there?", "What colour is the circle?")
KINDS = ("generate", "ask", "mixed")


def main() -> None:
    """Start the server, measure, print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=16, help="concurrent clients (default: 16)")
    parser.add_argument("--seconds", type=float, default=60, help="duration with all clients (default: 60)")
    parser.add_argument(
        "--baseline-seconds", type=float, default=20, help="duration with one client (default: 20)"
    )
    parser.add_argument("--kinds", nargs="+", default=["mixed"], choices=KINDS)
    args = parser.parse_args()
    command = [sys.executable, "-m", "open_unitok", "serve", "--model", args.model, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = wait_for_address(server)
        for kind in args.kinds:
            print(json.dumps(compare(kind, server, address, args), indent=2), flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)


def wait_for_address(server: subprocess.Popen) -> str:
    """host:port from the line that the server prints when it is ready: port 0 lets the system choose."""
    assert server.stderr is not None
    for line in server.stderr:
        if "http://" in line:
            return line.split("http://")[1].split("/")[0]
    sys.exit("the server stopped before it was ready")


def compare(kind: str, server: subprocess.Popen, address: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one client, then all of them."""
    process, requests = psutil.Process(server.pid), make_requests(kind)
    measure(address, requests, clients=1, duration=2.0)  # warm up
    one = measure(address, requests, 1, args.baseline_seconds)
    # memory and threads before and after the load: growth would be a leak
    memory, threads = process.memory_info().rss, process.num_threads()
    many = measure(address, requests, args.clients, args.seconds)
    return {
        "machine": processor_name(),
        "kind": kind,
        "one": one,
        "many": many,
        "ratio": round(many["requests_per_second"] / one["requests_per_second"], 2),
        "server_mb_before": memory >> 20,
        "server_mb_after": process.memory_info().rss >> 20,
        "server_threads": [threads, process.num_threads()],
        "load": load_average(),
    }


def make_requests(kind: str) -> list[Request]:
    """The requests that clients repeat: (path, JSON body)."""
    image = {"type": "image_url", "image_url": {"url": red_circle()}}
    generate = [("/v1/images/generations", {"prompt": text, "seed": i}) for i, text in enumerate(PROMPTS)]
    ask = []
    for text in QUESTIONS:
        message = {"role": "user", "content": [image, {"type": "text", "text": text}]}
        ask.append(("/v1/chat/completions", {"messages": [message], "max_tokens": 32}))
    mixed = [request for pair in zip(generate, ask) for request in pair]
    return {"generate": generate, "ask": ask, "mixed": mixed}[kind]


def red_circle() -> str:
    """An image of a red circle as a data: URL."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def measure(address: str, requests: list[Request], clients: int, duration: float) -> dict[str, Any]:
    """Throughput and latency of `clients` concurrent clients."""
    latencies: list[float] = []
    errors: list[str] = []
    start = time.monotonic()
    threads = [
        threading.Thread(target=run_client, args=(address, requests, i, start + duration, latencies, errors))
        for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - start
    # threads append to shared lists: list.append is atomic
    latencies.sort()
    return {
        "clients": clients,
        "requests": len(latencies),
        "requests_per_second": round(len(latencies) / elapsed, 2),
        "median_seconds": round(statistics.median(latencies), 3),
        "p95_seconds": round(latencies[int(0.95 * (len(latencies) - 1))], 3),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
    }


def run_client(
    address: str, requests: list[Request], first: int, end: float, latencies: list[float], errors: list[str]
) -> None:
    """Send requests until the time `end`, from request `first` on; append latencies and errors."""
    connection = http.client.HTTPConnection(address, timeout=300)
    number = first  # clients start at different requests, so that a batch mixes them
    while time.monotonic() < end:
        path, body = requests[number % len(requests)]
        start = time.monotonic()
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        latencies.append(time.monotonic() - start)
        if response.status != 200:
            errors.append(f"{response.status}: {text[:200]!r}")
        number += 1
    connection.close()


if __name__ == "__main__":
    main()
