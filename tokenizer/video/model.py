"""SweetTok's video tokenizer (arXiv 2412.10443): a clip as tokens of appearance and of motion, three words
each.

B batch, n tokens of appearance, P tokens of motion (one for each place), D width.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError

from ..layers import Linear
from ..precision import exact_products
from ..quantizers.language import NUM_CODES, LanguageQuantizer
from ..words import Words
from .config import VideoTokenizerConfig
from .paths import ClipDecoder, ClipPatches, PixelHead, SpatialPath, TemporalPath


class VideoCodes(NamedTuple):
    """The indices of clips, the three of a token together: (nearest, second nearest, noun or verb)."""

    spatial: Tensor  # (B, n, 3) int64: two adjectives, a noun
    temporal: Tensor  # (B, P, 3) int64: two adverbs, a verb


class VideoTokenizerOutput(NamedTuple):
    """Result of `VideoTokenizer.forward`."""

    reconstruction: Tensor  # (B, 3, T, H, W), not clamped
    codes: VideoCodes
    losses: dict[str, Tensor]  # "vq", the two quantisers' added; "proxy" where proxy codes are given
    proxy_logits: Tensor | None  # (B, S, P, proxy_codes)


class ProxyHead(nn.Module):
    """Hidden states to codes of another tokenizer, and its softmax-weighted rows back to hidden states."""

    rows: Tensor

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__()
        self.to_logits = Linear(config.hidden_size, config.proxy_codes)
        self.from_rows = Linear(config.proxy_dim, config.hidden_size)
        self.register_buffer("rows", torch.zeros(config.proxy_codes, config.proxy_dim))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.to_logits(hidden)
        return self.from_rows(logits.softmax(dim=-1) @ self.rows.to(logits.dtype)), logits


class VideoTokenizer(PreTrainedModel):
    """(B, 3, num_frames, image_size, image_size) clips in [-1, 1] <-> `VideoCodes`.

    Two quantisers of words, two decoupled paths and one decoder; without a temporal code nothing of a clip's
    motion reaches the pixels, and without change in the clip nothing but zeros enters the path of motion
    (`first_frame`: shared).
    """

    config_class = VideoTokenizerConfig
    config: VideoTokenizerConfig
    main_input_name = "clip"
    _keys_to_ignore_on_load_missing = [r"_quantizer\.(usage|calls)$"]  # statistics of training
    _keep_in_fp32_modules_strict = ["spatial_quantizer", "temporal_quantizer"]

    def __init__(self, config: VideoTokenizerConfig) -> None:
        super().__init__(config)
        self.patches = ClipPatches(config)
        self.spatial, self.temporal = SpatialPath(config), TemporalPath(config)
        width, latent = config.hidden_size, config.codebook_dim
        self.spatial_down, self.temporal_down = Linear(width, latent), Linear(width, latent)
        spatial = (config.adjectives, config.nouns, config.spatial_edges)
        temporal = (config.adverbs, config.verbs, config.temporal_edges)
        self.spatial_quantizer = self._quantizer(config, *spatial)
        self.temporal_quantizer = self._quantizer(config, *temporal)
        self.spatial_up, self.temporal_up = Linear(latent, width), Linear(latent, width)
        self.decoder = ClipDecoder(config)
        self.proxy = ProxyHead(config) if config.proxy_codes else None
        self.pixels = PixelHead(config)
        self.post_init()

    def forward(self, clip: Tensor, proxy_codes: Tensor | None = None) -> VideoTokenizerOutput:
        """All that training needs, differentiable.

        Args:
            clip: (B, 3, num_frames, image_size, image_size) in [-1, 1].
            proxy_codes: (B, S, P) codes of another tokenizer, which "proxy" predicts (published stage 1).
        """
        found = [q(x) for q, x in zip(self._quantizers, self.encode_latents(clip))]
        losses = {"vq": found[0].losses["vq"] + found[1].losses["vq"]}
        pixels, logits = self.decode_latents(found[0].quantised, found[1].quantised)
        if proxy_codes is not None:
            if logits is None:
                raise UserError("proxy_codes are given, but the config has proxy_codes = 0.")
            losses["proxy"] = F.cross_entropy(logits.flatten(0, -2).float(), proxy_codes.flatten())
        codes = VideoCodes(found[0].codes, found[1].codes)
        return VideoTokenizerOutput(pixels, codes, losses, logits)

    @torch.no_grad()
    def encode(self, clip: Tensor) -> VideoCodes:
        """(B, 3, T, H, W) pixels in [-1, 1] -> codes, (B, n, 3) and (B, P, 3)."""
        return VideoCodes(*(q.encode(x) for q, x in zip(self._quantizers, self.encode_latents(clip))))

    @torch.no_grad()
    def decode(self, codes: VideoCodes) -> Tensor:
        """Codes -> (B, 3, T, H, W) pixels, clamped to [-1, 1].

        Raises:
            UserError: codes of another shape or out of range.
        """
        codes = VideoCodes(as_int64(codes[0]), as_int64(codes[1]))
        for name, own, quantizer, count in zip(
            VideoCodes._fields, codes, self._quantizers, self.config.num_tokens
        ):
            if own.dim() != 3 or own.shape[1:] != (count, NUM_CODES) or len(own) != len(codes[0]):
                raise UserError(
                    f"{name} codes have shape {tuple(own.shape)}; expected (clips, {count}, {NUM_CODES})."
                )
            sizes = torch.tensor(quantizer.code_sizes, device=own.device)
            if own.numel() and (own.min() < 0 or (own >= sizes).any()):
                raise UserError(f"{name} codes must be 0 or more and less than {quantizer.code_sizes}.")
        latents = [q.embed(x) for q, x in zip(self._quantizers, codes)]
        return self.decode_latents(*latents)[0].clamp(-1, 1)

    def encode_latents(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, n, codebook_dim) latents of appearance, (B, P, codebook_dim) of motion."""
        self._check_clip(clip)
        # as in UniTok: outside of training no TF32
        with contextlib.nullcontext() if self.training else exact_products():
            tokens, changes = self.patches(clip)
            return self.spatial_down(self.spatial(tokens)), self.temporal_down(self.temporal(changes))

    def decode_latents(self, spatial: Tensor, temporal: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantised latents -> (B, 3, T, H, W) pixels, and the logits of proxy codes or None."""
        dtype = self.spatial_up.weight.dtype
        hidden = self.decoder(self.spatial_up(spatial.to(dtype)), self.temporal_up(temporal.to(dtype)))
        logits = None
        if self.proxy is not None:
            hidden, logits = self.proxy(hidden)
        return self.pixels(hidden), logits

    def set_words(self, spatial: Words, temporal: Words) -> None:
        """Take the words of appearance (adjectives, nouns) and of motion (adverbs, verbs).

        Raises:
            UserError: their numbers are not those of the config.
        """
        for words, quantizer in zip((spatial, temporal), self._quantizers):
            if words.counts != quantizer.code_sizes[1:]:
                raise UserError(
                    f"Word lists of {words.counts} words, but the config has {quantizer.code_sizes[1:]}."
                )
            quantizer.map.set_words(words.vectors, words.edges)

    def set_proxy_rows(self, rows: Tensor) -> None:
        """Take the (proxy_codes, proxy_dim) rows of the tokenizer whose codes are predicted.

        Raises:
            UserError: the config has no proxy codes, or other sizes.
        """
        shape = None if self.proxy is None else tuple(self.proxy.rows.shape)
        if self.proxy is None or tuple(rows.shape) != shape:
            raise UserError(f"Rows of shape {tuple(rows.shape)}; the config has {shape}.")
        with torch.no_grad():
            self.proxy.rows.copy_(rows)

    def freeze_for_pixels(self) -> None:
        """Published stage 2: train the pixel head alone; the quantisers' rows keep still, without dropout."""
        for name, part in self.named_children():
            part.requires_grad_(name == "pixels")
        if self.proxy is not None:
            self.proxy.from_rows.requires_grad_(True)
        for quantizer in self._quantizers:
            quantizer.frozen = True

    @property
    def _quantizers(self) -> tuple[LanguageQuantizer, LanguageQuantizer]:
        return self.spatial_quantizer, self.temporal_quantizer

    def _quantizer(self, config: VideoTokenizerConfig, first: int, second: int, edges: int) -> Any:
        return LanguageQuantizer(
            NUM_CODES,
            max(first, second),
            config.codebook_dim,
            adjectives=first,
            nouns=second,
            word_dim=config.word_dim,
            map=config.map,
            hidden=config.map_hidden,
            edges=edges,
            dropout=config.map_dropout,
            commitment=config.commitment,
            codebook=config.codebook,
        )

    def _check_clip(self, clip: Tensor) -> None:
        side = self.config.image_size
        expected = (3, self.config.num_frames, side, side)
        if clip.dim() != 5 or tuple(clip.shape[1:]) != expected or not clip.is_floating_point():
            raise UserError(
                f"The clip is {clip.dtype} of shape {tuple(clip.shape)}; expected floats in [-1, 1] of shape "
                f"(clips, {', '.join(map(str, expected))})."
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls it for every module, children first."""
        if hasattr(module, "init_weights") and module is not self:  # defined by the modules of this package
            module.init_weights()  # pyright: ignore[reportCallIssue]
        elif isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
