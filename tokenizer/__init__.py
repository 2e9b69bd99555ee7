"""Image <-> codes, and CLIP-style embeddings of images and texts: the UniTok tokenizer (arXiv 2502.20321)."""

from transformers import AutoConfig, AutoModel

from .config import TOKENIZER_SIZES, UniTokConfig
from .decoders import DECODERS
from .encoders import ENCODERS
from .model import UniTok, UniTokOutput
from .projection import AttentionProjection, KVCache, LinearProjection, build_projection
from .quantizers import QUANTIZERS, MultiCodebookQuantizer, Quantizer, QuantizerOutput, code_dtype
from .token_layout import TokenLayout

# transformers' Auto classes, peft and push_to_hub look the model up by its type.
AutoConfig.register(UniTokConfig.model_type, UniTokConfig, exist_ok=True)
AutoModel.register(UniTokConfig, UniTok, exist_ok=True)

__all__ = [
    "DECODERS",
    "ENCODERS",
    "QUANTIZERS",
    "TOKENIZER_SIZES",
    "AttentionProjection",
    "KVCache",
    "LinearProjection",
    "MultiCodebookQuantizer",
    "Quantizer",
    "QuantizerOutput",
    "TokenLayout",
    "UniTok",
    "UniTokConfig",
    "UniTokOutput",
    "build_projection",
    "code_dtype",
]
