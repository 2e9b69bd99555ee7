"""Linear layers with 8-bit weights for inference on a CPU: symmetric, one float32 scale per output row.

The layers hold the only copy of their weights: `load_quantized` quantises each tensor as it is read, so that
a model never exists in float32 as a whole. The native backend reads the int8 rows; torch operators dequantise
one layer at a time.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from open_unitok.core.text_files import read_json
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig
from open_unitok.mllm.loading import assign_state, check_generation_config
from open_unitok.tokenizer.folder_checks import check_finite_tensor, check_model_folder


class Int8Linear(nn.Module):
    """A linear layer with weight = scale[:, None] * int8 in [-127, 127].

    Attributes:
        weight: (outputs, inputs) int8; scale: (outputs,) float32; bias: (outputs,) float32 or None.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        # a parameter, so that transformers assigns and counts it; integers have no gradient
        weight = torch.empty(outputs, inputs, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """Take over a float weight (outputs, inputs)."""
        low, high = torch.aminmax(weight, dim=1)
        # clamp: a row of zeros would divide by zero
        self.scale.copy_(torch.maximum(-low, high).float().clamp(min=1e-12) / 127)
        self.weight.copy_((weight / self.scale[:, None]).round_())

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), by a dequantised weight that lives for this call only."""
        weight = self.weight.float().mul_(self.scale[:, None])
        return F.linear(x, weight.to(x.dtype), self.bias)


def load_quantized(folder: Path) -> UniTokForConditionalGeneration:
    """The MLLM of a folder with 8-bit weights in its linear layers, the rest in float32.

    Raises:
        UserError: the weights do not match config.json.
    """
    files = _safetensors_files(folder)
    if not files:  # an older format, which is not read tensor by tensor
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        quantize_model(model)
        return model
    check_generation_config(folder)
    check_model_folder(
        folder,
        lambda: UniTokForConditionalGeneration(UniTokMLLMConfig.from_pretrained(folder)),
        check_free=True,
        itemsize=1,
    )
    config = UniTokMLLMConfig.from_pretrained(folder)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = UniTokForConditionalGeneration(config).eval()
    # allocated first: small int8 tensors between the float ones would fragment the heap
    for parent, name, layer in _linear_layers(model):
        setattr(parent, name, Int8Linear(layer.in_features, layer.out_features, layer.bias is not None))
    quantized = {
        f"{n}.weight": module for n, module in model.named_modules() if isinstance(module, Int8Linear)
    }
    state: dict[str, Tensor] = {}
    for file in files:
        # pread: pages of a memory map would stay resident until the last tensor is read
        with safe_open(file, framework="pt", backend="pread") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                check_finite_tensor(name, tensor, file)
                layer = quantized.get(name)
                if layer is not None and tensor.shape == layer.weight.shape:
                    layer.quantize_(tensor)
                    state |= {name: layer.weight, name.removesuffix("weight") + "scale": layer.scale}
                else:
                    state[name] = tensor.float()
    if config.tie_word_embeddings:  # stored once
        state.setdefault("lm_head.weight", state["language_model.embed_tokens.weight"])
    assign_state(model, state, folder)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def quantize_model(model: nn.Module) -> None:
    """Replace the linear layers of a loaded MLLM by `Int8Linear`, in place; each float weight is freed."""
    for parent, name, layer in _linear_layers(model):
        new = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new.quantize_(layer.weight)
        if new.bias is not None and layer.bias is not None:
            new.bias.data = layer.bias.detach().float()
        setattr(parent, name, new.eval())


def _linear_layers(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of the linear layers of an MLLM that may be quantised."""
    output = model.get_output_embeddings()
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
        # the attention of the visual embedder reads this weight instead of calling the layer
        and name != "qkv"
        # a tied output layer has the weight of the input embeddings, which are looked up, not multiplied
        and not (model.config.tie_word_embeddings and layer is output)
    ]


def _safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, also of a sharded model; empty if it has others."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [single] if single.exists() else []
