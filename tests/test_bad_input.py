"""Invalid input of data and training commands: one line that names the cause, exit 2, no partial files."""

import pytest
import yaml

from open_unitok.cli.main import main
from open_unitok.tokenizer import UniTok, UniTokConfig

MODEL = {"image_size": 32, "stem_width": 8, "stage_widths": [8, 8], "hidden_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "decoder_widths": [8, 8], "codebook_size": 8, "codebook_dim": 2,
         "num_codebooks": 2}  # fmt: skip
EXTRACT = ["extract-codes", "--data", "HERE/garbage.tar", "--out", "HERE/codes"]


@pytest.fixture
def files(tmp_path):
    """The files that the cases name: a broken tar, a folder with another model type, configs."""
    (tmp_path / "garbage.tar").write_bytes(b"this is not a tar file" * 100)
    UniTok(UniTokConfig(**MODEL)).save_pretrained(tmp_path / "tokenizer")
    other = tmp_path / "other_kind"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    config = {
        "stage": "tokenizer",
        "out": str(tmp_path / "run"),
        "steps": 2,
        "batch_size": 2,
        "data": {"sources": [{"path": str(tmp_path / "garbage.tar")}], "shuffle": 2},
        "model": MODEL,
        "losses": {"clip": 0.0, "lpips": 0.0},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "gone.yaml"], "gone.yaml"),
        (["train", "HERE/list.yaml"], "list.yaml"),
        (["train", "HERE/train.yaml", "optimiser.lr=1"], "Did you mean 'optimizer'"),
        (["train", "HERE/train.yaml", "optimizer.lr=fast"], "optimizer.lr"),
        (["train", "HERE/train.yaml", "batch_size=0"], "batch_size"),
        (["train", "HERE/train.yaml", "stage=tokeniser"], "Did you mean 'tokenizer'"),
        (["train", "HERE/train.yaml", "losses.lpips=1"], "lpips_with_vgg.pth"),
        (["train", "HERE/train.yaml", "losses.clip=1"], "caption_tokenizer"),
        (["train", "HERE/train.yaml", "model.image_size=40"], "multiple of patch_size = 16"),
        (["train", "HERE/train.yaml"], "garbage.tar"),
        (["train", "HERE/train.yaml", "data.sources=[{path: HERE/gone-*.tar}]"], "gone-*.tar"),
        (["train", "HERE/train.yaml", "init_from=HERE/other_kind"], "bert"),
        ([*EXTRACT, "--tokenizer", "HERE/other_kind"], "bert"),
        ([*EXTRACT, "--tokenizer", "HERE/gone"], "gone"),
        ([*EXTRACT, "--tokenizer", "HERE/tokenizer"], "garbage.tar"),
        (["convert", "tokenizer", "HERE/garbage.tar", "HERE/m", "--config", "HERE/list.json"], "list.json"),
        (["data", "scenes", "--out", "HERE/scenes", "--size", "33"], "size"),
        (["data", "scenes", "--out", "HERE/scenes", "--config", "HERE/gone.yaml"], "gone.yaml"),
    ],
)  # fmt: skip
def test_one_line_exit_2_and_no_partial_files(files, capsys, arguments, words):
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("HERE", str(files)) for argument in arguments])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    message = [line for line in err.splitlines() if line.startswith("unitok: error: ")]
    assert len(message) == 1 and words in message[0] and "Traceback" not in err, err
    assert sorted(files.rglob("*")) == before


def test_an_error_does_not_touch_a_run_with_a_checkpoint(files):
    run = files / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "mine.txt").write_text("kept")
    for arguments in (["init_from=HERE/other_kind"], []):
        with pytest.raises(SystemExit):
            main([a.replace("HERE", str(files)) for a in ["train", "HERE/train.yaml", *arguments]])
    assert (run / "config.yaml").exists() and (run / "mine.txt").exists()
