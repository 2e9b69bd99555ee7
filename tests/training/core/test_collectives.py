"""Every collective operation of two ranks, intercepted: dtypes, bytes as planned, few per step; overlap and
hierarchical partitions give the losses of one process. All runs share one launch."""

import json
from collections import Counter
from pathlib import Path

import pytest

from open_unitok.training import run
from open_unitok.training.mllm import plan as mllm_plan
from open_unitok.training.tokenizer import plan as tokenizer_plan

from ..two_ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BF16 = ("engine.dtype=bf16", "steps=4", "checkpoint.every=100", "log.every=100")
# with the usual eps, gradients that are only rounding errors would change weights by the whole learning rate
FP32 = ("steps=4", "optimizer.eps=1e-4", "checkpoint.every=100", "log.every=2")
PARTED = "engine.accumulation=2"
# a tiny model would otherwise stay whole on every rank
SHARDED = "stage3_param_persistence_threshold: 0, stage3_max_live_parameters: 0, stage3_max_reuse_distance: 0"
ZERO3 = ("engine.zero_stage=3", f"engine.deepspeed={{zero_optimization: {{{SHARDED}}}}}")
TO_OWNERS = "engine.deepspeed={zero_optimization: {use_multi_rank_bucket_allreduce: false}}"

MLLM = {
    "zero0": ["engine.zero_stage=0", PARTED, *BF16],
    "zero1": ["engine.zero_stage=1", PARTED, *BF16],
    "zero2": ["engine.zero_stage=2", PARTED, *BF16],
    "zero3": [*ZERO3, PARTED, *BF16],
    "zero0-bf16": ["engine.zero_stage=0", "engine.reduce_dtype=bf16", *BF16],
    "zero1-bf16": ["engine.zero_stage=1", "engine.reduce_dtype=bf16", *BF16],
    "zero2-bf16": ["engine.zero_stage=2", "engine.reduce_dtype=bf16", PARTED, *BF16],
    "zero3-bf16": [*ZERO3, "engine.reduce_dtype=bf16", *BF16],
    "zero1-fp32": ["engine.zero_stage=1", "engine.reduce_dtype=fp32", *BF16],
    "zero2-fp32": ["engine.zero_stage=2", "engine.reduce_dtype=fp32", PARTED, *BF16],
    "zero3-fp32": [*ZERO3, "engine.reduce_dtype=fp32", *BF16],
    "zero2-owners": ["engine.zero_stage=2", TO_OWNERS, *BF16],
    "hpz-bf16": [*ZERO3, "engine.hpz=2", PARTED, *BF16],
    "overlap1": ["engine.zero_stage=1", "engine.overlap_comm=true", *FP32],
    "overlap2": ["engine.zero_stage=2", "engine.overlap_comm=true", *FP32],
    "apart3": [*ZERO3, "engine.overlap_comm=false", *FP32],
    "hpz": [*ZERO3, "engine.hpz=2", *FP32],
}
TOKENIZER = {
    "tokenizer0": ["engine.zero_stage=0", *BF16],
    "tokenizer1": ["engine.zero_stage=1", *BF16],
    "tokenizer2": ["engine.zero_stage=2", *BF16],
    "tokenizer0-bf16": ["engine.zero_stage=0", "engine.reduce_dtype=bf16", *BF16],
    "tokenizer1-bf16": ["engine.zero_stage=1", "engine.reduce_dtype=bf16", *BF16],
    "tokenizer2-bf16": ["engine.zero_stage=2", "engine.reduce_dtype=bf16", *BF16],
    "tokenizer2-fp32": ["engine.zero_stage=2", "engine.reduce_dtype=fp32", *BF16],
    "tokenizer-overlap": ["engine.zero_stage=2", "engine.overlap_comm=true", *BF16],
}
OPERATIONS = {
    "allreduce_": "all-reduce",
    "reduce_": "reduce",
    "_reduce_scatter_base_": "reduce-scatter",
    "_allgather_base_": "all-gather",
}
BYTES = {"float32": 4, "bfloat16": 2}


@pytest.fixture(scope="module")
def configs(mllm, data):
    """name -> (YAML file, overrides)."""
    quiet = ["log.images_every=0", "codebooks.reset_after=0"]
    found = {name: (mllm.folder / "config.yaml", overrides) for name, overrides in MLLM.items()}
    return found | {name: (data / "config.yaml", [*given, *quiet]) for name, given in TOKENIZER.items()}


@pytest.fixture(scope="module")
def launched(configs, tmp_path_factory):
    """The folder of all runs on two ranks."""
    folder = tmp_path_factory.mktemp("collectives")
    jobs = [
        {
            "config": str(file),
            "overrides": [*overrides, f"out={folder / name}"],
            "record": f"{folder / name}.jsonl",
        }
        for name, (file, overrides) in configs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch(Path(__file__).parent / "collectives_worker.py", folder / "jobs.json")
    return folder


def operations(folder: Path, name: str, step: int | None = 3) -> list[dict]:
    """Those of rank 0 in a step; None: in all."""
    lines = Path(f"{folder / name}.jsonl.0").read_text().splitlines()
    return [found for line in lines if (found := json.loads(line))["step"] == step or step is None]


def sent_by_deepspeed(folder: Path, name: str) -> Counter:
    """(operation, dtype) -> bytes in a step, without norms and flags."""
    found: Counter = Counter()
    for one in operations(folder, name):
        if one["by"].startswith("deepspeed") and one["dtype"] in BYTES and one["elements"] > 2:
            size = one["elements"] * BYTES[one["dtype"]]
            found[OPERATIONS[one["operation"]], one["dtype"]] += size
    return found


@pytest.mark.parametrize("name", [*MLLM, *TOKENIZER])
def test_ranks_send_what_is_planned(configs, launched, name):
    config = run.load_run_config(str(configs[name][0]), configs[name][1])
    if config.stage == "mllm":
        transfers = mllm_plan.plan_run(config, 2).transfers
    else:
        transfers = tokenizer_plan.sent_by(tokenizer_plan.model_on_meta(config)[0], config, 2)
    planned: Counter = Counter()
    for transfer in transfers:
        planned[transfer.operation, "bfloat16"] += transfer.bf16 * transfer.times
        planned[transfer.operation, "float32"] += transfer.fp32 * transfer.times
    found = sent_by_deepspeed(launched, name)
    for key in planned | found:
        assert found[key] == pytest.approx(planned[key], rel=0.02, abs=300), key


def reduced(folder: Path, name: str) -> dict[str, int]:
    """dtype -> bytes of gradients in a step."""
    return {key[1]: size for key, size in sent_by_deepspeed(folder, name).items() if key[0] != "all-gather"}


def test_gradients_are_reduced_in_the_configured_dtype(launched):
    for stage in range(4):
        assert reduced(launched, f"zero{stage}-bf16").keys() == {"bfloat16"}
    for name in ("zero1-fp32", "zero2-fp32", "zero3-fp32", "tokenizer2-fp32", "zero0", "tokenizer0"):
        assert reduced(launched, name).keys() == {"float32"}
    # DeepSpeed's rule: exactly nn.Linear in bf16, two thirds of this MLLM and little of the tokenizer
    for stage in (1, 2, 3):
        found = reduced(launched, f"zero{stage}")
        assert found["bfloat16"] / 2 > found["float32"] / 4
    for stage in (1, 2):
        found = reduced(launched, f"tokenizer{stage}")
        assert found["bfloat16"] < found["float32"] / 50
        assert reduced(launched, f"tokenizer{stage}-bf16").keys() == {"bfloat16"}


def test_fp32_sums_at_zero_3_leave_the_gather_in_bf16(launched):
    for name in ("zero3-fp32", "zero3-bf16"):
        found = sent_by_deepspeed(launched, name)
        assert found["all-gather", "bfloat16"] and found["all-gather", "float32"]


def test_the_dtype_changes_little_but_not_nothing(mllm, launched):
    for stage in (1, 2, 3):
        losses = [mllm.rows(launched / f"zero{stage}-{dtype}")[-1]["loss"] for dtype in ("fp32", "bf16")]
        assert losses[0] == pytest.approx(losses[1], rel=5e-3) and losses[0] != losses[1]


@pytest.mark.parametrize("name", ["overlap1", "overlap2", "apart3", "hpz"])
def test_overlap_and_hierarchical_partitions_equal_one_process(mllm, launched, name):
    single = mllm.folder / "single-collectives"
    if not single.exists():
        mllm.train(single.name, *FP32)
    mllm.same_rows(mllm.rows(launched / name), mllm.rows(single), 1e-4)


def own_collectives(folder: Path, name: str) -> tuple[Counter, list[int]]:
    """How often each of our modules asks for one in step 3; the steps after which ranks ask about signals."""
    found = Counter(o["by"] for o in operations(folder, name) if o["by"].startswith("open_unitok"))
    # recorded after the step's metrics, so with the number of the next step
    asked = [o["step"] - 1 for o in operations(folder, name, None) if o["by"].endswith("stop_signal")]
    return found, asked


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_few_collectives_of_ours_in_a_step_of_the_mllm(launched, name):
    """One for the number of targets, which is on the device; the ranks ask each other ever less often."""
    found, asked = own_collectives(launched, name)
    assert found == {"open_unitok.training.mllm.train": 1} and asked == [1, 3]


@pytest.mark.parametrize("name", ["tokenizer0", "tokenizer1", "tokenizer2"])
def test_few_collectives_of_ours_in_a_step_of_the_tokenizer(launched, name):
    """Those of losses: embeddings of images and texts with their gradients, entropy, usage; on the device."""
    found, asked = own_collectives(launched, name)
    assert found == {"open_unitok.training.core.collectives": 7} and asked == [1, 3]
