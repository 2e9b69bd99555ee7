"""The table of the benchmarks that ask questions about pictures."""

from . import pope, questions, vqa
from .asking import ask
from .harness import Benchmark, always

UNDERSTANDING: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "open questions about pictures (VQAv2 layout)",
        "mllm",
        questions.load_vqav2,
        always(ask),
        questions.score_vqav2,
        1024,
        vqa.SCORERS,
        ("scenes.json",),
    ),
    "pope": Benchmark(
        "is an object there or not (POPE layout)",
        "mllm",
        questions.load_pope,
        always(ask),
        questions.score_pope,
        1024,
        pope.SCORERS,
        ("scenes.json",),
    ),
}
