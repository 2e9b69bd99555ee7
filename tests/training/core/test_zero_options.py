"""Options of ZeRO in DeepSpeed's config and in its engine; what it does not know is rejected in one line."""

import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.training.core import deepspeed_engine
from open_unitok.training.core.options import EngineOptions, Optimizer

SMALL_BUCKET = {"zero_optimization": {"reduce_bucket_size": 1000}}


@pytest.fixture(scope="module", autouse=True)
def process():
    deepspeed_engine.init_distributed(EngineOptions(), 0)
    yield
    deepspeed_engine.exit_process()


def settings(**options):
    return deepspeed_engine.deepspeed_settings(Optimizer(), EngineOptions(**options), 4)


def zero_of(**options):
    """DeepSpeed's optimizer around a linear layer."""
    model = torch.nn.Linear(6, 5)
    groups = deepspeed_engine.parameter_groups(model, 0.1)
    given = EngineOptions(**options)
    deepspeed_engine.shard_to_device(model, torch.device("cpu"), Optimizer(), given, 4)
    return deepspeed_engine.build_engine(model, groups, Optimizer(), given, 4).optimizer


def test_options_reach_deepspeed():
    zero = settings(zero_stage=3, overlap_comm=False, deepspeed=SMALL_BUCKET)["zero_optimization"]
    assert zero["overlap_comm"] is False and zero["reduce_bucket_size"] == 1000
    assert settings(zero_stage=3, hpz=8)["zero_optimization"] == {
        "stage": 3,
        "stage3_gather_16bit_weights_on_model_save": True,
        "zero_hpz_partition_size": 8,
    }
    assert settings(zero_stage=2)["zero_optimization"] == {"stage": 2}
    assert settings(dtype="bf16", reduce_dtype="bf16")["communication_data_type"] == "bf16"
    zero = zero_of(zero_stage=2, overlap_comm=True, deepspeed=SMALL_BUCKET)
    assert zero.overlap_comm and zero.reduce_bucket_size == 1000
    # a bucket is allocated in full: it is no larger than the model
    zero = zero_of(zero_stage=2)
    assert not zero.overlap_comm and zero.reduce_bucket_size == 35


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_bucket_of_the_chosen_dtype(stage):
    for name, dtype in deepspeed_engine.REDUCE_DTYPES.items():
        zero = zero_of(zero_stage=stage, dtype="bf16", reduce_dtype=name)
        assert list(zero.ipg_buckets) == [dtype]
        assert all(zero.get_param_comm_dtype(p) == dtype for p in zero.optimizer.param_groups[0]["params"])
    # the rule of DeepSpeed itself: a linear layer in bf16
    assert list(zero_of(zero_stage=stage, dtype="bf16").ipg_buckets) == [torch.bfloat16]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"overlap_com": True}}, "DeepSpeed rejects the engine section: .*overlap_com"),
        ({"overlap_comm": True}, r"belongs in engine\.deepspeed\.zero_optimization\.overlap_comm"),
        ({"stage3_max_live_parameters": 0}, r"zero_optimization\.stage3_max_live_parameters"),
        ({"zero_optimization": {"mics_shard_size": 8}}, "MiCS ZeRO-3 sharding has been removed"),
        ({"communication_data_type": "int8"}, "Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_does_not_know_is_rejected(given, words):
    with pytest.raises(UserError, match=words):
        zero_of(zero_stage=2, deepspeed=given)
