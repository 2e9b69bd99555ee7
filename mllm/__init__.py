"""The decoder over text tokens and image codes with a visual embedder and a depth head (arXiv 2502.20321)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .config import SIZES, UniTokMLLMConfig
from .depth_head import DepthCache, DepthHead
from .loading import check_folder
from .model import UniTokForConditionalGeneration, UniTokMLLMOutput, positions_from_mask
from .processor import UniTokProcessor
from .prompts import DRAW_INSTRUCTION, IMAGE_MARK, TEMPLATES, UNCONDITIONAL, drawing_prompt
from .visual_embedder import VisualEmbedder

AutoConfig.register(UniTokMLLMConfig.model_type, UniTokMLLMConfig, exist_ok=True)
AutoModel.register(UniTokMLLMConfig, UniTokForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(UniTokMLLMConfig, UniTokForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniTokMLLMConfig, UniTokProcessor, exist_ok=True)

__all__ = [
    "DRAW_INSTRUCTION",
    "IMAGE_MARK",
    "SIZES",
    "TEMPLATES",
    "UNCONDITIONAL",
    "DepthCache",
    "DepthHead",
    "UniTokForConditionalGeneration",
    "UniTokMLLMConfig",
    "UniTokMLLMOutput",
    "UniTokProcessor",
    "VisualEmbedder",
    "check_folder",
    "drawing_prompt",
    "positions_from_mask",
]
