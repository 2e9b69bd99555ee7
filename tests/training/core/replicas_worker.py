"""Launched by torchrun in the tests: each rank writes what it holds while models of both stages are built.

replicas_worker.py OUT MLLM_CONFIG TOKENIZER_CONFIG DECODER MLLM TOKENIZER
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.core import distributed
from open_unitok.training.core import deepspeed_engine, replicas
from open_unitok.training.core.options import EngineOptions
from open_unitok.training.mllm import train
from open_unitok.training.mllm.model import build_parts
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer import model as tokenizer_model
from open_unitok.training.tokenizer.train import build_run_model, load_caption_tokenizer


class CountSampled(TorchDispatchMode):
    """Counts the random numbers that are sampled into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, torch.Tensor):
            self.count += 0 if out.is_meta else out.numel()
        return out


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    flat = {name: tensor.detach().contiguous().reshape(-1) for name, tensor in tensors.items()}
    return {
        name: hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in flat.items()
    }


def built(model: torch.nn.Module, sampled: int) -> dict[str, Any]:
    """Bytes of parameters that have memory, and random numbers that were sampled."""
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    return {"held": held, "sampled": sampled, "buffers": len(list(model.buffers()))}


def mllm(config_file: str, stage: int, *overrides: str) -> dict[str, Any]:
    config = load_run_config(config_file, [f"engine.zero_stage={stage}", "out=unused", *overrides])
    with CountSampled() as counted:
        model = build_parts(config).model  # pyright: ignore
    facts = built(model, counted.count)
    engine = train.prepare_engine(config, model, torch.device("cpu"), 1)  # pyright: ignore
    facts["values"] = digests(dict(model.named_buffers()))
    if stage == 3:
        for name, parameter in model.named_parameters():
            parameter.all_gather()
            facts["values"] |= digests({name: parameter})
            parameter.partition()
    else:
        facts["values"] |= digests(dict(model.named_parameters()))
    del engine
    return facts


def tokenizer(config_file: str, *overrides: str) -> dict[str, Any]:
    config: Any = load_run_config(config_file, ["out=unused", *overrides])
    # what the build holds before rank 0's values arrive
    seen = {}
    original = replicas.materialise

    def spy(model: torch.nn.Module, device: torch.device) -> None:
        seen.update(built(model, counted.count))
        original(model, device)

    tokenizer_model.materialise = spy
    with CountSampled() as counted:
        model, _ = build_run_model(config, load_caption_tokenizer(config))
    tokenizer_model.materialise = original
    return seen | {"values": digests({**dict(model.named_parameters()), **dict(model.named_buffers())})}


def main() -> None:
    out, mllm_config, tokenizer_config, decoder, trained, unitok = sys.argv[1:]
    deepspeed_engine.init_distributed(EngineOptions(threads=1), 0)
    facts = {f"mllm{stage}": mllm(mllm_config, stage) for stage in range(4)}
    loaded = ["model=null", f"init_from={trained}"]
    facts["loaded3"] = mllm(mllm_config, 3, *loaded)
    facts["lora3"] = mllm(
        mllm_config, 3, *loaded, "lora={rank: 4, alpha: 8, base: bf16}", "engine.dtype=bf16"
    )
    facts["decoder0"] = mllm(mllm_config, 0, "model.text={}", f"model.language_model={decoder}")
    facts["tokenizer"] = tokenizer(tokenizer_config)
    facts["from"] = tokenizer(tokenizer_config, f"init_from={unitok}", "model={}", "losses.clip=0")
    Path(f"{out}/{distributed.rank()}.json").write_text(json.dumps(facts))
    deepspeed_engine.exit_process()


if __name__ == "__main__":
    main()
