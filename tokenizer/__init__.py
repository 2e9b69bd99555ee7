"""Image <-> codes, and CLIP-style embeddings of images and texts: the UniTok tokenizer (arXiv 2502.20321)."""

from transformers import AutoConfig, AutoModel

from .config import TOKENIZER_SIZES, UniTokConfig
from .model import UniTok, UniTokOutput
from .projection import AttentionProjection, KVCache, LinearProjection, build_projection
from .quantizers import QUANTIZERS, MultiCodebookQuantizer, Quantizer, QuantizerOutput, code_dtype

AutoConfig.register(UniTokConfig.model_type, UniTokConfig, exist_ok=True)
AutoModel.register(UniTokConfig, UniTok, exist_ok=True)

__all__ = [
    "QUANTIZERS",
    "TOKENIZER_SIZES",
    "AttentionProjection",
    "KVCache",
    "LinearProjection",
    "MultiCodebookQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "UniTok",
    "UniTokConfig",
    "UniTokOutput",
    "build_projection",
    "code_dtype",
]
