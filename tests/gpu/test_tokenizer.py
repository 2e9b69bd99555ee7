"""The tokenizer on a GPU: codes are those of the CPU, whatever precision the caller has chosen elsewhere."""

import pytest
import torch
import torch.nn.functional as F

from open_unitok.tokenizer.precision import exact_float32

pytestmark = pytest.mark.gpu
SETTINGS = ["highest", "high", "medium", "legacy"]
MARGIN = 1e-5  # gap of squared distances that rounding may close


def pixels(count=8):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def gaps(model, latents):
    """(B, N, K): squared distance to the second nearest entry minus that to the nearest one."""
    features, table = model.quantizer.split(latents), F.normalize(model.quantizer.codebooks, dim=-1)
    similarity = torch.einsum("bnkc,kvc->bnkv", features, table).topk(2).values
    return 2 * (similarity[..., 0] - similarity[..., 1])


@pytest.mark.parametrize("setting", SETTINGS)
@torch.no_grad()
def test_codes_equal_those_of_the_cpu(tokenizer, caller_sets, setting):
    model, images = tokenizer(), pixels()
    latents = model.encode_latents(images)
    clear = gaps(model, latents) > MARGIN
    expected = model.encode(images)
    model = model.cuda()
    with caller_sets(setting):
        found = model.encode(images.cuda()).cpu()
        close = model.encode_latents(images.cuda()).cpu()
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], expected[clear])
    torch.testing.assert_close(close, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_exact_after_a_caller_asked_for_tf32(caller_sets, setting):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    image, kernel = (torch.randn(shape, generator=generator, dtype=torch.float64)
                     for shape in ((2, 64, 16, 16), (64, 64, 3, 3)))  # fmt: skip
    on_gpu = [x.float().cuda() for x in (a, b, image, kernel)]
    with caller_sets(setting):
        with exact_float32(torch.device("cuda")):
            product, map = on_gpu[0] @ on_gpu[1], F.conv2d(on_gpu[2], on_gpu[3])
            # inductor asks for these while it compiles
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
        # the caller's setting is back, and readable
        after = torch.get_float32_matmul_precision()
        assert after == ("high" if setting == "legacy" else setting)
    # TF32 has 10 bits: its error here is above 1e-2
    torch.testing.assert_close(product.cpu().double(), a @ b, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(map.cpu().double(), F.conv2d(image, kernel), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_decoded_images_equal_those_of_the_cpu(tokenizer, dtype):
    model = tokenizer().to(dtype)
    codes = torch.randint(64, (4, 256, 4), generator=torch.Generator().manual_seed(0))
    tokens = model.config.layout.num_tokens
    expected = model.decode(codes[:, :tokens]).float()
    found = model.cuda().decode(codes[:, :tokens].cuda()).float().cpu()
    tolerance = 1e-3 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
