"""The lmms-eval adapter, without lmms-eval, and on a tiny offline task if it is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.lmms_eval import adapter
from open_unitok.generation import Pipeline
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig

needed = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: it needs torchvision, which is incompatible with the tested torch",
)
SIZES = {
    "image_size": 32, "stem_width": 8, "stage_widths": [8, 8], "stage_depths": [1, 1], "hidden_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "decoder_widths": [8, 8], "decoder_depths": [1, 1],
    "num_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "embed_dim": 8, "text_hidden_size": 8,
    "text_num_layers": 1, "text_num_heads": 1, "text_context_length": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    torch.manual_seed(0)
    folder, text = tmp_path_factory.mktemp("model") / "mllm", golden / "mllm" / "tokenizer.model"
    unitok = UniTok(UniTokConfig(**SIZES, text_vocab_size=64))
    unitok.save_pretrained(folder / "unitok")
    processor = UniTokProcessor.from_text_tokenizer(text, image_size=32, num_image_tokens=4, template="plain")
    processor.save_pretrained(folder)
    decoder = {
        "model_type": "llama", "vocab_size": processor.vocab_size, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = UniTokMLLMConfig.for_tokenizer(
        unitok.config, text_config=decoder, depth_config={"num_hidden_layers": 1}, **processor.token_ids()
    )
    UniTokForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_pretrained(folder)


def image(number=0):
    return Image.new("RGB", (32, 32), (40 * number, 100, 200))


def test_batches_of_mixed_options_equal_single_questions(pipeline):
    questions = [
        adapter.VisualRequest([image(i)], f"Question {i}?", {"until": ["\n\n"], "max_new_tokens": 3 + i % 2})
        for i in range(5)
    ]
    counted = []
    together = adapter.answer_requests(pipeline, questions, 4, counted.append)
    alone = [adapter.answer_requests(pipeline, [question], 1, counted.append)[0] for question in questions]
    assert together == alone and sum(counted) == 10
    assert together[0] == pipeline.answer([image(0)], ["Question 0?"], 3)[0]


def test_options_stops_and_unsupported_options():
    until, longest, options = adapter.generation_options(
        {"until": "\n", "max_new_tokens": 7, "temperature": 0}
    )
    assert (until, longest, options) == (["\n"], 7, {})
    wanted = {"temperature": 0.5, "top_p": 0.9, "num_beams": 2, "image_aspect_ratio": "pad"}
    assert adapter.generation_options(wanted)[2] == {
        "num_beams": 2,
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
    }
    assert adapter.truncate_at_stops("a b\n\nc", ["\n\n", "b"]) == "a"
    with pytest.raises(UserError, match="unsupported generation options: penalty"):
        adapter.generation_options({"penalty": 1})
    with pytest.raises(UserError, match="only images are supported"):
        adapter.images_of(["film.mp4"])


def test_messages_keep_their_images_in_place(pipeline):
    content = [
        {"type": "text", "text": "First"}, {"type": "image", "url": image()},
        {"type": "text", "text": "and"},
        {"type": "image", "url": image(1).convert("L")}, {"type": "text", "text": "same?"},
    ]  # fmt: skip
    images, text = adapter.parse_messages([{"role": "user", "content": content}])
    assert len(images) == 2 and images[1].mode == "RGB" and text == "First\n<image>\nand\n<image>\nsame?"
    assert (
        len(
            adapter.answer_requests(
                pipeline, [adapter.VisualRequest(images, text, {"max_new_tokens": 2})], 1, print
            )
        )
        == 1
    )
    with pytest.raises(UserError, match="contains a video"):
        adapter.parse_messages([{"role": "user", "content": [{"type": "video", "url": "x"}]}])


def test_losses_equal_the_models_token_by_token(pipeline):
    loss, greedy = adapter.continuation_loss(pipeline, [image()], "Which?", "a cat")
    ids = pipeline.processor.question_ids("Which?", 1)
    codes = pipeline.encode_for_reading([image()]).codes
    total = 0.0
    for token in pipeline.processor.text_tokenizer("a cat", add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = pipeline.model(
                input_ids=torch.tensor([ids]), image_codes=codes, return_logits=True
            ).logits
        total -= float(logits[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    assert loss == pytest.approx(total, rel=1e-4) and greedy is False
    first = pipeline.answer([image()], ["Which?"], 1)[0]
    if first:
        assert adapter.continuation_loss(pipeline, [image()], "Which?", first)[0] > 0


def test_the_entry_point_names_the_manifest():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {
        "open_unitok": "open_unitok.eval.lmms_eval.adapter:manifest"
    }
    assert "lmms" in project["optional-dependencies"]


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function images.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
RUN = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2 as registry
from lmms_eval.tasks import TaskManager
folder, model = sys.argv[1:3]
registry.load_entrypoint_manifests(overwrite=True)
from open_unitok.eval.lmms_eval.adapter import manifest
registry.register_manifest(manifest(), overwrite=True)
for name, simple in (("tiny_words", False), ("tiny_words", True), ("tiny_choice", True)):
    kind = registry.get_model_class("unitok", force_simple=simple)
    built = kind(pretrained=model, batch_size=2, device="cpu")
    found = simple_evaluate(
        model=built, tasks=[name], batch_size=1, bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager("ERROR", include_path=folder, include_defaults=False),
    )
    rows = [[row["doc_id"], str(row["resps"])] for row in found["samples"][name]]
    print("RESULT", json.dumps([type(built).__name__, found["results"][name], rows]))
"""


@needed
def test_a_tiny_local_task_runs_offline(folder, pipeline, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [
        {"question": f"Question {i}?", "answer": "x", "image": i, "options": ["a cat", "x"]} for i in range(3)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "images.py").write_text(
        "from PIL import Image\n"
        "def visual(doc):\n    return [Image.new('RGB', (32, 32), (40 * doc['image'], 100, 200))]\n"
    )
    words = "generation_kwargs: {max_new_tokens: 4}"
    for name, kind, metric, more in (
        ("tiny_words", "generate_until", "exact_match", words),
        ("tiny_choice", "multiple_choice", "acc", "doc_to_choice: options"),
    ):
        content = TASK.format(name=name, data=data, kind=kind, metric=metric, more=more)
        if kind == "multiple_choice":
            content = content.replace('doc_to_target: "{{answer}}"', "doc_to_target: answer")
        (tmp_path / f"{name}.yaml").write_text(content)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), str(folder)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert [row[0] for row in found] == ["OpenUniTokChat", "OpenUniTok", "OpenUniTok"]
    expected = [pipeline.answer([image(i)], [f"Question {i}?"], 4)[0] for i in range(3)]
    for _, _, samples in found[:2]:
        assert all(expected[i].split("\n\n")[0].strip() in answer for i, answer in samples)
    assert "acc,none" in found[2][1]
