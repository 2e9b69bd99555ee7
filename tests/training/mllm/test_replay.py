"""`data.replay`: shares, adapters and full fine-tuning, resume, ranks; and what is rejected before a step."""

import json
import lzma
import math
import shutil
from collections import Counter

import numpy as np
import pytest

from open_unitok.cli.main import run as unitok
from open_unitok.core.errors import UserError
from open_unitok.core.files import write_json
from open_unitok.training import run
from open_unitok.training.data import code_shards
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture_options import with_replay
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS
from open_unitok.training.mllm import plan
from open_unitok.training.mllm.model import load_parts
from open_unitok.training.mllm.train import build_mixture

from ..two_ranks import assert_resumed_exactly, launch_jobs

KINDS = ("text_to_image=1", "conversation=3")
# four images of one's own, as captions alone
OWN = "data.mixture=[{{kind: captioning, path: {}/few}}]"
LORA = "lora={rank: 4, alpha: 8, parts: [language_model, lm_head, depth_head]}"


@pytest.fixture(scope="module")
def base(mllm, mllm_reference, tmp_path_factory):
    """The model of six steps, with twelve of its sixteen training images to replay."""
    folder = tmp_path_factory.mktemp("replay") / "base"
    shutil.copytree(mllm_reference / "model", folder)
    unitok(["data", "replay", str(folder), f"{mllm.folder}/codes", "--kinds", *KINDS, "--samples", "12"])
    return folder


@pytest.fixture(scope="module")
def parts(base):
    """The model of `base`, which no test changes."""
    return load_parts(str(base))


@pytest.fixture
def given(mllm, base):
    """Overrides of a run on four images of one's own; half of its samples are replayed."""
    return ["model=null", f"init_from={base}", OWN.format(mllm.folder), "data.replay=0.5"]


def config(mllm, *overrides):
    return run.load_run_config(str(mllm.folder / "config.yaml"), list(overrides))


@pytest.mark.parametrize("options", [[], ["data.pack_to=100"], ["data.workers=1"], ["engine.accumulation=2"]])
def test_half_of_the_samples_of_every_step_are_replayed(mllm, parts, given, options):
    loaded = config(mllm, *given, *options)
    mixture = build_mixture(loaded, parts)
    for step in range(1, 7):
        batches = mixture.next()
        # 8 samples a step: 4 own ones; of 4 replayed ones 1 image and 3 conversations
        assert mixture.counts.tolist() == [4 * step, step, 3 * step]
        kinds = Counter(list(SAMPLE_KINDS)[kind] for batch in batches for kind in batch.kinds.unique())
        assert kinds.keys() == {"captioning", "text_to_image", "conversation"}


def test_own_samples_are_those_of_a_run_without_replay(mllm, parts, given):
    mixtures = [build_mixture(config(mllm, *given, f"data.replay={r}"), parts) for r in (0, 0.5)]
    places = [[mixture.orders[0][n] for n in range(20)] for mixture in mixtures]
    assert places[0] == places[1]
    # without it nothing changes, also not for a run that began before there was any
    assert len(mixtures[0].entries) == 1 and mixtures[0].entries[0].weight == 1.0


@pytest.mark.parametrize("options", [[LORA], []], ids=["lora", "full"])
def test_training_learns_replayed_answers_and_resumes(mllm, given, options, request):
    out = f"replay-{request.node.callspec.id}"
    whole = mllm.train(out, *given, *options)
    assert {"text_loss/captioning", "text_loss/conversation", "image_loss"} <= mllm.rows(whole)[-1].keys()
    mllm.train(f"{out}-resumed", *given, *options, "stop_at=3")
    resumed = mllm.train(f"{out}-resumed", *given, *options)
    file = "model/adapter_model.safetensors" if options else "model/model.safetensors"
    assert_resumed_exactly(whole, resumed, file)
    # a fine-tuned model keeps what it may replay, an adapter has it in its base
    assert (whole / "model" / "replay" / "replay.json").exists() == (not options)


def test_a_merged_adapter_keeps_the_replay_data(mllm, base, given, tmp_path):
    adapter = mllm.train("replay-merged", *given, LORA, "steps=1") / "model"
    unitok(["convert", "adapter", str(base), str(adapter), str(tmp_path / "merged")])
    again = config(mllm, *given, f"init_from={tmp_path / 'merged'}")
    assert len(build_mixture(again, load_parts(str(tmp_path / "merged"))).entries) == 3


def test_other_replay_data_end_a_run_that_resumes(mllm, base, given, tmp_path):
    shutil.copytree(base / "replay", tmp_path / "replay")
    options = [*given, f"data.replay_path={tmp_path / 'replay'}"]
    out = mllm.train("replay-changed", *options, "stop_at=2")
    recorded = json.loads((out / "run.json").read_text())["facts"]["data"]
    unitok(["data", "replay", str(base), f"{mllm.folder}/codes", "--kinds", *KINDS, "--samples", "11",
            "--out", str(tmp_path / "replay")])  # fmt: skip
    with pytest.raises(UserError, match=f"was started with data {recorded}"):
        mllm.train("replay-changed", *options)


def test_the_plan_counts_what_is_replayed(mllm, base, given, capsys):
    replayed = plan.plan_run(config(mllm, *given), 1)
    both = f"{{kind: conversation, path: {base}/replay, weight: 3}}"
    both += f", {{kind: text_to_image, path: {base}/replay}}, {{kind: captioning, path: x, weight: 4}}"
    written_out = plan.plan_run(config(mllm, *given, "data.replay=0", f"data.mixture=[{both}]"), 1)
    assert replayed.counts == pytest.approx(written_out.counts)
    assert (
        replayed.counts.image_targets > 0 == plan.plan_run(config(mllm, *given, "data.replay=0"), 1).counts[4]
    )
    # of a base that is not here nothing is known
    assert plan.plan_run(config(mllm, *given, "init_from=not/here"), 1).assumed


# ---- the folder --------------------------------------------------------------------------------------------


def test_replay_data_are_small_and_checked_like_all_codes(mllm, base, capsys):
    codes, source = CodeFolder(base / "replay"), CodeFolder(mllm.folder / "codes")
    assert codes.sizes == [12] and codes.fingerprint != source.fingerprint
    originals = {sample.key: sample for sample in (source.read(0, n) for n in range(16))}
    for number in range(12):
        sample = codes.read(0, number)
        original = originals[sample.key]
        assert np.array_equal(sample.codes, original.codes)
        assert sample.info["captions"][0] in original.info["captions"] and len(sample.info["captions"]) == 1
        assert sample.info.keys() == {"captions", "conversations", "grid"}  # no names of files
    tars = (mllm.folder / "codes" / "codes-000000.tar", base / "replay" / "codes-000000.tar.xz")
    assert tars[1].stat().st_size < tars[0].stat().st_size / 8
    unitok(["data", "check", str(base / "replay"), "--tokenizer", str(base)])
    printed = capsys.readouterr().out
    assert "12 samples with conversations" in printed and "0 broken" in printed


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_looked_up_by_name(mllm, kind, tmp_path):
    module = __import__({"gz": "gzip", "bz2": "bz2", "xz": "lzma"}[kind])
    plain = CodeFolder(mllm.folder / "codes")
    tar = (plain.folder / "codes-000000.tar").read_bytes()
    (tmp_path / "codes.tar").write_bytes(module.compress(tar))
    write_json(
        tmp_path / "codes.json",
        plain.manifest | {"shards": [{"file": "codes.tar", "samples": 16, "sha256": ""}]},
    )
    packed = CodeFolder(tmp_path)
    for name in ("0003.png", "0011.png"):
        assert np.array_equal(packed.image(name).codes, plain.image(name).codes)


def test_a_shard_that_is_damaged_or_unpacks_without_end_is_rejected(base, tmp_path, monkeypatch):
    shutil.copytree(base / "replay", tmp_path / "replay")
    shard = tmp_path / "replay" / "codes-000000.tar.xz"
    monkeypatch.setattr(code_shards, "MAX_UNPACKED", 2000)
    with pytest.raises(UserError, match="unpacks to more than 2,000 bytes"):
        CodeFolder(tmp_path / "replay").read(0, 0)
    monkeypatch.undo()
    for data in (shard.read_bytes()[:-40], lzma.compress(b"no tar" * 1000), b"\xfd7zXZ\0nothing"):
        shard.write_bytes(data)
        with pytest.raises(UserError, match="is broken"):
            CodeFolder(tmp_path / "replay").read(0, 0)


# ---- what is rejected --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "problem"),
    [(1, "data.replay is 1, must be a share"), (-0.1, "is -0.1, must be"), (1.5, "is 1.5, must be"),
     (".nan", "data.replay is nan: expected a finite number"), ("true", "data.replay is True")],
)  # fmt: skip
def test_shares_that_are_none(mllm, given, value, problem):
    with pytest.raises(UserError, match=problem):
        config(mllm, *given, f"data.replay={value}")


def test_a_new_model_has_nothing_to_replay(mllm):
    with pytest.raises(UserError, match="a new model has no base whose data to replay: give init_from"):
        config(mllm, "data.replay=0.3")
    classes = ["stage=mllm", "conditioner=class", "model={unitok: x, num_classes: 3}"]
    with pytest.raises(UserError, match="a new model has no base"):
        config(mllm, *classes, "data.mixture=[{kind: class_conditional, path: x}]", "data.replay=0.3")


def test_a_base_without_replay_data(mllm, mllm_reference, given, tmp_path):
    nothing = f"init_from={mllm_reference / 'model'}"
    codes = f"data.replay_path={mllm.folder}/codes"  # says nothing on shares of kinds
    for missing, problem in (
        (nothing, r"the model .* has no replay/: make it with `unitok data replay`"),
        (f"data.replay_path={tmp_path}", f"{tmp_path} holds no replay.json"),
        (codes, "holds no replay.json"),
    ):
        with pytest.raises(UserError, match=problem) as error:
            mllm.train("replay-refused", *given, missing)
        assert (
            "\n" not in str(error.value) and not (mllm.folder / "replay-refused" / "metrics.jsonl").exists()
        )


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"tokenizer": "0" * 64}, "made by another visual tokenizer"),
        # the model reads them, but cannot generate them
        ({"num_tokens": 9, "layout": {"rows": 3, "columns": 3, "registers": 0}}, "holds 9 visual tokens"),
        ({"shards": []}, "replay holds no sample"),
    ],
)
def test_codes_that_are_not_the_models(mllm, base, parts, given, changed, problem, tmp_path):
    manifest = json.loads((base / "replay" / "codes.json").read_text())
    shutil.copytree(base / "replay", tmp_path / "replay")
    write_json(tmp_path / "replay" / "codes.json", manifest | changed)
    with pytest.raises(UserError, match=problem):
        build_mixture(config(mllm, *given, f"data.replay_path={tmp_path / 'replay'}"), parts)
    if "tokenizer" in changed:
        with pytest.raises(UserError, match=problem):
            unitok(["data", "replay", str(base), str(tmp_path / "replay"), "--kinds", *KINDS])


@pytest.mark.parametrize(
    ("mixture", "problem"),
    [
        ([{"kind": "class_conditional", "path": "."}], "kind class_conditional needs conditioner: class"),
        ([{"kind": "captioning", "path": "../codes"}], "is not a path inside"),
        ([{"kind": "text", "path": "/etc/passwd"}], "is not a path inside"),
        ([{"kind": "text", "path": "*.txt"}], "is not a path inside"),
        ([{"kind": "captioning", "path": ".", "weight": math.inf}], "replay.json"),
        ([{"kind": "speech", "path": "."}], "replay.json: .*kind 'speech'"),
        ([], "is not replay data"),
        ("captioning", "replay.json: .*mixture"),
    ],
)
def test_malformed_replay_data(mllm, base, parts, given, mixture, problem, tmp_path):
    shutil.copytree(base / "replay", tmp_path / "replay")
    content = {"format": "open-unitok replay 1", "mixture": mixture}
    (tmp_path / "replay" / "replay.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem) as error:
        build_mixture(config(mllm, *given, f"data.replay_path={tmp_path / 'replay'}"), parts)
    assert "\n" not in str(error.value)


def test_any_data_of_a_mixture_can_be_replayed(mllm, base, parts, given, tmp_path):
    shutil.copytree(base / "replay", tmp_path / "codes")
    (tmp_path / "lines.txt").write_text("the quick brown fox\n")
    entries = [{"kind": "captioning", "path": "codes"}, {"kind": "text", "path": "lines.txt", "weight": 3}]
    write_json(tmp_path / "replay.json", {"format": "open-unitok replay 1", "mixture": entries})
    loaded = config(mllm, *given, f"data.replay_path={tmp_path}")
    found = with_replay(loaded.data, loaded.init_from).mixture
    assert [(entry.kind, entry.weight) for entry in found] == [
        ("captioning", 0.5),
        ("captioning", 0.125),
        ("text", 0.375),
    ]
    assert build_mixture(loaded, parts).next()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--kinds", "captioning"], "'captioning' is not KIND=SHARE"),
        (["--kinds", "captioning=0"], "weight of captioning"),
        (["--kinds", "captioning=nan"], "finite"),
        (["--kinds", "captioning=1", "captioning=2"], "twice"),
        (["--kinds", "captoning=1"], "kind 'captoning'"),
        (["--kinds", "text=1"], "text is not made of codes"),
        (["--kinds", "class_conditional=1"], "No sample of .* can be used as class_conditional"),
        (["--kinds", "captioning=1", "--samples", "0"], "--samples"),
        (["--kinds", "captioning=1", "--out", "{unitok}"], "exists and is not replay data"),
    ],
)
def test_the_command_rejects(mllm, base, words, problem):
    words = [word.format(unitok=base / "unitok") for word in words]
    with pytest.raises(UserError, match=problem):
        unitok(["data", "replay", str(base), f"{mllm.folder}/codes", *words])
    assert CodeFolder(base / "replay").sizes == [12]  # the old data remain
    with pytest.raises(UserError, match="is not an MLLM folder"):
        unitok(["data", "replay", str(base / "unitok"), f"{mllm.folder}/codes", "--kinds", "captioning=1"])


# ---- ranks -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_equal_one_process(mllm, given):
    steps = ["optimizer.eps=1e-4", "log.every=2", "data.pack_to=100"]
    single = mllm.train("replay-single", *given, LORA, *steps)
    root = mllm.folder / "replay_ranks"
    root.mkdir()
    both = [*given, LORA, *steps, f"out={root / 'both'}"]
    resumed = [*given, LORA, *steps, f"out={root / 'resumed'}"]
    jobs = [both, [*resumed, "stop_at=2"], resumed]
    path = str(mllm.folder / "config.yaml")
    launch_jobs([{"config": path, "overrides": overrides} for overrides in jobs], "mllm", root)
    for name in ("both", "resumed"):
        mllm.same_rows(mllm.rows(root / name), mllm.rows(single), 1e-4)
    assert_resumed_exactly(root / "both", root / "resumed", "model/adapter_model.safetensors")
