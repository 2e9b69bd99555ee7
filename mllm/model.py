"""The unified MLLM: one autoregressive decoder over text tokens and image codes (arXiv 2502.20321, section
3.4).

Weights have one dtype throughout, the frozen code rows included; losses and their logits are float32.

B batch, L sequence, I images in the batch, N visual tokens per image, K sub-codebooks, V entries per
sub-codebook, D decoder width, J target images, T target text tokens.
"""

from __future__ import annotations

import contextlib
import copy
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.utils import can_return_tuple

from open_unitok.core.codes import as_int64
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok
from open_unitok.tokenizer.folder_checks import check_finite, load_checked, loading
from open_unitok.tokenizer.projection import ProjectionAttention
from open_unitok.tokenizer.standalone import InstalledCode

from .attention import bounds_arguments, eager_attention
from .config import UniTokMLLMConfig
from .convert import read_published
from .depth_head import ContextDecoder, DepthHead, ZeroLinear, check_final_norm, norm_inputs
from .features import FeatureAdapter, FeatureOptions, FeatureSource
from .input_embedding import InputEmbedding
from .loading import (
    PUBLISHED_TYPE,
    FiniteLogits,
    assign_state,
    check_folder,
    check_generation_config,
    folder_type,
)
from .losses import Targets, divide_losses, image_loss, text_loss
from .output import UniTokMLLMOutput
from .positions import BatchPlan, positions_from_mask
from .visual_embedder import VisualEmbedder


class UniTokForConditionalGeneration(InstalledCode, InputEmbedding, PreTrainedModel, GenerationMixin):
    """Any transformers decoder that takes `inputs_embeds`, with a visual embedder at its input and two heads:
    `lm_head` for text, `depth_head` for the K codes of a visual token.

    Some decoders (Gemma) scale text embeddings. Visual vectors are not scaled: the embedder's MLP learns
    their scale.
    """

    config_class = UniTokMLLMConfig
    config: UniTokMLLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisualEmbedder", "LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: UniTokMLLMConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.language_model = AutoModel.from_config(text)
        self.visual_embedder = VisualEmbedder(config, text.hidden_size)
        self.feature_adapter: FeatureAdapter | None = None
        if config.visual_input != "discrete":
            norm = FeatureOptions(**(config.features or {})).norm
            self.feature_adapter = FeatureAdapter(config.continuous_dim or 0, text.hidden_size, bool(norm))
        self.depth_head = DepthHead(config, text.hidden_size, self.visual_embedder.shared_tables)
        # of the sums over layers in training under autocast; None = that of the weights
        self.residual_dtype: torch.dtype | None = None
        self._reads_raw_states = config.depth.context == "raw"
        if self._reads_raw_states:
            check_final_norm(self.language_model)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        reduction: Literal["mean", "sum"] = "mean",
        return_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_features: torch.Tensor | None = None,
        plan: BatchPlan | None = None,
        **kwargs: Any,
    ) -> UniTokMLLMOutput:
        """One pass over sequences of text and images.

        Args:
            input_ids: (B, L); an image is N placeholders `config.image_token_id`.
            attention_mask: (B, L), 0 on padding, on either side; None = no padding.
            image_codes: (I, N, K), the images in row-major order of their placeholders.
            labels: (B, L): the id of a target text token, `config.image_token_id` at the placeholders of a
                target image, -100 elsewhere. The first token of a row or packed sample is never a target.
            inputs_embeds: (B, L, D) instead of `input_ids`, images included.
            position_ids: (B, L); None = counted along the mask. For rows that pack several samples pass
                positions that restart from 0 with each sample, and no mask: samples then do not attend to
                each other.
            logits_to_keep: number of last positions with text logits; 0 = all.
            reduction: "mean" or "sum" of the losses; see `UniTokMLLMOutput`.
            return_logits: return logits; None = those of images, and those of text except in training with
                labels. With False the losses need less memory.
            num_items_in_batch: of transformers' Trainer: the number of labels, visual tokens included, in all
                micro-batches of an optimizer step. The losses are then sums divided by it, so that their sum
                over micro-batches does not depend on how the step is split.
            image_features: (J, M, F) of the images that are read, in row-major order of their M placeholders
                `config.feature_token_id`; only with continuous or dual visual input.
            plan: of `plan_batch`, on the device of the other inputs; None = derived here, for which the host
                waits several times for a GPU.
            kwargs: of the decoder, such as output_hidden_states and output_attentions (which takes eager
                attention); return_dict = False returns a tuple.

        Raises:
            UserError: images and placeholders do not match; a sequence is longer than the context; a target
                image has no token before it.
        """
        image_codes = None if image_codes is None else as_int64(image_codes)
        # entries already in the KV cache
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if plan is None:
            plan = self._plan(
                input_ids if inputs_embeds is None else None, image_codes, labels=labels,
                attention_mask=attention_mask, position_ids=position_ids,
            )  # fmt: skip
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self._embed(input_ids, image_codes, plan, image_features)
        if self.residual_dtype is not None:
            inputs_embeds = inputs_embeds.to(self.residual_dtype)
        if position_ids is None:  # a packed row may exceed the context, its samples do not
            self.check_length(past + inputs_embeds.shape[1])
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = positions_from_mask(attention_mask)[:, past:]
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs[name] = bool(getattr(self.config, name, False))
        flat, flat_positions = inputs_embeds, position_ids
        if past_key_values is None and not use_cache and not kwargs["output_attentions"]:
            # attention by samples: FlashAttention ignores 4-D masks, and packed samples would attend to each
            # other
            shape = inputs_embeds.shape[:2]
            arguments = bounds_arguments(self.language_model, plan.bounds, shape)
            if arguments and position_ids is not None:
                flat = inputs_embeds.flatten(0, 1)[None]
                flat_positions = position_ids.expand(shape).flatten()[None]
                attention_mask = arguments.pop("attention_mask")
                kwargs |= arguments
        raw = norm_inputs(self.language_model) if self._reads_raw_states else contextlib.nullcontext([])
        with eager_attention(self.language_model, only_if=kwargs["output_attentions"]), raw as states:
            output = self.language_model(
                inputs_embeds=flat,
                attention_mask=attention_mask,
                position_ids=flat_positions,
                past_key_values=past_key_values,
                use_cache=bool(use_cache),
                **kwargs,
            )
        hidden = output.last_hidden_state.view_as(inputs_embeds)
        context = states[-1].view_as(inputs_embeds) if states else hidden
        # collected first: an output keeps the order of its constructor, and tuples are read by position
        found: dict[str, Any] = {"past_key_values": output.past_key_values, "last_hidden_state": hidden}
        if output.hidden_states is not None:
            found["hidden_states"] = tuple(states.view_as(inputs_embeds) for states in output.hidden_states)
        found["attentions"] = output.attentions
        if labels is not None:
            reduction = reduction if num_items_in_batch is None else "sum"
            assert plan.targets is not None
            keep = return_logits is not False
            found |= self._losses(hidden, context, plan.targets, image_codes, reduction, keep)
            if num_items_in_batch is not None:
                divide_losses(found, num_items_in_batch)
        # skipped in training: (B, L, vocabulary) is large, and the loss needs logits at targets only
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            found["logits"] = self.text_logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return UniTokMLLMOutput(**found)

    @property
    def context_decoder(self) -> Any:
        """The decoder as the depth head reads it: `last_hidden_state` is its context."""
        return ContextDecoder(self.language_model) if self._reads_raw_states else self.language_model

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) hidden states -> (..., vocabulary) logits of text."""
        logits = self.lm_head(hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check_length(self, length: int, what: str = "The sequence") -> None:
        """
        Raises:
            UserError: `length` tokens do not fit the decoder's context.
        """
        limit = self.config.context_length
        if limit is not None and length > limit:
            raise UserError(
                f"{what} has {length} tokens (visual ones included); this model's context is {limit} "
                "(max_position_embeddings): shorten the text or use fewer images."
            )

    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        image_codes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text as transformers' `generate` does, with images in the prompts.

        Args:
            input_ids: (B, L) prompts, left-padded.
            image_codes: (I, N, K), the images in the prompts. With it (I = 0 is allowed) only the new ids are
                returned; without it, as in transformers, prompt and new ids.
            attention_mask: (B, L), 0 on padding.
            image_features: (J, M, F), as in `forward`; only the new ids are returned.
            kwargs: of transformers' `generate`: beams, penalties, guidance_scale, ...; assisted decoding
                (assistant_model, prompt_lookup_num_tokens) only without images.

        Raises:
            UserError: as `forward`; a prompt that fills the context; the first logits are not finite.
        """
        if input_ids is not None:
            limit = self.config.context_length
            if limit is not None and input_ids.shape[1] >= limit:
                self.check_length(input_ids.shape[1] + 1, "The prompt with one new token")
            if attention_mask is None:
                attention_mask = torch.ones_like(input_ids)
        kwargs["attention_mask"] = attention_mask
        given = kwargs.pop("logits_processor", None) or []
        kwargs["logits_processor"] = LogitsProcessorList([*given, FiniteLogits(self)])
        if input_ids is None or (image_codes is None and image_features is None):
            return super().generate(input_ids, **kwargs)  # type: ignore[misc]
        if any(images is not None and len(images) for images in (image_codes, image_features)):
            if any(kwargs.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens")):
                raise UserError("Assisted decoding is for text alone, and these prompts have images.")
            # transformers' loop has no image_codes argument: pass the embedded prompt
            with torch.no_grad():
                kwargs["inputs_embeds"] = self.embed_inputs(input_ids, image_codes, image_features)
            # the ids too, for penalties and guidance, which index by id: a placeholder is no valid index
            input_ids = self._without_placeholders(input_ids)
        found = super().generate(input_ids, **kwargs)  # type: ignore[misc]
        if isinstance(found, torch.Tensor):
            return found[:, input_ids.shape[1] :]
        found.sequences = found.sequences[:, input_ids.shape[1] :]
        return found

    def init_from_tokenizer(self, unitok: UniTok, features: FeatureSource | None = None) -> None:
        """Copy a visual tokenizer's code table, and initialise the causal projection from its up projection.

        With continuous or dual input the source of features is loaded, or the given one taken.

        Raises:
            UserError: the tokenizer's sizes differ from the model's; its quantiser has no code table.
        """
        self.visual_embedder.init_from_tokenizer(unitok)
        self.config.unitok_fingerprint = unitok.fingerprint()
        if self.feature_adapter is not None:
            source = features or FeatureSource(FeatureOptions(**(self.config.features or {})), unitok)
            self.config.features_fingerprint = source.fingerprint()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model folder, a hub id or a published folder; keyword arguments as in transformers, for a
        published folder only `dtype` and `attn_implementation`.

        Raises:
            UserError: the folder holds no model, another type of model, or incomplete weights; a package
                that an argument needs (flash-attn, bitsandbytes, accelerate) is not installed.
        """
        path = Path(pretrained_model_name_or_path)
        published = path.is_dir() and not args and folder_type(path) == PUBLISHED_TYPE
        if published and kwargs.keys() <= {"dtype", "attn_implementation"}:
            attention = kwargs.pop("attn_implementation", None)
            model = cls.from_state(*read_published(path, **kwargs), source=path)
            if attention is not None:
                model.set_attn_implementation(attention)
            return model
        if path.is_dir():
            check_folder(path)
            check_generation_config(path)
        quantization = kwargs.get("quantization_config")
        if getattr(quantization, "llm_int8_skip_modules", quantization) is None and quantization is not None:
            # the embedder's attention reads `qkv.weight` directly, so it must not be quantised
            kwargs["quantization_config"] = quantization = copy.copy(quantization)
            quantization.llm_int8_skip_modules = ["visual_embedder", "lm_head"]
        loaded = load_checked(cls, super().from_pretrained, path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.visual_embedder.freeze_codebooks()  # transformers sets requires_grad to True
        return loaded

    @classmethod
    def from_state(cls, config: UniTokMLLMConfig, state: dict[str, torch.Tensor], source: Any) -> Any:
        """Build a model in evaluation mode from a complete state dict; errors name `source`.

        Raises:
            UserError: names or shapes differ.
        """
        with loading(source), torch.device("meta"):
            model = cls(config)
        assign_state(model, state, source)
        check_finite(model, source)
        model.visual_embedder.freeze_codebooks()
        # save_pretrained writes config.dtype into config.json
        dtype = state["language_model.embed_tokens.weight"].dtype
        for part in (config, config.text_config, config.depth_config):
            part.dtype = dtype
        model.tie_weights()
        return model.eval()

    def _losses(
        self,
        hidden: torch.Tensor,
        context: torch.Tensor,
        targets: Targets,
        image_codes: torch.Tensor | None,
        reduction: str,
        keep_logits: bool,
    ) -> dict[str, torch.Tensor]:
        """Losses and counts of an output; text logits and the depth head are computed at targets only.

        Args:
            hidden, context: (B, L, D) states that the text head and the depth head read.
            keep_logits: return `image_logits`; else their memory is reused.
        """
        flat = hidden.flatten(0, 1)
        keep_graph = self.training and torch.is_grad_enabled()
        zero = flat.new_zeros((), dtype=torch.float32)
        text_sum = image_sum = z_sum = zero
        count, num_codes = len(targets.text_before), 0
        result = {"image_correct": targets.text_ids.new_zeros(self.config.num_codebooks)}
        if count:
            logits = self.text_logits(flat[targets.text_before])
            text_sum = text_loss(logits, targets.text_ids, self.config.text_z_loss_weight, keep_logits=False)
        elif keep_graph:  # zero-weighted dummy, as in `_embed`
            text_sum = 0.0 * self.lm_head(flat[:1]).sum().float()
        if targets.image_before is not None:
            assert image_codes is not None
            self.config.check_generates()
            # the depth head runs on target visual tokens only, as one batch of J*N
            codes = image_codes[targets.images].flatten(0, 1)  # (J*N, K)
            before = context.flatten(0, 1)[targets.image_before.flatten()]
            logits = self.depth_head(before, codes, self.residual_dtype)
            weight = self.config.image_z_loss_weight
            image_sum, z_sum, result["image_correct"] = image_loss(logits, codes, weight, keep_logits)
            if keep_logits:
                result["image_logits"] = logits.view(*targets.image_before.shape, *logits.shape[1:])
            num_codes = codes.numel()
        elif keep_graph:  # zero-weighted dummy, as in `_embed`
            dummy = targets.text_ids.new_zeros((1, self.config.num_codebooks))
            image_sum = 0.0 * self.depth_head(context.flatten(0, 1)[:1], dummy).sum().float()
        # every code counts as one token, as published
        result |= {"text_tokens": zero.new_full((), count, dtype=torch.int64)}
        result |= {"image_codes": zero.new_full((), num_codes, dtype=torch.int64)}
        total = text_sum + image_sum
        if reduction == "mean":
            total = total / max(count + num_codes, 1)
            text_sum = text_sum / max(count, 1)
            image_sum, z_sum = image_sum / max(num_codes, 1), z_sum / max(num_codes, 1)
        losses = {"loss": total, "text_loss": text_sum, "image_loss": image_sum, "image_z_loss": z_sum}
        return losses | result

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            module.init_weights()
            return  # transformers would sample a linear layer's weights
        if isinstance(module, (VisualEmbedder, ProjectionAttention)):
            module.init_weights()
        super()._init_weights(module)
