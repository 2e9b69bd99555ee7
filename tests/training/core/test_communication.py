"""What ranks send each other: the 7B run by hand, the ZeRO options, the time that hides it, the table."""

import re
from pathlib import Path

import pytest

from open_unitok.cli import main
from open_unitok.core.errors import UserError
from open_unitok.training import run
from open_unitok.training.core.communication import Network, Sizes, StepTime, Transfer, step_time, transfers
from open_unitok.training.core.options import EngineOptions
from open_unitok.training.core.plan import estimate_run
from open_unitok.training.mllm import plan as mllm_plan
from open_unitok.training.tokenizer import plan as tokenizer_plan

PRETRAIN, LARGE = "configs/mllm/pretrain_7b.yaml", "configs/tokenizer/unitok_large.yaml"
TO_OWNERS = "engine.deepspeed={zero_optimization: {use_multi_rank_bucket_allreduce: false}}"


def planned(ranks: int, *overrides: str):
    return mllm_plan.plan_run(run.load_run_config(PRETRAIN, list(overrides)), ranks)


def summary(ranks: int, found: list[Transfer]) -> dict[str, tuple[float, int, float, str]]:
    """what -> GB of one operation, times, seconds of all at 50 GB/s, what it runs beside."""
    network = Network(ranks)
    return {t.what: (t.size / 1e9, t.times, t.times * t.seconds(network), t.beside) for t in found}


def sent(ranks: int, *overrides: str) -> dict[str, tuple[float, int, float, str]]:
    return summary(ranks, planned(ranks, *overrides).transfers)


def test_the_7b_on_64_gpus_by_hand():
    """15 GB in bf16 for every micro-batch and 30 GB in fp32 for the weights, at 50 GB/s."""
    found = sent(64, TO_OWNERS)
    assert found["gradients"][0] == pytest.approx(15.5, abs=0.1) and found["gradients"][1] == 4
    assert found["gradients"][2] == pytest.approx(4 * 0.3, rel=0.03)
    assert found["weights"][:3] == (pytest.approx(30.03, abs=0.01), 1, pytest.approx(0.6, rel=0.02))
    # by default DeepSpeed reduces to all ranks, which is twice as much
    assert sent(64)["gradients"][2] == pytest.approx(2 * found["gradients"][2])
    # a step of 0.33 s of computation takes six times as long, at the 6 % that a GPU then reaches
    network, config = Network(64), run.load_run_config(PRETRAIN, [TO_OWNERS])
    estimate = estimate_run(planned(64, TO_OWNERS), config, network, 989.0, 0.4)
    assert estimate.time.compute == pytest.approx(0.33, rel=0.02)
    assert estimate.time.total == pytest.approx(2.1, abs=0.1) and estimate.mfu(989.0) < 0.07


def test_the_7b_on_8_gpus_keeps_casts_of_its_weights():
    memory = planned(8).memory
    assert memory[2].casts / 2**30 == pytest.approx(13.5, abs=0.1)
    assert 66 < sum(memory[2]) / 2**30 < 69
    assert memory[3].casts == 0 and planned(8, "engine.dtype=fp32").memory[2].casts == 0


def test_the_tokenizer_on_256_gpus_by_hand():
    """Its layers are subclasses, so 3.3 GB go in fp32 each way: 66 ms a pass at 50 GB/s."""
    config = run.load_run_config(LARGE, [])
    model, _ = tokenizer_plan.model_on_meta(config)
    found = summary(256, tokenizer_plan.sent_by(model, config, 256))
    assert found["weights"][:3] == (pytest.approx(3.28, abs=0.01), 1, pytest.approx(0.066, abs=0.001))
    assert found["gradients"][:3] == (pytest.approx(3.28, abs=0.01), 1, pytest.approx(0.131, abs=0.001))
    config = run.load_run_config(LARGE, ["engine.reduce_dtype=bf16"])
    halved = summary(256, tokenizer_plan.sent_by(model, config, 256))
    assert halved["gradients"][0] == pytest.approx(found["gradients"][0] / 2, rel=0.01)


def test_what_each_stage_sends():
    both = sent(64, "engine.zero_stage=3", "engine.accumulation=1", "engine.hpz=8")
    assert [found[1] for found in both.values()] == [1, 1, 1]
    # the second gather stays in the node, where links are six times as fast
    assert both["weights"][2] > 5 * both["weights again"][2]
    assert sent(64, "engine.zero_stage=3", "engine.accumulation=1")["weights again"][2] == both["weights"][2]
    parts = sent(64, "engine.zero_stage=3", "engine.accumulation=4", "engine.hpz=8")
    assert {name: found[1] for name, found in parts.items()} == {
        "gradients": 4,
        "weights": 1,
        "weights again": 4,
        "weights in the node": 3,
    }
    assert sent(64, "engine.zero_stage=1")["gradients"][1] == 1
    assert sent(64, "engine.zero_stage=0").keys() == {"gradients"}
    # DeepSpeed's rule by classes starts at ZeRO 1
    assert sent(64, "engine.zero_stage=0")["gradients"][0] == pytest.approx(30.03, abs=0.01)
    assert not planned(1, "batch_size=4").transfers


SIZES = Sizes(10**9, 10**8, 10**9, 10**8, 0, 10**9)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("overlap", [None, False, True])
def test_hidden_time_is_never_negative_and_never_more_than_all(stage, accumulation, overlap):
    engine = EngineOptions(zero_stage=stage, accumulation=accumulation, overlap_comm=overlap)
    for network in (Network(8), Network(64), Network(256, between=350.0)):
        found = transfers(SIZES, engine, stage, network.ranks)
        for compute in (1e-3, 0.1, 100.0):
            time = step_time(compute, found, network, engine)
            assert 0 <= time.exposed <= time.communication * (1 + 1e-9)
            if stage == 0 or overlap is False or (overlap is None and stage < 3):
                assert time.exposed == pytest.approx(time.communication)
    # a long pass hides all but the gather of ZeRO 1 and 2
    if stage and overlap:
        after = sum(t.seconds(Network(64)) for t in transfers(SIZES, engine, stage, 64) if t.beside == "none")
        long = step_time(100.0, transfers(SIZES, engine, stage, 64), Network(64), engine)
        assert long.exposed == pytest.approx(after) and (after > 0) == (stage < 3)


def test_rings_by_hand():
    network = Network(16, per_node=8, node=100.0, between=10.0)
    assert network.seconds("all-reduce", 10e9, 8) == pytest.approx(2 * 7 / 8 * 0.1)
    assert network.seconds("all-gather", 10e9, 16) == pytest.approx(15 / 16)
    assert network.seconds("reduce", 10e9, 1) == 0
    assert StepTime(1.0, 3.0, 2.0).total == 3.0


def test_the_table_for_several_numbers_of_gpus(capsys):
    main.run(["plan", PRETRAIN, "--gpus", "8", "64", "256", "--bandwidth", "400"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[0]: row for row in rows if row and row[0] in ("8", "64", "256")}
    assert [row[1] for row in rows.values()] == ["4", "4", "2"]  # 512 samples do not split into 4 x 256
    steps = [float(row[7]) for row in rows.values()]
    assert steps[0] > steps[1] > steps[2]
    main.run(["plan", "configs/demo/tokenizer.yaml", "--gpus", "2", "4"])
    out = capsys.readouterr().out
    assert "images/s" in out and "does not fit" not in out
    main.run(["plan", PRETRAIN, "--gpus", "8", "64", "--gpu-memory", "60"])
    table = capsys.readouterr().out.splitlines()[-3:]
    assert ["!" in line for line in table] == [True, False, True]
    assert table[-1] == "! does not fit --gpu-memory 60"
    main.run(["plan", PRETRAIN, "--gpus", "64"])
    out = capsys.readouterr().out
    assert "communication of a step at 50 GB/s" in out and "are exposed" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bandwidth", "0"], "must be above 0 GB/s"),
        (["--gpus", "8", "1000"], "batch_size 512 is not divisible by 1000 ranks"),
        (["engine.zero_stage=3", "engine.hpz=16", "--gpus", "8"], "8 ranks are not a multiple of it"),
        (["engine.hpz=8"], "needs engine.zero_stage 3"),
        (["engine.zero_stage=0", "engine.overlap_comm=true"], "overlap_comm needs engine.zero_stage 1"),
        (["engine.reduce_dtype=fp16"], "engine.reduce_dtype is 'fp16'"),
        (["engine.reduce_dtype=bf16", "engine.dtype=fp32"], "set both to bf16"),
        (["engine.overlap=true"], "Unknown config key 'engine.overlap'"),
    ],
)
def test_error_messages(arguments, words):
    with pytest.raises(UserError, match=words):
        main.run(["plan", PRETRAIN, *arguments])


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_cards_for_64_gpus_say_what_is_planned(name, capsys):
    path = f"configs/mllm/{name}_7b_64gpu.yaml"
    card = " ".join(Path(path).read_text().split("inherits:")[0].replace("#", " ").split())
    for bandwidth in (50, 350):
        main.run(["plan", path, "--gpus", "64", "--bandwidth", str(bandwidth)])
        out = capsys.readouterr().out
        memory = next(float(line.split()[-1]) for line in out.splitlines() if line.startswith("*"))
        assert f"{memory:.1f} GiB per GPU" in card
        compute, seconds, mfu = re.search(
            r"H100: (\S+) s, .* exposed; (\S+) s per step, .* MFU (\S+)%;", out
        ).groups()
        assert f"compute {compute} s per step" in card
        told = re.search(rf"--bandwidth {bandwidth} \([^)]*\) (\S+) s(?: per step)?, (\S+) %", card)
        assert told and told.groups() == (seconds, mfu)
