"""VQGAN's networks and published checkpoints, against a forward pass written from the published names."""

import pytest
import torch
import torch.nn.functional as F

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.vqgan.published import load_published_vqgan

CHANNELS, MULTIPLIERS, LATENT, WIDTH, ENTRIES = 32, (1, 2), 6, 4, 11


def published_shapes(residual: int = 1, channels: int = CHANNELS, multipliers=MULTIPLIERS, attention=(1,)):
    """Names and shapes of a taming-transformers VQGAN."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name, outputs, inputs, size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", outputs, inputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", outputs, inputs, 1)

    def attend(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name, width):
        block(f"{name}.block_1", width, width)
        attend(f"{name}.attn_1", width)
        block(f"{name}.block_2", width, width)

    widths, levels = [channels * m for m in multipliers], len(multipliers)
    conv("encoder.conv_in", channels, 3, 3)
    inputs = channels
    for level, outputs in enumerate(widths):
        for i in range(residual):
            block(f"encoder.down.{level}.block.{i}", inputs, outputs)
            inputs = outputs
            if level in attention:
                attend(f"encoder.down.{level}.attn.{i}", outputs)
        if level < levels - 1:
            conv(f"encoder.down.{level}.downsample.conv", outputs, outputs, 3)
    middle("encoder.mid", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", LATENT, widths[-1], 3)
    conv("decoder.conv_in", widths[-1], LATENT, 3)
    middle("decoder.mid", widths[-1])
    inputs = widths[-1]
    for level in reversed(range(levels)):
        for i in range(residual + 1):
            block(f"decoder.up.{level}.block.{i}", inputs, widths[level])
            inputs = widths[level]
            if level in attention:
                attend(f"decoder.up.{level}.attn.{i}", inputs)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", inputs, inputs, 3)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0], 3)
    conv("quant_conv", WIDTH, LATENT, 1)
    conv("post_quant_conv", LATENT, WIDTH, 1)
    shapes["quantize.embedding.weight"] = (ENTRIES, WIDTH)
    return shapes


@pytest.fixture(scope="module")
def published():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in published_shapes().items()}


class Reference:
    """VQGAN's forward pass by the published names, one operation after the other."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6)

    def block(self, name, x):
        inner = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        inner = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", inner)), padding=1)
        has_shortcut = f"{name}.nin_shortcut.weight" in self.state
        return inner + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attend(self, name, x):
        query, key, value = (
            self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv"
        )
        weights = torch.softmax(torch.einsum("bci,bcj->bij", query, key) * query.shape[1] ** -0.5, dim=-1)
        found = torch.einsum("bij,bcj->bci", weights, value).view_as(x)
        return x + self.conv(f"{name}.proj_out", found)

    def middle(self, name, x):
        return self.block(f"{name}.block_2", self.attend(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        x = self.block("encoder.down.0.block.0", x)
        x = self.conv("encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.attend("encoder.down.1.attn.0", self.block("encoder.down.1.block.0", x))
        x = F.silu(self.norm("encoder.norm_out", self.middle("encoder.mid", x)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))

    def decode(self, rows):
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", rows), padding=1)
        x = self.middle("decoder.mid", x)
        for i in range(2):
            x = self.attend(f"decoder.up.1.attn.{i}", self.block(f"decoder.up.1.block.{i}", x))
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        x = self.conv("decoder.up.1.upsample.conv", x, padding=1)
        for i in range(2):
            x = self.block(f"decoder.up.0.block.{i}", x)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)


# system -> what a search maximises, (R, C) latents, (V, C) rows -> (R, V); rows that are decoded
RULES = {
    "vqgan": (lambda z, rows: -torch.cdist(z, rows), lambda rows: rows),
    "ibq": (lambda z, rows: z @ rows.T, lambda rows: rows),
    "llamagen": (lambda z, rows: z @ F.normalize(rows, dim=-1).T, lambda rows: F.normalize(rows, dim=-1)),
}


def in_names_of(system, published):
    """The checkpoint as the system's code saves it."""
    if system == "vqgan":
        extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
        return {"state_dict": {**published, **extra}, "epoch": 3}
    if system == "ibq":  # the raw weights differ from their average, whose names have no dots
        averaged = {f"model_ema.{name.replace('.', '')}": t for name, t in published.items()}
        raw = {name: t + 1 for name, t in published.items()}
        return {"state_dict": {**raw, **averaged, "model_ema.decay": torch.tensor(0.999)}}
    middle = {"block_1": "0", "attn_1": "1", "block_2": "2"}
    renamed = {}
    for name, tensor in published.items():
        part, _, rest = name.partition(".")
        words = rest.split(".")
        if words[0] == "mid":
            words[1] = middle[words[1]]
        if words[0] in ("down", "up"):
            level = int(words[1])
            words[:2] = ["conv_blocks", str(level if words[0] == "down" else 1 - level)]
            words[2] = "res" if words[2] == "block" else words[2]
        renamed[".".join([part, *words])] = tensor
    return {"model": {**renamed, "quantize.codebook_used": torch.zeros(65536)}, "steps": 1}


@pytest.mark.parametrize("system", RULES)
def test_published_checkpoints(system, published, tmp_path, capsys):
    file, folder = tmp_path / "vq.pt", tmp_path / "tokenizer"
    torch.save(in_names_of(system, published), file)
    main(["convert", "tokenizer", str(file), str(folder), "--system", system, "--image-size", "16"])
    model = UniTok.from_pretrained(folder)
    assert not any(name.startswith(("text_encoder", "image_", "logit")) for name in model.state_dict())
    score, decoded_rows = RULES[system]
    reference, rows = Reference(published), published["quantize.embedding.weight"]
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = reference.encode(pixels).flatten(2).transpose(1, 2)  # (B, N, C)
    torch.testing.assert_close(model.encode_latents(pixels), latents, rtol=1e-4, atol=1e-4)
    scores = score(latents.flatten(0, 1), rows)
    best = scores.topk(2, dim=-1).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4  # no near tie: codes are decided
    codes = scores.argmax(dim=-1).view(2, 64, 1)
    assert torch.equal(model.encode(pixels), codes)
    map = decoded_rows(rows)[codes[..., 0]].transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(
        model.decode_latents(model.quantizer.embed(codes), (8, 8)),
        reference.decode(map),
        rtol=1e-4,
        atol=1e-4,
    )


def test_published_sizes():
    """VQGAN f16, IBQ, LlamaGen's VQ-16 and VQ-8: names and shapes of the published networks."""
    for residual, multipliers, attention in ((2, (1, 1, 2, 2, 4), (4,)), (4, (1, 1, 2, 2, 4), (4,)),
                                             (2, (1, 2, 2, 4), (3,))):  # fmt: skip
        shapes = published_shapes(residual, 128, multipliers, attention)
        options = {"residual_blocks": residual, "multipliers": multipliers, "attention_levels": attention}
        with torch.device("meta"):
            config = UniTokConfig(
                patch_size=2 ** (len(multipliers) - 1), hidden_size=LATENT, num_attention_heads=1,
                encoder="vqgan", decoder="vqgan", encoder_options=options, decoder_options=options,
                projection="linear", num_codebooks=1, codebook_size=ENTRIES, codebook_dim=WIDTH, embed_dim=0,
            )  # fmt: skip
            model = UniTok(config)
        for part in ("encoder", "decoder"):
            ours = {f"{part}.{n}": tuple(p.shape) for n, p in getattr(model, part).named_parameters()}
            assert ours == {n: s for n, s in shapes.items() if n.startswith(f"{part}.")}


def test_bad_checkpoints(published, tmp_path, capsys):
    def fails(state, words, system="vqgan"):
        torch.save({"state_dict": state}, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=words):
            load_published_vqgan(system, tmp_path / "bad.pt")

    without = {n: t for n, t in published.items() if n != "decoder.norm_out.bias"}
    fails(without, "1 weights are missing .decoder.norm_out.bias")
    fails({"a": torch.zeros(1)}, "not a checkpoint of vqgan: encoder.conv_in.weight is missing")
    fails({**published, "encoder.extra": torch.zeros(1)}, "unexpected .encoder.extra")
    fails(published, "'vqgam' is not a known system. Did you mean 'vqgan'", "vqgam")
    fails({n: t * torch.nan for n, t in published.items()}, "finite|NaN")
    for arguments, words in (
        (["--image-size", "64"], "--image-size is for the other systems"),
        (["--system", "ibq", "--config", "c.json"], "--config is for UniTok's"),
    ):
        with pytest.raises(SystemExit):
            main(["convert", "tokenizer", str(tmp_path / "bad.pt"), str(tmp_path / "out"), *arguments])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 30}, "norm_groups is 32, which does not divide 30 channels"),
        ({"multipliers": []}, "multipliers is .*one per level"),
        ({"multipliers": [1, 0]}, "multipliers is .*one per level"),
        ({"attention_levels": [5]}, "the levels are 0 to 4"),
        ({"residual_blocks": 0}, "residual_blocks is 0: it must be a number of at least 1"),
        ({"chanels": 32}, "Did you mean 'channels'"),
    ],
)
def test_bad_options(options, words):
    for part in ("encoder", "decoder"):
        with pytest.raises(UserError, match=words), torch.device("meta"):
            UniTok(UniTokConfig(**{part: "vqgan", f"{part}_options": options}))


def test_without_a_text_tower():
    sizes = {"channels": 32, "multipliers": [1, 2], "attention_levels": []}
    config = UniTokConfig(
        image_size=16, patch_size=2, hidden_size=8, num_attention_heads=1, embed_dim=0, projection="linear",
        encoder="vqgan", decoder="vqgan", encoder_options=sizes, decoder_options=sizes, codebook_size=16,
    )  # fmt: skip
    model = UniTok(config)
    out = model(torch.zeros(1, 3, 16, 16))
    assert out.image_embeds is None and out.logit_scale is None and out.reconstruction.shape == (1, 3, 16, 16)
    for embed in (lambda: model.embed_image(torch.zeros(1, 3, 16, 16)),
                  lambda: model.embed_text(torch.zeros(1, 4, dtype=torch.int64))):  # fmt: skip
        with pytest.raises(UserError, match=r"no text tower.*embed_dim = 0"):
            embed()


@pytest.mark.parametrize("system", ["vqgan", "ibq", "llamagen"])
def test_a_file_with_one_tensor_of_the_system_is_refused(tmp_path, system):
    torch.save({"encoder.conv_in.weight": torch.randn(3)}, tmp_path / "one.pt")
    words = f"one.pt is not a checkpoint of {system}: encoder.down.0.block.0.conv1.weight is missing"
    with pytest.raises(UserError, match=words):
        load_published_vqgan(system, tmp_path / "one.pt")
