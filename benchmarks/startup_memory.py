"""Host memory of a node while two ranks build an MLLM: the sum of their peaks.

    python benchmarks/startup_memory.py                    # 185 M parameters, 4 GB of memory

A random decoder is written to a folder; two ranks build an MLLM around it (`model.language_model`) and shard
it at ZeRO 3. "every rank": each builds the whole model and loads the decoder beside it. "rank 0": as training
does; ranks other than 0 build without memory, and rank 0 holds one copy. Peaks are of the proportional set
size (a page that ranks share counts once), sampled every 10 ms.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, load_average, processor_name, result_file, write_results
from transformers import LlamaConfig, LlamaForCausalLM

from open_unitok.core import distributed
from open_unitok.core.files import model_path
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions
from open_unitok.training.mllm import model as mllm_model
from open_unitok.training.mllm.config import MLLMRunConfig
from open_unitok.training.run import load_run_config

WAYS = ("every rank", "rank 0")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10, help="of the decoder, width 1024 (default: 10)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure_rank(Path(args.worker[0]), args.worker[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), args.layers, args.ranks)
    file = result_file("startup-memory", processor_name(), args.out)
    write_results(file, results)
    print(f"load average {load_average()}")
    for name, row in results.items():
        print(name, row)


def measure(folder: Path, layers: int, ranks: int) -> dict[str, Any]:
    """GiB by way: of each rank and of the node, and their ratio."""
    write_decoder(folder / "decoder", layers)
    (folder / "config.yaml").write_text(json.dumps(run_config(folder)))
    results: dict[str, Any] = {}
    for way in WAYS:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launch, __file__, "--worker", str(folder), way]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
        peaks = [round(rank["peak"], 2) for rank in found]
        results[way] = {
            "parameters": found[0]["parameters"],
            "weights_gib": round(4 * found[0]["parameters"] / GIB, 2),
            "peak_gib_of_ranks": peaks,
            "peak_gib": round(sum(rank["peak"] for rank in found), 2),
            "sharded_gib": round(sum(rank["sharded"] for rank in found), 2),
        }
    results["ratio"] = round(results[WAYS[0]]["peak_gib"] / results[WAYS[1]]["peak_gib"], 2)
    return results


def write_decoder(folder: Path, layers: int) -> None:
    """A random LLaMA in bf16, as they are published: 12.8 M parameters per layer, 16 M of embeddings."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "vocab_size": 8000,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers))
    model.to(torch.bfloat16).save_pretrained(folder)


def run_config(folder: Path) -> dict[str, Any]:
    """A run on the shipped tokenizers, with the decoder of `folder`."""
    scenes = str(model_path("scenes"))
    return {
        "stage": "mllm",
        "out": "unused",
        "steps": 1,
        "batch_size": 8,
        "model": {"unitok": scenes, "text_tokenizer": scenes, "language_model": str(folder / "decoder")},
        "engine": {"zero_stage": 3, "threads": 1},
        "data": {"mixture": [{"kind": "text", "path": "unused.txt"}], "max_length": 64},
    }


class Peak:
    """Peak of this process's memory in bytes, sampled in a thread."""

    def __init__(self) -> None:
        self.bytes = self.start = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.bytes - self.start

    def _sample(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, self._now())
            time.sleep(0.01)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def measure_rank(folder: Path, way: str) -> None:
    """Build and shard the model on this rank; writes FOLDER/RANK.json."""
    deepspeed_engine.init_distributed(EngineOptions(threads=1), 0)
    if way == "every rank":
        mllm_model.build_on_main = lambda build, kind: build()
        mllm_model._without_decoder = contextlib.nullcontext
    config = load_run_config(str(folder / "config.yaml"), [])
    assert isinstance(config, MLLMRunConfig)
    peak = Peak()
    model = mllm_model.build_parts(config).model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    deepspeed_engine.shard_to_device(model, torch.device("cpu"), config.optimizer, config.engine, 4)
    sharded = Peak._now() - peak.start
    facts = {"parameters": parameters, "peak": peak.stop() / GIB, "sharded": sharded / GIB}
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(facts))
    deepspeed_engine.exit_process()


if __name__ == "__main__":
    main()
