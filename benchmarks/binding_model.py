"""The settings and the model of benchmarks/binding.py.

n samples, N visual tokens per image, K codes per visual token of V entries each, T words per text.
"""

import copy
from dataclasses import asdict, dataclass
from typing import Any

import binding_scenes as data
import torch
from binding_scenes import GRID, ID, KINDS, PAD, WORDS
from torch import nn
from transformers import LlamaConfig, LlamaModel

from open_unitok.core.files import tokenizer_path
from open_unitok.mllm import UniTokMLLMConfig
from open_unitok.mllm.visual_embedder import VisualEmbedder
from open_unitok.tokenizer import UniTok


@dataclass(frozen=True)
class Setting:
    """One run. Shares: `captions` and `images` (generated) of the samples, the rest are conversations of up
    to `turns` questions, whose kinds have `shares`. Weights: `text` and `image` of the mean losses over
    learned words and codes; `answer` of the words that answer. `position_norm`: norm of a position's vector
    at the start, in norms of a visual vector. `one_object`: first steps, with scenes of one object."""

    optimizer: str = "muon"
    lr: float = 5e-3
    schedule: str = "constant"
    steps: int = 2500
    batch: int = 64
    width: int = 64
    depth: int = 4
    init: float = 0.07
    rope_theta: float = 1e4
    code: str = "joint"
    tokens: int = 1
    embedder: str = "table"
    positions: str = "none"
    position_norm: float = 1.0
    bidirectional: bool = False
    shares: tuple[float, ...] = (1.0,) * len(KINDS)
    turns: int = 1
    filler: int = 0
    describe: bool = False
    captions: float = 0.0
    images: float = 0.0
    answer: float = 1.0
    text: float = 1.0
    image: float = 1.0
    one_object: int = 0

    @property
    def name(self) -> str:
        """The fields that differ from the defaults."""
        plain = asdict(Setting())
        return " ".join(f"{k}={show(v)}" for k, v in asdict(self).items() if v != plain[k]) or "base"


def show(value: Any) -> str:
    return "/".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


class SymbolEmbedding(nn.Module):
    """(n, N, K) codes -> the sum of K trained vectors."""

    def __init__(self, books: int, entries: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(entries, width) for _ in range(books))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.stack([book(codes[..., i]) for i, book in enumerate(self.embeddings)]).sum(0)


class Decoder(nn.Module):
    """A Llama over visual vectors and words, with a head for words and one for codes."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.setting, self.side = setting, GRID * (2 if setting.tokens == 4 else 1)
        text = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=width * 8 // 3 // 16 * 16,
            num_hidden_layers=setting.depth, num_attention_heads=width // 32, max_position_embeddings=256,
            initializer_range=setting.init, rope_theta=setting.rope_theta,
        )  # fmt: skip
        self.language_model = LlamaModel(text)
        self.lm_head = nn.Linear(width, len(WORDS), bias=False)
        if setting.code == "scenes":
            self.visual, self.books, self.entries = visual_embedder(setting.embedder, text)
        else:
            self.books, self.entries = (
                (1, data.PAIRS + 1) if setting.code == "joint" else (2, data.COLORS + 1)
            )
            self.visual = SymbolEmbedding(self.books, self.entries, width)
        self.code_lm_head = nn.Linear(width, self.books * self.entries, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "projection" not in name:
                nn.init.normal_(parameter, std=setting.init)
        self.row_embedding = nn.Parameter(torch.zeros(self.side, width), requires_grad=False)
        self.column_embedding = nn.Parameter(torch.zeros(self.side, width), requires_grad=False)

    @torch.no_grad()
    def init_positions(self, codes: torch.Tensor) -> None:
        """Row and column vectors whose sum has `position_norm` times the norm of a visual vector."""
        kind, width = self.setting.positions, self.setting.width
        norm = float(self.visual(codes).square().mean().sqrt()) * self.setting.position_norm
        for parameter, shift in ((self.row_embedding, 0), (self.column_embedding, width // 2)):
            if kind == "learned":
                parameter.normal_(std=norm / 2**0.5).requires_grad_(True)
            elif kind == "sinusoidal":  # half of the channels for rows, half for columns
                angle = torch.arange(self.side)[:, None] * 3.0 ** -torch.arange(width // 4)
                parameter[:, shift : shift + width // 2] = (
                    torch.cat([angle.sin(), angle.cos()], 1) * 2**0.5 * norm
                )

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """(n, N, K) -> (n, N, width)."""
        places = (self.row_embedding[:, None] + self.column_embedding).flatten(0, 1)
        return self.visual(codes) + places[: codes.shape[1]]

    def forward(self, before: torch.Tensor, codes: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """(n, A) ids, (n, N, K) codes of an image, (n, B) ids -> (n, A + N + B, width) hidden states."""
        words, mask = self.language_model.embed_tokens, None
        x = torch.cat([words(before), self.embed(codes), words(after)], dim=1)
        if self.setting.bidirectional and before.shape[1] == 1:  # an image that is read
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask[1 : 1 + codes.shape[1], 1 : 1 + codes.shape[1]] = True
            mask = mask.expand(len(x), 1, -1, -1)
        return self.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state

    def read(self, codes: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """(n, T, width): the states that predict each of (n, T) `ids` behind an image."""
        boi, eoi = (ids.new_full((len(ids), 1), ID[word]) for word in ("boi", "eoi"))
        return self(boi, codes, torch.cat([eoi, ids[:, :-1]], dim=1))[:, codes.shape[1] + 1 :]

    def generate(self, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(n, N, K, V): logits of the codes of an image behind (n, T) `ids`, each token from those before."""
        shift = (ids == PAD).sum(1, keepdim=True)  # padding to the left: the image follows the text
        ids = ids.gather(1, (torch.arange(ids.shape[1]) - shift) % ids.shape[1])
        boi = ids.new_full((len(ids), 1), ID["boi"])
        states = self(torch.cat([ids, boi], dim=1), codes[:, :-1], ids[:, :0])[:, ids.shape[1] :]
        return self.code_lm_head(states).unflatten(-1, (self.books, self.entries))


def visual_embedder(kind: str, text: LlamaConfig) -> tuple[VisualEmbedder, int, int]:
    """An MLLM's embedder of the shipped tokenizer's codes, and the numbers of codes and entries."""
    unitok = UniTok.from_pretrained(tokenizer_path("scenes"), dtype=torch.float32)
    # a copy: an outer config resets the attention of its parts, and without one it is not causal
    sizes = {"text_config": copy.deepcopy(text), "input_embedder": kind}
    config = UniTokMLLMConfig.for_tokenizer(unitok.config, **sizes)
    embedder = VisualEmbedder(config, text.hidden_size)
    embedder.init_from_tokenizer(unitok)
    embedder.freeze_codebooks()
    return embedder, config.num_codebooks, config.codebook_size
