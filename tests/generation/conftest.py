"""Fixtures: tiny random models for image and text generation, a pipeline, and a running server."""

import contextlib
import faulthandler
import json
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.generation import Pipeline
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(**changes) -> UniTokMLLMConfig:
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sizes = {
        "text_config": text,
        "depth_config": {"num_hidden_layers": 2},
        "num_codebooks": 3,
        "codebook_size": 16,
        "codebook_dim": 4,
        "visual_hidden_size": 24,
        "num_image_tokens": 9,
    }
    return UniTokMLLMConfig(**{**sizes, **changes})


def tiny_model(**changes) -> UniTokForConditionalGeneration:
    """A random model; weights are enlarged, so that codes differ between positions and prompts."""
    torch.manual_seed(7)
    model = UniTokForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(
                    0, 1.0 if "embed" in name or "codebooks" in name else 1.5 * weight.shape[-1] ** -0.5
                )
    return model


@pytest.fixture(scope="session")
def make_model():
    """make_model(**changes of the config) -> a tiny model."""
    return tiny_model


@pytest.fixture(scope="session", params=["full", "last"])
def model(request):
    return tiny_model(visual_context=request.param)


@pytest.fixture(scope="session")
def full_model():
    return tiny_model()


@pytest.fixture(scope="session")
def tiny_unitok():
    torch.manual_seed(3)
    model = UniTok(
        UniTokConfig(
            image_size=48,
            stem_width=8,
            stage_widths=(8, 16),
            stage_depths=(1, 1),
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            decoder_widths=(16, 8),
            decoder_depths=(1, 1),
            num_codebooks=3,
            codebook_size=16,
            codebook_dim=4,
            embed_dim=16,
            text_hidden_size=16,
            text_num_layers=1,
            text_num_heads=2,
            text_vocab_size=32,
            text_context_length=8,
        )
    ).eval()
    with torch.no_grad():
        model.quantizer.codebooks.normal_()
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory, full_model, tiny_unitok, golden):
    """A complete MLLM folder: model, processor, `unitok/`."""
    path = tmp_path_factory.mktemp("models") / "mllm"
    full_model.config.unitok_fingerprint = tiny_unitok.fingerprint()
    full_model.save_pretrained(path)
    tiny_unitok.save_pretrained(path / "unitok")
    processor = UniTokProcessor.from_text_tokenizer(
        golden / "mllm" / "tokenizer.model", image_size=48, num_image_tokens=9, template="plain"
    )
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pipe(folder):
    return Pipeline.from_pretrained(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three PNGs of different shapes."""
    path, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = []
    for i, shape in enumerate([(48, 48, 3), (60, 40, 3), (50, 90, 3)]):
        files.append(path / f"p{i}.png")
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(files[-1])
    return files


def request(url, body=None, path="/v1/chat/completions", **headers):
    """(status, parsed response) of a request; `body` is bytes, or is sent as JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url + path, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text.decode()


@pytest.fixture(scope="session")
def ask():
    """The function `request`."""
    return request


@contextlib.contextmanager
def running(pipe, limits=None, **options):
    """A running server; yields (its address, its `Server` with an `http_server`)."""
    from open_unitok.generation.serving.app import create_app
    from open_unitok.generation.serving.http_server import HttpServer
    from open_unitok.generation.serving.listen import listen

    app = create_app(pipe, "tiny", limits, **options)
    listening = listen("127.0.0.1", 0)
    server = app.state.server.http_server = HttpServer(app, grace=2)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.server
    finally:
        server.should_exit = True
        thread.join(60)  # beside other tests it may take its time
        if thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__)  # what it waits for
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving():
    """The context manager `running`."""
    return running


@pytest.fixture(scope="session")
def server(pipe):
    """(address, `Server`) with small limits."""
    from open_unitok.generation.serving.limits import Limits

    limits = Limits(
        max_batch_size=4, max_queue_size=6, max_body=200_000, max_side=1000, timeout=60, body_timeout=2
    )
    with running(pipe, limits) as found:
        yield found
