"""The golden values of the losses, the small DINOv2, discriminator and LPIPS they were made with, and the
pairs of a small run of stage 1."""

import io
import json
import tarfile

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file

from open_unitok.tokenizer.lpips import LPIPS
from open_unitok.training.dino import Dino
from open_unitok.training.discriminator import DinoDiscriminator

SEED = 20250
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200), "black": (20, 20, 20)}

YAML = """
stage: tokenizer
engine: {{threads: 1}}
out: {folder}/run
steps: 8
batch_size: 8
data: {{sources: [{{path: "{folder}/pairs-*.tar"}}], shuffle: 16}}
pictures: {{captions: json}}
caption_tokenizer: {folder}/tokenizer.model
model:
  {{image_size: 32, stem_width: 8, stage_widths: [8, 8], stage_depths: [1, 1], decoder_widths: [8, 8],
   decoder_depths: [1, 1], hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_codebooks: 2,
   codebook_size: 16, codebook_dim: 4, embed_dim: 16, text_hidden_size: 16, text_num_layers: 1,
   text_num_heads: 2, text_context_length: 12, drop_path_rate: 0.1}}
losses: {{lpips: 0.0, entropy: 0.1}}
codebooks: {{init_images: 16, restart_after: 2, restart_share: 1.0}}
ema: 0.9
optimizer: {{lr: 2.0e-3}}
schedule: {{warmup: 2}}
checkpoint: {{every: 3}}
log: {{every: 1, images_every: 4}}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two tars of 20 coloured squares with captions, a sentencepiece model, and config.yaml."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    captions = []
    for tar in range(2):
        with tarfile.open(folder / f"pairs-{tar}.tar", "w") as file:
            for n in range(20):
                name = list(COLOURS)[rng.integers(4)]
                picture = np.full((32, 32, 3), 235, np.uint8)
                x, y = rng.integers(0, 20, 2)
                picture[y : y + 12, x : x + 12] = COLOURS[name]
                buffer = io.BytesIO()
                Image.fromarray(picture).save(buffer, "PNG")
                words = [f"a {name} square", f"{name} and square"]
                captions += words
                for extension, content in (
                    ("png", buffer.getvalue()),
                    ("json", json.dumps({"captions": words}).encode()),
                ):
                    member = tarfile.TarInfo(f"{tar}{n:03d}.{extension}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "config.yaml").write_text(YAML.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def values(golden):
    """The golden tensors; clone before changing one."""
    return load_file(golden / "losses" / "losses.outputs.safetensors")


@pytest.fixture(scope="session")
def numbers(golden):
    """The golden numbers."""
    return json.loads((golden / "losses" / "losses.meta.json").read_text())


@pytest.fixture
def small_dino(formula):
    """() -> a fresh DINOv2 of the golden files: 98 pixels natively, width 64, 4 blocks."""

    def build() -> Dino:
        dino = Dino(width=64, depth=4, heads=2, patch=14, grid=7)
        dino.load_state_dict({n: formula(f"dino.{n}", t.shape, SEED) for n, t in dino.state_dict().items()})
        return dino

    return build


@pytest.fixture
def small_discriminator(small_dino, formula):
    """(**options) -> a fresh discriminator of the golden files."""

    def build(**options) -> DinoDiscriminator:
        model = DinoDiscriminator(small_dino(), depths=(0, 1, 3), **options)
        if not options:
            heads = {
                n: formula(f"disc.heads.{n}", t.shape, SEED) for n, t in model.heads.state_dict().items()
            }
            model.heads.load_state_dict(heads)
        return model

    return build


@pytest.fixture(scope="session")
def lpips(formula):
    """LPIPS with the golden weights."""
    model = LPIPS()
    model.load_state_dict({n: formula(f"lpips.{n}", t.shape, SEED) for n, t in model.state_dict().items()})
    return model


@pytest.fixture
def recorded_look(values):
    """(step, number) -> the draws of that call of DiffAug in the golden training steps."""

    def pick(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return values[f"train.step{step}.rand{2 * number}"], values[f"train.step{step}.rand{2 * number + 1}"]

    return pick


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory):
    """A small DINOv2 with random weights under the published name."""
    torch.manual_seed(0)
    dino = Dino(width=64, depth=12, heads=1, patch=14, grid=2)
    for name, parameter in dino.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "embed" in name or "token" in name else 0.12)
    path = tmp_path_factory.mktemp("dino") / "dinov2_vits14_pretrain.pth"
    torch.save(dino.state_dict(), path)
    return path
