"""The page of `unitok ui` in headless Chromium: generate, ask, reconstruct, and invalid input."""

import base64
import http.client
import io
import json
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling
from open_unitok.generation.image_files import RECORD_KEY
from open_unitok.generation.ui.views import code_colours, code_maps
from open_unitok.tokenizer import UniTok, UniTokConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync"]  # fmt: skip
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"
)


@pytest.fixture(scope="module")
def address(pipe):
    """The URL of a running page."""
    import os

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from open_unitok.generation.ui.page import build_page, launch

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = build_page(pipe, "tiny", ["a star"])
    yield launch(page, "127.0.0.1", port).rstrip("/")
    page.close(verbose=False)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, address):
    """A new tab; at the end there must be no console error and no request to another host."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(30_000)
    errors, urls = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: urls.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("#generated")
    yield tab
    tab.close()
    assert errors == []
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []


def saved_images(tab):
    """The images behind the Save links."""
    links = [link.get_attribute("href") for link in tab.locator("#generated figcaption a").all()]
    return [Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) for link in links]


@needs_browser
def test_generate_and_restore_from_the_history(page, pipe):
    page.get_by_label("Random seed").uncheck()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Prompt", exact=True).fill("two blue squares")
    page.get_by_text("2", exact=True).click()
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector("#generated .ou-done")
    photos = saved_images(page)
    expected = pipe.generate(["two blue squares"] * 2, Sampling(guidance=5.0), seed=7)
    assert [np.array_equal(a, b) for a, b in zip(photos, expected, strict=True)] == [True, True]
    record = json.loads(photos[1].text[RECORD_KEY])
    assert (record["prompt"], record["seed"], record["guidance"]) == ("two blue squares", 8, 5.0)

    page.get_by_label("Prompt", exact=True).fill("a star")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("#history button.thumbnail-item").nth(3).wait_for()
    page.locator("#history button.thumbnail-item").nth(2).click()  # seed 8 of the first prompt
    page.wait_for_function("document.querySelector('textarea').value == 'two blue squares'")
    assert page.get_by_label("Seed", exact=True).input_value() == "8"

    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("The prompt is empty.").wait_for()


@needs_browser
def test_a_preview_is_shown_after_every_row(page, pipe, monkeypatch):
    stream, resume = pipe.stream, threading.Event()

    def paused(*arguments, **options):
        for images in stream(*arguments, **options):
            yield images
            assert resume.wait(30)

    monkeypatch.setattr(pipe, "stream", paused)
    page.get_by_label("Prompt", exact=True).fill("a star")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.wait_for_selector("#generated .ou-generating img")
    assert "row 1 of 3" in page.locator("#generated").inner_text() and saved_images(page) == []
    resume.set()
    page.wait_for_selector("#generated .ou-done")
    assert len(saved_images(page)) == 1


@needs_browser
def test_a_corrupt_upload_is_reported_and_the_page_still_works(page, photos, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    page.get_by_role("tab", name="Reconstruct").click()
    upload = page.locator("#original input[type=file]")
    upload.set_input_files(tmp_path / "empty.png")
    page.get_by_text("not a readable image").wait_for()
    page.reload()
    page.get_by_role("tab", name="Reconstruct").click()
    upload.set_input_files(photos[0])
    page.wait_for_selector("#maps rect")


@needs_browser
def test_ask_and_new_conversation(page, pipe, photos, monkeypatch):
    """Each question is asked with the finished answers of its own conversation."""
    stream, histories, resume = pipe.chat_stream, {}, threading.Event()

    def recorded(question, images, history, **options):
        histories[question] = list(history)
        assert resume.wait(30)
        yield from stream(question, images, history, **options)

    monkeypatch.setattr(pipe, "chat_stream", recorded)
    text_of = "document.querySelector('#conversation').innerText"

    def ask(question):
        page.locator("#question textarea").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        page.wait_for_function(f"text => {text_of}.includes(text)", arg=question)

    def history_of(question):
        for _ in range(300):
            if question in histories:
                return histories[question]
            page.wait_for_timeout(100)
        raise AssertionError(f"{question} was not asked")

    page.get_by_role("tab", name="Ask").click()
    page.locator("#question-image input[type=file]").set_input_files(photos[0])
    page.locator("#question-image img").wait_for()
    page.get_by_role("button", name="More settings").last.click()
    page.get_by_label("number input for Max new tokens").fill("4")
    ask("What is it?")
    page.get_by_role("button", name="Describe the image.").click()  # while the first is answered
    resume.set()
    answer = pipe.answer([photos[0]], ["What is it?"], max_new_tokens=4)[0]
    page.wait_for_function(f"text => {text_of}.includes(text)", arg=answer or "(empty answer)")
    assert history_of("What is it?") == []
    assert history_of("Describe the image.") == [("What is it?", answer)]

    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function(f"() => !{text_of}.includes('What is it?')")
    ask("Which?")
    assert history_of("Which?") == []
    page.locator("#question-image input[type=file]").set_input_files(photos[1])
    page.wait_for_function(f"() => !{text_of}.includes('Which?')")
    ask("Who?")
    assert history_of("Who?") == []


@needs_browser
def test_code_maps_show_the_codes_of_a_token(page, photos):
    page.get_by_role("tab", name="Reconstruct").click()
    upload = page.locator("#original input[type=file]")
    upload.set_input_files(photos[1])
    page.wait_for_selector("#maps rect")
    assert page.locator("#maps svg").count() == 3 and page.locator("#maps rect").count() == 27
    assert page.locator("#comparison img").count() == 3 and "dB" in page.locator("#comparison").inner_text()
    page.locator("#maps svg").nth(1).locator("rect").nth(4).hover()
    page.wait_for_function("document.querySelectorAll('#maps .ou-marked').length == 3")
    assert page.locator("#maps .ou-codes").inner_text().startswith("row 2, column 2: ")


def bomb():
    """A PNG whose header says 30,000 x 30,000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = (30_000).to_bytes(4) + (30_000).to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a readable image"), (b"no image", "not one of PNG"), (bomb(), "exceeds limit"),
     (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of PNG")],
)  # fmt: skip
def test_broken_images_are_rejected(pipe, tmp_path, content, words):
    from open_unitok.generation.ui.page import AnswerHandler, ReconstructionHandler

    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        ReconstructionHandler(pipe)(str(path))
    with pytest.raises(UserError, match=words):
        list(AnswerHandler(pipe)(str(path), "What?", [], 4, 0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", "", 1, 0, True, 5, "constant", 1, 0, 1), "prompt is empty"),
        ((None, None, 1, 0, True, 5, "constant", 1, 0, 1), "prompt is empty"),
        (("a", "", 1, None, False, 5, "constant", 1, 0, 1), "empty"),
        (("a", "", 99, 0, False, 5, "constant", 1, 0, 1), "must be 1, 2 or 4"),
        (("a", "", 1, -1, False, 5, "constant", 1, 0, 1), "seed is -1"),
        (("a", "", 1, 0, False, float("nan"), "constant", 1, 0, 1), "guidance is nan"),
        (("a", "", 1, 0, False, 5, "wild", 1, 0, 1), "guidance_schedule"),
        (("a", "", 1, float("nan"), False, 5, "constant", 1, 0, 1), "seed is nan"),
        (("a", "", 1, 0, False, 5, "constant", 1, float("nan"), 1), "top_k is nan"),
        (("a", "", 1, 0, False, 5, "constant", 1, 0, None), "empty"),
        (("word " * 90, "", 1, 0, False, 5, "constant", 1, 0, 1), "shorten"),
    ],
)
def test_invalid_sampling_settings_are_rejected(pipe, arguments, words):
    from open_unitok.generation.ui.page import ImageHandler

    with pytest.raises(UserError, match=words):
        list(ImageHandler(pipe)(*arguments))


@pytest.mark.parametrize(
    ("length", "temperature", "words"),
    [(float("nan"), 0, "max_new_tokens is nan"), (4, float("nan"), "temperature is nan"), (4, -1, "is -1")],
)
def test_invalid_answer_settings_are_rejected(pipe, length, temperature, words):
    from open_unitok.generation.ui.page import AnswerHandler

    with pytest.raises(UserError, match=words):
        list(AnswerHandler(pipe)(None, "What?", [], length, temperature))


def test_one_preview_after_each_row(pipe):
    from open_unitok.generation.ui.page import ImageHandler

    shown = list(ImageHandler(pipe)("a star", "", 2, 5, False, 2.0, "constant", 1, 0, 1))
    assert [text.count("<img") for text, _, _ in shown] == [0, 2, 2, 2]
    assert [f"row {row} of 3" in text for row, (text, _, _) in enumerate(shown)] == [False, True, True, False]
    assert [len(images) for _, _, images in shown] == [0, 0, 0, 2]


def test_gradio_does_not_open_uploads(address, pipe, tmp_path):
    import gradio as gr
    from gradio.data_classes import ImageData

    from open_unitok.generation.ui.page import build_page

    (tmp_path / "a.png").write_bytes(bomb())
    uploads = [b for b in build_page(pipe, "tiny").blocks.values() if isinstance(b, gr.Image)]
    assert len(uploads) == 2
    for upload in uploads:
        given = ImageData(path=str(tmp_path / "a.png"), orig_name="a.png")
        assert upload.preprocess(given) == given.path and upload.preprocess(None) is None


def test_files_outside_the_page_are_not_served(address):
    for path in ("/etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError) as rejected:
            urllib.request.urlopen(f"{address}/gradio_api/file={urllib.parse.quote(path)}", timeout=30)
        assert rejected.value.code in (403, 404)


def test_similar_codes_have_similar_colours(tiny_unitok):
    books = tiny_unitok.quantizer.codebooks.detach().clone()
    books[0, 1] = books[0, 0] * 2 + 1e-4  # the same direction
    colours = code_colours(books, [16] * 3)
    assert colours.shape == (3, 16, 3) and colours.min() >= 0 and colours.max() <= 255
    assert (colours[0, 0] - colours[0, 1]).abs().max() <= 205 / 15 + 1  # neighbours by rank
    assert code_colours(None, [4, 3]).unique(dim=1).shape == (2, 4, 3)  # a quantiser without a table
    maps = code_maps(colours.new_zeros(9, 3), colours, 3)
    assert maps.count("<svg") == 3 and maps.count("<rect") == 27 and "1 used" in maps


@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/queue/join"])
def test_pages_of_other_sites_are_rejected(address, path):
    def status(method="GET", **headers):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        answer = connection.getresponse()
        connection.close()
        return answer.status, answer.read()

    port = address.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "127.0.0.1:1@evil.example",
        "",
    ):
        found, body = status(host=host)
        assert found == 403 and b"wrong_host" in body, host
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1.evil.example:{port}",
        "http://[",
        "file://",
    ):
        found, body = status("POST", origin=origin)
        assert found == 403 and b"wrong_origin" in body, origin
    for own in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert status(host=own, origin=f"http://{own}")[0] != 403


def test_the_page_maps_the_last_scale_of_a_pyramid(tmp_path):
    from open_unitok.generation.ui.page import ReconstructionHandler

    sizes = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "stage_widths": (8, 8), "decoder_widths": (8, 8), "num_codebooks": 2, "codebook_size": 8,
             "codebook_dim": 4, "quantizer": "residual", "quantizer_options": {"scales": [1, 2]}}  # fmt: skip
    text = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 8}
    torch.manual_seed(0)
    unitok = UniTok(UniTokConfig(**sizes, **text)).eval()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    comparison, maps = ReconstructionHandler(SimpleNamespace(unitok=unitok))(str(tmp_path / "red.png"))
    assert maps.count("viewBox='0 0 2 2'") == 2 and ">5<" in comparison.replace("\n", "")
