"""The decoder over text tokens and image codes with a visual embedder and a depth head (arXiv 2502.20321)."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .class_conditional import ClassConditionalConfig, ClassConditionalModel
from .config import MLLM_SIZES, UniTokMLLMConfig
from .depth_head import DepthCache, DepthHead
from .loading import check_folder
from .model import UniTokForConditionalGeneration
from .output import UniTokMLLMOutput
from .positions import positions_from_mask
from .processor import UniTokProcessor
from .prompts import IMAGE_MARK, TEMPLATES, TEXT_TO_IMAGE_INSTRUCTION, UNCONDITIONAL
from .visual_embedder import VisualEmbedder

# transformers' Auto classes, peft and push_to_hub look the model up by its type.
AutoConfig.register(UniTokMLLMConfig.model_type, UniTokMLLMConfig, exist_ok=True)
AutoModel.register(UniTokMLLMConfig, UniTokForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(UniTokMLLMConfig, UniTokForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(UniTokMLLMConfig, UniTokForConditionalGeneration, exist_ok=True)
AutoConfig.register(ClassConditionalConfig.model_type, ClassConditionalConfig, exist_ok=True)
AutoModel.register(ClassConditionalConfig, ClassConditionalModel, exist_ok=True)
AutoProcessor.register(UniTokMLLMConfig, UniTokProcessor, exist_ok=True)

__all__ = [
    "IMAGE_MARK",
    "MLLM_SIZES",
    "TEMPLATES",
    "TEXT_TO_IMAGE_INSTRUCTION",
    "UNCONDITIONAL",
    "ClassConditionalConfig",
    "ClassConditionalModel",
    "DepthCache",
    "DepthHead",
    "UniTokForConditionalGeneration",
    "UniTokMLLMConfig",
    "UniTokMLLMOutput",
    "UniTokProcessor",
    "VisualEmbedder",
    "check_folder",
    "positions_from_mask",
]
