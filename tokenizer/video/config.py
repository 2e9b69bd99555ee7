"""The configuration of a `VideoTokenizer`, checked on construction (SweetTok, arXiv 2412.10443)."""

from typing import Any

from transformers import PretrainedConfig

from open_unitok.core.errors import UserError, did_you_mean

SPATIAL_INPUTS = ("mean", "first")
FIRST_FRAMES = ("shared", "own")


class VideoTokenizerConfig(PretrainedConfig):
    """All sizes of a `VideoTokenizer`; the defaults are SweetTok's (17 frames of 256 px, 256 + 1,024 tokens).

    Args:
        image_size: side of the square frames in pixels; num_frames: 1 + a multiple of tube_frames.
        patch_size, tube_frames: patches of the first frame are patch_size squared; the other frames are cut
            into tubes of tube_frames patches.
        first_frame: "shared": the first frame is embedded as a tube of equal frames, so that a still clip
            has no motion at all; "own": by weights of its own.
        hidden_size, num_attention_heads: of all transformers; D and its heads.
        spatial_layers, spatial_queries: layers of the path of appearance, and n of its tokens.
        spatial_input: what the queries read: the "mean" of the frames (published code) or the "first" frame
            (paper).
        windowed_layers, window_size: these spatial layers, counted from 0, attend within windows of
            window_size x window_size patches.
        temporal_layers: causal layers of the path of motion, which has one token for each place.
        temporal_after: layers of the decoder, counted from 1, after which a temporal layer follows.
        pixel_layers: transformer layers between the decoder and the pixels.
        codebook_dim: width of a latent, two halves.
        adjectives, nouns, spatial_edges: words of appearance and their pairs.
        adverbs, verbs, temporal_edges: words of motion and their pairs.
        word_dim, map, map_hidden, map_dropout: see `WordMap`.
        commitment, codebook: weights of the two sides of the quantisers' losses.
        proxy_codes, proxy_dim: with codes of another tokenizer as the target (published: the 8,192 of
            OmniTokenizer), their number and the width of their rows; 0 = pixels alone.

    Raises:
        UserError: a field is unknown, or a value is not valid.
    """

    model_type = "unitok_video"

    image_size: int = 256
    num_frames: int = 17
    patch_size: int = 8
    tube_frames: int = 4
    first_frame: str = "shared"
    hidden_size: int = 512
    num_attention_heads: int = 8
    spatial_layers: int = 8
    spatial_queries: int = 256
    spatial_input: str = "mean"
    windowed_layers: list[int] | tuple[int, ...] = ()
    window_size: int = 8
    temporal_layers: int = 4
    temporal_after: list[int] | tuple[int, ...] = (1, 3, 5, 7)
    pixel_layers: int = 4
    codebook_dim: int = 512
    adjectives: int = 5403
    nouns: int = 5078
    spatial_edges: int = 0
    adverbs: int = 1872
    verbs: int = 9267
    temporal_edges: int = 0
    word_dim: int = 512
    map: str = "gcn"
    map_hidden: int = 256
    map_dropout: float | None = None
    commitment: float | int = 1.0
    codebook: float | int = 0.25
    proxy_codes: int = 0
    proxy_dim: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        known = set(self.__dataclass_fields__)
        for key in kwargs.keys() - {"model_type", "transformers_version", "architectures", "dtype"}:
            if key not in PretrainedConfig.__dataclass_fields__:
                raise UserError(f"VideoTokenizerConfig has no field {key!r}.{did_you_mean(key, known)}")
        self.windowed_layers, self.temporal_after = list(self.windowed_layers), list(self.temporal_after)
        self._check()
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("pixel_layers", "spatial_edges", "temporal_edges", "proxy_codes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 0.")
        for name, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, name) % getattr(self, part):
                raise UserError(
                    f"{name} = {getattr(self, name)} is not a multiple of {part} = {getattr(self, part)}."
                )
        if self.num_frames <= 1 or (self.num_frames - 1) % self.tube_frames:
            raise UserError(
                f"num_frames = {self.num_frames}: must be 1 more than a multiple of tube_frames = "
                f"{self.tube_frames}."
            )
        for name, allowed in (("spatial_input", SPATIAL_INPUTS), ("first_frame", FIRST_FRAMES)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} = {getattr(self, name)!r}: must be {' or '.join(allowed)}.")
        if self.windowed_layers and self.side % self.window_size:
            raise UserError(
                f"window_size = {self.window_size} does not divide the {self.side} patches of a row."
            )
        for name, low, high in (
            ("windowed_layers", 0, self.spatial_layers - 1),
            ("temporal_after", 1, self.spatial_layers),
        ):
            layers = getattr(self, name)
            if len(set(layers)) != len(layers) or not all(low <= layer <= high for layer in layers):
                raise UserError(f"{name} = {layers}: expected distinct layers from {low} to {high}.")
        if not self.temporal_after:
            raise UserError("temporal_after = []: without a temporal layer no motion reaches the pixels.")

    @property
    def side(self) -> int:
        """Patches in a row of a frame."""
        return self.image_size // self.patch_size

    @property
    def steps(self) -> int:
        """Points in time: the first frame, then the tubes."""
        return 1 + (self.num_frames - 1) // self.tube_frames

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of appearance and of motion; each has three indices."""
        return self.spatial_queries, self.side**2


_POSITIVE = (
    "image_size", "num_frames", "patch_size", "tube_frames", "hidden_size", "num_attention_heads",
    "spatial_layers", "spatial_queries", "window_size", "temporal_layers", "codebook_dim", "adjectives",
    "nouns", "adverbs", "verbs", "word_dim", "map_hidden", "proxy_dim",
)  # fmt: skip
