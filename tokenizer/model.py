"""UniTok: one tokenizer whose codes reconstruct an image and align with its caption (arXiv 2502.20321).

B batch, N visual tokens per image (registers first), K sub-codebooks, V entries per sub-codebook, C width of
one code, D model width, E width of the joint image-text space, T text positions.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from open_unitok.core.codes import as_int64, check_codes
from open_unitok.core.errors import UserError
from open_unitok.core.files import tokenizer_path

from .adaptation.folders import is_adapter_folder, load_adapted
from .config import UniTokConfig
from .convert import read_published_tokenizer
from .decoders import build_decoder
from .encoders import build_encoder, load_towers, resolve_paths
from .fingerprint import compute_fingerprint
from .folder_checks import check_finite, load_checked, loading
from .layers import NORM_EPS, Recomputing
from .loading import check_tokenizer_folder, check_weights_fit, find_weights
from .precision import FLOAT32_PARTS, exact_products, float32_projections, spare_float32_parts, to_dtype_of
from .projection import LinearProjection, build_down_projection, build_projection
from .quantizers import build_quantizer
from .standalone import InstalledCode
from .text_tower import TextEncoder
from .token_layout import grid_of_codes, only_grid

# floats beyond it are no pixels in [-1, 1]; normalised with mean and deviation, or noise, they stay below
MAX_PIXEL = 10.0
PUBLISHED_FILE = "unitok_tokenizer.pth"
PUBLISHED_HUB_ID = "FoundationVision/unitok_tokenizer"


class UniTokOutput(NamedTuple):
    """Result of `UniTok.forward`; None where a part was not requested."""

    reconstruction: torch.Tensor | None  # (B or fewer, 3, H, W), not clamped
    codes: Any  # (B, N, K) int64; None without a quantiser
    quantised: torch.Tensor  # (B, N, latent_dim) float32, as the up projection reads it
    losses: dict[str, torch.Tensor]  # scalars by name, from the quantiser: "vq" (commitment included), ...
    usage: torch.Tensor  # (K,) per cent of each sub-codebook's entries used in this batch
    image_embeds: torch.Tensor | None  # (B, E) unit norm
    text_embeds: torch.Tensor | None  # (B, E) unit norm
    logit_scale: torch.Tensor | None  # scalar, after exp


class UniTok(Recomputing, InstalledCode, PreTrainedModel):
    """Image <-> codes, and CLIP-style embeddings of images and texts, in one transformers model."""

    config_class = UniTokConfig
    config: UniTokConfig
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_missing = [r"^quantizer\.(usage|calls)$"]  # statistics of training
    _keep_in_fp32_modules_strict = list(FLOAT32_PARTS)  # not cast by from_pretrained(dtype=...)

    def __init__(self, config: UniTokConfig) -> None:
        config, towers = resolve_paths(config)
        super().__init__(config)
        # Quantiser and decoder are built first: the projections need their widths. Modules are assigned in
        # the order of the data flow, which is the order of the state dict and of weight initialisation.
        quantizer, decoder = build_quantizer(config), build_decoder(config)
        latent, kind, causal = quantizer.latent_dim, config.projection, config.projection_causal
        self.encoder = build_encoder(config)
        self.down_projection = build_down_projection(config, self.encoder, quantizer)
        # of a continuous autoencoder with a KL posterior
        self.variance_projection = LinearProjection(self.encoder.width, latent) if quantizer.moments else None
        self.quantizer = quantizer
        heads = config.projection_heads_for(decoder.width)
        decoded = quantizer.decoded_channels
        self.up_projection = build_projection(
            kind, len(decoded) if decoded else latent, decoder.width, heads, causal
        )
        self.decoder = decoder
        if config.embed_dim:
            self.image_norm = nn.LayerNorm(decoder.width, eps=NORM_EPS)
            self.image_projection = nn.Linear(decoder.width, config.embed_dim)
            self.text_encoder = TextEncoder(config)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of the scale, as in CLIP
        self.post_init()
        load_towers(self.encoder, towers)

    def forward(
        self,
        pixels: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        reconstruct_first: int | None = None,
        entropy: bool = False,
    ) -> UniTokOutput:
        """All outputs that training needs, differentiable.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            token_ids: (B, T) captions, or None.
            reconstruct_first: decode only this many images of the batch; None = all, 0 = none.
            entropy: compute the entropy loss as well.
        """
        # The contrastive loss needs every image of the batch; decoding, the expensive half, can skip some.
        quantised = self.quantizer(self._encode_moments(pixels), entropy=entropy)
        hidden = self.up_project(quantised.quantised)
        first = hidden.shape[0] if reconstruct_first is None else reconstruct_first
        grid = self._grid(pixels)
        return UniTokOutput(
            reconstruction=self.decoder(to_dtype_of(self.decoder, hidden[:first]), grid) if first else None,
            codes=quantised.codes,
            quantised=quantised.quantised,
            losses=quantised.losses,
            usage=quantised.usage,
            image_embeds=self._image_embedding(hidden) if self.config.embed_dim else None,
            text_embeds=None if token_ids is None else self.embed_text(token_ids),
            logit_scale=self.logit_scale.exp() if self.config.embed_dim else None,
        )

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, N, K) codes.

        Raises:
            UserError: the height or width is not a multiple of `patch_size`; pixels that are integers, NaN,
                or far outside of [-1, 1].
        """
        self._check_range(pixels)
        return self.quantizer.encode(self.encode_latents(pixels))

    @torch.no_grad()
    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels -> their reconstruction, clamped to [-1, 1]; works without codes as well.

        Raises:
            UserError: see `encode`.
        """
        self._check_range(pixels)
        latents = self.quantizer.quantise(self.encode_latents(pixels))
        return self.decode_latents(latents, self._grid(pixels)).clamp(-1, 1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, N, K) codes -> (B, 3, patch_size*rows, patch_size*columns) pixels, clamped to [-1, 1].

        Args:
            codes: those of register tokens, if any, come first; with scales, those of the first scales
                alone are accepted as well and give a coarse image.
            grid: (rows, columns) of the image tokens; None = the config's `token_layout`, else square. A set
                of tokens has the grid of the layout alone.

        Raises:
            UserError: codes out of range or of another shape; a grid that does not fit them.
        """
        codes = as_int64(codes)
        grid = self.check_codes(codes, grid)
        return self.decode_latents(self.quantizer.embed(codes), grid).clamp(-1, 1)

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels -> (B, E) unit-norm embeddings, computed from the codes, or without a quantiser
        from the latents.

        Raises:
            UserError: this tokenizer has no joint image-text space (embed_dim = 0).
        """
        self._check_embeds()
        self._check_range(pixels)
        return self._image_embedding(self.up_project(self.quantizer.quantise(self.encode_latents(pixels))))

    def embed_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) caption token ids, T <= text_context_length -> (B, E) unit-norm embeddings.

        Raises:
            UserError: this tokenizer has no text tower (embed_dim = 0).
        """
        self._check_embeds()
        return F.normalize(self.text_encoder(token_ids).float(), dim=-1)

    def encode_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels -> (B, N, K*C) float32 latents before quantisation, the mean of a posterior."""
        return self._latents(self._tokens(pixels), self._grid(pixels))

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, N, encoder width)."""
        self._check_pixels(pixels)
        # two machines must come to the same codes; a training step may be faster than exact
        with contextlib.nullcontext() if self.training else exact_products():
            return self.encoder(to_dtype_of(self.encoder, pixels))

    def _latents(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.call(self._project_down, tokens, grid)

    def _project_down(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        # float32 from here to the codes: rounding would change them (see precision.py)
        with float32_projections(tokens.device, self.training):
            if not self.config.adapter_layers:
                return self.down_projection(tokens.float())
            return self.down_projection(tokens.float(), grid)

    def _encode_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """The latents; with a KL posterior mean and log variance, (B, N, 2C)."""
        tokens = self._tokens(pixels)
        latents = self._latents(tokens, self._grid(pixels))
        if self.variance_projection is None:
            return latents
        with float32_projections(tokens.device, self.training):
            log_variance = self.variance_projection(to_dtype_of(self.variance_projection, tokens))
        return torch.cat([latents, log_variance.float()], dim=-1)

    def _grid(self, pixels: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of the image tokens."""
        return pixels.shape[2] // self.config.patch_size, pixels.shape[3] // self.config.patch_size

    def up_project(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, N, K*C) quantised latents -> (B, N, D) float32 hidden, which decoder and image head share."""
        if self.quantizer.decoded_channels is not None:
            latents = latents[..., self.quantizer.decoded_channels]
        return self.call(self._project_up, latents)

    def _project_up(self, latents: torch.Tensor) -> torch.Tensor:
        with float32_projections(latents.device, self.training):
            return self.up_projection(latents.float())

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, K*C) latents -> pixels as from `decode`, but not clamped, and differentiable."""
        return self.decoder(to_dtype_of(self.decoder, self.up_project(latents)), grid)

    def check_codes(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """The grid of `codes`: `grid` if given, else the config's, else the square one.

        Raises:
            UserError: see `decode`.
        """
        if not self.quantizer.discrete:
            raise UserError(self.quantizer.no_codes)
        codes = as_int64(codes)
        check_codes(codes, self.quantizer.code_sizes)
        count, layout = codes.shape[1], self.config.layout
        if self.config.scales:
            self.quantizer.check_length(count)  # pyright: ignore[reportCallIssue]
            return only_grid(layout.grid, grid, f"the scales {self.config.scales}")
        # codes that are a set, or in a layout that is not square, have one grid
        expected = self.config.num_visual_tokens
        if layout.tokens and count != expected:
            raise UserError(f"codes have {count} visual tokens; expected {expected} (token_layout).")
        if layout.tokens:
            return only_grid(layout.grid, grid, f"{layout} (token_layout)")
        if grid is None and self.config.token_layout is not None and count == expected:
            return layout.grid
        return grid_of_codes(count, grid, layout.registers)

    def fingerprint(self) -> str:
        """Hex sha256 of all that determines the codes: encoder, down projection and quantiser, as float32.

        Raises:
            UserError: there are no codes.
        """
        if not self.quantizer.discrete:
            raise UserError(self.quantizer.no_codes)
        return compute_fingerprint(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model folder, a hub id, the published .pth file, or a shipped model's tokenizer ("scenes").

        Keyword arguments are those of transformers; `encoder_options` adds to the stored ones, e.g.
        `encoder_options={"merge": {"method": "tome", "r": 4}}` switches token merging on, and
        `{"merge": None}` off.

        A folder or hub id that holds the published file and no config.json loads that file.

        Raises:
            UserError: neither a local path nor a hub repository; the folder holds no model, or one of another
                type; the file is not a published checkpoint.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            return cls.from_reference(path, **kwargs)
        if not path.is_dir():
            path = tokenizer_path(path)  # of a shipped model, else unchanged
        if path.is_dir():
            if (path / PUBLISHED_FILE).is_file() and not (path / "config.json").exists():
                return cls.from_reference(path / PUBLISHED_FILE, **kwargs)
            check_tokenizer_folder(path)
            if is_adapter_folder(path):
                if kwargs.get("encoder_options"):
                    raise UserError(f"{path} holds an adapter, which takes no encoder_options.")
                return load_adapted(cls, path, kwargs.get("dtype"))
            _add_encoder_options(path, kwargs)
            return _keep_rows(load_checked(cls, super().from_pretrained, path, *args, **kwargs))
        try:
            _add_encoder_options(path, kwargs)
            return _keep_rows(super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs))
        except OSError as error:  # transformers: the hub has no such model, or cannot be reached
            reason = str(error).strip().splitlines()[0]
            message = f"{path} is neither a local path nor available from the hub: {reason}"
        # The published repository has no config.json, so the attempt above fails for it.
        try:
            file = find_weights(
                str(path), (PUBLISHED_FILE,), "The tokenizer", f"https://huggingface.co/{PUBLISHED_HUB_ID}"
            )
        except UserError:
            raise UserError(message) from None
        return cls.from_reference(file, **kwargs)

    @classmethod
    def from_reference(
        cls,
        path: str | os.PathLike[str],
        config: UniTokConfig | None = None,
        dtype: torch.dtype = torch.float32,
        encoder_options: Mapping[str, Any] | None = None,
    ) -> "UniTok":
        """Load a published checkpoint file (.pth); `config` is needed for sizes not in `TOKENIZER_SIZES`.

        `encoder_options` as in `from_pretrained`.

        Raises:
            UserError: the file is not such a checkpoint, or its weights do not fit the config.
        """
        with loading(path):
            config, state = read_published_tokenizer(path, config)
        if encoder_options:
            options = _more_options(config.encoder_options, encoder_options)
            config = UniTokConfig.from_dict({**config.to_dict(), "encoder_options": options})
        # The meta device allocates and initialises nothing; `assign` makes the file's tensors the parameters.
        with torch.device("meta"):
            model = cls(config)
        check_weights_fit(path, state, model.state_dict(), "the config")
        model.load_state_dict(state, assign=True)
        check_finite(model, path)
        return model.eval().to(dtype)  # pyright: ignore

    def _image_embedding(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, E), unit norm; mean pooling over all tokens, registers included."""
        pooled = self.image_norm(to_dtype_of(self.image_norm, hidden.mean(dim=1)))
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def _check_embeds(self) -> None:
        if not self.config.embed_dim:
            raise UserError(
                "This tokenizer has no text tower and no joint image-text space (embed_dim = 0): it "
                "reconstructs images, but embeds neither images nor texts."
            )

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        step = self.config.patch_size
        if not pixels.is_floating_point():
            raise UserError(
                f"pixels have dtype {pixels.dtype}; expected floats in [-1, 1]: for 0 to 255 take "
                "pixels.float() / 127.5 - 1."
            )
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise UserError(f"pixels have shape {tuple(pixels.shape)}; expected (images, 3, height, width).")
        if pixels.shape[2] % step or pixels.shape[3] % step or 0 in pixels.shape:
            raise UserError(
                f"Images of {pixels.shape[2]} x {pixels.shape[3]} pixels (height x width): both must be "
                f"multiples of {step}. Resize or crop them first."
            )
        if self.config.layout.tokens and pixels.shape[2:] != self.config.image_shape:
            height, width = self.config.image_shape
            raise UserError(
                f"Images of {pixels.shape[2]} x {pixels.shape[3]} pixels (height x width): "
                f"{self.config.layout.tokens} tokens (token_layout) are of images of {height} x {width}."
            )
        if self.config.scales and pixels.shape[2:] != self.config.image_shape:
            raise UserError(
                f"scales need square images of {self.config.image_size} pixels; this one has "
                f"{pixels.shape[2]} x {pixels.shape[3]}."
            )

    def _check_range(self, pixels: torch.Tensor) -> None:
        # only where nothing is trained: reading the values waits for the device
        readable = pixels.numel() and not pixels.is_meta and not torch.compiler.is_compiling()
        if pixels.is_floating_point() and readable:
            low, high = (float(value) for value in pixels.aminmax())
            # NaN fails every comparison
            if not (low >= -MAX_PIXEL and high <= MAX_PIXEL):
                raise UserError(
                    f"pixels range from {low:g} to {high:g}; expected [-1, 1]: for 0 to 255 take "
                    "pixels / 127.5 - 1."
                )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "UniTok":
        """Make `.to(dtype)`, `.half()` and `.bfloat16()` keep `FLOAT32_PARTS` in float32."""
        return super()._apply(spare_float32_parts(self, fn), recurse)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module; transformers calls it for every module, children first."""
        if module is self and self.config.embed_dim:
            init.constant_(self.logit_scale, math.log(1 / 0.07))
        elif hasattr(module, "init_weights"):  # defined by the modules of this package
            module.init_weights()  # pyright: ignore[reportCallIssue]
        elif isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()


def _add_encoder_options(path: Path, kwargs: dict[str, Any]) -> None:
    """Add the options stored at `path`, a folder or hub id, to those in `kwargs`."""
    if options := kwargs.pop("encoder_options", None):
        stored = UniTokConfig.from_pretrained(path).encoder_options
        kwargs["encoder_options"] = _more_options(stored, options)


def _more_options(stored: Mapping[str, Any] | None, more: Mapping[str, Any]) -> dict[str, Any] | None:
    """`stored` and `more` encoder options, without a merging that is switched off."""
    options = {**(stored or {}), **more}
    return {name: value for name, value in options.items() if name != "merge" or value is not None} or None


def _keep_rows(loaded: Any) -> Any:
    """The loaded model, or (model, info); transformers makes every parameter it loads require a gradient."""
    quantizer = (loaded[0] if isinstance(loaded, tuple) else loaded).quantizer
    if quantizer.codebooks is not None and not quantizer.trains_rows:
        quantizer.codebooks.requires_grad_(False)
    return loaded
