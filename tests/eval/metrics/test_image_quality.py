"""PSNR, SSIM, codebook usage and zero-shot against the golden vectors and by hand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from open_unitok.core.errors import UserError
from open_unitok.eval.metrics import image_quality
from open_unitok.eval.tokenizer import zeroshot

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"
SSIM_NAMES = {
    "skimage7": "ssim_skimage_default_win7",
    "gauss11": "ssim_gaussian_wang",
    "llamagen": "ssim_llamagen_range2",
    "torchmetrics": "ssim_torchmetrics",
}


@pytest.fixture(scope="module")
def expected():
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "metrics.npz")


def test_psnr_per_image_and_its_mean(expected, arrays):
    values = image_quality.psnr(arrays["img_ref"], arrays["img_rec"])
    rows = expected["image_metrics"]["per_image"]
    assert values == pytest.approx([r["psnr_255"] for r in rows], abs=1e-9)
    assert values.mean() == pytest.approx(expected["image_metrics"]["mean_of_per_image_psnr"], abs=1e-9)
    assert image_quality.psnr(arrays["img_ref"], arrays["img_ref"]) == pytest.approx(100.0)


@pytest.mark.parametrize("mode", image_quality.SSIM_MODES)
def test_ssim_in_every_convention(expected, arrays, mode):
    values = image_quality.ssim(arrays["img_ref"], arrays["img_rec"], mode)
    wanted = [r[SSIM_NAMES[mode]] for r in expected["image_metrics"]["per_image"]]
    assert values == pytest.approx(wanted, abs=1e-5)
    assert image_quality.ssim(arrays["img_ref"][0], arrays["img_ref"][0], mode) == pytest.approx([1.0])


def test_images_that_cannot_be_compared_raise(arrays):
    a = arrays["img_ref"]
    with pytest.raises(UserError, match="must have equal shapes"):
        image_quality.psnr(a, a[:, :-1])
    with pytest.raises(UserError, match="must be uint8"):
        image_quality.psnr(a / 255.0, a / 255.0)
    with pytest.raises(UserError, match="smaller than SSIM's window of 7x7"):
        image_quality.ssim(a[:, :6], a[:, :6])
    with pytest.raises(UserError, match="Did you mean 'gauss11'"):
        image_quality.ssim(a, a, "gaus11")


def test_codebook_usage_and_perplexity():
    counter = image_quality.CodebookUsage(2, 4)
    counter.add(np.array([[[0, 0], [1, 0]], [[2, 0], [3, 1]]]))  # (B, N, K)
    counter.add(np.array([[0, 0], [1, 0], [2, 0], [3, 1]]))
    assert counter.usage() == pytest.approx([1.0, 0.5])
    assert counter.perplexity() == pytest.approx([4.0, np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))])
    with pytest.raises(UserError, match="Codes range from 0 to 4"):
        counter.add(np.array([[0, 4]]))


def hashed_embedding(texts):
    return np.array([[(b - 127.5) / 127.5 for b in hashlib.sha256(t.encode()).digest()[:8]] for t in texts])


def test_classifier_equals_the_golden_weights():
    golden = json.loads((GOLDEN / "zeroshot.json").read_text())
    templates = zeroshot.clip_templates()
    joined = hashlib.sha256("\n".join(templates).encode()).hexdigest()
    assert joined == golden["templates_sha256_joined_by_newline"]["openai_80"]
    weights = zeroshot.build_classifier(
        zeroshot.fill_templates(golden["classnames"], templates), hashed_embedding
    )
    assert weights == pytest.approx(np.array(golden["expected_weights_DxC"]), abs=1e-6)
    with pytest.raises(UserError, match="at least one prompt"):
        zeroshot.build_classifier([["a"], []], hashed_embedding)


def test_topk_equals_the_golden_counts(expected, arrays):
    weights = zeroshot.unit_rows(arrays["zs_classifier"].T).T
    choices = zeroshot.top_classes(
        zeroshot.class_logits(zeroshot.unit_rows(arrays["zs_image_features"]), weights), 5
    )
    result = zeroshot.topk_hits(choices.tolist(), arrays["zs_target"].tolist())
    wanted = expected["zero_shot_topk"]
    assert (sum(result["top1"]), sum(result["top5"])) == (wanted["top1_correct"], wanted["top5_correct"])
