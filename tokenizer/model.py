"""UniTok: one tokenizer whose codes both rebuild an image and mean what its caption says (arXiv 2502.20321).

B batch, N visual tokens per image (registers first), K sub-codebooks, V entries per sub-codebook, C width of
one code, D model width, E width of the joint image-text space, T text positions.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from open_unitok.core.errors import UserError
from open_unitok.core.files import read_json

from .config import UniTokConfig
from .decoders.vitamin import Decoder
from .encoders.vitamin import Encoder
from .layers import NORM_EPS, Conv2d, exact_float32
from .loading import find_weights
from .projection import ProjectionAttention, build_projection
from .quantizers.multi_codebook import Quantizer
from .text_tower import TextBlock, TextEncoder

PUBLISHED, HUB = "unitok_tokenizer.pth", "FoundationVision/unitok_tokenizer"  # the published file, its place


class UniTokOutput(NamedTuple):
    """What `UniTok.forward` gives; None stands where nothing was asked for."""

    reconstruction: torch.Tensor | None  # (B or fewer, 3, H, W), not clamped
    codes: torch.Tensor  # (B, N, K) int64
    losses: dict[str, torch.Tensor]  # scalars: "vq" (commitment included), "entropy" (0 unless asked for)
    usage: torch.Tensor  # (K,) per cent of each sub-codebook's entries used in this batch
    image_embeds: torch.Tensor  # (B, E) unit norm
    text_embeds: torch.Tensor | None  # (B, E) unit norm
    logit_scale: torch.Tensor  # scalar, the factor itself (not its logarithm)


class UniTok(PreTrainedModel):
    """Image <-> codes, and CLIP-style embeddings of images and texts, in one transformers model."""

    config_class = UniTokConfig
    config: UniTokConfig
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["down_projection", "quantizer", "up_projection"]

    def __init__(self, config: UniTokConfig) -> None:
        super().__init__(config)
        width, latent, heads = config.hidden_size, config.latent_dim, config.num_projection_heads
        causal = config.projection_causal
        self.encoder = Encoder(config)
        self.down_projection = build_projection(config.projection, width, latent, heads, causal)
        self.quantizer = Quantizer(config.num_codebooks, config.codebook_size, config.codebook_dim)
        self.up_projection = build_projection(config.projection, latent, width, heads, causal)
        self.decoder = Decoder(config)
        self.image_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.image_projection = nn.Linear(width, config.embed_dim)
        self.text_encoder = TextEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # a logarithm
        self.post_init()

    def forward(
        self,
        pixels: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        reconstruct_first: int | None = None,
        entropy: bool = False,
    ) -> UniTokOutput:
        """Everything that training needs, differentiable from end to end.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            token_ids: (B, T) captions, or None.
            reconstruct_first: decode only this many images of the batch; None = all, 0 = none.
            entropy: compute the entropy loss too.
        """
        quantised = self.quantizer(self.encode_latents(pixels), entropy=entropy)
        hidden = self.expand(quantised.quantised)
        first = hidden.shape[0] if reconstruct_first is None else reconstruct_first
        grid = (pixels.shape[2] // self.config.patch_size, pixels.shape[3] // self.config.patch_size)
        return UniTokOutput(
            reconstruction=self.decoder(self._to_decoder(hidden[:first]), grid) if first else None,
            codes=quantised.codes,
            losses=quantised.losses,
            usage=quantised.usage,
            image_embeds=self._embed(hidden),
            text_embeds=None if token_ids is None else self.embed_text(token_ids),
            logit_scale=self.logit_scale.exp(),
        )

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels in [-1, 1] -> (B, N, K) codes.

        Raises:
            UserError: the height or width is not a multiple of 16.
        """
        return self.quantizer.encode(self.encode_latents(pixels))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """(B, N, K) codes -> (B, 3, 16*rows, 16*columns) pixels, clamped to [-1, 1].

        Args:
            codes: with the register tokens' codes, if any, in front.
            grid: (rows, columns) of the image tokens; None = square.

        Raises:
            UserError: codes out of range or of another shape; a grid that does not fit them.
        """
        grid = self.check_codes(codes, grid)
        return self.decode_latents(self.lookup(codes), grid).clamp(-1, 1)

    def embed_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels -> (B, E) unit-norm embeddings, from the quantised image."""
        return self._embed(self.expand(self.lookup(self.encode(pixels))))

    def embed_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) caption token ids, T <= text_context_length -> (B, E) unit-norm embeddings."""
        return F.normalize(self.text_encoder(token_ids).float(), dim=-1)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, N, K) codes -> (B, N, K*C) quantised latents: the K unit-norm rows side by side."""
        return self.quantizer.lookup(codes)

    def encode_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) pixels -> (B, N, K*C) float32 latents, before quantisation."""
        self._check_pixels(pixels)
        tokens = self.encoder(pixels.to(self.encoder.stem.conv1.weight.dtype))
        with exact_float32(tokens.device):
            return self.down_projection(tokens.float())

    def expand(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, N, K*C) quantised latents -> (B, N, D) float32 hidden, which decoder and image head share."""
        with exact_float32(latents.device):
            return self.up_projection(latents.float())

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, N, K*C) latents -> (B, 3, 16*rows, 16*columns) pixels, not clamped; differentiable."""
        return self.decoder(self._to_decoder(self.expand(latents)), grid)

    def check_codes(self, codes: torch.Tensor, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """The grid of these codes, given or square.

        Raises:
            UserError: see `decode`.
        """
        books, entries = self.config.num_codebooks, self.config.codebook_size
        registers = self.config.num_register_tokens
        if codes.dim() != 3 or codes.shape[2] != books or codes.is_floating_point():
            raise UserError(
                f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; integers of shape "
                f"(images, visual tokens, {books} sub-codebooks) are needed."
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= entries):
            raise UserError(f"codes run from {codes.min()} to {codes.max()}; 0 to {entries - 1} are allowed.")
        tokens = codes.shape[1] - registers
        if grid is None:
            side = math.isqrt(max(tokens, 0))
            grid = (side, side)
            if tokens < 1 or side * side != tokens:
                raise UserError(
                    f"{codes.shape[1]} visual tokens, {registers} of them registers, are not a square image: "
                    "pass grid=(rows, columns)."
                )
        if grid[0] * grid[1] != tokens or min(grid) < 1:
            raise UserError(
                f"grid = {tuple(grid)} does not fit {tokens} image tokens (and {registers} registers)."
            )
        return int(grid[0]), int(grid[1])

    def fingerprint(self) -> str:
        """Hex sha256 over all that decides the codes: encoder, down projection, codebooks (as float32)."""
        digest = hashlib.sha256()
        tensors = {f"encoder.{name}": t for name, t in self.encoder.state_dict().items()}
        tensors |= {f"down_projection.{name}": t for name, t in self.down_projection.state_dict().items()}
        tensors["codebooks"] = self.quantizer.codebooks
        for name in sorted(tensors):
            tensor = tensors[name].detach().float().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
        return digest.hexdigest()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a folder of ours, a hub id, or the published .pth file; keyword arguments as in transformers.

        A folder or hub id that holds the published file in place of a config.json is taken as that file.

        Raises:
            UserError: nothing is there, on disk or on the hub; the folder holds no model, or one of another
                kind; the file is no published checkpoint.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            return cls.from_reference(path, **kwargs)
        if path.is_dir():
            if (path / PUBLISHED).is_file() and not (path / "config.json").exists():
                return cls.from_reference(path / PUBLISHED, **kwargs)
            check_folder(path)
            return super().from_pretrained(path, *args, **kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:  # how transformers says that the hub has no such model, or cannot be reached
            reason = str(error).strip().splitlines()[0]
            message = f"{path} is not here, nor could the hub give it: {reason}"
        try:
            file = find_weights(str(path), (PUBLISHED,), "The tokenizer", f"https://huggingface.co/{HUB}")
        except UserError:
            raise UserError(message) from None
        return cls.from_reference(file, **kwargs)

    @classmethod
    def from_reference(
        cls,
        path: str | os.PathLike[str],
        config: UniTokConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "UniTok":
        """Load a published checkpoint file (.pth); `config` is needed for sizes that no name covers.

        Raises:
            UserError: the file is no such checkpoint, or its weights do not fit the config.
        """
        from .convert import load_reference

        return load_reference(path, config).to(dtype)  # pyright: ignore

    def _embed(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, E), unit norm; the mean takes in the registers."""
        pooled = self.image_norm(hidden.mean(dim=1).to(self.image_norm.weight.dtype))
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    def _to_decoder(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.to(self.decoder.norm.weight.dtype)

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        step = self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise UserError(f"pixels have shape {tuple(pixels.shape)}; (images, 3, height, width) is needed.")
        if pixels.shape[2] % step or pixels.shape[3] % step or 0 in pixels.shape:
            raise UserError(
                f"Images of {pixels.shape[2]} x {pixels.shape[3]} pixels (height x width): both must be "
                f"multiples of {step}. Resize or crop them first."
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "UniTok":
        """`.to(dtype)`, `.half()` and `.bfloat16()` leave in float32 what decides the codes."""
        kept = set()
        for name in self._keep_in_fp32_modules_strict or ():
            for tensor in self.get_submodule(name).state_dict(keep_vars=True).values():
                kept |= {id(tensor), id(tensor.grad)} - {id(None)}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep, recurse)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """How weights start, as in the published training; transformers calls it for each module."""
        if isinstance(module, Conv2d):
            _init_conv(module)
        elif isinstance(module, nn.Linear):
            if module is self.image_projection:
                module.reset_parameters()
            else:
                init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Encoder):
            init.zeros_(module.position_offset)
            if module.register_tokens is not None:
                init.normal_(module.register_tokens, std=0.02)
        elif isinstance(module, ProjectionAttention):
            init.zeros_(module.query_bias)
            init.zeros_(module.value_bias)
        elif isinstance(module, Quantizer):
            bound = 1 / (36 * module.codebooks.shape[2] ** 0.5)
            init.uniform_(module.codebooks, -bound, bound)
            init.zeros_(module.usage)
            init.zeros_(module.calls)
        elif isinstance(module, TextEncoder):
            _init_text(module)
        elif module is self:
            init.constant_(self.logit_scale, math.log(1 / 0.07))


def check_folder(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: `folder` holds no visual tokenizer; the message says what it holds.
    """
    config = Path(folder) / "config.json"
    if not config.exists():
        raise UserError(f"{folder} is no model folder: it has no config.json.")
    kind = read_json(config).get("model_type")
    if kind != UniTokConfig.model_type:
        inside = Path(folder) / "unitok"
        hint = f" Its visual tokenizer is in {inside}." if inside.is_dir() else ""
        raise UserError(f"{folder} holds a model of type {kind!r}, not a visual tokenizer ('unitok').{hint}")


def _init_conv(conv: Conv2d) -> None:
    if conv.start == "torch":
        conv.reset_parameters()
        return
    if conv.start == "xavier":
        init.xavier_normal_(conv.weight, gain=0.5)
    else:
        init.normal_(
            conv.weight, std=math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]))
        )
    if conv.bias is not None:
        init.zeros_(conv.bias)


def _init_text(text: TextEncoder) -> None:
    """CLIP's rule: widths and depth set the scale (arXiv 2103.00020, section 2.4)."""
    width, depth = text.token_embedding.embedding_dim, len(text.blocks)
    init.normal_(text.token_embedding.weight, std=0.02)
    init.normal_(text.position_embedding, std=0.01)
    init.normal_(text.projection.weight, std=width**-0.5)
    for block in text.blocks:
        assert isinstance(block, TextBlock)
        init.normal_(block.attention.qkv.weight, std=width**-0.5)
        init.normal_(block.attention.out.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        init.normal_(block.up.weight, std=(2 * width) ** -0.5)
        init.normal_(block.down.weight, std=width**-0.5 * (2 * depth) ** -0.5)
