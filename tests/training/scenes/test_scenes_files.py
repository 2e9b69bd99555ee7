"""Files of `unitok data scenes`: deterministic, resumable, in the layouts of real data sets."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from open_unitok.cli import main
from open_unitok.core.errors import UserError
from open_unitok.eval.generation import geneval
from open_unitok.training.scenes import dataset
from open_unitok.training.scenes.benchmark_files import GENEVAL_PROMPTS
from open_unitok.training.scenes.config import SceneConfig, with_values
from open_unitok.training.scenes.scene import render_array, sample_scene

SMALL = SceneConfig(train=60, test=30, shard=25, pope=10, text_lines=40)


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "data"
    assert dataset.write_scenes(SMALL, out, progress=False)
    return out


def test_an_interrupted_run_resumes_to_the_same_bytes_and_a_finished_one_is_kept(data, tmp_path):
    before = digests(data)
    assert not dataset.write_scenes(SMALL, data, progress=False)
    assert digests(data) == before
    out = tmp_path / "killed"
    out.mkdir()  # after a kill: a shard, some of the images, and the settings of the run in progress
    (out / "unfinished.json").write_text(
        json.dumps({"config": json.loads((data / "scenes.json").read_text())["config"]})
    )
    (out / "train").mkdir()
    (out / "train" / "scenes-000001.tar").write_bytes((data / "train" / "scenes-000001.tar").read_bytes())
    (out / "test" / "images.partial").mkdir(parents=True)
    (out / "test" / "images.partial" / "scenes_test_000000000000.png").write_bytes(b"half")
    assert dataset.write_scenes(SMALL, out, progress=False)
    assert digests(out) == before


def test_several_processes_write_the_same_bytes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PER_PROCESS", 10)
    monkeypatch.setattr(dataset, "available_cores", lambda: 2)
    assert dataset.write_scenes(SMALL, tmp_path / "parallel", progress=False)
    assert digests(tmp_path / "parallel") == digests(data)


def test_an_error_of_a_process_is_the_commands_error(tmp_path, monkeypatch):
    def full(path, content):
        raise UserError(f"{os.getpid()}: the disk is full")

    monkeypatch.setattr(dataset, "PER_PROCESS", 10)
    monkeypatch.setattr(dataset, "available_cores", lambda: 2)
    monkeypatch.setattr(dataset, "write_atomic", full)
    with pytest.raises(UserError, match="the disk is full") as error:
        dataset.write_scenes(SMALL, tmp_path / "parallel", progress=False)
    assert str(os.getpid()) not in str(error.value)  # it was another process


def test_a_finished_folder_with_fewer_settings_is_recognised(data, tmp_path):
    shutil.copytree(data, tmp_path / "older")
    stored = json.loads((data / "scenes.json").read_text())
    for name in ("question_shares", "short_names", "pair_captions"):
        del stored["config"][name]
    (tmp_path / "older" / "scenes.json").write_text(json.dumps(stored))
    assert not dataset.write_scenes(SMALL, tmp_path / "older", progress=False)
    with pytest.raises(UserError, match="short_names = False, now True"):
        dataset.write_scenes(with_values(SMALL, {"short_names": True}), tmp_path / "older", progress=False)


def test_a_finished_folder_with_the_old_key_of_question_shares_is_recognised(data, tmp_path):
    """Before version 0.1.0: `asked`, a list of shares in the order of the kinds."""
    shutil.copytree(data, tmp_path / "older")
    stored = json.loads((data / "scenes.json").read_text())
    del stored["config"]["question_shares"]
    stored["config"]["asked"] = [3, 1, 1, 1, 1, 3]
    (tmp_path / "older" / "scenes.json").write_text(json.dumps(stored))
    assert not dataset.write_scenes(SMALL, tmp_path / "older", progress=False)
    other = with_values(SMALL, {"question_shares": {"count": 1}})
    with pytest.raises(UserError, match=r"question_shares = \{'existence': 3\.0"):
        dataset.write_scenes(other, tmp_path / "older", progress=False)


def test_a_validation_split_is_another_one_without_training_data(data, tmp_path):
    config = with_values(SMALL, {"split": "validation"})
    assert dataset.write_scenes(config, tmp_path / "validation", progress=False)
    made = digests(tmp_path / "validation")
    assert {name for name in digests(data) if name.startswith("test/")} == made.keys() - {"scenes.json"}
    # questions, prompts and images differ; single objects of a demo have few prompts, so positions repeat
    assert not set(made.values()) & set(digests(data).values())
    with pytest.raises(UserError, match="split = 'test', now 'validation'"):
        dataset.write_scenes(config, data, progress=False)
    with pytest.raises(UserError, match="expected test or validation"):
        with_values(SMALL, {"split": "val"})


def test_a_folder_of_an_earlier_version_gets_its_attribute_prompts(tmp_path):
    config = with_values(SMALL, {"textures": ("plain", "dotted"), "test": 5})
    assert dataset.write_scenes(config, tmp_path / "data", progress=False)
    before = digests(tmp_path / "data")
    (tmp_path / "data" / "test" / "attributes.jsonl").unlink()
    assert not dataset.write_scenes(config, tmp_path / "data", progress=False)
    assert digests(tmp_path / "data") == before


def test_another_configuration_or_foreign_files_are_rejected(data, tmp_path):
    other = SceneConfig(train=60, test=30, shard=25, pope=10, text_lines=40, seed=1)
    before = digests(data)
    with pytest.raises(UserError, match=r"seed = 0, now 1.*--overwrite"):
        dataset.write_scenes(other, data, progress=False)
    assert digests(data) == before
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="choose an empty or new folder"):
        dataset.write_scenes(SMALL, tmp_path, overwrite=True, progress=False)
    out = tmp_path / "again"
    out.mkdir()
    (out / "scenes.json").write_text((data / "scenes.json").read_text())
    assert dataset.write_scenes(other, out, overwrite=True, progress=False)
    assert digests(out)["train/scenes-000000.tar"] != before["train/scenes-000000.tar"]


def test_shards_are_webdataset_tars(data):
    keys = []
    for path in sorted((data / "train").iterdir()):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        names = [name.split(".")[0] for name in members]
        assert names == sorted(names)
        for key in dict.fromkeys(names):
            keys.append(key)
            record = json.loads(members[f"{key}.json"])
            assert members[f"{key}.txt"].decode() == record["captions"][0]
            assert record["held_out"] is False and len(record["captions"]) == 4
            image = np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))
            assert (image == render_array(sample_scene(SMALL, "train", int(key)))).all()
            for turns in record["conversations"]:
                assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
                assert [t["value"].count("<image>\n") for t in turns] == [1] + [0] * (len(turns) - 1)
    assert keys == [f"{i:08d}" for i in range(60)]


def test_questions_have_the_layout_of_vqav2(data):
    questions = json.loads((data / "test" / "v2_OpenEnded_scenes_test_questions.json").read_text())
    annotations = json.loads((data / "test" / "v2_scenes_test_annotations.json").read_text())
    assert questions["data_subtype"] == annotations["data_subtype"] == "scenes_test"
    assert len(questions["questions"]) == len(annotations["annotations"]) > 3 * 30
    for question, note in zip(questions["questions"], annotations["annotations"]):
        assert (question["question_id"], question["image_id"]) == (note["question_id"], note["image_id"])
        assert (data / "test" / "images" / f"scenes_test_{note['image_id']:012d}.png").exists()
        assert note["answer_type"] in ("yes/no", "number", "other")
        assert [a["answer"] for a in note["answers"]] == [note["multiple_choice_answer"]] * 10


def test_pope_labels_are_true_and_adversarial_negatives_are_similar(data):
    truth = json.loads((data / "test" / "captions.json").read_text())
    for category in ("random", "popular", "adversarial"):
        lines = (data / "test" / f"scenes_pope_{category}.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [r["label"] for r in rows] == ["yes", "no"] * 10
        for row in rows:
            scene = truth[int(row["image"][-16:-4])]["scene"]["objects"]
            assert ((data / "test" / "images") / row["image"]).exists()
            color, shape = row["text"].split()[3:5]
            assert (row["label"] == "yes") == any((o["color"], o["shape"]) == (color, shape) for o in scene)
            assert category != "adversarial" or any(color == o["color"] or shape == o["shape"] for o in scene)


def test_prompts_have_the_layout_of_geneval_and_can_be_satisfied(data):
    rows = [json.loads(x) for x in (data / "test/geneval/evaluation_metadata.jsonl").read_text().splitlines()]
    tags = [row["tag"] for row in rows]
    assert list(dict.fromkeys(tags)) == list(GENEVAL_PROMPTS)
    assert min(tags.count(tag) for tag in tags) >= 20
    assert any(row["held_out"] for row in rows) and not all(row["held_out"] for row in rows)
    # for every tag, the true boxes of some scenes satisfy the prompts
    description = json.loads((data / "scenes.json").read_text())
    rules = geneval.Rules(threshold=0, counting_threshold=0, colours=tuple(description["palette"]))
    seen = []
    for i in range(1500):
        found = {"detections": {}, "colors": {}}
        for obj in sample_scene(SMALL, "test", i).as_json()["objects"]:
            found["detections"].setdefault(obj["shape"], []).append([*obj["box"], 1.0])
            found["colors"].setdefault(obj["shape"], []).append(obj["color"])
        seen.append(found)
    for tag in dict.fromkeys(tags):
        some = [row for row in rows if row["tag"] == tag][:6]
        satisfied = sum(any(geneval.judge_image(row, found, rules).correct for found in seen) for row in some)
        assert satisfied >= (3 if tag == "color_attr" else 6), tag  # two given objects rarely meet in a scene
    positions = [json.loads(x) for x in (data / "test/positions.jsonl").read_text().splitlines()]
    assert len(positions) == 24 * 4 and {tuple(p["cell"]) for p in positions} == {
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    }


def test_the_text_tokenizer_has_llamas_first_ids_and_one_token_per_word(data):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data / "text" / "tokenizer.model"))
    assert [tokenizer.id_to_piece(i) for i in range(5)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    for word in [*SMALL.color_names, *SMALL.shape_names, "yes", "no", "left", "above", "circles", "crosses"]:
        assert len(tokenizer.encode(word)) == 1, word
    for text in ("Is there a red circle?", "naïve 漢字 🙂", "<unconditional>", "two\nlines"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 not in tokenizer.encode(text)


def test_the_command_takes_yaml_and_options(tmp_path, capsys):
    config = tmp_path / "scenes.yaml"
    config.write_text("train: 4\ntest: 2\npope: 1\ntext_lines: 3\nsizes: [9, 10]\n")
    out = tmp_path / "out"
    main.main(["data", "scenes", "--config", str(config), "--out", str(out), "--test", "3",
               "--question-shares", "count=2", "shape=1"])  # fmt: skip
    settings = json.loads((out / "scenes.json").read_text())["config"]
    assert settings["sizes"] == [9, 10]
    assert settings["question_shares"] == {
        "existence": 0, "count": 2, "colour": 0, "shape": 1, "position": 0, "relation": 0
    }  # fmt: skip
    assert len(list((out / "test" / "images").iterdir())) == 3
    assert "4 training and 3 test scenes" in capsys.readouterr().out
    for arguments in (
        ["--size", "33"],
        ["--question-shares", "size=1"],
        ["--config", str(tmp_path / "none.yaml")],
    ):
        with pytest.raises(SystemExit) as stop:
            main.main(["data", "scenes", "--out", str(tmp_path / "new"), *arguments])
        assert stop.value.code == 2 and not (tmp_path / "new").exists()
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
