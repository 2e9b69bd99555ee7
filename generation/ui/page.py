"""The page behind `unitok ui`: three tabs around one pipeline, one request at a time."""

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

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.images import image_psnr, to_pil, to_pixels

from ..image_files import open_image
from ..pipeline import Pipeline
from ..sampling import SCHEDULES, Sampling
from .views import HINT, MAPS_SCRIPT, code_colours, code_maps, images_view, pair_view

STYLE = Path(__file__).with_name("page.css")
MAX_SIDE = 8192  # pixels of an image that is uploaded
MAX_UPLOAD = "20mb"
KEPT = 48  # images in the history
SETTINGS = ("guidance", "guidance_schedule", "temperature", "top_k", "top_p")
Drawn = list[tuple[Image.Image, dict[str, Any]]]  # images and how they were drawn
Pairs = list[tuple[str, str]]  # questions and answers
QUESTIONS = ("What is in the image?", "How many objects are there?", "Describe the image.")
RECONSTRUCT_HINT = HINT.format(
    "What the codes of an image keep of it,<br>and the codes themselves, appear here."
)
ONE_AT_A_TIME: dict[str, Any] = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
    "api_visibility": "private",
    "show_progress": "hidden",
}


def build_page(pipe: Pipeline, name: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page; `examples` are prompts to start from."""
    model = pipe.model
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    dtype = str(model.dtype).removeprefix("torch.")
    with gr.Blocks(title=f"{name} · OpenUniTok", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f"<div class='ou-head'><h1>Open<em>UniTok</em></h1><span>{name} · {size:,.1f} M parameters · "
            f"{model.config.num_image_tokens} visual tokens of {model.config.num_codebooks} codes · "
            f"{pipe.device} · {dtype}</span></div>"
        )
        with gr.Tab("Draw", id="draw"):
            _draw_tab(Draw(pipe), examples)
        with gr.Tab("Ask", id="ask"):
            _ask_tab(Ask(pipe))
        with gr.Tab("Reconstruct", id="reconstruct"):
            _reconstruct_tab(Reconstruct(pipe))
    return page.queue(max_size=32)


def launch(page: gr.Blocks, host: str, port: int, browser: bool = False) -> str:
    """Start the page on a thread of its own; its address."""
    theme = gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    _, url, _ = page.launch(
        server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True,
        theme=theme, css_paths=[STYLE], max_file_size=MAX_UPLOAD, allowed_paths=[], max_threads=8,
        share=False, ssr_mode=False, footer_links=[], enable_monitoring=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    return url


def unopened(picture: gr.Image) -> gr.Image:
    """The component, which now hands over the file as it came: gradio would open it first, and answer one
    that is no image with a traceback."""
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


@contextlib.contextmanager
def mistakes_shown() -> Iterator[None]:
    """A user's mistake becomes a note on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), duration=8, print_exception=False) from error


class Draw:
    """Draws images that grow."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe

    def __call__(
        self, prompt: str, negative: str, count: float, seed: float, fresh: bool, *settings: Any
    ) -> Iterator[tuple[str, int, Drawn]]:
        """(what to show, the seed taken, what is drawn: nothing but at the end) after every row."""
        sampling, first, number = self.check(prompt, count, seed, fresh, settings)
        negative = (negative or "").strip()
        record = {"prompt": prompt, "negative_prompt": negative, **dict(zip(SETTINGS, settings))}
        records = [{**record, "seed": first + i} for i in range(number)]
        rows = self.pipe.layout.rows
        started = time.perf_counter()
        yield HINT.format("Reading the prompt …"), first, []
        steps = self.pipe.stream(
            [prompt],
            sampling,
            [r["seed"] for r in records],
            negative_prompt=negative or None,
            num_images=number,
        )
        for row, images in enumerate(steps, 1):
            seconds = time.perf_counter() - started
            status = f"row {row} of {rows} · {seconds:.1f} s" if row < rows else f"drawn in {seconds:.1f} s"
            done = list(zip(images, records)) if row == rows else []
            yield images_view(images, records, row / rows, status), first, done

    @staticmethod
    def check(prompt: Any, count: Any, seed: Any, fresh: Any, settings: Any) -> tuple[Sampling, int, int]:
        """
        Raises:
            UserError: nothing to draw, or a field that is empty or out of range.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError("Write what to draw.")
        if None in (count, *settings) or (seed is None and not fresh):
            raise UserError("One of the settings is empty.")
        if count not in (1, 2, 4):
            raise UserError(f"{count!r} images; it must be 1, 2 or 4.")
        first = secrets.randbelow(2**31) if fresh else as_whole(seed)
        if not isinstance(first, int) or not 0 <= first < 2**53:
            raise UserError(f"The seed is {first!r}; it must be a whole number from 0 to 2**53 - 1.")
        guidance, schedule, temperature, top_k, top_p = settings
        sampling = Sampling(guidance, temperature, as_whole(top_k), top_p, guidance_schedule=schedule)
        return sampling, first, int(count)


def as_whole(number: Any) -> Any:
    """An int where the browser sent a whole number, else what it sent."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _draw_tab(draw: Draw, examples: Sequence[str]) -> None:
    own = draw.pipe.sampling
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            prompt = gr.Textbox(
                label="Prompt", placeholder="What to draw", lines=2, max_lines=6, autofocus=True
            )
            with gr.Row():
                start = gr.Button("Draw", variant="primary")
                stop = gr.Button("Stop")
            if examples:
                gr.Examples([[text] for text in examples], [prompt], label="For example")
            with gr.Row():
                count = gr.Radio([1, 2, 4], value=1, label="Images")
                guidance = gr.Slider(1, 20, own.guidance, step=0.1, label="Guidance")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                fresh = gr.Checkbox(True, label="A new seed each time", container=False)
            with gr.Accordion("More settings", open=False):
                negative = gr.Textbox(label="Negative prompt", placeholder="What to lead away from")
                schedule = gr.Dropdown(
                    list(SCHEDULES), value=own.guidance_schedule, label="Guidance schedule"
                )
                temperature = gr.Slider(0.05, 2, own.temperature, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 4096, own.top_k, step=1, label="Top-k", info="0 keeps all codes")
                top_p = gr.Slider(0.05, 1, own.top_p, step=0.01, label="Top-p")
        with gr.Column(scale=6, min_width=360):
            hint = HINT.format("The image appears here,<br>row by row as it is drawn.")
            view = gr.HTML(hint, elem_id="drawing")
    title = gr.HTML(
        "<div class='ou-title'>History <span>choose one to take its settings up again</span></div>",
        visible=False,
    )
    history = gr.Gallery(
        show_label=False, columns=8, fit_columns=False, height="auto", format="png", object_fit="contain",
        allow_preview=False, visible=False, buttons=[], elem_id="history", interactive=False,
    )  # fmt: skip
    kept = gr.State([])  # Drawn, the newest first
    settings = [guidance, schedule, temperature, top_k, top_p]

    def run(earlier: Drawn, *values: Any) -> Iterator[Any]:
        with mistakes_shown():
            for shown, first, new in draw(*values):
                now = (new[::-1] + earlier)[:KEPT]
                strip = [(image, f"{record['prompt']} · {record['seed']}") for image, record in now]
                told = (gr.Gallery(strip, visible=True), gr.HTML(visible=True)) if new else (gr.skip(),) * 2
                yield shown, first, now, *told

    def choose(earlier: Drawn, event: gr.SelectData) -> list[Any]:
        record = earlier[event.index][1]
        first = [record[name] for name in ("prompt", "negative_prompt", "seed")]
        return [*first, False, *(record[name] for name in SETTINGS)]

    fields = [kept, prompt, negative, count, seed, fresh, *settings]
    events = [
        trigger(run, fields, [view, seed, kept, history, title], **ONE_AT_A_TIME)
        for trigger in (start.click, prompt.submit)
    ]
    stop.click(None, cancels=events, api_visibility="private")
    restored = [prompt, negative, seed, fresh, *settings]
    history.select(choose, [kept], restored, api_visibility="private", show_progress="hidden")


class Ask:
    """Answers questions about one image, in a conversation."""

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe

    def __call__(
        self,
        path: str | None,
        question: str,
        history: list[tuple[str, str]],
        length: float,
        temperature: float,
    ) -> Iterator[Pairs]:
        """The conversation with the new answer as it is written."""
        if not isinstance(question, str) or not question.strip():
            raise UserError("Write a question.")
        if None in (length, temperature):
            raise UserError("One of the settings is empty.")
        images = [] if path is None else [open_image(Path(path).read_bytes(), MAX_SIDE)]
        options: dict[str, Any] = {"max_new_tokens": as_whole(length)}
        if temperature != 0:
            options |= {"do_sample": True, "temperature": temperature}
        answer = ""
        yield [*history, (question, "…")]
        for piece in self.pipe.chat_stream(question, images, history, **options):
            answer += piece
            yield [*history, (question, answer)]
        yield [*history, (question, answer)]


def _ask_tab(ask: Ask) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            picture = unopened(gr.Image(
                label="Image", type="filepath", image_mode=None, height=340,
                sources=["upload", "clipboard"], buttons=[], elem_id="asked",
            ))  # fmt: skip
            with gr.Accordion("More settings", open=False):
                length = gr.Slider(1, 512, 64, step=1, label="Longest answer, in tokens")
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest words"
                )
        with gr.Column(scale=6, min_width=360):
            talk = gr.Chatbot(
                label="Conversation", height=400, layout="bubble", render_markdown=False,
                feedback_options=None, buttons=[], elem_id="talk",
                placeholder="Show an image and ask about it.",
            )  # fmt: skip
            with gr.Row():
                chips = [gr.Button(text, size="sm", elem_classes="ou-chip") for text in QUESTIONS]
            question = gr.Textbox(
                show_label=False, placeholder="Ask a question", max_lines=4, elem_id="question"
            )
            with gr.Row():
                send = gr.Button("Ask", variant="primary", min_width=90)
                stop = gr.Button("Stop", min_width=90)
                new = gr.Button("New conversation", min_width=160)
    history = gr.State([])

    def run(path: Any, text: Any, earlier: Any, *options: Any) -> Iterator[Any]:
        with mistakes_shown():
            for pairs in ask(path, text, earlier, *options):
                yield messages(pairs), "", pairs

    def forget() -> tuple[list[Any], list[Any]]:
        return [], []

    inputs = [picture, question, history, length, temperature]
    outputs = [talk, question, history]
    events = [trigger(run, inputs, outputs, **ONE_AT_A_TIME) for trigger in (send.click, question.submit)]
    for chip in chips:
        events.append(
            chip.click(run, [picture, chip, history, length, temperature], outputs, **ONE_AT_A_TIME)
        )
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    stop.click(None, cancels=events, api_visibility="private")
    new.click(forget, None, [talk, history], cancels=events, **quiet)
    picture.change(forget, None, [talk, history], cancels=events, **quiet)


def messages(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as the chat shows them."""
    return [
        {"role": role, "content": text or "(no words)"}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair)
    ]


class Reconstruct:
    """Encodes an image, decodes its codes again and shows both, and the codes."""

    def __init__(self, pipe: Pipeline):
        self.unitok = pipe.unitok
        self.colours = code_colours(pipe.unitok.quantizer.codebooks)

    @torch.no_grad()
    def __call__(self, path: str | None) -> tuple[str, str]:
        """The image beside its copy, and the maps of its codes."""
        if path is None:
            return RECONSTRUCT_HINT, ""
        config = self.unitok.config
        image = open_image(Path(path).read_bytes(), MAX_SIDE)
        pixels = to_pixels(image, config.image_size, mode="crop")
        codes = self.unitok.encode(pixels[None].to(self.unitok.device))
        original, copy = to_pil(pixels), to_pil(self.unitok.decode(codes)[0])
        grid = codes[0, config.num_register_tokens :].cpu()
        bits = codes[0].numel() * math.log2(config.codebook_size)
        facts = [
            ("PSNR", f"{image_psnr(original, copy):.1f} dB"),
            ("visual tokens", f"{codes.shape[1]}"),
            ("codes each", f"{codes.shape[2]}"),
            ("entries to choose from", f"{config.codebook_size:,}"),
            ("bits in all", f"{bits:,.0f}"),
            ("of the raw pixels", f"1 / {original.width * original.height * 24 / bits:.0f}"),
        ]
        return pair_view(original, copy, facts), code_maps(grid, self.colours, round(len(grid) ** 0.5))


def _reconstruct_tab(reconstruct: Reconstruct) -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=260):
            picture = unopened(gr.Image(
                label="Image", type="filepath", image_mode=None, height=300,
                sources=["upload", "clipboard"], buttons=[], elem_id="original",
            ))  # fmt: skip
        with gr.Column(scale=7, min_width=420):
            pair = gr.HTML(RECONSTRUCT_HINT, elem_id="pair")
            maps = gr.HTML("", elem_id="maps", js_on_load=MAPS_SCRIPT)

    def run(path: Any) -> tuple[str, str]:
        with mistakes_shown():
            return reconstruct(path)

    picture.change(run, [picture], [pair, maps], **ONE_AT_A_TIME)
