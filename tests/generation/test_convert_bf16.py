"""`unitok convert bf16` and sampling.json: a shipped model has its own sampling settings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from open_unitok import Pipeline, Sampling
from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation.serving.schema import ImageRequest
from open_unitok.tokenizer import UniTok

OWN = Sampling(guidance=3.0, temperature=0.3)


@pytest.fixture(scope="module")
def rounded(folder, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "mllm"
    shutil.copytree(folder, source)
    (source / "unitok" / "caption_tokenizer").mkdir()
    (source / "unitok" / "caption_tokenizer" / "tokenizer.model").write_bytes(b"kept")
    target = source.parent / "rounded"
    main(["convert", "bf16", str(source), str(target), "--guidance", "3", "--temperature", "0.3"])
    return target


def test_weights_are_rounded_and_codebooks_kept(folder, rounded):
    for name in ("model.safetensors", "unitok/model.safetensors"):
        before, after = load_file(folder / name), load_file(rounded / name)
        assert before.keys() == after.keys()
        for key, tensor in after.items():
            assert torch.equal(tensor.float(), before[key].to(tensor.dtype).float())
            exact = key.startswith(("quantizer.", "down_projection.", "up_projection."))  # FLOAT32_PARTS
            if tensor.is_floating_point() and not exact:
                assert tensor.dtype == torch.bfloat16
    assert (rounded / "unitok" / "caption_tokenizer" / "tokenizer.model").read_bytes() == b"kept"


def test_it_loads_in_fp32_and_generates_with_its_own_settings(rounded):
    pipe = Pipeline.from_pretrained(rounded)
    assert pipe.model.dtype == torch.float32 and pipe.sampling == OWN
    prompt = ["a red circle"]
    assert torch.equal(pipe.generate_codes(prompt, seed=1), pipe.generate_codes(prompt, OWN, seed=1))
    assert not torch.equal(
        pipe.generate_codes(prompt, seed=1), pipe.generate_codes(prompt, Sampling(), seed=1)
    )


def test_its_settings_are_the_defaults_of_command_line_and_server(rounded, tmp_path):
    from PIL import Image

    command = ["generate", "a star", "--model", str(rounded), "--top-k", "5", "--out", str(tmp_path / "out")]
    main(command)
    with Image.open(tmp_path / "out" / "00000-a-star-seed0.png") as image:
        record = json.loads(image.text["unitok"])
    assert (record["guidance"], record["temperature"], record["top_k"]) == (3.0, 0.3, 5)
    asked = ImageRequest(prompt="a star", guidance=2.0)
    assert OWN.override(asked.model_dump()) == Sampling(guidance=2.0, temperature=0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "must hold a JSON object"),
        ('{"guidence": 2}', "must be a mapping with some of guidance"),
        ('{"guidance": 0}', "guidance is 0"),
        ("{", "sampling.json"),
    ],
)
def test_invalid_settings_in_the_folder_are_named(tmp_path, text, words):
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(UserError, match=words):
        Sampling.from_folder(tmp_path)


def test_another_pixel_decoder_replaces_the_models(folder, tmp_path, capsys):
    other = UniTok.from_pretrained(folder / "unitok")
    with torch.no_grad():
        for weight in other.decoder.parameters():
            weight.mul_(1.25)
    other.save_pretrained(tmp_path / "decoder")
    main(["convert", "bf16", str(folder), str(tmp_path / "new"), "--unitok", str(tmp_path / "decoder")])
    assert Pipeline.from_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "unitok" / "model.safetensors")
    for key, tensor in load_file(tmp_path / "decoder" / "model.safetensors").items():
        assert torch.equal(saved[key].float(), tensor.to(saved[key].dtype).float()), key
    # other codes are refused
    with torch.no_grad():
        other.encoder.get_parameter(next(iter(dict(other.encoder.named_parameters())))).mul_(2)
    other.save_pretrained(tmp_path / "codes")
    with pytest.raises(SystemExit) as stop:
        main(["convert", "bf16", str(folder), str(tmp_path / "bad"), "--unitok", str(tmp_path / "codes")])
    assert stop.value.code == 2 and str(tmp_path / "codes") in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_an_existing_target_is_not_overwritten(rounded, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "bf16", str(rounded), str(rounded)])
    assert stop.value.code == 2 and "already exists" in capsys.readouterr().err
