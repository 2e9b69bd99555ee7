"""CLIP score, FD-DINOv2 and CMMD against the public functions, on at least fifty cases each.

`image_sets.json` holds what torchmetrics, cmmd-pytorch, dgm-eval and dinov2 return ("source" names the
versions) for inputs and weights from seeds.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.judges.clip_model import ClipModel, clip_scores
from open_unitok.eval.metrics import fid
from open_unitok.eval.metrics.set_distances import Dinov2Extractor, cmmd, find_dinov2_weights

from ..conftest import GOLDEN
from .tiny_networks import blocky_image, caption, write_clip, write_dinov2

VECTORS = json.loads((GOLDEN / "image_sets.json").read_text())


def cases(name):
    assert len(VECTORS[name]) >= 50
    return VECTORS[name]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipModel(str(write_clip(tmp_path_factory.mktemp("clip"))), "cpu", "--clip-model")


def two_sets(seed):
    """Two random sets of different size, scale and place."""
    random = np.random.RandomState(seed)
    width = int(random.randint(2, 24))
    n, m = int(random.randint(width + 2, 80)), int(random.randint(width + 2, 80))
    scale, shift = [1e-3, 1, 10][seed % 3], [0, 0.3, 3][seed // 3 % 3]
    x = random.standard_normal((n, width)) * scale
    return x, random.standard_normal((m, width)) * scale * (1 + seed % 2) + shift * scale


def test_cmmd_is_that_of_the_public_code():
    for seed, expected in cases("cmmd"):
        x, y = two_sets(seed)
        if seed % 5 != 4:
            x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
        assert cmmd(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9), seed
        assert cmmd(x, y, rows=7) == pytest.approx(expected, rel=1e-9, abs=1e-9), seed


def test_cmmd_of_a_set_with_itself_is_zero():
    x, _ = two_sets(1)
    assert cmmd(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_is_that_of_dgm_eval():
    for seed, expected in cases("fd"):
        a, b = (fid.compute_moments([features]) for features in two_sets(seed))
        assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-9), seed


@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_dinov2_features_are_those_of_the_published_network(tmp_path, layout):
    file = write_dinov2(tmp_path / "dinov2_vitl14_pretrain.pth")
    if layout == "transformers":
        file = in_the_layout_of_transformers(file, tmp_path / "model.safetensors")
        (tmp_path / "dinov2_vitl14_pretrain.pth").unlink()
    net = Dinov2Extractor(find_dinov2_weights(str(tmp_path)))
    for start in range(0, 50, 25):
        part = cases("dinov2")[start : start + 25]
        found = net([blocky_image(seed) for seed, _, _ in part]).pooled
        for row, (seed, some, total) in zip(found, part):
            assert row[[0, 7, 31, 63]] == pytest.approx(some, abs=2e-4), seed
            assert np.abs(row).sum() == pytest.approx(total, rel=1e-4), seed


def in_the_layout_of_transformers(file, out):
    """The weights under the names of transformers' Dinov2Model, with query, key and value apart."""
    from safetensors.torch import save_file

    names = {
        "cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings", "norm": "layernorm",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
    }  # fmt: skip
    inside = {
        "attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }  # fmt: skip
    result = {}
    for name, tensor in torch.load(file, weights_only=True).items():
        if not name.startswith("blocks."):
            stem = next(n for n in sorted(names, key=len, reverse=True) if name.startswith(n))
            result[names[stem] + name.removeprefix(stem)] = tensor
            continue
        _, number, rest = name.split(".", 2)
        layer = f"encoder.layer.{number}."
        if rest.startswith("attn.qkv."):
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            result |= {f"{layer}attention.attention.{p}.{rest[9:]}": t.contiguous() for p, t in parts}
        else:
            stem = next((n for n in inside if rest.startswith(n)), "")
            result[layer + (inside[stem] + rest.removeprefix(stem) if stem else rest)] = tensor
    save_file(result, out)
    return out


def test_a_file_without_the_last_norm_is_rejected(tmp_path):
    file = write_dinov2(tmp_path / "dinov2_vitl14_pretrain.pth")
    weights = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in weights.items() if not k.startswith("norm.")}, file)
    with pytest.raises(UserError, match="no last norm"):
        Dinov2Extractor(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"dinov2_vitl14_pretrain\.pth"):
        find_dinov2_weights(str(tmp_path / "empty"))


def test_the_clip_score_is_that_of_torchmetrics(clip):
    rows = cases("clip_score")
    images = clip.embed_images([Image.fromarray(blocky_image(seed)) for seed, _, _ in rows])
    found = clip_scores(images, clip.embed_texts([caption(seed) for seed, _, _ in rows]))
    assert found == pytest.approx([score for _, score, _ in rows], abs=2e-3)
    raw = 100 * (images * clip.embed_texts([caption(seed) for seed, _, _ in rows])).sum(axis=1)
    assert raw == pytest.approx([cosine for _, _, cosine in rows], abs=2e-3)


def test_a_negative_cosine_counts_as_zero():
    axes = np.eye(3, dtype=np.float32)[:2]
    assert clip_scores(axes, -axes).tolist() == [0, 0]
    assert clip_scores(axes, axes).tolist() == [100, 100]


def test_the_embeddings_of_cmmd_are_those_of_the_public_code(clip):
    rows = cases("cmmd_embedding")
    found = clip.embed_squares([blocky_image(seed) for seed, _ in rows])
    assert found[:, :3] == pytest.approx(np.array([some for _, some in rows]), abs=1e-4)


def test_a_long_prompt_keeps_its_end(clip):
    long = " ".join(["red", "cat"] * 20)
    assert np.isfinite(clip.embed_texts([long, "a cat"])).all()
