"""Captured steps of images, classes and answers: on every device, kept, released, and used by threads."""

import contextlib
import gc
import threading
import types

import torch
from emulated_cuda import LOG, host_copy, measure
from peft import LoraConfig, get_peft_model

from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids, iter_text_ids
from open_unitok.generation.backends import captured_step, choose_backend, graph_capture
from open_unitok.mllm import ClassConditionalConfig, ClassConditionalModel

from .parts import error_of, load_conftest, planted

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, top_k=8)
TEXT_SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 3},
}
tiny_model = load_conftest("generation").tiny_model


def _images(model, seeds=(1, 2, 3), sampling=SAMPLED, **options):
    codes = generate_image_codes(model, PROMPTS, sampling, list(seeds), UNCONDITIONAL, **options)
    return host_copy(codes).tolist()


def _questions(model):
    """Prompts of several lengths with no, one and two images."""
    image = [model.config.image_token_id] * model.config.num_image_tokens
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(16, (n, len(image), 3), generator=generator) for n in (1, 0, 2)]
    prompts = [[1, 5, *image, 6, 7], [1, 8, 9], [1, *image, 10, *image, 11], [1, 5, *image, 12, 13, 14]]
    return prompts, [*codes, codes[0]]


def _class_model():
    torch.manual_seed(0)
    config = ClassConditionalConfig(
        num_classes=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_image_tokens=16, num_codebooks=2, codebook_size=16,
    )  # fmt: skip
    model = ClassConditionalModel(config).eval()
    torch.nn.init.normal_(model.depth_head.output.weight, std=0.5)
    return model


def _classes(model, **options):
    null = [model.config.null_class]
    codes = generate_image_codes(model, [[0], [3]], SAMPLED, [5, 6], null, **options)
    return host_copy(codes).tolist()


@contextlib.contextmanager
def _counted_captures():
    """The list grows by one with every capture."""
    captures, original = [], graph_capture.capture_step

    def counted(*args, **options):
        captures.append(1)  # not the arguments, which refer to the model
        return original(*args, **options)

    with planted(captured_step, "capture_step", counted):
        yield captures


def scenario_second_device() -> dict:
    """What a model on cuda:1 generates while cuda:0 is the current device."""
    on_cpu, model = tiny_model(), tiny_model().to("cuda:1")
    classes = _class_model()
    found = {
        "images": _images(model) == _images(on_cpu),
        "classes": _classes(_class_model().to("cuda:1")) == _classes(classes),
    }
    for name, options in TEXT_SETTINGS.items():
        ids = generate_text_ids(model, *_questions(model), 12, **options)
        found[name] = ids == generate_text_ids(on_cpu, *_questions(on_cpu), 12, **options)
    return {**found, "replays": LOG.replays, "current": torch.cuda.current_device()}


def scenario_planted_current_device() -> str:
    """A capture on the current device instead of the model's."""
    graph_capture._side_stream.cache_clear()
    with (
        planted(graph_capture, "current_device", lambda device: contextlib.nullcontext()),
        planted(graph_capture, "_side_stream", lambda device: torch.cuda.Stream()),
    ):
        return error_of(lambda: _images(tiny_model().to("cuda:1")))


def scenario_reuse() -> dict:
    """Captures of repeated shapes, of other shapes and settings, and of a second model."""
    model, counts = tiny_model().to("cuda"), {}
    expected = {seeds: _images(model, seeds, backend="torch") for seeds in ((1, 2, 3), (4, 5, 6))}
    with _counted_captures() as captures:
        equal = [_images(model, seeds) == wanted for seeds, wanted in expected.items()]
        counts["same shape"] = len(captures)
        guided = Sampling(guidance=1.7, top_k=8, guidance_schedule="linear")
        equal.append(_images(model, sampling=guided) == _images(model, sampling=guided, backend="torch"))
        counts["other guidance"] = len(captures)
        _images(model, sampling=Sampling(guidance=3.0, top_k=5))
        counts["other top-k"] = len(captures)
        for count in (3, 4, 4):
            prompts, images = (part[:count] for part in _questions(model))
            generate_text_ids(model, prompts, images, 12)
        counts["answers of 3, 4 and 4 prompts"] = len(captures)
        other = tiny_model().to("cuda")
        equal.append(_images(other) == expected[1, 2, 3])
        counts["other model"] = len(captures)
    return {"equal": equal, "counts": counts}


def scenario_release() -> dict:
    """What is kept after changes of the weights, with an adapter, and after the model is gone."""
    found = {}
    with _counted_captures() as captures:
        model = tiny_model().to("cuda")
        before = _images(model)
        with torch.no_grad():
            model.language_model.layers[0].mlp.down_proj.weight.mul_(-1)
        after = _images(model)
        found["in place"] = (after != before, after == _images(model, backend="torch"), len(captures))
        layer = model.language_model.layers[1].mlp.down_proj
        layer.weight = torch.nn.Parameter(-layer.weight.detach())
        moved = _images(model)
        found["replaced"] = (moved != after, moved == _images(model, backend="torch"), len(captures))
        # an adapter that is not merged
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, config)
        found["adapter"] = (choose_backend(model), _images(model) != moved, len(captured_step._kept))
        merged = adapted.merge_and_unload()
        last = _images(merged)
        found["merged"] = (last != moved, last == _images(merged, backend="torch"), len(captures))
    found["kept"] = len(captured_step._kept)
    del model, merged, adapted, layer
    gc.collect()
    found["kept without the model"] = len(captured_step._kept)
    return found


def scenario_answers() -> dict:
    """Captured and eager answers and streams, and what their decoding waits for."""
    model, found = tiny_model().to("cuda"), {}
    questions = _questions(model)
    for name, options in TEXT_SETTINGS.items():
        for what, function in (("answers", generate_text_ids), ("stream", iter_text_ids)):
            for length in (9, 17):
                ids, report = measure(lambda: list(function(model, *questions, length, **options)))  # noqa: B023
                eager = list(function(model, *questions, length, **options, backend="torch"))
                again, repeated = measure(lambda: list(function(model, *questions, length, **options)))  # noqa: B023
                found[f"{what}, {name}, {length}"] = {
                    "equal": ids == eager == again,
                    "waits": repeated["waits"],
                    "replays": repeated["replays"],
                    "refused": report["refused"],
                }
    return found


def scenario_threads() -> dict:
    """Two threads with one model and one shape, as two users of a server; each on the second device."""
    model = tiny_model().to("cuda:1")
    wanted = {i: _images(model, (i, 20, 30), backend="torch") for i in range(2)}
    found, errors = {}, []

    def work(i):
        try:
            found[i] = [_images(model, (i, 20, 30)) for _ in range(2)]
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    with _counted_captures() as captures:
        threads = [threading.Thread(target=work, args=(i,)) for i in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        equal = [found.get(i) == [wanted[i]] * 2 for i in wanted]
        many = len(captures)
        _images(model)
    return {"equal": equal, "errors": errors, "captures": many, "one more": len(captures) - many}


def scenario_interleaved() -> dict:
    """The server's worker: a batch of images and one of answers take turns, twice."""
    from open_unitok.generation.serving.worker import AnswerKey, AnswerTask, ImageKey, ImageTask, ModelWorker

    model, found = tiny_model().to("cuda:1"), []
    pipe = types.SimpleNamespace(device=model.device, model=model, layout=None, backend="auto")
    worker = ModelWorker(pipe)
    worker._send_previews = lambda jobs, codes: None
    pipe.decode = lambda codes: [code.tolist() for code in host_copy(codes)]
    pipe.encode_for_reading = lambda images: torch.zeros(0, 9, 3, dtype=torch.long)
    pipe.processor = types.SimpleNamespace(
        decode=lambda ids: " ".join(map(str, ids)), decode_settled=lambda ids: " ".join(map(str, ids))
    )

    def job(key, task):
        made = types.SimpleNamespace(key=key, task=task, pending=True, send_partial=lambda text: None)
        made.finish = lambda result: setattr(made, "result", result) or setattr(made, "pending", False)
        return made

    def one_round():
        images = [job(ImageKey(SAMPLED), ImageTask(p, UNCONDITIONAL, s)) for p, s in zip(PROMPTS, (1, 2, 3))]
        answers = [job(AnswerKey(), AnswerTask(p, [], 12)) for p in ([1, 8, 9], [1, 5, 6, 7])]
        turns = [worker(images), worker(answers)]
        while turns:
            turns = [turn for turn in turns if next(turn, turn) is not turn]
        return [made.result for made in images], [made.result.text for made in answers]

    with _counted_captures() as captures:
        found = [one_round(), one_round()]
    ids = generate_text_ids(
        model, [[1, 8, 9], [1, 5, 6, 7]], [torch.zeros(0, 9, 3, dtype=torch.long)] * 2, 12
    )
    return {
        "images": [images == _images(model, backend="torch") for images, _ in found],
        "answers": [texts == [" ".join(map(str, row)) for row in ids] for _, texts in found],
        "captures": len(captures),
    }
