"""The input vectors of the decoder: text, codes of images, and features of images that are read.

B batch, L sequence, I images with codes, N visual tokens per image, K sub-codebooks, J images with M features
of width F each, D decoder width.
"""

from typing import Any

import torch
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.precision import to_dtype_of

from .config import UniTokMLLMConfig
from .features import FeatureAdapter
from .positions import BatchPlan, plan_batch


class InputEmbedding:
    """The part of `UniTokForConditionalGeneration` that embeds its inputs."""

    config: UniTokMLLMConfig
    training: bool
    visual_embedder: Any
    feature_adapter: FeatureAdapter | None

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        image_codes: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, L) ids, (I, N, K) codes and (J, M, F) features -> (B, L, D) input vectors of the decoder.

        Raises:
            UserError: images and placeholders do not match.
        """
        return self._embed(input_ids, image_codes, self._plan(input_ids, image_codes), image_features)

    def _plan(
        self, input_ids: torch.Tensor | None, image_codes: torch.Tensor | None, **inputs: torch.Tensor | None
    ) -> BatchPlan:
        """The plan of a batch that came without one; `inputs` are further arguments of `plan_batch`."""
        config = self.config
        return plan_batch(
            input_ids,
            **inputs,
            num_images=0 if image_codes is None else len(image_codes),
            image_token_id=config.image_token_id,
            feature_token_id=None if self.feature_adapter is None else config.feature_token_id,
            sep_token_id=config.sep_token_id,
        )

    def _check_codes(self, image_codes: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """
        Raises:
            UserError: codes that are not the model's, or whose number is not that of the placeholders.
        """
        images = 0 if image_codes is None else len(image_codes)
        if images:
            self.visual_embedder.check_codes(image_codes)
        length = self.config.num_read(image_codes.shape[1]) if image_codes is not None and images else 0
        found = 0 if positions is None else positions.numel()
        if found != images * length:
            raise UserError(
                f"input_ids hold {found} image placeholders, but image_codes hold {images} images "
                f"of {length} visual tokens = {images * length}: expected one placeholder per visual token."
            )

    def _embed(
        self,
        input_ids: torch.Tensor,
        image_codes: torch.Tensor | None,
        plan: BatchPlan,
        image_features: torch.Tensor | None,
    ) -> torch.Tensor:
        self._check_codes(image_codes, plan.images)
        # placeholders are outside the vocabulary: embed id 0, then overwrite
        vectors = self.get_input_embeddings()(self._without_placeholders(input_ids))
        vectors = self._insert_codes(vectors, image_codes, plan.images)
        if self.feature_adapter is not None:
            assert plan.features is not None
            count = self.config.num_continuous_tokens or 0
            return self.feature_adapter.insert(vectors, plan.features, image_features, count)
        if image_features is not None:
            raise UserError("image_features were given, but visual_input = 'discrete' reads codes alone.")
        return vectors

    def _without_placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids with 0 in the place of images, which is a valid index."""
        is_image = input_ids == self.config.image_token_id
        if self.feature_adapter is not None:
            is_image |= input_ids == self.config.feature_token_id
        return input_ids.masked_fill(is_image, 0)

    def _insert_codes(
        self,
        vectors: torch.Tensor,
        image_codes: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        if positions is None:
            if self.training and torch.is_grad_enabled():
                # zero-weighted dummy: every rank must run every module, or ZeRO-3's all-gathers deadlock
                length = self.config.num_codes if self.config.scales else 1
                shape = (1, length, self.config.num_codebooks)
                dummy = vectors.new_zeros(shape, dtype=torch.long)
                vectors = vectors + 0.0 * self.visual_embedder(dummy).sum().to(vectors.dtype)
            return vectors
        assert image_codes is not None
        visual = self.visual_embedder(image_codes).to(vectors.dtype)
        # index_copy instead of an in-place write: gradients flow to both
        flat = vectors.flatten(0, 1).index_copy(0, positions.flatten(), visual.flatten(0, 1))
        return flat.view_as(vectors)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """(I, N, K) codes of whole images -> (I, N, D) input vectors of the decoder."""
        self.visual_embedder.check_codes(codes)
        return to_dtype_of(self.get_input_embeddings(), self.visual_embedder(codes))
