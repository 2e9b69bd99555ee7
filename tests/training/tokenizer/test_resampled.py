"""Query tokens end to end: training, extraction, an MLLM that reads and generates them, refusals; ranks and
resume."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.generation.backends import native_library
from open_unitok.generation.ui.page import ReconstructionHandler
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.token_layout import TokenLayout
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture import codes_layout
from open_unitok.training.mllm.train import check_generated_layout

from ..two_ranks import MODEL, STEPS, assert_resumed_exactly, assert_two_ranks_equal_one_process, train_all

LAYOUT = {"rows": 2, "columns": 2, "tokens": 5}
QUERIES = [
    "model.encoder=resampled",
    "model.decoder=resampled",
    "model.token_layout={rows: 2, columns: 2, tokens: 5}",
    "model.encoder_options={query_layers: 1, query_reads: layers}",
    "model.decoder_options={query_layers: 2}",
]
# UniTok's quantiser on 1-D tokens, and SweetTok's codebook of words
WORDS = [
    "model.quantizer=language",
    "model.num_codebooks=3",
    "model.codebook_size=null",
    "model.codebook_dim=16",
    "model.projection=linear",
    "losses.entropy=0",
    "codebooks={}",
]


def kind_options(kind: str, folder: Path) -> list[str]:
    if kind == "multi_codebook":
        return QUERIES
    words = {
        "adjectives": ["red", "green", "blue", "black"],
        "nouns": ["square", "circle", "a", "and", "dot"],
    }
    for name, listed in words.items():
        (folder / f"{name}.txt").write_text("\n".join(listed))
    (folder / "edges.txt").write_text("red\tsquare\nblue\tdot\n")
    vectors = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    np.save(folder / "vectors.npy", vectors.numpy())
    lists = [str(folder / f"{name}.txt") for name in words]
    section = {"lists": lists, "vectors": str(folder / "vectors.npy"), "edges": str(folder / "edges.txt")}
    return [*QUERIES, *WORDS, f"words={json.dumps(section)}"]


@pytest.fixture(scope="module", params=["multi_codebook", "language"])
def trained(request, data, tmp_path_factory):
    """A folder with `run` (two steps), and `codes`, those of the images of `data`."""
    folder = tmp_path_factory.mktemp(request.param)
    options = kind_options(request.param, folder)
    main(["train", str(data / "config.yaml"), f"out={folder / 'run'}", "steps=2", *options])
    main(["extract-codes", "--tokenizer", str(folder / "run" / "model"), "--data", f"{data}/pairs-0.tar",
          "--out", str(folder / "codes")])  # fmt: skip
    return folder


def test_a_run_records_and_keeps_the_layout(trained):
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["vq"] > 0 and records[-1]["grad_norm"] > 0 and records[-1]["usage/0"] > 0
    model = UniTok.from_pretrained(trained / "run" / "model")
    assert model.config.token_layout == {**LAYOUT, "registers": 0}
    assert model.config.num_visual_tokens == 5


def test_codes_are_extracted_with_the_layout(trained):
    model = UniTok.from_pretrained(trained / "run" / "model")
    codes = CodeFolder(trained / "codes", model.fingerprint())
    assert codes.manifest["layout"] == {**LAYOUT, "registers": 0} and codes.image_places == 5
    assert codes_layout(codes) == TokenLayout(2, 2, tokens=5)
    assert codes.read(0, 0).images[0].shape == (5, model.config.num_codebooks)


def test_an_mllm_reads_and_generates_a_sequence_of_tokens(trained, golden, tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    mixture = [{"kind": kind, "path": str(trained / "codes")} for kind in ("text_to_image", "captioning")]
    config = {
        "stage": "mllm",
        "out": str(tmp_path / "mllm"),
        "steps": 1,
        "batch_size": 2,
        "model": {
            "unitok": str(trained / "run" / "model"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**text, "max_position_embeddings": 64},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        },
        "data": {"mixture": mixture, "max_length": 64},
        "engine": {"threads": 1},
        "log": {"every": 1},
    }
    (tmp_path / "mllm.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(tmp_path / "mllm.yaml")])
    Image.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / "photo.png")
    codes, answers = [], []
    for backend in ["torch", *(["native"] if native_library.load_library() is not None else [])]:
        pipe = Pipeline.from_pretrained(tmp_path / "mllm" / "model", backend=backend)
        assert pipe.layout == TokenLayout(2, 2, tokens=5) and pipe.model.config.num_image_tokens == 5
        codes.append(pipe.generate_codes(["a red square"], Sampling(guidance=2.0, greedy=True), seed=0))
        answers.append(pipe.answer([tmp_path / "photo.png"], ["What is it"], max_new_tokens=3))
    assert codes[0].shape == (1, 5, pipe.unitok.config.num_codebooks) and torch.equal(codes[0], codes[-1])
    assert answers[0] == answers[-1] and pipe.decode(codes[0])[0].size == (32, 32)
    # no preview before all tokens are there
    previews = list(pipe.stream(["a red square"], Sampling(guidance=2.0), seed=3))
    assert len(previews) == 1
    assert (
        previews[0][0].tobytes()
        == pipe.generate(["a red square"], Sampling(guidance=2.0), seed=3)[0].tobytes()
    )
    with pytest.raises(UserError, match="5 visual tokens of an image have no rows"):
        pipe.first_rows([tmp_path / "photo.png"], 1)
    given = pipe.generate_codes(["a red square"], Sampling(guidance=2.0), seed=4, prefix=codes[0][:, :2])
    assert torch.equal(given[:, :2], codes[0][:, :2])
    assert pipe.reconstruct([tmp_path / "photo.png"])[0].size == (32, 32)
    _, maps = ReconstructionHandler(pipe)(str(tmp_path / "photo.png"))
    assert maps.count("data-code=") == 5 * codes[0].shape[2] and "data-columns='0'" in maps


def test_codes_of_a_grid_with_as_many_tokens_are_rejected():
    sizes = UniTokMLLMConfig(num_image_tokens=4, token_layout={"rows": 2, "columns": 2, "tokens": 4})
    message = r"codes holds images of 2 x 2 visual tokens, .* generates 4 visual tokens of 2 x 2 patches"
    with pytest.raises(UserError, match=message):
        check_generated_layout(sizes, TokenLayout(2, 2), "codes")
    check_generated_layout(sizes, TokenLayout(2, 2, tokens=4), "codes")


REFUSED = {
    "no number": (["model.token_layout=null"], "needs the number of its query tokens: set token_layout"),
    "0 queries": (["model.token_layout={rows: 2, columns: 2, tokens: 0}"], "needs the number of its query"),
    "registers": (
        ["model.token_layout={rows: 2, columns: 2, tokens: 5, registers: 1}"],
        "num_register_tokens = 1: .* has queries instead",
    ),
    "another grid": (["model.token_layout={rows: 4, columns: 4, tokens: 5}"], "image_size = 32 is not"),
    "scales": (
        ["model.quantizer=residual", "model.quantizer_options={scales: [1, 2]}"],
        "token_layout.tokens = 5 together with scales",
    ),
    "an encoder alone": (["model.decoder=vitamin", "model.decoder_options={}"], "decoder 'vitamin' has one"),
    "patches of a teacher": (
        ["losses.teacher=1", "teacher={kind: cosine, model: TEACHER}"],
        "compares each token with the teacher's patch there, but 5 visual tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_batch(data, tmp_path, capsys, name, clip_folder):
    options, message = REFUSED[name]
    options = [option.replace("TEACHER", str(clip_folder)) for option in options]
    with pytest.raises(SystemExit):
        main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=1", *QUERIES, *options])
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- slow: ranks and resume ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    kinds = ("multi_codebook", "language")
    options = {kind: (data / "config.yaml", [*kind_options(kind, folder), *STEPS]) for kind in kinds}
    return train_all(folder, options, stop_at=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["multi_codebook", "language"])
def test_two_ranks_equal_one_process(runs, kind):
    assert_two_ranks_equal_one_process(runs, kind)
    assert "encoder.resampler.queries" in load_file(runs / kind / MODEL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["multi_codebook", "language", "multi_codebook-ranks", "language-ranks"])
def test_a_stopped_run_resumes_exactly(runs, kind):
    assert_resumed_exactly(runs / kind, runs / f"{kind}-resumed")
