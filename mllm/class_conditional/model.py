"""The class-conditional image model: a class, then the codes of its image in raster order (LlamaGen, arXiv
2406.06525, with the K codes of UniTok, arXiv 2502.20321).

B batch, N visual tokens per image, K sub-codebooks, V entries of each, D width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError
from open_unitok.tokenizer.folder_checks import check_finite, load_checked, loading
from open_unitok.tokenizer.standalone import InstalledCode

from ..loading import assign_state
from ..losses import image_loss
from ..output import UniTokMLLMOutput
from ..visual_embedder import check_image_codes
from .config import ClassConditionalConfig
from .layers import CodeHead, LlamaGenBlock, rotary_table


class ClassConditionalModel(InstalledCode, PreTrainedModel):
    """A LLaMA-like decoder over [class, token 0, ..., token N-2]; position s predicts the K codes of token s.

    A token is embedded as the sum of K tables' rows, which are trained; the tokenizer's rows are not read.
    """

    config_class = ClassConditionalConfig
    config: ClassConditionalConfig
    base_model_prefix = ""
    main_input_name = "classes"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LlamaGenBlock"]  # type: ignore[misc]
    _supports_sdpa = True

    def __init__(self, config: ClassConditionalConfig) -> None:
        super().__init__(config)
        width, depth = config.hidden_size, config.num_hidden_layers
        rows = config.num_classes + (config.null_class is not None)
        self.class_embedding = nn.Embedding(rows, width)
        self.code_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in config.book_sizes)
        self.dropout = nn.Dropout(config.dropout)
        rates = torch.linspace(0, config.drop_path, depth, device="cpu").tolist()
        self.layers = nn.ModuleList(LlamaGenBlock(config, i, rate) for i, rate in enumerate(rates))
        self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.depth_head = CodeHead(config)
        self.post_init()

    def forward(
        self,
        classes: torch.Tensor,
        image_codes: torch.Tensor,
        reduction: Literal["mean", "sum"] = "mean",
        return_logits: bool | None = None,
        **kwargs: Any,
    ) -> UniTokMLLMOutput:
        """One teacher-forced pass: the loss is the cross entropy over all codes, without z-loss.

        Args:
            classes: (B,) integers; `config.null_class` for samples that see no class. Class dropout is the
                caller's: the training mixture samples it, so that it does not depend on the number of ranks.
            image_codes: (B, N, K).
            reduction: "mean" or "sum" of the loss over B*N*K codes.
            return_logits: return `image_logits` (B, N, K, V); None = except in training.

        Raises:
            UserError: classes or codes of another shape or range.
        """
        codes = as_int64(image_codes)
        assert codes is not None
        self._check_inputs(classes, codes)
        hidden = self.hidden_states(classes, codes)
        # one row per visual token
        flat = codes.flatten(0, 1)
        logits = self.depth_head(hidden.flatten(0, 1), flat)
        wanted = not self.training if return_logits is None else return_logits
        loss, _, correct = image_loss(logits, flat, 0.0, keep_logits=wanted)
        if reduction == "mean":
            loss = loss / flat.numel()
        return UniTokMLLMOutput(
            loss=loss,
            image_loss=loss,
            image_codes=codes.new_tensor(flat.numel()),
            image_correct=correct,
            image_logits=logits.unflatten(0, codes.shape[:2]) if wanted else None,
            last_hidden_state=hidden,
        )

    def hidden_states(self, classes: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(B,) classes and (B, N, K) codes -> (B, N, D) after the final norm; place s predicts token s."""
        # the last token is never an input
        vectors = torch.cat([self.embed_classes(classes), self.embed_codes(codes[:, :-1])], dim=1)
        return self.decode(vectors, self.rotary()[: vectors.shape[1]])

    def embed_classes(self, classes: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, 1, D)."""
        return self.class_embedding(classes).unsqueeze(1)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """(B, n, K) -> (B, n, D): the sum of the K tables' rows."""
        rows = [table(codes[..., k]) for k, table in enumerate(self.code_embeddings)]
        return torch.stack(rows).sum(dim=0)

    def rotary(self) -> torch.Tensor:
        """(1 + N, d/2, 2) cosines and sines of the class and of every token; see `rotary_table`."""
        config, layout = self.config, self.config.layout
        width = config.hidden_size // config.num_attention_heads
        return rotary_table(layout.rows, layout.columns, width, float(config.rope_base), self.device)

    def decode(
        self, vectors: torch.Tensor, rotary: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, S, D) inputs -> (B, S, D) after the final norm.

        Args:
            rotary: (S, d/2, 2), the rows of `rotary()` at these positions.
            cache: keys and values of earlier positions; a transformers `Cache`.
            mask: (B or 1, 1, S, cached), True where visible; None = causal.
        """
        hidden = self.dropout(vectors)
        for layer in self.layers:
            hidden = layer(hidden, rotary, cache, mask)
        return self.norm(hidden)

    def get_input_embeddings(self) -> nn.Module:
        return self.class_embedding

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model folder or a hub id; keyword arguments as in transformers.

        Raises:
            UserError: the folder holds no such model or incomplete weights.
        """
        path = Path(pretrained_model_name_or_path)
        return load_checked(cls, super().from_pretrained, path, *args, **kwargs)

    @classmethod
    def from_state(cls, config: ClassConditionalConfig, state: dict[str, torch.Tensor], source: Any) -> Any:
        """Build a model in evaluation mode from a complete state dict; errors name `source`.

        Raises:
            UserError: names or shapes differ.
        """
        with loading(source), torch.device("meta"):
            model = cls(config)
        assign_state(model, state, source)
        check_finite(model, source)
        config.dtype = state["class_embedding.weight"].dtype
        return model.eval()

    def _check_inputs(self, classes: torch.Tensor, codes: torch.Tensor) -> None:
        config = self.config
        check_image_codes(codes, config.book_sizes)
        if classes.shape != codes.shape[:1] or codes.shape[1] != config.num_image_tokens:
            raise UserError(
                f"classes have shape {tuple(classes.shape)} and image_codes {tuple(codes.shape)}; expected "
                f"(B,) and (B, {config.num_image_tokens}, {config.num_codebooks})."
            )
        if classes.device.type == "cpu" and classes.numel():  # elsewhere it would wait for the device
            low, high = torch.aminmax(classes)
            rows = config.num_classes + (config.null_class is not None)
            if low < 0 or high >= rows:
                raise UserError(f"classes range from {low} to {high}; allowed: 0 to {rows - 1}.")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # equal logits at the start: the first loss is ln V
        if module is self.depth_head.output:
            init.zeros_(module.weight)  # pyright: ignore
