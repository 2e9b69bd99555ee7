"""Quantisers of published checkpoints: names as in their code, codes as in the golden files, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTokConfig
from open_unitok.tokenizer.quantizers import QUANTIZERS, build_quantizer
from open_unitok.tokenizer.quantizers.published import (
    convert_quantizer,
    load_quantizer,
    quantizer_from_published,
)


def coda_state(rows, width, norm="rms", make=torch.zeros):
    """A published state dict of CODA's quantiser with C = 16."""
    state = {"codebooks.weight": make(rows, 16)}
    for name, outputs in (("to_q", width), ("to_k", width), ("to_v", 16)):
        state |= {f"attn.{name}.weight": make(outputs, 16), f"attn.{name}.bias": make(outputs)}
    if norm:
        for name in ("norm_q", "norm_k"):
            parts = ("weight", "bias") if norm == "layer" else ("weight",)
            state |= {f"attn.{name}.{part}": make(width) for part in parts}
    return state


def meta(*shape):
    return torch.empty(shape, device="meta")


PUBLISHED = {  # (system, state dict at the published sizes)
    "ibq-16384": ("ibq", {"quantize.embedding.weight": meta(16384, 256)}),
    "ibq-262144": ("ibq", {"quantize.embedding.weight": meta(262144, 256)}),
    "tokenflow": (
        "tokenflow",
        {
            "quantize.embedding_vqkd.weight": meta(32768, 32),
            "quantize.embedding_vqgan.weight": meta(32768, 8),
            "quantize.codebook_used": meta(131072),
        },
    ),
    "vqkd": (
        "vqkd",
        {
            "_quantizer._embedding.weight": meta(8192, 32),
            "_quantizer._losses.commitment_loss._weight._steps": meta(),
        },
    ),
    "cluster": (
        "cluster",
        {"_quantizer._embedding.weight": meta(8192, 768), "_quantizer._probability": meta(8192)},
    ),
    "coda-mar": ("coda", coda_state(16384, 32, make=meta)),
    "coda-flux": ("coda", coda_state(65536, 32, make=meta)),
    "coda-layer": ("coda", coda_state(64, 8, "layer", meta)),
    "coda-none": ("coda", coda_state(64, 8, None, meta)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit_on_meta(name):
    """Every tensor of our quantiser but the statistics is in the file, with its shape."""
    system, published = PUBLISHED[name]
    others = {"encoder.conv_in.weight": meta(8, 3, 3, 3), "decoder.conv_in.weight": meta(8, 8, 3, 3)}
    found = quantizer_from_published(system, published | others)
    with torch.device("meta"):
        quantizer = build_quantizer(UniTokConfig(**found.fields, projection="linear"))
    ours = {n: t.shape for n, t in quantizer.state_dict().items() if n not in ("usage", "calls")}
    assert {name: tensor.shape for name, tensor in found.state.items()} == ours


def test_averaged_rows_of_ibq_come_first():
    state = {
        "quantize.embedding.weight": torch.zeros(4, 2),
        "model_ema.quantizeembeddingweight": torch.ones(4, 2),
    }
    assert quantizer_from_published("ibq", state).state["codebooks"].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("system", "state", "words"),
    [
        (
            "ibq",
            {"encoder.conv_in.weight": torch.zeros(1)},
            r"ibq is not complete: quantize\.embedding\.weight",
        ),
        (
            "tokenflow",
            {"quantize.embedding.weight": torch.zeros(4, 2)},
            r"quantize\.embedding_vqkd\.weight, quantize\.embedding_vqgan\.weight missing",
        ),
        ("vqkd", {"quantize.embedding.weight": torch.zeros(4, 2)}, r"_quantizer\._embedding\.weight missing"),
        (
            "cluster",
            {"_quantizer._embedding.weight": torch.zeros(4, 2)},
            r"_quantizer\._probability missing",
        ),
        (
            "coda",
            {"codebooks.weight": torch.zeros(4, 2)},
            r"attn\.to_q\.weight, attn\.to_q\.bias, .* missing",
        ),
        (
            "coda",
            coda_state(4, 2) | {"attn.to_out.weight": torch.zeros(1)},
            r"1 tensors are not known .*attn\.to_out\.weight",
        ),
        (
            "tokenflow",
            {
                "quantize.embedding_vqkd.weight": torch.zeros(4, 2),
                "quantize.embedding_vqgan.weight": torch.zeros(5, 2),
            },
            "4 and 5 rows",
        ),
        ("idq", {}, "Did you mean 'ibq'"),
        (
            "cluster",
            {"_quantizer._embedding.weight": torch.zeros(4, 2), "_quantizer._probability": torch.zeros(5)},
            r"_probability has shape \(5,\), expected \(4,\)",
        ),
        (
            "coda",
            coda_state(4, 2) | {"attn.to_k.weight": torch.zeros(3, 16)},
            r"key\.weight has shape \(3, 16\)",
        ),
        ("coda", coda_state(4, 2) | {"attn.to_v.bias": torch.zeros(3)}, r"value\.bias has shape \(3,\)"),
        ("coda", coda_state(4, 2) | {"attn.norm_q.weight": torch.zeros(5)}, r"query_norm\.weight has shape"),
    ],
)
def test_files_that_do_not_fit_are_refused(system, state, words):
    with pytest.raises(UserError, match=words):
        quantizer_from_published(system, state)


def test_tokenflow_rows_give_the_published_codes(golden, tmp_path):
    """From a file with TokenFlow's names to the golden codes of one scale, through the command."""
    values = load_file(golden / "quantizers" / "tokenflow.safetensors")
    state = {
        "module.quantize.embedding_vqkd.weight": values["weights.semantic_table"],
        "module.quantize.embedding_vqgan.weight": values["weights.pixel_table"],
        "module.quantize.codebook_used": torch.zeros(8),
        "module.decoder.conv_in.weight": torch.zeros(2, 2),
    }
    torch.save({"model": state, "steps": 3}, tmp_path / "published.pt")
    main(["convert", "quantizer", "tokenflow", str(tmp_path / "published.pt"), str(tmp_path / "out")])
    fields = json.loads((tmp_path / "out" / "quantizer.json").read_text())["model"]
    assert fields["quantizer_options"] == {"block_widths": [6, 3]}
    config = UniTokConfig(**fields, projection="linear")
    quantizer = build_quantizer(config)
    load_quantizer(quantizer, config, tmp_path / "out")
    latents = torch.cat([values["in.semantic"], values["in.pixel"]], dim=1).flatten(2).transpose(1, 2)
    assert torch.equal(quantizer.encode(latents)[..., 0], values["single_w1.out.codes"])


def test_coda_weights_give_the_published_codes(golden, tmp_path):
    """In a pyramid the weights are those of its inner quantiser."""
    values = load_file(golden / "quantizers" / "coda.safetensors")
    numbers = json.loads((golden / "quantizers" / "coda.meta.json").read_text())
    prefix = "rms.weights."
    own = {n.removeprefix(prefix): t for n, t in values.items() if n.startswith(prefix)}
    state = {"codebooks.weight": own["codebook"]}
    for short in "qkv":
        state |= {f"attn.to_{short}.{part}": own[f"{short}.{part}"] for part in ("weight", "bias")}
    state |= {f"attn.norm_{short}.weight": own[f"{short}_norm.weight"] for short in "qk"}
    torch.save(state, tmp_path / "published.pth")
    main(["convert", "quantizer", "coda", str(tmp_path / "published.pth"), str(tmp_path / "out")])
    fields = json.loads((tmp_path / "out" / "quantizer.json").read_text())["model"]
    assert fields["quantizer_options"]["norm"] == "rms"
    latents = values["rms.in.latents"]
    options = {
        "inner": "attention",
        "inner_options": fields["quantizer_options"],
        "scales": numbers["cases"]["rms"]["scales"],
    }
    quantizer = QUANTIZERS["residual"](1, fields["codebook_size"], fields["codebook_dim"], **options)
    quantizer.grid = tuple(latents.shape[-2:])
    config = UniTokConfig(**fields, projection="linear")
    config.quantizer, config.quantizer_options = "residual", options
    load_quantizer(quantizer, config, tmp_path / "out")
    codes = quantizer.encode(latents.flatten(2).transpose(1, 2))[..., 0]
    assert torch.equal(codes, values["rms.out.codes"])


def test_another_quantizer_is_refused(tmp_path, capsys):
    torch.save({"state_dict": {"quantize.embedding.weight": torch.zeros(8, 4)}}, tmp_path / "ibq.ckpt")
    main(["convert", "quantizer", "ibq", str(tmp_path / "ibq.ckpt"), str(tmp_path / "out")])
    assert 'quantizer: "ibq"' in capsys.readouterr().out
    for fields, words in (
        ({"quantizer": "nearest"}, "has quantizer = 'ibq', but model.quantizer is 'nearest'"),
        ({"quantizer": "ibq", "codebook_size": 9}, "codebook_size = 8, but model.codebook_size is 9"),
    ):
        sizes = {"num_codebooks": 1, "codebook_size": 8, "codebook_dim": 4}
        config = UniTokConfig(**{**sizes, **fields})
        with pytest.raises(UserError, match=words):
            load_quantizer(build_quantizer(config), config, tmp_path / "out")
    with pytest.raises(UserError, match=r"init_quantizer: .* has no quantizer\.safetensors"):
        load_quantizer(build_quantizer(config), config, tmp_path)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(SystemExit):
        main(["convert", "quantizer", "ibq", str(tmp_path / "list.pth"), str(tmp_path / "other")])
    assert "does not hold a state dict" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "quantizer.json is not a file of unitok convert quantizer"),
        ("[]", "quantizer.json is not a file of unitok convert quantizer"),
        ('{"model": {"quantizer_options": null}}', "is not a file of unitok convert quantizer"),
        ('{"model": {"quantizer_options": {}, "rows": 3}}', "is not a file of unitok convert quantizer"),
    ],
)
def test_a_description_of_another_kind_is_refused(tmp_path, content, words):
    (tmp_path / "quantizer.json").write_text(content)
    save_file({"codebooks": torch.randn(1, 16, 4)}, tmp_path / "quantizer.safetensors")
    with pytest.raises(UserError, match=words):
        load_quantizer(QUANTIZERS["ibq"](1, 16, 4), UniTokConfig(), tmp_path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.full((16, 4), torch.nan), "does not fit: codebooks holds NaN or infinity"),
        (torch.zeros(16), r"does not fit: its table of rows has shape \(16,\)"),
    ],
)
def test_rows_that_are_no_table_of_numbers_are_refused(tmp_path, rows, words):
    torch.save({"quantize.embedding.weight": rows}, tmp_path / "ibq.pt")
    with pytest.raises(UserError, match=words):
        convert_quantizer("ibq", tmp_path / "ibq.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_rows_is_refused_in_one_line(tmp_path):
    torch.save({"quantize.embedding.weight": torch.randn(16, 4)}, tmp_path / "ibq.pt")
    fields = convert_quantizer("ibq", tmp_path / "ibq.pt", tmp_path / "out")
    (tmp_path / "out" / "quantizer.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"quantizer\.safetensors cannot be loaded"):
        load_quantizer(QUANTIZERS["ibq"](1, 16, 4), UniTokConfig(**fields), tmp_path / "out")


def test_an_unknown_system_is_refused_without_the_file(tmp_path):
    with pytest.raises(UserError, match=r"^'ibqs' is not a known system"):
        convert_quantizer("ibqs", tmp_path / "ibq.pt", tmp_path / "out")
