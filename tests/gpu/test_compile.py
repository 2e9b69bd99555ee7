"""torch.compile on a GPU: compiled models give what they gave before."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_compiled_tokenizer_gives_the_same_codes_and_images(tokenizer, caller_sets):
    """Also where the caller asked for TF32, which inductor asks about while it compiles."""
    model = tokenizer().cuda()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda() * 2 - 1
    codes = model.encode(images)
    decoded = model.decode(codes)
    model.encoder.compile()
    model.decoder.compile()
    with caller_sets("high"):
        found = model.encode(images)
        # a compiled encoder rounds elsewhere
        assert (found == codes).float().mean() > 0.98
        torch.testing.assert_close(model.decode(codes), decoded, rtol=0, atol=1e-2)
