"""The table of the benchmarks that ask questions about images; what each needs stands in README.md here."""

from ..core.annotations import answer_questions
from ..core.harness import Benchmark, always
from . import gqa, mmbench, mme, mmvet, multiple_choice, pope, questions, textvqa, vqav2

# Questions per call of the model; it makes batches of like length of them itself.
BATCH = 1024

UNDERSTANDING: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "open questions, ten answers each",
        "mllm", questions.load_vqav2, always(answer_questions),
        questions.score_vqav2, BATCH,
        vqav2.SCORERS, ("scenes.json", *questions.VQA_ORIGINAL, *questions.VQA_LLAVA), questions.submit_vqav2,
    ),
    "gqa": Benchmark(
        "compositional questions about real images",
        "mllm", gqa.load, always(answer_questions),
        gqa.score, BATCH,
        gqa.SCORERS, ("testdev_balanced_questions.json", *gqa.LLAVA), gqa.submit,
    ),
    "textvqa": Benchmark(
        "questions about text in images, with the OCR words in the prompt or without",
        "mllm", textvqa.load, always(answer_questions),
        textvqa.score, BATCH,
        textvqa.SCORERS, textvqa.ORIGINAL, textvqa.submit,
    ),
    "pope": Benchmark(
        "is an object there or not",
        "mllm", questions.load_pope, always(answer_questions),
        questions.score_pope, BATCH,
        pope.SCORERS, ("scenes.json", *questions.POPE_ORIGINAL, *questions.POPE_LLAVA),
    ),
    "mme": Benchmark(
        "fourteen tasks of yes or no, two questions per image",
        "mllm", mme.load, always(answer_questions),
        mme.score, BATCH,
        mme.SCORERS, ("existence/*.txt", f"{mme.RELEASE}/existence/*.txt"), mme.submit,
    ),
    "mmvet": Benchmark(
        "open answers graded by a judge",
        "mllm", mmvet.load, always(answer_questions),
        mmvet.score, BATCH,
        mmvet.SCORERS, mmvet.ORIGINAL, mmvet.submit,
    ),
    "vizwiz": Benchmark(
        "questions of blind people, some without an answer",
        "mllm", textvqa.load_vizwiz, always(answer_questions),
        textvqa.score, BATCH,
        textvqa.SCORERS, ("val.json", "test.json", "Annotations/val.json"), textvqa.submit_vizwiz,
    ),
    "seedbench": Benchmark(
        "twelve dimensions with four options, images and videos",
        "mllm", multiple_choice.load_seedbench, always(answer_questions),
        multiple_choice.score_seedbench, BATCH,
        multiple_choice.SEED_SCORERS, multiple_choice.SEED_ORIGINAL, multiple_choice.submit_seedbench,
    ),
    "scienceqa": Benchmark(
        "school questions with options, half of them with an image",
        "mllm", multiple_choice.load_scienceqa, always(answer_questions),
        multiple_choice.score_scienceqa, BATCH,
        multiple_choice.SQA_SCORERS, multiple_choice.SQA_ORIGINAL, multiple_choice.submit_scienceqa,
    ),
    "mmbench": Benchmark(
        "twenty abilities with options, every question once per rotation of its options",
        "mllm", mmbench.load, always(answer_questions),
        mmbench.score, BATCH,
        mmbench.SCORERS, mmbench.FILES, mmbench.submit,
    ),
}  # fmt: skip
