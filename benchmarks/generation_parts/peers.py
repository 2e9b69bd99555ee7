"""What a user could run instead of this package's C++ steps, for benchmarks/generation.py.

- `Compiled`: the torch backend under `torch.compile`: static KV caches, and one graph for decoder, all depth
  steps (unrolled) and sampling. As it comes, or tuned: constant weights (freezing), packed once, with
  products by inductor's own C++ kernels (max-autotune), which alone read weights faster than MKL and oneDNN.
- `quantize_by_torchao`: its int8 weights, which run fast only under the same compiler.
- `iter_static_codes`: sampling as in LlamaGen's loop: eager, static caches of full length, conditional and
  unconditional rows in one batch, top-k filter, softmax and multinomial.
- `answer_by_transformers`: transformers' `generate`, with its growing or its static cache.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from open_unitok.generation.backends.cuda_graph import CudaGraph
from open_unitok.generation.kv_cache import join_images, pad_left
from open_unitok.generation.sampling import filter_logits

from .model import GUIDANCE

# Of torch._inductor.config: global, because freezing is decided before the options of torch.compile are read.
TUNED = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"}
# With 16 rows oneDNN is as fast as inductor's kernels at some shapes, and inductor has none of its own for
# some int8 products: the fastest of all is taken.
TUNED_ANY = {"freezing": True, "max_autotune": True}


class Compiled(CudaGraph):
    """The torch backend on static caches, its step under torch.compile."""

    def decode_step(self, codes: Tensor) -> None:
        """As the captured step, without its counter in Python: a new number would be a new graph."""
        self._feed(codes.unsqueeze(1), self.visual_index)
        self.visual_index += 1

    def compile_step(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        state = (*state, *self.counters)
        start = [tensor.clone() for tensor in state]
        # one step first: what it allocates would be another graph in the next
        step()
        for tensor, value in zip(state, start):
            tensor.copy_(value)
        # after some graphs dynamo falls back to eager operators in silence
        dynamo = torch._dynamo.config
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 1, True
        return torch.compile(step, dynamic=False)


class StaticEager(CudaGraph):
    """The torch backend on static caches, its step as it is."""

    def compile_step(self, step: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        return step


def tune_inductor(images: int, weights: str) -> None:
    """Set inductor's options for this process."""
    import torch._inductor.config as inductor  # seconds to import

    for name, value in (TUNED if images == 1 and weights != "int8" else TUNED_ANY).items():
        setattr(inductor, name, value)


def torchao_obstacle() -> str | None:
    """Why torchao cannot run; None if it can."""
    return None if importlib.util.find_spec("torchao") else "torchao is not installed"


def quantize_by_torchao(model: nn.Module) -> None:
    """int8 weights with a scale per output row, as `int8.quantize_model`, in place; the rest in bfloat16.

    In float32 inductor has no int8 product: freezing folds weight and scale into a float32 matrix.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_read_by_layer(module: nn.Module, name: str) -> bool:
        # the attention of the visual embedder reads `qkv.weight` itself
        return isinstance(module, nn.Linear) and not name.endswith("qkv")

    model.to(torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_read_by_layer)


@torch.no_grad()
def iter_static_codes(
    model: Any, prompts: Sequence[Sequence[int]], unconditional: Sequence[int], top_k: int = 2000
) -> Iterator[Tensor]:
    """Yield the codes so far (B, t, K) after every visual token; B prompts."""
    images, books = len(prompts), model.config.num_codebooks
    backend = StaticEager(model)
    codes = torch.zeros(images, model.config.num_image_tokens, books, dtype=torch.long)
    backend.prefill([*prompts, *[unconditional] * images], codes[:, :0])
    for t in range(codes.shape[1]):
        if t:
            backend.decode_step(codes[:, t - 1])
        previous = None
        for k in range(books):
            conditional, without = backend.code_logits(k, previous).float().chunk(2)
            logits = filter_logits(without + GUIDANCE * (conditional - without), top_k)
            probabilities = logits.softmax(-1)
            # all probability on the maximum: as `greedy`, at the cost of sampling
            best = probabilities.amax(-1, keepdim=True)
            previous = torch.multinomial((probabilities == best).float(), 1)[:, 0]
            codes[:, t, k] = previous
        yield codes[:, : t + 1]


def answer_by_transformers(
    model: Any, prompts: Sequence[Sequence[int]], images: Sequence[Tensor], new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new ids of one batch, greedy."""
    ids, mask = pad_left(prompts, model)
    inputs = {"input_ids": ids, "attention_mask": mask, **join_images(images, model)}
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new_tokens, **options}
    return model.generate(**inputs, **settings).tolist()
