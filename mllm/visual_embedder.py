"""The visual embedder: codes of an image to input vectors of the decoder (arXiv 2502.20321, section 3.4).

I images, N visual tokens per image, K sub-codebooks, V entries per sub-codebook, C width of one code, D
decoder width.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.projection import AttentionProjection, KVCache
from open_unitok.tokenizer.quantizers.base import normalise_blocks
from open_unitok.tokenizer.quantizers.residual import next_scale_inputs, sum_scales
from open_unitok.tokenizer.token_layout import TokenLayout

from .config import UniTokMLLMConfig, check_mllm_quantizer

NORM_IMAGES = 64  # of random codes, see `VisualEmbedder.with_positions`
PROJECTOR_EPS = 1e-6  # as published; the norms of the projection use torch's 1e-5


class VisualEmbedder(nn.Module):
    """Frozen code rows -> causal attention projection within each image -> MLP.

    With `visual_positions` "learned_2d" the vectors of its row and column in the image are added to each.

    `input_embedder` "mlp" leaves out the projection and the MLP's norm; "tables" has trained tables of width
    D instead of rows, and one linear layer.

    Attributes:
        codebooks: (K, V, C) frozen copy of the tokenizer's `Quantizer.code_table()`; None for "tables". Rows
            are stored as in the tokenizer and normalised by `row_norm` on use, so that saving and converting
            preserve them.
        shared_tables: the K trained tables in one, (K*V, D); None but for "tables".
    """

    def __init__(self, config: UniTokMLLMConfig, width: int) -> None:
        super().__init__()
        self.config = config
        middle = config.visual_hidden_size
        self.context = config.visual_context
        self.row_norm, self.row_blocks = config.row_norm, config.row_blocks
        self.code_sizes, self.sums_rows = config.book_sizes, config.sums_rows
        # not read from `codebooks`: under ZeRO-3 a parameter's shape is that of its partition
        self.num_codebooks, self.codebook_size = config.num_codebooks, config.codebook_size
        self.row_embedding = self.column_embedding = None
        if config.visual_positions == "learned_2d":
            layout = TokenLayout.from_config(config.token_layout, config.num_image_tokens)
            self.registers = layout.registers
            self.row_embedding = nn.Embedding(layout.rows, width)
            self.column_embedding = nn.Embedding(layout.columns, width)
        self.codebooks = self.projection = self.shared_tables = None
        if config.input_embedder == "tables":
            self.shared_tables = nn.Embedding(config.num_codebooks * config.codebook_size, width)
            self.projector = nn.Linear(config.num_codebooks * width, width)
            return
        shape = (config.num_codebooks, config.codebook_size, config.codebook_dim)
        self.codebooks = nn.Parameter(torch.randn(shape), requires_grad=False)
        inputs, norm = config.latent_dim, []
        if config.input_embedder == "projection":
            # causal, so that generation can run it token by token
            self.projection = AttentionProjection(inputs, middle, config.num_projection_heads, causal=True)
            inputs, norm = middle, [nn.LayerNorm(middle, eps=PROJECTOR_EPS)]
        self.projector = nn.Sequential(*norm, nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))

    @torch.no_grad()
    def with_positions(
        self, norm_ratio: float = 1 / 3, codes: torch.Tensor | None = None
    ) -> "VisualEmbedder":
        """A new embedder of these trained layers with `visual_positions` "learned_2d"; this one has none.

        The caller puts it in place of this one and sets the key in the model's config. Training makes visual
        vectors long (about 80 times a text embedding in the model `scenes`); next to them place vectors of
        the usual initialisation stay without effect (docs/experiments/binding.md).

        Args:
            norm_ratio: norm of the added vectors (row and column in sum), divided by that of the visual
                vectors, as root mean squares.
            codes: (I, N, K), whose visual vectors are measured. None = random codes: in the model `scenes`
                the norm is 46 for these, and 54 for codes of real images.

        Raises:
            UserError: the visual tokens are not on a grid.
        """
        assert self.row_embedding is None
        config = copy.copy(self.config)  # a refused one stays as it is
        config.visual_positions = "learned_2d"
        config.check_places()
        if codes is None:
            sizes = torch.tensor(self.code_sizes)
            shape = (NORM_IMAGES, config.num_image_tokens, self.num_codebooks)
            codes = (torch.rand(shape) * sizes).long()
        vectors = self(codes)
        embedder = VisualEmbedder(config, vectors.shape[-1])
        for name, layer in self.named_children():  # not copies: a depth head may read the same tables
            setattr(embedder, name, layer)
        embedder.codebooks = self.codebooks
        std = norm_ratio * vectors.square().mean().sqrt().item() / 2**0.5  # of the sum of two
        for table in (embedder.row_embedding, embedder.column_embedding):
            assert table is not None
            table.weight.normal_(std=std)
        return embedder.train(self.training)

    def init_weights(self) -> None:
        if self.codebooks is not None:
            init.normal_(self.codebooks)

    def freeze_codebooks(self) -> None:
        """Exclude the code rows from training: stored codes refer to them."""
        if self.codebooks is not None:
            self.codebooks.requires_grad_(False)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """(I, N, K) codes of whole images -> (I, N, D); with scales, one vector per place of the last."""
        return self._add_places(self.projector(self._project(self.embed(codes))), 0)

    def step(self, codes: torch.Tensor, cache: KVCache | None, start: int | torch.Tensor) -> torch.Tensor:
        """One decode step: the next codes (I, n, K) of each image -> (I, n, D).

        With the "full" context, steps equal one `forward` over all tokens; with "last" each visual token is
        embedded alone.

        Args:
            cache: of `new_cache`.
            start: index in the image of the first of the n tokens; a number or (1,).
        """
        if cache is None:
            alone = self.embed(codes).flatten(0, 1).unsqueeze(1)  # sequences of one token
            vectors = self.projector(self._project(alone)).view(*codes.shape[:2], -1)
        else:
            vectors = self.projector(self._project(self.embed(codes), cache))
        return self._add_places(vectors, start)

    def place_table(self) -> torch.Tensor | None:
        """(N, D): what is added to each visual token of an image; None without `visual_positions`."""
        if self.row_embedding is None or self.column_embedding is None:
            return None
        # by calls, not by their weights: ZeRO-3 gathers a module's parameters when it is called
        rows, columns = (
            table(torch.arange(table.num_embeddings, device=table.weight.device))
            for table in (self.row_embedding, self.column_embedding)
        )
        grid = (rows[:, None] + columns).flatten(0, 1)
        return F.pad(grid, (0, 0, self.registers, 0))

    def _add_places(self, vectors: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
        """(I, n, D) vectors of the tokens from `start` on."""
        table = self.place_table()
        if table is None:
            return vectors
        # a tensor, so that a CUDA graph does not hold the index as a constant
        index = torch.arange(vectors.shape[1], device=vectors.device) + start
        return vectors + table[index].to(vectors.dtype)

    def new_cache(self, length: int) -> KVCache | None:
        """The KV cache of `step` for up to `length` visual tokens; None with the "last" context, and without
        a projection."""
        return KVCache(length) if self.context == "full" and self.projection is not None else None

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) codes -> (..., latent_dim): K rows, concatenated or added, as the tokenizer's `embed`;
        with trained tables (..., K*D)."""
        # one lookup in all K tables: table k starts at row k * V
        if self.shared_tables is not None:
            offsets = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
            return self.shared_tables(codes.long() + offsets).flatten(-2)
        rows = self._rows(codes)
        if not self.config.scales:
            return rows
        return sum_scales(rows.float(), self.config.scales).to(rows.dtype)

    def next_scales(self, codes: torch.Tensor, again: int | None = None) -> torch.Tensor:
        """(I, N, K) codes of a pyramid -> (I, N - s1*s1, D): what TokenFlow's next-scale decoder reads for
        the scales 2 to S, before its level and position embeddings; see `next_scale_inputs`.

        Raises:
            UserError: the model does not read a pyramid through "mlp".
        """
        scales = self.config.scales
        if not scales or self.config.input_embedder != "mlp":
            raise UserError(
                f"next_scales needs scales and input_embedder = 'mlp', not {scales} and "
                f"{self.config.input_embedder!r}."
            )
        rows = self._rows(codes)
        return self.projector(next_scale_inputs(rows.float(), scales, again).to(rows.dtype))

    def _rows(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., K) codes -> (..., latent_dim), without a sum over scales."""
        assert self.codebooks is not None
        offsets = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        rows = F.embedding(codes.long() + offsets, self.codebooks.flatten(0, 1))
        rows = self._normalise(rows)
        return rows.sum(dim=-2) if self.sums_rows else rows.flatten(-2)

    def code_table(self) -> torch.Tensor:
        """(K, V, C) float32 rows, normalised as in `embed`."""
        assert self.codebooks is not None
        return self._normalise(self.codebooks.detach().float())

    def _project(self, rows: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        return rows if self.projection is None else self.projection(rows, cache)

    def _normalise(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., C) rows, normalised as the tokenizer's quantiser does."""
        if self.row_norm == "none":
            return rows
        if self.row_norm == "blocks":
            return normalise_blocks(rows, self.row_blocks)
        return F.normalize(rows, dim=-1)

    @torch.no_grad()
    def init_from_tokenizer(self, unitok: UniTok) -> None:
        """Copy a visual tokenizer's code table, and initialise the causal projection from its up projection.

        Raises:
            UserError: the tokenizer's sizes differ; its quantiser has no code table.
        """
        table, config = readable_code_table(unitok), self.config
        for name in ("num_codebooks", "codebook_size", "codebook_dim"):
            ours, theirs = getattr(config, name), getattr(unitok.config, name)
            if ours != theirs:
                raise UserError(f"{name} = {ours} in the model, but {theirs} in the visual tokenizer.")
        for name in ("row_norm", "row_blocks"):
            ours, theirs = getattr(config, name), getattr(unitok.quantizer, name)
            if ours != theirs and (name == "row_norm" or config.row_norm == "blocks"):
                raise UserError(
                    f"{name} = {ours!r} in the model, but {theirs!r} in the visual tokenizer: build the "
                    "config with UniTokMLLMConfig.for_tokenizer."
                )
        if config.scales != unitok.config.scales:
            raise UserError(
                f"scales = {config.scales} in the model, but {unitok.config.scales} in the visual tokenizer: "
                "build the config with UniTokMLLMConfig.for_tokenizer."
            )
        for name, ours in (("code_sizes", config.book_sizes), ("sums_rows", config.sums_rows)):
            theirs = getattr(unitok.quantizer, name)
            if ours != theirs:
                raise UserError(
                    f"{name} = {ours} in the model, but {theirs} in the visual tokenizer: build the config "
                    "with UniTokMLLMConfig.for_tokenizer."
                )
        own, other = self.projection, unitok.up_projection
        # a linear projection has no matching weights, nor has one that reads some of the channels
        whole = isinstance(other, AttentionProjection) and unitok.quantizer.decoded_channels is None
        if own is not None and whole:
            shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (own, other)]
            if shapes[0] != shapes[1] or own.attention.heads != other.attention.heads:  # pyright: ignore
                raise UserError(
                    f"visual_hidden_size = {config.visual_hidden_size} with {own.attention.heads} heads "
                    "does not fit the visual tokenizer's projection to "
                    f"{unitok.config.decoder_width} with {other.attention.heads} heads: build the config "  # pyright: ignore
                    "with UniTokMLLMConfig.for_tokenizer."
                )
            own.load_state_dict(other.state_dict())
        if self.codebooks is not None:
            self.codebooks.copy_(table)

    def check_codes(self, codes: torch.Tensor) -> None:
        """
        Raises:
            UserError: codes of another shape, dtype or range than this embedder's.
        """
        check_image_codes(codes, self.code_sizes)
        if self.row_embedding is not None and codes.shape[1] != self.config.num_image_tokens:
            raise UserError(
                f"image_codes have {codes.shape[1]} visual tokens; visual_positions = 'learned_2d' has the "
                f"places of {self.config.num_image_tokens} (num_image_tokens)."
            )
        if self.config.scales and codes.shape[1] != self.config.num_codes:
            raise UserError(
                f"image_codes have {codes.shape[1]} visual tokens; the scales {self.config.scales} take "
                f"{self.config.num_codes}."
            )


def check_image_codes(codes: torch.Tensor, code_sizes: list[int]) -> None:
    """Check (I, N, K) codes against the K sizes of the sub-codebooks.

    Raises:
        UserError: codes of another shape, dtype or range.
    """
    codes = as_int64(codes)
    books, entries = len(code_sizes), max(code_sizes)
    if codes.dim() != 3 or codes.shape[2] != books or codes.dtype != torch.int64:
        raise UserError(
            f"image_codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; expected integers of "
            f"shape (images, visual tokens, {books} sub-codebooks)."
        )
    if codes.device.type == "cpu" and codes.numel():  # elsewhere the check would wait for the device
        low, high = torch.aminmax(codes)
        if low < 0 or high >= entries:
            raise UserError(f"image_codes range from {low} to {high}; allowed: 0 to {entries - 1}.")
        highest = codes.flatten(0, 1).amax(dim=0).tolist()
        if any(code >= size for code, size in zip(highest, code_sizes)):
            raise UserError(
                f"image_codes go up to {highest} per sub-codebook; allowed: less than {code_sizes}."
            )


def readable_code_table(unitok: UniTok) -> torch.Tensor:
    """(K, V, C) float32 rows of a tokenizer's codebooks, to be copied into an MLLM.

    Raises:
        UserError: an MLLM cannot read or generate the quantiser's codes, or their embedding is not a table
            lookup.
    """
    quantizer, name = unitok.quantizer, unitok.config.quantizer
    check_mllm_quantizer(name, quantizer)
    table = quantizer.code_table()
    if table is None:
        raise UserError(
            f"The MLLM reads codes from a table of K x V rows, which quantizer = {name!r} does not have "
            "(Quantizer.code_table)."
        )
    return table
