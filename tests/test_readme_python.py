"""The Python blocks of README.md run as they stand, and the shapes in their comments are right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from open_unitok.tokenizer import UniTokConfig
from open_unitok.tokenizer.convert import codes_from_published

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
# What the table of sizes would need to know the golden checkpoint, whose model name is not a published one.
PRELUDE = """
from open_unitok.tokenizer.config import TOKENIZER_SIZES
TOKENIZER_SIZES["vitamin_tiny_dev"] = dict(
    stem_width=16, stage_widths=(16, 32), stage_depths=(2, 4), hidden_size=64, num_hidden_layers=3,
    num_attention_heads=2, decoder_widths=(32, 16), decoder_depths=(4, 2),
)
"""
EPILOGUE = """
import torch
from safetensors.torch import load_file
assert pixels.shape == (1, 3, 64, 64) and -1 <= pixels.min() and pixels.max() <= 1
assert codes.dtype == torch.int64 and image_embeds.shape == (1, 32) and reconstruction.size == (64, 64)
torch.save(unitok.encode(load_file(sys.argv[1])["image"]), "codes.pt")
"""


def test_the_published_tokenizer_loads_from_a_hub_cache(golden, tmp_path):
    """The download is replaced by a hub cache that holds the golden checkpoint under the published name."""
    cached = tmp_path / "hub" / "models--FoundationVision--unitok_tokenizer"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    (cached / "snapshots" / "0123").mkdir(parents=True)
    checkpoint = golden / "tokenizer" / "reference_ckpt.pth"
    (cached / "snapshots" / "0123" / "unitok_tokenizer.pth").symlink_to(checkpoint)
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "photo.jpg")
    outputs = golden / "tokenizer" / "attn.outputs.safetensors"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    code = f"import sys\n{PRELUDE}\n{BLOCKS[0]}\n{EPILOGUE}"
    command = [sys.executable, "-c", code, str(outputs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = codes_from_published(load_file(outputs)["indices"])
    assert torch.equal(torch.load(tmp_path / "codes.pt"), expected.long())


def test_the_shapes_in_its_comments_are_the_published_ones():
    config = UniTokConfig.named("vitamin_large")
    side, tokens = config.image_size, config.num_visual_tokens
    for shape in ((1, 3, side, side), (1, tokens, config.num_codebooks), (1, config.embed_dim)):
        assert f"# {shape}" in BLOCKS[0]


def test_the_pipeline_generates_answers_and_reconstructs():
    names: dict = {}
    exec(compile(BLOCKS[1] + BLOCKS[2], "README.md", "exec"), names)
    assert names["reply"] == names["answer"]
    assert names["image"].size == names["reconstruction"].size == (64, 64)
    assert names["answer"].strip()
    assert names["codes"].shape == (1, 16, 8) and "# (1, 16, 8)" in BLOCKS[1]
