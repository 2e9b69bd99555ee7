"""Two ranks: rank 1 has rank 0's parameters and buffers, and held none of its own before."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from ..two_ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

BUILDS = [*(f"mllm{stage}" for stage in range(4)), "loaded3", "lora3", "decoder0"]


@pytest.fixture(scope="module")
def built(mllm, mllm_reference, data, tmp_path_factory):
    """What the two ranks held, by the names of `replicas_worker.py`."""
    folder = tmp_path_factory.mktemp("replicas")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # fewer ids than the processor has: the embedding is resized on rank 0
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=290)).save_pretrained(folder / "decoder")
    unitok = mllm.folder / "unitok"
    worker = Path(__file__).parent / "replicas_worker.py"
    configs = mllm.folder / "config.yaml", data / "config.yaml"
    launch(worker, folder, *configs, folder / "decoder", mllm_reference / "model", unitok)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", BUILDS)
def test_rank_1_builds_without_memory_and_gets_the_values_of_rank_0(built, name):
    main, other = (facts[name] for facts in built)
    assert main["values"] == other["values"] and len(main["values"]) > 20
    assert main["held"] > 0 and main["buffers"] == other["buffers"]
    assert other["held"] == 0
    # single parameters that a module samples itself, and adapters
    assert other["sampled"] < main["held"] // (10 if name == "lora3" else 100)


def test_values_differ_between_models(built):
    """So that equal ones mean something: other seeds and files give other values."""
    assert built[0]["mllm0"]["values"] == built[0]["mllm3"]["values"]
    assert built[0]["mllm0"]["values"] != built[0]["loaded3"]["values"]
