"""A kind of training sample defined in this file is checked, planned and trained by its name."""

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training import run
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS, CaptioningKind
from open_unitok.training.mllm import plan


class ReversedCaptioning(CaptioningKind):
    """The caption with its words in reverse order."""

    crop = "pad"

    def sequence(self, processor, text):
        return super().sequence(processor, " ".join(reversed((text or "").split())))


class Shouting(CaptioningKind):
    """Reads a field that no other kind reads."""

    field = "shout"

    def texts(self, info, num_images):
        return [info["shout"]] if "shout" in info else []


@pytest.fixture
def reversed_captioning(monkeypatch):
    monkeypatch.setitem(SAMPLE_KINDS, "reversed_captioning", ReversedCaptioning())
    return "reversed_captioning"


def entries(mllm, *kinds):
    return "data.mixture=[" + ", ".join(f"{{kind: {k}, path: {mllm.folder}/codes}}" for k in kinds) + "]"


def test_it_trains(mllm, reversed_captioning):
    mixture = entries(mllm, reversed_captioning, "text_to_image")
    folder = mllm.train("reversed", mixture, "steps=2", "data.workers=1")
    rows = mllm.rows(folder)
    assert len(rows) == 2 and all(row["text_loss/reversed_captioning"] > 0 for row in rows)
    assert (folder / "model" / "model.safetensors").exists()


def test_it_is_planned_as_reading_an_image(mllm, reversed_captioning):
    config = run.load_run_config(str(mllm.folder / "config.yaml"), [entries(mllm, reversed_captioning)])
    counts = plan.plan_run(config, gpus=1).counts
    assert counts.image_tokens > 0 and counts.image_targets == 0 and counts.text_targets > 0


def test_data_check_counts_its_field(mllm, monkeypatch):
    monkeypatch.setitem(SAMPLE_KINDS, "shouting", Shouting())
    report = check_dataset(str(mllm.folder / "codes"), quiet=True)
    assert not report.broken and not any("shout" in line for line in report.lines)
    field = Shouting.field
    monkeypatch.setattr(Shouting, "texts", lambda self, info, num_images: info["captions"])
    lines = check_dataset(str(mllm.folder / "codes"), quiet=True).lines
    assert any(f"16 samples with {field}: 32 texts" in line for line in lines)


def test_an_unknown_kind_is_rejected(mllm, reversed_captioning):
    with pytest.raises(
        UserError, match=r"'reversed_caption' is not in SAMPLE_KINDS .* mean 'reversed_captioning'"
    ):
        mllm.train("unknown", entries(mllm, "reversed_caption"))
