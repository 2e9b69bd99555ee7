"""BLIP-VQA (T2I-CompBench, arXiv 2307.06350): the probability that an image shows a noun phrase.

B images.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.results import model_fingerprint
from .object_detector import load_pretrained

# BERT's vocabulary with BLIP's two additions; the published script has these numbers
_DECODE, _ENCODE, _YES, _NO = 30522, 30523, 2748, 2053
_LONGEST = 35  # tokens of a question
_PUBLISHED_SIDE = 480
# noun chunks that name a place, not a thing; published
_PLACES = ("top", "the side", "the left", "the right")
_WITHOUT_MARKS = dict.fromkeys(map(ord, '.!"()*#:;~'))
MOST_PHRASES = 8


class BlipVqa:
    """A BLIP VQA folder in transformers' layout.

    Raises:
        UserError: the folder is missing or not such a model.
    """

    def __init__(self, folder: str, device: str):
        path = existing(folder, "--blip-model must be a BLIP VQA folder in transformers' layout.")
        self.processor, self.model = load_pretrained(path, device, "BlipForQuestionAnswering")
        if self.model.config.text_config.vocab_size <= _ENCODE:
            raise UserError(
                f"{path}: vocab_size is {self.model.config.text_config.vocab_size}; BLIP has 30524."
            )
        self.device, side = device, self.model.config.vision_config.image_size
        # the published weights read 480 pixels; those on the hub were resized to 384
        self.is_published = side == _PUBLISHED_SIDE
        self.about: dict[str, Any] = {
            "model": path.name, "fingerprint": model_fingerprint(path), "side": side,
        }  # fmt: skip

    def pixels(self, images: Sequence[Image.Image]) -> Any:
        """Images squeezed to the model's square by Pillow's bicubic and normalised, (B, 3, H, W)."""
        import torch

        side, settings = self.about["side"], self.processor.image_processor
        resized = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
        values = (np.stack(resized).astype(np.float32) / 255 - settings.image_mean) / settings.image_std
        return torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2).to(self.device)

    def probabilities(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
        """Per image the probability of "yes" against "no" as the first token of the answer."""
        import torch

        tokens = self.processor.tokenizer(
            [normalise_question(q) for q in questions],
            padding="longest", truncation=True, max_length=_LONGEST, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        tokens.input_ids[:, 0] = _ENCODE
        with torch.inference_mode():
            seen = self.model.vision_model(self.pixels(images))[0]
            read = self.model.text_encoder(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=seen.device),
            )[0]
            start = torch.full((len(read), 1), _DECODE, device=self.device)
            logits = self.model.text_decoder(
                input_ids=start, encoder_hidden_states=read, encoder_attention_mask=tokens.attention_mask
            ).logits[:, 0]
        return logits[:, [_YES, _NO]].float().softmax(dim=1)[:, 0].cpu().tolist()


def normalise_question(text: str) -> str:
    """A question as BLIP's data set gives it: lower case, without some marks, at most fifty words."""
    text = text.lower().translate(_WITHOUT_MARKS).rstrip(" ")
    return " ".join(text.split(" ")[:50])


def load_noun_phrases(name: str) -> Callable[[str], list[str]]:
    """Prompt -> its noun phrases by a pipeline of spaCy, at most eight, without those of places.

    Raises:
        UserError: spaCy or the pipeline is not installed.
    """
    try:
        spacy = importlib.import_module("spacy")  # of the extra compbench
    except ImportError as error:
        raise UserError(
            "BLIP-VQA needs the noun phrases of spaCy: pip install 'open-unitok[compbench]', then "
            "python -m spacy download en_core_web_sm."
        ) from error
    try:
        pipeline = spacy.load(name)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--spacy-model {name} cannot be loaded: {reason}") from error
    return lambda prompt: noun_phrases(chunk.text for chunk in pipeline(prompt).noun_chunks)


def noun_phrases(chunks: Any) -> list[str]:
    """The noun chunks that are asked about."""
    return [text for text in chunks if text not in _PLACES][:MOST_PHRASES]


def blip_score(probabilities: Sequence[float]) -> float:
    """The product over phrases, rounded to four decimals as published; 1 without phrases."""
    product = np.float32(1)
    for value in probabilities:
        product *= np.float32(f"{value:.4f}")
    return float(f"{product:.4f}")
