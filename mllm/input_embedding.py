"""The input vectors of the decoder: text, codes of images, and features of images that are read.

B batch, L sequence, I images with codes, N visual tokens per image, K sub-codebooks, J images with M features
of width F each, D decoder width.
"""

from typing import Any

import torch
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.precision import to_dtype_of

from .config import IGNORED, UniTokMLLMConfig
from .features import FeatureAdapter


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
        positions = self._image_positions(input_ids, image_codes)
        return self._embed(input_ids, image_codes, positions, image_features)

    def _image_positions(
        self, input_ids: torch.Tensor, image_codes: torch.Tensor | None
    ) -> torch.Tensor | None:
        """(I, N) positions of the images in the flattened batch; None without images."""
        positions = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)
        if image_codes is None or image_codes.shape[0] == 0:
            if len(positions):
                raise UserError(
                    f"input_ids hold {len(positions)} image placeholders, but no image_codes were given."
                )
            return None
        self.visual_embedder.check_codes(image_codes)
        images, length = image_codes.shape[0], self.config.num_read(image_codes.shape[1])
        if len(positions) != images * length:
            raise UserError(
                f"input_ids hold {len(positions)} image placeholders, but image_codes hold {images} images "
                f"of {length} visual tokens = {images * length}: expected one placeholder per visual token."
            )
        return positions.view(images, length)

    def _embed(
        self,
        input_ids: torch.Tensor,
        image_codes: torch.Tensor | None,
        positions: torch.Tensor | None,
        image_features: torch.Tensor | None,
    ) -> torch.Tensor:
        # placeholders are outside the vocabulary: embed id 0, then overwrite
        vectors = self.get_input_embeddings()(self._without_placeholders(input_ids))
        vectors = self._insert_codes(vectors, image_codes, positions)
        if self.feature_adapter is not None:
            is_place = input_ids == self.config.feature_token_id
            count = self.config.num_continuous_tokens or 0
            return self.feature_adapter.insert(vectors, is_place, image_features, count)
        if image_features is not None:
            raise UserError("image_features were given, but visual_input = 'discrete' reads codes alone.")
        return vectors

    def _check_feature_targets(
        self, input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor | None
    ) -> None:
        """
        Raises:
            UserError: labels mark features, or an image that is generated has features behind its codes.
        """
        ids, targets = input_ids.flatten(), labels.flatten()
        is_feature = ids == self.config.feature_token_id
        if bool((targets[is_feature] != IGNORED).any()):
            raise UserError("labels mark feature placeholders: features are never targets, set them to -100.")
        if positions is None:
            return
        last = positions[:, -1]
        behind = torch.stack([(last + step).clamp(max=len(ids) - 1) for step in (1, 2)])
        is_read = is_feature[behind[0]]
        if self.config.sep_token_id is not None:
            is_read |= (ids[behind[0]] == self.config.sep_token_id) & is_feature[behind[1]]
        if bool((is_read & (targets[last] == self.config.image_token_id)).any()):
            raise UserError(
                "An image that is generated has features behind its codes: only images that are read have "
                "them."
            )

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
