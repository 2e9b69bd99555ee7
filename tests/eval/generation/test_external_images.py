"""Images of other systems: numbers of any width, folders around them, and none at all."""

import json

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.core.benchmark import Sample
from open_unitok.eval.core.generated_images import ExternalImages

from .test_generated_images import write_dpg, write_genai


def save(path, red=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (red, 0, 0)).save(path)


def reds(folder, ids):
    """The red level of the image of each id."""
    samples = [Sample(i, name, "p", None, "generate") for i, name in enumerate(ids)]
    model = ExternalImages(folder)
    model.refuse_missing("x", samples)
    return [image if isinstance(image, str) else int(image[0, 0, 0]) for image in model.load_batch(samples)]


def write_geneval(folder, prompts=2):
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": f"p{i}"}
        for i in range(prompts)
    ]
    folder.mkdir(parents=True)
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "names", [("00000", "00001"), ("0", "1"), ("1", "2"), ("09", "10"), ("0000", "0003"), ("0001", "0002")]
)
@pytest.mark.parametrize("prompt", ["00000", "0", "000"])
def test_genevals_images_are_taken_in_numeric_order(tmp_path, names, prompt):
    for k, name in enumerate(names):
        save(tmp_path / prompt / "samples" / f"{name}.png", 10 + k)
    save(tmp_path / prompt / "grid.png", 99)
    save(tmp_path / prompt / "samples" / "grid.png", 99)
    assert reds(tmp_path, ["00000/samples/0000", "00000/samples/0001"]) == [10, 11]


def test_numbers_of_any_width_and_suffixes_in_any_case(tmp_path):
    for number, name in ((1, "1.PNG"), (2, "0002.Jpg"), (3, "000003.jpeg")):
        save(tmp_path / "a" / name, 80 * number)
    found = reds(tmp_path / "a", ["00001", "00002", "00003"])
    assert found == pytest.approx([80, 160, 240], abs=3)
    # the images may lie in a folder of their own, as in our runs
    assert reds(tmp_path, ["00001", "00002", "00003"]) == found
    assert reds(tmp_path, ["000001", "000002", "000003"]) == found
    save(tmp_path / "a" / "²³.png")  # digits, but no number
    assert reds(tmp_path, ["00001", "00002", "00003"]) == found
    save(tmp_path / "a" / "01.png")
    assert "01.png and 1.PNG are the same image" in reds(tmp_path, ["00001", "00002", "00003"])[0]
    (tmp_path / "a" / "01.png").rename(tmp_path / "a" / "0002.png")
    assert "0002.Jpg and 0002.png are the same image" in reds(tmp_path, ["0001", "0002", "0003"])[1]


@pytest.mark.parametrize("width", [1, 4, 6, 9])
def test_prompts_with_numbers_of_any_width(tmp_path, width):
    """T2I-CompBench's names: PROMPT_NUMBER."""
    prompts = ["a red cup and a 2_3", "a red cup.", "._x"]
    for k, prompt in enumerate(prompts):
        save(tmp_path / "color" / "samples" / f"{prompt}_{k:0{width}d}.png", 40 + k)
    ids = [f"color/samples/{prompt}_{k:06d}" for k, prompt in enumerate(prompts)]
    assert reds(tmp_path, ids) == [40, 41, 42]
    # of another prompt, or another number
    assert "has no image a red cup_000001" in reds(tmp_path, [*ids, "color/samples/a red cup_000001"])[3]
    assert "has no image a red cup._000002" in reds(tmp_path, [*ids, "color/samples/a red cup._000002"])[3]


def test_dpg_and_mjhq_names(tmp_path):
    for k in range(3):
        save(tmp_path / "dpg" / "item7" / f"{k:03d}.png", 20 + k)
        save(tmp_path / "mjhq" / "art" / f"{k}{'a' * 5}.png", 30 + k)
    assert reds(tmp_path / "dpg", ["item7/0", "item7/2"]) == [20, 22]
    assert reds(tmp_path / "mjhq", ["art/0aaaaa", "art/2aaaaa"]) == [30, 32]
    with pytest.raises(UserError, match=r"holds none of its 1 images.*has no image 12345"):
        reds(tmp_path / "mjhq", ["art/12345"])


def test_images_numbered_from_zero_or_of_other_prompts_are_refused(tmp_path):
    for k in range(3):
        save(tmp_path / "zero" / f"{k}.png")
        save(tmp_path / "zeros" / f"{k:05d}.png")
        save(tmp_path / "other" / f"{k:05d}" / "samples" / "0000.png")
        (tmp_path / "other" / f"{k:05d}" / "metadata.jsonl").write_text(
            json.dumps({"prompt": f"another {k}"})
        )
    for folder in ("zero", "zeros"):
        with pytest.raises(UserError, match="has an image number 0, but the first prompt is number 1"):
            reds(tmp_path / folder, ["00001", "00002", "00003"])
    with pytest.raises(UserError, match="images of another list of prompts"):
        reds(tmp_path / "other", [f"{k:05d}/samples/0000" for k in range(3)])


def test_half_of_the_images_say_which_option_takes_the_rest(tmp_path):
    for k in range(4):
        save(tmp_path / f"{k:05d}" / "samples" / "0000.png", k)
    with pytest.raises(UserError, match=r"only 4 of its 16 images.*--images-per-prompt N"):
        reds(tmp_path, [f"{k:05d}/samples/{j:04d}" for k in range(4) for j in range(4)])


@pytest.mark.parametrize("name", ["geneval", "genai_bench", "dpg_bench", "mjhq", "imagenet_generation"])
def test_not_one_image_is_an_error_in_every_benchmark(call, tmp_path, name):
    """No 0.0 % and no result file."""
    data = tmp_path / "data" / name
    if name == "geneval":
        write_geneval(data)
    elif name == "genai_bench":
        write_genai(data)
    elif name == "dpg_bench":
        write_dpg(data)
    elif name == "mjhq":
        data.mkdir(parents=True)
        (data / "meta_data.json").write_text(json.dumps({"ab": {"category": "art", "prompt": "p"}}))
    else:
        data.mkdir(parents=True)
        (data / "VIRTUAL_imagenet256_labeled.npz").write_bytes(b"")
    save(tmp_path / "theirs" / "something.png")
    words = ("eval", "run", name, "--model", tmp_path / "theirs", "--data", data, "--limit", 2)
    code, out, err = call(*words, "--out", tmp_path / "o")
    assert code == 2 and out == "" and "holds none of its" in err and err.count("\n") == 1, err
    assert not (tmp_path / "o").exists()


def test_more_images_than_are_scored_are_counted(tmp_path):
    for k in range(6):
        save(tmp_path / "00000" / "samples" / f"{k:05d}.png", k)
    model = ExternalImages(tmp_path)
    samples = [Sample(i, f"00000/samples/{i:04d}", "p", None, "generate") for i in range(4)]
    model.refuse_missing("geneval", samples)
    assert model.describe()["notes"] == [
        "2 images of these prompts are not scored: --images-per-prompt is smaller"
    ]
