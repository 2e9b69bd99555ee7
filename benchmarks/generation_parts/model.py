"""The model and the prompts of benchmarks/generation.py: random weights, at one size and as a toy."""

from typing import Any

import torch
from torch import nn

from open_unitok import UniTokForConditionalGeneration, UniTokMLLMConfig

PROMPT, UNCONDITIONAL = list(range(10, 30)), [1, 5, 6, 3]
GUIDANCE = 5.0
_TEXT = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 32000, "max_position_embeddings": 1024,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_TOY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOY = {
    "depth_config": {"num_hidden_layers": 2}, "num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
    "visual_hidden_size": 24, "num_image_tokens": 16,
}  # fmt: skip


def benchmark_model(toy: bool = False, short: bool = False) -> Any:
    """The benchmark's model with fixed random weights, in float32; `short`: 2 layers and codes, not 8."""
    config = {"text_config": _TEXT | _TOY_TEXT, **_TOY} if toy else {"text_config": _TEXT}
    if short:
        config = config | {
            "text_config": config["text_config"] | {"num_hidden_layers": 2},
            "num_codebooks": 2,
        }
    torch.manual_seed(1)
    return UniTokForConditionalGeneration(UniTokMLLMConfig(**config)).eval()


def image_prompts(images: int) -> list[list[int]]:
    """Different prompts of one length."""
    return [[*PROMPT, i, 3] for i in range(images)]


def weights_per_token(model: Any) -> tuple[int, int, int]:
    """Weights read per visual token: decoder, visual embedder, depth head (K times)."""
    # embeddings and lm_head are left out: a visual token does not read them
    parts = (model.language_model.layers, model.visual_embedder, model.depth_head)
    sizes = [sum(m.weight.numel() for m in p.modules() if isinstance(m, nn.Linear)) for p in parts]
    return sizes[0], sizes[1], sizes[2] * model.config.num_codebooks


def cache_bytes(model: Any, images: int, tokens: int) -> float:
    """Bytes of float32 keys and values that the mean visual token reads: decoder (2 rows per image) and
    visual embedder. The prompt is longer than half of the image only in a toy."""
    text, mean = model.config.text_config, len(PROMPT) + 2 + tokens / 2
    decoder = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    projection = model.visual_embedder.projection.attention
    return 4.0 * images * (2 * mean * decoder + tokens / 2 * 2 * projection.outputs)


def make_questions(count: int, images: int, toy: bool = False) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Prompts of one image and 8 to 64 text ids, and the codes of their images."""
    generator = torch.Generator().manual_seed(0)
    visual, books, entries = (16, 3, 16) if toy else (256, 8, 4096)
    # text of different lengths, so that a batch needs padding
    lengths = torch.randint(8, 65, (count,), generator=generator).tolist()
    texts = [torch.randint(10, 32000, (n,), generator=generator).tolist() for n in lengths]
    codes = torch.randint(entries, (images, visual, books), generator=generator)
    prompts = [[1, 7, 8, 9, *[-200] * visual, 13, *text] for text in texts]
    return prompts, [codes[i % images][None] for i in range(count)]
