"""Fixtures of the tests that need a CUDA device: tiny random models, the same on every device.

All tests with the mark `gpu` are in this folder: `make test-gpu`. Not run on a GPU yet: tests/device runs
them on the emulated device.
"""

import contextlib
from pathlib import Path

import pytest
import torch

from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.tokenizer import UniTok, UniTokConfig

TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "visual_hidden_size": 24}


def pytest_collection_modifyitems(items):
    """Without a CUDA device these tests are skipped, also where somebody selects them."""
    if not torch.cuda.is_available():
        for item in items:
            # a conftest gets the tests of all folders
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def random_mllm(**changes) -> UniTokForConditionalGeneration:
    """A random model on the CPU; weights are enlarged, so that codes differ between positions and prompts."""
    torch.manual_seed(7)
    sizes = {**SIZES, "text_config": TEXT, "depth_config": {"num_hidden_layers": 2}, "num_image_tokens": 12}
    with torch.device("cpu"):
        model = UniTokForConditionalGeneration(UniTokMLLMConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                wide = "embed" in name or "codebooks" in name
                weight.normal_(0, 1.0 if wide else 1.5 * weight.shape[-1] ** -0.5)
    return model


def random_tokenizer(**changes) -> UniTok:
    """A random tokenizer on the CPU."""
    torch.manual_seed(3)
    sizes = {
        "image_size": 64, "stem_width": 16, "stage_widths": (16, 32), "stage_depths": (2, 2),
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "decoder_widths": (32, 16),
        "decoder_depths": (2, 2), "num_codebooks": 4, "codebook_size": 64, "codebook_dim": 4, "embed_dim": 32,
        "text_hidden_size": 32, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 64,
        "text_context_length": 16,
    }  # fmt: skip
    model = UniTok(UniTokConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        model.quantizer.codebooks.normal_()
    return model


@pytest.fixture
def mllm():
    """mllm(**changes of the config) -> a model on the CPU."""
    return random_mllm


@pytest.fixture
def tokenizer():
    """tokenizer(**changes of the config) -> a tokenizer on the CPU."""
    return random_tokenizer


@contextlib.contextmanager
def float32_precision(setting):
    """What a caller may have set: "legacy" is the older switch, else an argument of torch's function."""
    before = torch.get_float32_matmul_precision()
    try:
        if setting == "legacy":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        else:
            torch.set_float32_matmul_precision(setting)
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def caller_sets():
    """The context manager `float32_precision`."""
    return float32_precision
