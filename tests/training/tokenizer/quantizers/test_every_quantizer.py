"""Every entry of QUANTIZERS through what comes after it: a training step, files, evaluation, an MLLM."""

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.generation.backends import native_library
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.mllm.visual_embedder import VisualEmbedder
from open_unitok.tokenizer import QUANTIZERS, UniTok, UniTokConfig
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.dead_codes import DeadCodes, usage_and_perplexity

from ....tokenizer.quantizers.kinds import ENTRIES, KINDS, entry_of, overrides

STATISTICS = ("usage", "calls", "started", "probability")  # change in training, and no code with them


def settings(name: str) -> list[str]:
    """Overrides of the config of `data` for this kind."""
    return [*overrides(name), "codebooks={}"]


def tokenizer_config(name: str, data: Any, **options: Any) -> UniTokConfig:
    run = load_run_config(str(data / "config.yaml"), settings(name))
    fields = {**run.model, "quantizer_options": {**KINDS[name].options, **options}}
    return UniTokConfig(**fields, text_vocab_size=290)


@pytest.fixture(scope="module", params=ENTRIES)
def trained(request, data, tmp_path_factory):
    """kind, out: the run directory of one step; model: the tokenizer that it left."""
    name, out = request.param, tmp_path_factory.mktemp(request.param) / "run"
    main(["train", str(data / "config.yaml"), f"out={out}", "steps=1", *settings(name)])
    model = UniTok.from_pretrained(out / "model")
    return SimpleNamespace(name=name, kind=KINDS[name], out=out, model=model)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = torch.randint(256, (40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def some_pixels(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", ENTRIES)
def test_every_trainable_parameter_learns(name, data):
    torch.manual_seed(0)
    model, kind = UniTok(tokenizer_config(name, data)).train(), KINDS[name]
    out = model(some_pixels(), torch.randint(1, 290, (2, 12)), entropy=kind.entropy)
    pairs = (out.image_embeds @ out.text_embeds.T) * out.logit_scale
    clip = torch.nn.functional.cross_entropy(pairs, torch.arange(2))
    (out.reconstruction.square().mean() + clip + sum(out.losses.values())).backward()
    assert kind.entropy or "entropy" not in out.losses or not out.losses["entropy"]
    for parameter, weight in model.named_parameters():
        if not weight.requires_grad:
            assert parameter in ("quantizer.codebooks", "quantizer.inner.codebooks")
            assert not model.quantizer.trains_rows
            continue
        learns = weight.grad is not None and bool(weight.grad.any())
        assert learns != parameter.startswith(tuple(kind.no_gradient)), parameter
        assert weight.grad is None or weight.grad.isfinite().all(), parameter


def test_a_step_is_recorded_with_usage_and_perplexity(trained):
    record = json.loads((trained.out / "metrics.jsonl").read_text().splitlines()[-1])
    quantizer = trained.model.quantizer
    used, perplexity = usage_and_perplexity(quantizer.usage, quantizer.code_sizes)
    assert record["vq"] >= 0 and record["grad_norm"] > 0 and quantizer.calls == 1
    for book, size in enumerate(quantizer.code_sizes):
        assert record[f"usage/{book}"] == pytest.approx(used[book]) and 0 < used[book] <= 100
        assert record[f"perplexity/{book}"] == pytest.approx(perplexity[book], rel=1e-5)
        assert 1 <= perplexity[book] <= size
        assert quantizer.usage[book].sum() == pytest.approx(1, abs=1e-5)


def reset_in_place(original: Any, unused: torch.Tensor, rows: torch.Tensor, _write: Any) -> None:
    """`Quantizer.reset_codes` without a training engine."""
    original(unused, rows)


def test_dead_codes_are_reset_or_refused(trained, data, monkeypatch, tmp_path, capsys):
    torch.manual_seed(0)
    model = UniTok(trained.model.config).train()
    quantizer = model.quantizer
    if quantizer.codebooks is None or quantizer.moves_rows:
        with pytest.raises(SystemExit):
            main(["train", str(data / "config.yaml"), f"out={tmp_path / 'run'}", "steps=1",
                  *settings(trained.name), "codebooks={reset_after: 2}"])  # fmt: skip
        lines = capsys.readouterr().err.strip().splitlines()
        assert "codebooks.reset_after" in lines[-1] and not (tmp_path / "run" / "metrics.jsonl").exists()
        return
    resets = DeadCodes(quantizer, 1, 10, seed=0)
    before = quantizer.codebooks.detach().clone()
    model(some_pixels())
    monkeypatch.setattr(quantizer, "reset_codes", functools.partial(reset_in_place, quantizer.reset_codes))
    dead = resets.reset_codes(1, None)
    assert dead is not None and dead.any() and torch.equal(quantizer.codebooks[~dead], before[~dead])
    assert quantizer.codebooks[dead].isfinite().all() and not torch.equal(quantizer.codebooks, before)


def test_it_saves_and_loads(trained, tmp_path):
    model = trained.model
    model.save_pretrained(tmp_path)
    again = UniTok.from_pretrained(tmp_path)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)
    assert type(again.quantizer) is QUANTIZERS[entry_of(trained.name)]
    learns = [{n: p.requires_grad for n, p in m.quantizer.named_parameters()} for m in (model, again)]
    assert learns[0] == learns[1] and again.fingerprint() == model.fingerprint()
    codes = model.encode(some_pixels())
    assert codes.shape == (2, model.config.num_visual_tokens, model.config.num_codebooks)
    assert torch.equal(again.encode(some_pixels()), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))


def test_the_fingerprint_covers_all_that_changes_codes(trained, data):
    model, found = trained.model, trained.model.fingerprint()
    quantizer = model.quantizer
    latents = model.encode_latents(some_pixels()).detach()
    codes = quantizer.encode(latents)
    rows = quantizer.embed(codes)
    for name, tensor in quantizer.state_dict().items():
        kept = tensor.clone()
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        changed = not torch.equal(quantizer.encode(latents), codes)
        changed = changed or not torch.equal(quantizer.embed(codes), rows)
        assert not changed or model.fingerprint() != found, name
        assert not changed or name.rpartition(".")[2] not in STATISTICS, name
        tensor.copy_(kept)
    for options in trained.kind.other_codes:
        torch.manual_seed(0)
        plain = UniTok(tokenizer_config(trained.name, data))
        other = UniTok(tokenizer_config(trained.name, data, **options))
        other.load_state_dict(plain.state_dict(), strict=False)
        assert plain.fingerprint() != other.fingerprint()


def test_codes_are_extracted(trained, data):
    model, codes = trained.model, CodeFolder(extracted(trained, data), trained.model.fingerprint())
    sample = codes.read(0, 0).images[0]
    assert sample.shape == (model.config.num_visual_tokens, model.config.num_codebooks)
    assert (sample < model.quantizer.code_sizes).all()


def extracted(trained, data):
    """The code folder of the images of `data`."""
    folder = trained.out.parent / "codes"
    if not folder.exists():
        main(["extract-codes", "--tokenizer", str(trained.out / "model"),
              "--data", str(data / "pairs-0.tar"), "--out", str(folder)])  # fmt: skip
    return folder


def test_reconstruct(trained, photo, tmp_path, capsys):
    main(["reconstruct", str(photo), "--model", str(trained.out / "model"), "--out", str(tmp_path)])
    assert (tmp_path / "photo.png").exists() and "PSNR" in capsys.readouterr().out


def test_evaluation_of_the_tokenizer(trained, photo, tmp_path):
    main(["eval", "run", "reconstruction", "--model", str(trained.out / "model"),
          "--data", str(photo.parent), "--out", str(tmp_path)])  # fmt: skip
    result = json.loads((tmp_path / "reconstruction" / "results.json").read_text())
    assert result["metrics"]["psnr"]["value"] > 0
    assert len(result["details"]["usage"]) == trained.model.config.num_codebooks


@pytest.fixture(scope="module")
def mllm_run(trained, data, golden):
    """A function: train an MLLM on the codes for one step, and return its run directory."""

    def train(kinds=("text_to_image", "captioning")):
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        mixture = [{"kind": kind, "path": str(extracted(trained, data))} for kind in kinds]
        model = {
            "unitok": str(trained.out / "model"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**text, "max_position_embeddings": 64},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        }
        out = trained.out.parent / "mllm"
        config = {
            "stage": "mllm",
            "out": str(out),
            "steps": 1,
            "batch_size": 2,
            "model": model,
            "data": {"mixture": mixture, "max_length": 64},
            "engine": {"threads": 1},
            "log": {"every": 1},
        }
        file = trained.out.parent / "mllm.yaml"
        file.write_text(yaml.safe_dump(config))
        main(["train", str(file)])
        return out

    return train


def refusal_of(quantizer: Any, name: str) -> str | None:
    """What an MLLM says to the codes of a quantiser, or None."""
    if not quantizer.reads:
        return f"The codes of quantizer = {name!r} cannot be read by an MLLM (Quantizer.reads)."
    if not quantizer.generates and not hasattr(quantizer, "scales"):
        return f"The codes of quantizer = {name!r} cannot be generated by an MLLM (Quantizer.generates)."
    return None


def an_mllm_reads_a_pyramid(trained, mllm_run, photo, capsys) -> None:
    """It learns from and answers about the sum of all scales, and refuses to generate images."""
    line = "codes an image as a pyramid (scales [1, 2], 5 tokens); the MLLM reads it, but generates one grid"
    with pytest.raises(SystemExit):
        mllm_run()
    assert line in capsys.readouterr().err
    out = mllm_run(["captioning"])
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["text_loss"] > 0 and record["grad_norm"] > 0
    answers = []
    for backend in ["torch", *(["native"] if native_library.load_library() is not None else [])]:
        pipe = Pipeline.from_pretrained(out / "model", backend=backend)
        answers.append(
            pipe.answer([photo, None, photo], ["What is it", "Hello", "Is it red"], max_new_tokens=3)
        )
        with pytest.raises(UserError, match=line.replace("(", r"\(").replace("[", r"\[").replace(")", r"\)")):
            pipe.generate(["a red square"])
    assert answers[0] == answers[-1]
    codes = pipe.encode_for_reading([photo]).codes
    embedder = pipe.model.visual_embedder
    assert codes.shape[1] == 5 and embedder(codes).shape[1] == 4 == pipe.model.config.num_image_tokens
    rows = pipe.unitok.quantizer.embed(codes)
    torch.testing.assert_close(embedder.embed(codes), rows, rtol=0, atol=1e-6)


def test_an_mllm_trains_generates_and_answers(trained, mllm_run, photo, capsys):
    refusal = refusal_of(trained.model.quantizer, entry_of(trained.name))
    if refusal is not None:
        with pytest.raises(UserError, match=refusal.replace("(", r"\(").replace(")", r"\)")):
            UniTokMLLMConfig.for_tokenizer(trained.model.config)
        with pytest.raises(SystemExit):
            mllm_run()
        assert refusal in capsys.readouterr().err.replace("\n", " ")
        return
    if trained.model.config.scales:
        an_mllm_reads_a_pyramid(trained, mllm_run, photo, capsys)
        return
    out = mllm_run()
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["image_loss"] > 0 and record["grad_norm"] > 0
    backends = ["torch", *(["native"] if native_library.load_library() is not None else [])]
    codes, answers = [], []
    for backend in backends:
        pipe = Pipeline.from_pretrained(out / "model", backend=backend)
        codes.append(pipe.generate_codes(["a red square"], Sampling(guidance=2.0, greedy=True), seed=0))
        answers.append(pipe.answer([photo], ["What is it"], max_new_tokens=3))
    config = trained.model.config
    assert codes[0].shape == (1, config.num_visual_tokens, config.num_codebooks)
    assert (codes[0] < torch.tensor(trained.model.quantizer.code_sizes)).all()
    assert pipe.decode(codes[0])[0].size == (32, 32)
    assert all(torch.equal(codes[0], other) for other in codes) and answers[0] == answers[-1]
    embedder = next(m for m in pipe.model.modules() if isinstance(m, VisualEmbedder))
    rows = pipe.unitok.quantizer.embed(codes[0])  # the MLLM reads what the pixel decoder reads
    torch.testing.assert_close(embedder.embed(codes[0]), rows, rtol=0, atol=1e-6)
