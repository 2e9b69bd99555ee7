"""The Gradio page of `unitok ui`: tabs to generate, ask and reconstruct with one pipeline."""

import contextlib
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from starlette.middleware import Middleware

from open_unitok.core.devices import set_device
from open_unitok.core.errors import UserError
from open_unitok.tokenizer.images import image_psnr, to_pil, to_pixels

from ..image_files import open_image
from ..pipeline import Pipeline
from ..sampling import SCHEDULES, Sampling
from ..serving.listen import allowed_hosts
from ..serving.origin import OriginMiddleware
from .views import CODE_MAPS_SCRIPT, code_colours, code_maps, comparison_view, hint_view, images_view

_MAX_SIDE = 8192  # pixels of an uploaded image's longer side
_MAX_UPLOAD = "20mb"
_HISTORY_LENGTH = 48  # images
_SETTINGS = ("guidance", "guidance_schedule", "temperature", "top_k", "top_p")
_Images = list[tuple[Image.Image, dict[str, Any]]]  # images and the settings they were generated with
_Pairs = list[tuple[str, str]]  # questions and answers
_EXAMPLE_QUESTIONS = ("What is in the image?", "How many objects are there?", "Describe the image.")
_RECONSTRUCT_HINT = hint_view(
    "The reconstruction of the image from its codes,<br>and the codes, appear here."
)
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# all events that use the model share one queue of concurrency 1
_MODEL_EVENT: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, **_PRIVATE}


def build_page(pipe: Pipeline, name: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """Build the page; `examples` are example prompts."""
    model = pipe.model
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    # gradio deletes uploads and images from its cache after an hour
    with gr.Blocks(title=f"{name} · OpenUniTok", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f"<div class='ou-head'><h1>Open<em>UniTok</em></h1><span>{name} · {size:,.1f} M parameters · "
            f"{model.config.num_image_tokens} visual tokens × {model.config.num_codebooks} codes · "
            f"{pipe.device} · {dtype}</span></div>"
        )
        with gr.Tab("Generate", id="generate"):
            _generate_tab(ImageHandler(pipe), examples)
        with gr.Tab("Ask", id="ask"):
            _ask_tab(AnswerHandler(pipe))
        with gr.Tab("Reconstruct", id="reconstruct"):
            _reconstruct_tab(ReconstructionHandler(pipe))
    # further events are rejected: each may take a minute
    return page.queue(max_size=32)


def launch(
    page: gr.Blocks, host: str, port: int, browser: bool = False, allow_hosts: Sequence[str] = ()
) -> str:
    """Serve the page on a separate thread; returns its URL.

    Args:
        allow_hosts: names of the server in Host and Origin headers, besides those of this machine.
    """
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    # the page neither loads from nor sends to the internet
    _, url, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True,
        theme=theme, css_paths=[Path(__file__).with_name("page.css")], max_file_size=_MAX_UPLOAD,
        allowed_paths=[], max_threads=8, share=False, ssr_mode=False, footer_links=[],
        enable_monitoring=False, pwa=False, mcp_server=False,
        app_kwargs={
            "docs_url": None, "redoc_url": None,
            "middleware": [Middleware(OriginMiddleware, hosts=allowed_hosts(host, allow_hosts))],
        },
    )  # fmt: skip
    return url


def as_path(component: gr.Image) -> gr.Image:
    """Make the component pass the path of the uploaded file without opening it.

    gradio would open the file without our size limit, and raise a traceback if it is not an image.
    """
    component.preprocess = lambda payload: None if payload is None else payload.path
    return component


@contextlib.contextmanager
def errors_as_toasts() -> Iterator[None]:
    """Show a UserError as a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), duration=8, print_exception=False) from error


class ImageHandler:
    """Generates images with previews."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe

    def __call__(
        self, prompt: str, negative: str, count: float, seed: float, random_seed: bool, *settings: Any
    ) -> Iterator[tuple[str, int, _Images]]:
        """Yield (HTML, seed, images) after every row of visual tokens; images are empty until the end."""
        set_device(self.pipe.device)  # of a thread of the server
        sampling, first, number = self.check(prompt, count, seed, random_seed, settings)
        negative = (negative or "").strip()
        record = {"prompt": prompt, "negative_prompt": negative, **dict(zip(_SETTINGS, settings))}
        # each image has its own seed, so that it can be reproduced alone
        records = [{**record, "seed": first + i} for i in range(number)]
        rows = len(self.pipe.layout.row_ends)
        started = time.perf_counter()
        yield hint_view("Prefilling the prompt …"), first, []
        steps = self.pipe.stream(
            [prompt],
            sampling,
            [r["seed"] for r in records],
            negative_prompt=negative or None,
            num_images=number,
        )
        for row, images in enumerate(steps, 1):
            seconds = time.perf_counter() - started
            # the elapsed time includes prefill
            status = (
                f"row {row} of {rows} · {seconds:.1f} s" if row < rows else f"generated in {seconds:.1f} s"
            )
            done = list(zip(images, records)) if row == rows else []
            yield images_view(images, records, row / rows, status), first, done

    @staticmethod
    def check(
        prompt: Any, count: Any, seed: Any, random_seed: Any, settings: Any
    ) -> tuple[Sampling, int, int]:
        """
        Raises:
            UserError: a field is empty or out of range.
        """
        # gradio sends None for an emptied field
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("The prompt is empty.")
        if None in (count, *settings) or (seed is None and not random_seed):
            raise UserError("One of the settings is empty.")
        if count not in (1, 2, 4):
            raise UserError(f"The number of images is {count!r}; it must be 1, 2 or 4.")
        first = secrets.randbelow(2**31) if random_seed else _to_int(seed)
        # browsers send numbers as doubles: exact up to 2**53
        if not isinstance(first, int) or not 0 <= first < 2**53:
            raise UserError(f"The seed is {first!r}; it must be a whole number from 0 to 2**53 - 1.")
        guidance, schedule, temperature, top_k, top_p = settings
        sampling = Sampling(guidance, temperature, _to_int(top_k), top_p, guidance_schedule=schedule)
        return sampling, first, int(count)


def _to_int(number: Any) -> Any:
    """A whole number as int, anything else unchanged; sliders send floats."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _generate_tab(handler: ImageHandler, examples: Sequence[str]) -> None:
    defaults = handler.pipe.sampling
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", placeholder="Describe the image", lines=2, max_lines=6, autofocus=True
            )
            with gr.Row():
                start = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
            if examples:
                gr.Examples([[text] for text in examples], [prompt], label="Examples")
            with gr.Row():
                count = gr.Radio([1, 2, 4], value=1, label="Number of images")
                guidance = gr.Slider(1, 20, defaults.guidance, step=0.1, label="Guidance scale")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                random_seed = gr.Checkbox(True, label="Random seed", container=False)
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", placeholder="What the image should not show")
                schedule = gr.Dropdown(
                    list(SCHEDULES), value=defaults.guidance_schedule, label="Guidance schedule"
                )
                temperature = gr.Slider(0.05, 2, defaults.temperature, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 4096, defaults.top_k, step=1, label="Top-k", info="0 = all codes")
                top_p = gr.Slider(0.05, 1, defaults.top_p, step=0.01, label="Top-p")
        with gr.Column(scale=6, min_width=360):
            hint = hint_view("The image appears here,<br>row by row while it is generated.")
            view = gr.HTML(hint, elem_id="generated")
    title = gr.HTML(
        "<div class='ou-title'>History <span>click an image to restore its settings</span></div>",
        visible=False,
    )
    history = gr.Gallery(
        show_label=False, columns=8, fit_columns=False, height="auto", format="png", object_fit="contain",
        allow_preview=False, visible=False, buttons=[], elem_id="history", interactive=False,
    )  # fmt: skip
    state = gr.State([])  # _Images, newest first
    settings = [guidance, schedule, temperature, top_k, top_p]

    def run(earlier: _Images, *values: Any) -> Iterator[Any]:
        with errors_as_toasts():
            for shown, first, new in handler(*values):
                now = (new[::-1] + earlier)[:_HISTORY_LENGTH]
                gallery = [(image, f"{record['prompt']} · {record['seed']}") for image, record in now]
                # the gallery is re-rendered only when there are new images
                updates = (
                    (gr.Gallery(gallery, visible=True), gr.HTML(visible=True)) if new else (gr.skip(),) * 2
                )
                yield shown, first, now, *updates

    def restore(earlier: _Images, event: gr.SelectData) -> list[Any]:
        record = earlier[event.index][1]
        first = [record[name] for name in ("prompt", "negative_prompt", "seed")]
        return [*first, False, *(record[name] for name in _SETTINGS)]

    fields = [state, prompt, negative, count, seed, random_seed, *settings]
    events: Any = [
        trigger(run, fields, [view, seed, state, history, title], **_MODEL_EVENT)
        for trigger in (start.click, prompt.submit)
    ]
    stop.click(None, cancels=events, api_visibility="private")
    restored = [prompt, negative, seed, random_seed, *settings]
    history.select(restore, [state], restored, **_PRIVATE)


class AnswerHandler:
    """Answers questions about one image in a conversation."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe

    def __call__(
        self,
        path: str | None,
        question: str,
        history: _Pairs,
        max_new_tokens: float,
        temperature: float,
    ) -> Iterator[_Pairs]:
        """Yield the conversation after every piece of the new answer."""
        set_device(self.pipe.device)
        if not isinstance(question, str) or not question.strip():
            raise UserError("The question is empty.")
        if None in (max_new_tokens, temperature):
            raise UserError("One of the settings is empty.")
        images = [] if path is None else [open_image(Path(path).read_bytes(), _MAX_SIDE)]
        options: dict[str, Any] = {"max_new_tokens": _to_int(max_new_tokens)}
        if temperature != 0:
            options |= {"do_sample": True, "temperature": temperature}
        answer = ""
        # show the question while the image is encoded and the prompt prefilled
        yield [*history, (question, "…")]
        for piece in self.pipe.chat_stream(question, images, history, **options):
            answer += piece
            yield [*history, (question, answer)]
        yield [*history, (question, answer)]


def _ask_tab(handler: AnswerHandler) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            image = as_path(gr.Image(
                label="Image", type="filepath", image_mode=None, height=340,
                sources=["upload", "clipboard"], buttons=[], elem_id="question-image",
            ))  # fmt: skip
            with gr.Accordion("More settings", open=False):
                length = gr.Slider(1, 512, 64, step=1, label="Max new tokens")
                temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 = greedy")
        with gr.Column(scale=6, min_width=360):
            chatbot = gr.Chatbot(
                label="Conversation", height=400, layout="bubble", render_markdown=False,
                feedback_options=None, buttons=[], elem_id="conversation",
                placeholder="Upload an image and ask a question about it.",
            )  # fmt: skip
            with gr.Row():
                chips = [gr.Button(text, size="sm", elem_classes="ou-chip") for text in _EXAMPLE_QUESTIONS]
            question = gr.Textbox(
                show_label=False, placeholder="Ask a question", max_lines=4, elem_id="question"
            )
            with gr.Row():
                send = gr.Button("Ask", variant="primary", min_width=90)
                stop = gr.Button("Stop", min_width=90)
                new = gr.Button("New conversation", min_width=160)

    # the browser's number of the conversation, and whose number the history has
    number, history = gr.Number(0, visible="hidden"), gr.State((0, []))

    def run(path: Any, text: Any, current: Any, earlier: Any, *options: Any) -> Iterator[Any]:
        with errors_as_toasts():
            for pairs in handler(path, text, earlier[1] if earlier[0] == current else [], *options):
                yield _messages(pairs), "", (current, pairs)

    more, outputs = [number, history, length, temperature], [chatbot, question, history]
    events: Any = [
        trigger(run, [image, question, *more], outputs, **_MODEL_EVENT)
        for trigger in (send.click, question.submit)
    ]
    for chip in chips:
        events.append(chip.click(run, [image, chip, *more], outputs, **_MODEL_EVENT))
    stop.click(None, cancels=events, api_visibility="private")
    # a new image starts a new conversation: earlier answers are about the old one. The browser clears it: an
    # event of the server could end after the next question has begun, and clear that
    for trigger in (new.click, image.change):
        trigger(None, number, [chatbot, number], js="n => [[], n + 1]", cancels=events, **_PRIVATE)


def _messages(pairs: _Pairs) -> list[dict[str, str]]:
    """Questions and answers in the format of gr.Chatbot."""
    return [
        {"role": role, "content": text or "(empty answer)"}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair)
    ]


class ReconstructionHandler:
    """Encodes an image and shows its reconstruction and codes."""

    def __init__(self, pipe: Pipeline):
        self.unitok = pipe.unitok
        self.colours = code_colours(pipe.unitok.quantizer.code_table(), pipe.unitok.quantizer.code_sizes)

    @torch.no_grad()
    def __call__(self, path: str | None) -> tuple[str, str]:
        """HTML of the comparison and of the code maps."""
        set_device(self.unitok.device)
        if path is None:
            return _RECONSTRUCT_HINT, ""
        config, code_sizes = self.unitok.config, self.unitok.quantizer.code_sizes
        layout = config.layout
        image = open_image(Path(path).read_bytes(), _MAX_SIDE)
        # cropped as in tokenizer training, not padded as for questions
        pixels = to_pixels(image, config.image_shape, mode="crop")
        codes = self.unitok.encode(pixels[None].to(self.unitok.device))
        original, reconstruction = to_pil(pixels), to_pil(self.unitok.decode(codes, layout.grid)[0])
        # the grid is last: register tokens, or the coarser scales of a pyramid, come first
        grid = codes[0, -(layout.tokens or layout.rows * layout.columns) :].cpu()
        # N * sum of log2(V) over the sub-codebooks, against 24 bits per pixel
        bits = codes.shape[1] * sum(math.log2(size) for size in code_sizes)
        facts = [
            ("PSNR", f"{image_psnr(original, reconstruction):.1f} dB"),
            ("visual tokens", f"{codes.shape[1]}"),
            ("codes per token", f"{codes.shape[2]}"),
            ("entries per sub-codebook", ", ".join(f"{size:,}" for size in sorted(set(code_sizes)))),
            ("bits per image", f"{bits:,.0f}"),
            ("compression", f"{original.width * original.height * 24 / bits:.0f} : 1"),
        ]
        return comparison_view(original, reconstruction, facts), code_maps(
            grid, self.colours, layout.columns, not layout.tokens
        )


def _reconstruct_tab(handler: ReconstructionHandler) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=260):
            image = as_path(gr.Image(
                label="Image", type="filepath", image_mode=None, height=300,
                sources=["upload", "clipboard"], buttons=[], elem_id="original",
            ))  # fmt: skip
        with gr.Column(scale=7, min_width=420):
            comparison = gr.HTML(_RECONSTRUCT_HINT, elem_id="comparison")
            maps = gr.HTML("", elem_id="maps", js_on_load=CODE_MAPS_SCRIPT)

    def run(path: Any) -> tuple[str, str]:
        with errors_as_toasts():
            return handler(path)

    image.change(run, [image], [comparison, maps], **_MODEL_EVENT)
