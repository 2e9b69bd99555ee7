"""Stage adapt: a continuous autoencoder becomes a discrete tokenizer (CODA)."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.adaptation.lora import inject_lora, merged_weights
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.adapt import build_adapted
from open_unitok.training.tokenizer.plan import model_on_meta, plan_run

pytest.importorskip("diffusers")
pytest.importorskip("peft")

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.5,
    "shift_factor": 0.2,
}
UNITOK = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": [8, 8],
    "stage_depths": [1, 1],
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": [8, 8],
    "decoder_depths": [1, 1],
    "quantizer": "none",
    "quantizer_options": {"posterior": "kl"},
    "codebook_dim": 4,
    "embed_dim": 16,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 290,
    "text_context_length": 12,
}
ATTENTION = {
    "quantizer": "attention",
    "quantizer_options": {"attention_dim": 8},
    "codebook_size": 16,
    "image_size": 32,
}
PYRAMID = {
    "quantizer": "residual",
    "quantizer_options": {
        "inner": "attention",
        "inner_options": {"attention_dim": 8},
        "scales": [1, 2, 4, 8],
        "detach": False,
    },
    "codebook_size": 16,
    "image_size": 32,
}
LAYERS = {"vae": ["conv1", "conv2"], "unitok": ["conv", "pool", "qkv"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of a tiny random AutoencoderKL, saved by diffusers, and of a UniTok without quantiser."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    UniTok(UniTokConfig(**UNITOK)).save_pretrained(folder / "unitok")
    return folder


@pytest.fixture(scope="module")
def config_file(data, bases, tmp_path_factory):
    """(base, **changes) -> the YAML of a run of one step."""
    folder = tmp_path_factory.mktemp("configs")

    def write(base: str = "vae", **changes) -> str:
        config = {
            "stage": "adapt",
            "engine": {"threads": 1},
            "out": str(folder / "run"),
            "init_from": str(bases / base),
            "steps": 1,
            "batch_size": 4,
            "data": {"sources": [{"path": f"{data}/pairs-*.tar"}], "shuffle": 16},
            "model": ATTENTION,
            "lora": {"rank": 2, "modules": LAYERS[base]},
            "losses": {"clip": 0.0, "lpips": 0.0, "entropy": 0.05},
            "optimizer": {"lr": 2e-3},
            "log": {"every": 1},
            "ema": 0.9,
        }
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config | changes))
        return str(file)

    return write


@pytest.fixture(scope="module", params=["vae", "unitok", "pyramid"])
def adapted(request, config_file, tmp_path_factory):
    """The run of two steps and its tokenizer."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    base = "vae" if request.param == "pyramid" else request.param
    model = PYRAMID if request.param == "pyramid" else ATTENTION
    main(["train", config_file(base, model=model), f"out={out}", "steps=2", "checkpoint.every=1"])
    return SimpleNamespace(
        name=request.param, base=base, out=out, model=UniTok.from_pretrained(out / "model")
    )


def some_pixels(images: int = 2) -> torch.Tensor:
    return torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(config_file, base: str = "vae", **changes) -> UniTok:
    return build_adapted(load_run_config(config_file(base, **changes), []))[0]


# ---- LoRA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", LAYERS)
def test_lora_starts_bit_equal_to_the_bare_network(base, bases, config_file):
    model = build(config_file, base).eval()
    pixels, latents = some_pixels(), torch.randn(2, 4, 4) if base == "unitok" else torch.randn(2, 64, 4)
    grid = (2, 2) if base == "unitok" else (8, 8)
    if base == "unitok":
        bare = UniTok.from_pretrained(bases / "unitok")
        encode, decode = bare.encode_latents, lambda z: bare.decode_latents(z, grid)
    else:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(bases / "vae")

        def encode(x):
            return ((vae.encode(x).latent_dist.mode() - 0.2) * 0.5).flatten(2).transpose(1, 2)

        def decode(z):
            return vae.decode(z.transpose(1, 2).unflatten(2, grid) / 0.5 + 0.2).sample

    with torch.no_grad():
        for _ in range(2):  # in training mode, too: layers may take another path there
            assert torch.equal(model.encode_latents(pixels), encode(pixels))
            assert torch.equal(model.decode_latents(latents, grid), decode(latents))
            model.train()
            bare.train() if base == "unitok" else vae.train()


def test_lora_equals_the_golden_one(golden):
    """Outputs, gradients and two SGD steps of a convolution, and the merged kernel."""
    tensors = load_file(golden / "quantizers" / "coda.safetensors")
    meta = json.loads((golden / "quantizers" / "coda.meta.json").read_text())["cases"]
    for case in ("lora_k3s1", "lora_k3s2"):
        stride, padding = meta[case]["stride"], meta[case]["padding"]
        get = {n.removeprefix(f"{case}."): t for n, t in tensors.items() if n.startswith(f"{case}.")}
        outputs, inputs = get["weights.weight"].shape[:2]
        rank = len(get["weights.down"])
        holder = torch.nn.ModuleDict({"decoder": torch.nn.ModuleDict()})
        conv = torch.nn.Conv2d(inputs, outputs, 3, stride, padding)
        conv.weight.data, conv.bias.data = get["weights.weight"].clone(), get["weights.bias"].clone()
        holder["decoder"]["conv1"] = conv
        with torch.no_grad():
            bare = conv(get["in.x"])
        inject_lora(holder, ["conv1"], rank)
        layer = holder["decoder"]["conv1"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert layer.scaling["default"] == 1 and not up.any()
        down.data.copy_(get["weights.down"])
        trained = [p for p in holder.parameters() if p.requires_grad]
        assert len(trained) == 2
        sgd = torch.optim.SGD(trained, lr=meta[case]["sgd_lr"])
        assert torch.equal(layer(get["in.x"]), bare)
        for step in (1, 2):
            sgd.zero_grad()
            (layer(get["in.x"]) * get["in.cotangent"]).sum().backward()
            for name, parameter in (("down", down), ("up", up)):
                expected = get[f"grad{step}.{name}"]
                scale = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=2e-5 * scale)
            assert step > 1 or not down.grad.any()
            sgd.step()
            torch.testing.assert_close(layer(get["in.x"]), get[f"out.after{step}"], rtol=0, atol=1e-5)
            torch.testing.assert_close(up, get[f"weights.up_after{step}"], rtol=0, atol=2e-6)
        fused = merged_weights(holder)["decoder.conv1.weight"]
        torch.testing.assert_close(fused, get["weights.fused"], rtol=0, atol=2e-6)


def test_lora_has_the_published_start(bases):
    model = UniTok(UniTokConfig(**UNITOK))
    torch.manual_seed(0)
    names = inject_lora(model, ["conv", "widen", "narrow"], 32)
    assert any(name.startswith("encoder.") for name in names) and "decoder.narrow.0.depthwise" not in names
    downs = torch.cat([p.flatten() for n, p in model.named_parameters() if ".lora_A." in n])
    assert downs.std().item() == pytest.approx(1 / 32, rel=0.05)


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", LAYERS)
def test_every_trainable_parameter_and_nothing_else_learns(base, config_file):
    model = build(config_file, base).train()
    for parameter, weight in model.named_parameters():  # at the start `up` is 0, so `down` gets no gradient
        if ".lora_B." in parameter:
            weight.data.normal_(std=0.1)
    out = model(some_pixels(), entropy=True)
    (out.reconstruction.square().mean() + sum(out.losses.values())).backward()
    for parameter, weight in model.named_parameters():
        learns = ".lora_" in parameter or parameter.startswith("quantizer.")
        assert weight.requires_grad == learns, parameter
        assert bool(weight.grad is not None and weight.grad.any()) == learns, parameter


def test_the_autoencoder_stays_and_the_rest_moves(adapted, bases):
    checkpoint = adapted.out / "checkpoints" / "step-00000001"
    first, last = UniTok.from_pretrained(checkpoint).state_dict(), adapted.model.state_dict()
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert any(name.startswith("encoder.") for name in changed)
    assert any(name.startswith("decoder.") for name in changed)
    assert {"quantizer.calls", "quantizer.codebooks", "quantizer.query.weight"} <= {
        name.replace("inner.", "") for name in changed
    }
    for name in changed:
        assert name.startswith("quantizer.") or any(part in name for part in LAYERS[adapted.base]), name
        assert not name.endswith("bias") or name.startswith("quantizer."), name
    assert not [name for name in last if "lora" in name or "base_layer" in name or "variance" in name]


def test_it_is_a_tokenizer_like_any_other(adapted, data, tmp_path):
    model, count = adapted.model, {"vae": 64, "unitok": 4, "pyramid": 85}[adapted.name]
    codes = model.encode(some_pixels())
    assert codes.shape == (2, count, 1) and model.decode(codes).shape == (2, 3, 32, 32)
    assert torch.equal(model.reconstruct(some_pixels()), model.decode(codes))
    assert model.config.patch_size == (16 if adapted.name == "unitok" else 4)
    model.save_pretrained(tmp_path / "again")
    again = UniTok.from_pretrained(tmp_path / "again")
    assert again.fingerprint() == model.fingerprint() and torch.equal(again.encode(some_pixels()), codes)
    half = UniTok.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert half.decode(half.encode(some_pixels())).isfinite().all()
    main(["extract-codes", "--tokenizer", str(adapted.out / "model"), "--data", str(data / "pairs-0.tar"),
          "--out", str(tmp_path / "codes")])  # fmt: skip
    assert CodeFolder(tmp_path / "codes", model.fingerprint()).read(0, 0).images[0].shape == (count, 1)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / "a.png")
    main(["eval", "run", "reconstruction", "--model", str(adapted.out / "model"),
          "--data", str(tmp_path / "images"), "--out", str(tmp_path / "eval")])  # fmt: skip
    found = json.loads((tmp_path / "eval" / "reconstruction" / "results.json").read_text())
    assert found["metrics"]["psnr"]["value"] > 0 and found["metrics"]["codebook_usage_min"]["value"] > 0


def test_scale_and_shift_are_in_the_fingerprint(adapted):
    if adapted.base != "vae":
        return
    config = UniTokConfig.from_dict(adapted.model.config.to_dict())
    config.encoder_options = {**config.encoder_options, "scaling_factor": 0.25}
    other = UniTok(config)
    other.load_state_dict(adapted.model.state_dict())
    assert other.fingerprint() != adapted.model.fingerprint()


def test_an_mllm_reads_and_generates_its_codes(adapted, data, golden, tmp_path):
    if adapted.name != "unitok":  # 64 tokens would take longer, a pyramid is read only
        return
    codes = tmp_path / "codes"
    main(["extract-codes", "--tokenizer", str(adapted.out / "model"), "--data", str(data / "pairs-0.tar"),
          "--out", str(codes)])  # fmt: skip
    pipe = Pipeline.from_pretrained(train_mllm(adapted, codes, golden, tmp_path) / "model")
    generated = pipe.generate_codes(["a red square"], Sampling(greedy=True), seed=0)
    assert generated.shape == (1, 4, 1) and pipe.decode(generated)[0].size == (32, 32)


def train_mllm(adapted, codes, golden, tmp_path, kinds=("text_to_image", "captioning")):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "stage": "mllm",
        "out": str(tmp_path / "mllm"),
        "steps": 1,
        "batch_size": 2,
        "model": {
            "unitok": str(adapted.out / "model"),
            "text_tokenizer": str(golden / "mllm" / "tokenizer.model"),
            "text": {**text, "max_position_embeddings": 128},
            "depth": {"num_hidden_layers": 1},
            "processor": {"template": "plain"},
        },
        "data": {"mixture": [{"kind": kind, "path": str(codes)} for kind in kinds], "max_length": 128},
        "engine": {"threads": 1},
    }
    (tmp_path / "mllm.yaml").write_text(yaml.safe_dump(config))
    main(["train", str(tmp_path / "mllm.yaml")])
    return tmp_path / "mllm"


def test_an_mllm_reads_the_pyramid_and_generates_none(adapted, data, golden, tmp_path, capsys):
    if adapted.name != "pyramid":
        return
    codes = tmp_path / "codes"
    main(["extract-codes", "--tokenizer", str(adapted.out / "model"), "--data", str(data / "pairs-0.tar"),
          "--out", str(codes)])  # fmt: skip
    with pytest.raises(SystemExit):
        train_mllm(adapted, codes, golden, tmp_path)
    assert "pyramid (scales [1, 2, 4, 8], 85 tokens)" in capsys.readouterr().err
    out = train_mllm(adapted, codes, golden, tmp_path, ["captioning"])
    with pytest.raises(UserError, match="pyramid"):
        Pipeline.from_pretrained(out / "model").generate(["a red square"])


# ---- folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", LAYERS)
def test_an_adapter_beside_its_base_equals_the_merged_model(base, bases, config_file, tmp_path):
    shutil.copytree(bases / base, tmp_path / "base")
    runs = {}
    for kind in ("merged", "adapter"):
        out = tmp_path / kind
        file = config_file(
            base,
            init_from=str(tmp_path / "base"),
            save=kind,
            out=str(out),
            lora={"rank": 2, "modules": LAYERS[base]},
        )
        main(["train", file])
        runs[kind] = UniTok.from_pretrained(out / "model")
    stored = {path.name for path in (tmp_path / "adapter" / "model").rglob("*") if path.is_file()}
    assert stored == {"config.json", "adapter_config.json", "adapter_model.safetensors"}
    assert runs["merged"].fingerprint() == runs["adapter"].fingerprint()
    assert torch.equal(*(run.encode(some_pixels()) for run in runs.values()))
    states = [run.state_dict() for run in runs.values()]
    assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []
    torch.testing.assert_close(*(run.reconstruct(some_pixels()) for run in runs.values()))
    # another base, or none
    weights = next((tmp_path / "base").glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(n for n in tensors if n.startswith("decoder") and n.endswith("weight"))
    save_file({**tensors, name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="whose weights have changed since"):
        UniTok.from_pretrained(tmp_path / "adapter" / "model")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"is an adapter of .*, which cannot be read"):
        UniTok.from_pretrained(tmp_path / "adapter" / "model")


def test_a_pipeline_with_a_vae_is_read(bases, config_file, tmp_path):
    shutil.copytree(bases / "vae", tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    model = build(config_file, init_from=str(tmp_path / "pipeline"))
    assert model.config.encoder == "autoencoder_kl" and model.config.encoder_options["shift_factor"] == 0.2


def test_a_sample_of_the_posterior_is_keyed_by_image_and_step(config_file, tmp_path):
    outs = []
    for out in ("one", "two"):
        file = config_file(posterior="sample", out=str(tmp_path / out))
        main(["train", file])
        outs.append(load_file(tmp_path / out / "model" / "model.safetensors"))
    main(["train", config_file(out=str(tmp_path / "mode"))])
    mode = load_file(tmp_path / "mode" / "model" / "model.safetensors")
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in mode)
    assert not all(torch.equal(outs[0][name], mode[name]) for name in mode)
    model = UniTok.from_pretrained(tmp_path / "one" / "model")
    assert torch.equal(model.encode(some_pixels()), model.encode(some_pixels()))


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, changes, words",
    [
        (
            "vae",
            ["init_from=null"],
            "init_from is not set: stage adapt needs a trained continuous autoencoder",
        ),
        ("vae", ["init_from=scenes"], "is a tokenizer with quantizer = 'multi_codebook'"),
        ("vae", ["init_from=/nowhere/vae"], "/nowhere/vae does not exist"),
        ("vae", ["lora.rank=0"], "lora.rank is 0: it must be 1 or more"),
        ("vae", ["lora.rank=-1"], "lora.rank is -1: it must be 1 or more"),
        ("vae", ["lora.modules=[]"], "lora.modules is []"),
        ("vae", ["lora.modules=[conv9]"], "lora.modules has 'conv9', but no convolution"),
        ("unitok", ["lora.modules=[depthwise]"], "a grouped convolution, whose LoRA cannot be merged"),
        ("vae", ["lora.alpha=1"], "Unknown config key 'lora.alpha'"),
        ("vae", ["model.codebook_dim=8"], "is 8, but the autoencoder's latents have width 4"),
        ("unitok", ["model.num_codebooks=2"], "is 8, but the autoencoder's latents have width 4"),
        ("vae", ["model.quantizer=none"], "model.quantizer is 'none': stage adapt needs a quantiser"),
        ("vae", ["model.quantizer=null"], "model.quantizer is None: stage adapt needs a quantiser"),
        ("vae", ["model.hidden_size=9"], "model.hidden_size is 9, but the autoencoder has 4"),
        (
            "vae",
            ["model.encoder_options.scaling_factor=1.0"],
            "scaling_factor is 1.0, but the autoencoder has 0.5",
        ),
        ("vae", ["posterior=median"], "posterior is 'median'"),
        (
            "unitok",
            ["posterior=sample"],
            "posterior is sample, but of encoder 'vitamin' only the mode is kept",
        ),
        ("vae", ["losses.clip=1.0"], "losses.clip is 1.0, but stage adapt has no captions"),
        ("vae", ["freeze=[encoder]"], "freeze is ['encoder']: stage adapt freezes the autoencoder"),
        ("vae", ["ema_pace=0"], "ema_start must be 0 or more, ema_pace 1 or more"),
        ("vae", ["save=both"], "save is 'both'"),
        ("vae", ["losses.kl=1.0"], "losses.kl is 1.0, but AttentionQuantizer has no such loss"),
        (
            "vae",
            ["losses.adversarial=1.0", "discriminator.kind=patch", "lora.adaptive_at=decoder.conv_in"],
            "lora.adaptive_at is 'decoder.conv_in', which has no LoRA",
        ),
        (
            "unitok",
            ["losses.adversarial=1.0", "discriminator.kind=patch", "lora.modules=[stem.conv1]"],
            "lora.modules picks no layer of the decoder",
        ),
    ],
)
def test_refusals_before_the_first_batch(base, changes, words, config_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", config_file(base), f"out={tmp_path / 'run'}", *changes])
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1] and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("package", ["peft", "diffusers"])
def test_a_missing_package_is_named(package, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        main(["train", config_file(), f"out={tmp_path / 'run'}"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert package in line and "pip install 'open-unitok[" in line


def test_the_gan_trains_at_a_lora_matrix(config_file, tmp_path):
    """The factor of the generator loss rises over the whole run, without a blur."""
    gan = {"kind": "patch", "width": 8, "layers": 1, "adaptive": "vqgan", "warmup": 2, "blur": False}
    gan |= {"augment": 0.0, "cutout": 0.0, "consistency": 0.0, "loss": "hinge_half"}
    losses = {"clip": 0.0, "lpips": 0.0, "entropy": 0.05, "adversarial": 1.0}
    file = config_file(out=str(tmp_path / "run"), steps=2, discriminator=gan, losses=losses)
    main(["train", file])
    first, second = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert first["adversarial_weight"] == 0 and second["adversarial_weight"] > 0
    assert second["discriminator_grad_norm"] > 0


# ---- published layouts -----------------------------------------------------------------------------------


def ldm_names(weights: dict, levels: int) -> dict:
    """diffusers' names -> LDM's, the inverse of what is tested."""
    found = {}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        rest = rest.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        rest = rest.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        rest = rest.replace("mid_block.attentions.0", "mid.attn_1")
        words = rest.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            level = int(words[1]) if part == "encoder" else levels - 1 - int(words[1])
            words[:2] = ["down" if part == "encoder" else "up", str(level)]
        rest = ".".join(words).replace("resnets", "block").replace("attentions", "attn")
        rest = rest.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        for own, theirs in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            if ".attn" in f".{rest}":
                rest = rest.replace(f".{own}.", f".{theirs}.")
        linear = any(f".{x}.weight" in rest for x in ("q", "k", "v", "proj_out"))
        found[f"{part}.{rest}"] = tensor[:, :, None, None] if linear else tensor
    return found


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_in_ldms_layout_is_read(suffix, config_file, tmp_path):
    """As diffusers converts it, but for attention within levels, which that leaves out; MAR's file has it."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    torch.manual_seed(1)
    fields = {**VAE, "block_out_channels": [32, 32, 64], "norm_num_groups": 32, "layers_per_block": 2}
    fields["down_block_types"] = ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    vae = AutoencoderKL(**fields).eval()
    published = ldm_names(vae.state_dict(), 3)
    theirs = convert_ldm_vae_checkpoint(dict(published), dict(vae.config))
    own = vae.state_dict()
    inner = {name for name in own if ".down_blocks.2.attentions." in name}
    assert {name for name in own if name not in theirs} == inner and inner
    assert all(torch.equal(own[name], theirs[name].view_as(own[name])) for name in own if name in theirs)
    file = tmp_path / f"vae.{suffix}"
    if suffix == "ckpt":
        torch.save({"model": published}, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in published.items()}, file)
    with pytest.raises(UserError, match="does not hold the scale of its latents"):
        build(config_file, init_from=str(file))
    scale = {"encoder_options": {"scaling_factor": 0.5, "shift_factor": 0.2}}
    model = build(config_file, init_from=str(file), model={**ATTENTION, **scale}).eval()
    assert model.config.encoder_options["down_block_types"][-1] == "AttnDownEncoderBlock2D"
    with torch.no_grad():
        z = vae.encode(some_pixels()).latent_dist.mode()
        assert torch.equal(model.encode_latents(some_pixels()), ((z - 0.2) * 0.5).flatten(2).transpose(1, 2))
        assert torch.equal(
            model.decode_latents(torch.zeros(1, 64, 4), (8, 8)),
            vae.decode(torch.zeros(1, 4, 8, 8) + 0.2).sample,
        )


RECIPES = {  # codes, patch size, parameters of VAE, LoRA and quantiser, layers with LoRA (encoder, decoder)
    "coda_flux": (2240, 8, 83.8, 5.82, 1_050_000, (20, 28)),
    "coda_mar": (680, 16, 66.5, 6.02, 263_568, (28, 38)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_have_the_published_sizes(name):
    tokens, patch, vae, lora, quantizer, layers = RECIPES[name]
    config = load_run_config(f"configs/tokenizer/{name}.yaml", [])
    model, assumed = model_on_meta(config)
    assert model.config.num_visual_tokens == tokens == model.quantizer.num_tokens(model.config.layout)
    assert model.config.patch_size == patch and model.config.latent_dim == 16 and "assumed" in assumed[0]
    names = [n for n, _ in model.named_parameters() if ".lora_B." in n]
    assert tuple(sum(n.startswith(part) for n in names) for part in ("encoder.", "decoder.")) == layers
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    parts = {n: size for n, size in sizes.items() if n.startswith(("encoder.", "decoder."))}
    adapters = sum(size for n, size in parts.items() if ".lora_" in n)
    assert round(adapters / 1e6, 2) == lora and round((sum(parts.values()) - adapters) / 1e6, 1) == vae
    assert sum(size for n, size in sizes.items() if n.startswith("quantizer.")) == quantizer
    if config.lora.adaptive_at:
        assert any(n.startswith(f"{config.lora.adaptive_at}.") for n in names)
    with torch.device("meta"):
        codes = model.eval().encode(torch.zeros(1, 3, 256, 256))
        assert codes.shape == (1, tokens, 1) and model.decode_latents(
            torch.zeros(1, (256 // patch) ** 2, 16), (256 // patch,) * 2
        ).shape == (1, 3, 256, 256)


def test_the_plan_counts_what_is_trained(config_file, capsys):
    main(["plan", config_file(), "--gpus", "1"])
    out = capsys.readouterr().out
    model = build(config_file)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = plan_run(load_run_config(config_file(), []), 1)
    assert sum(count for _, count in plan.parameters.values()) == trained
    assert plan.memory[0].gradients == 4 * trained and plan.memory[0].optimizer == 3 * 4 * trained  # with EMA
    assert plan.memory[0].activations > 0 and plan.tokens == 64 and plan.flops > 0
    assert "ZeRO" in out and "of 64 codes" in out and "GPU-hours" in out


def test_the_rows_of_the_study_follow_each_other(data, tmp_path):
    """coda.yaml adapts what continuous.yaml leaves."""
    changes = [
        f"data.sources=[{{path: '{data}/pairs-*.tar'}}]",
        "images.captions=json",
        "steps=1",
        "batch_size=2",
    ]
    main(["train", "configs/study/encoders/continuous.yaml", f"out={tmp_path / 'continuous'}", *changes,
          f"caption_tokenizer={data}/tokenizer.model"])  # fmt: skip
    main(["train", "configs/study/encoders/coda.yaml", f"out={tmp_path / 'coda'}", *changes,
          "codebooks.init_images=4", f"init_from={tmp_path / 'continuous' / 'model'}"])  # fmt: skip
    model = UniTok.from_pretrained(tmp_path / "coda" / "model")
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 1) and model.config.codebook_size == 512
    assert (tmp_path / "coda" / "model" / "caption_tokenizer").is_dir()
