"""The reader of the hub's parquet files: layouts, lazy images, and one-line errors."""

import io
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.eval.core import parquet
from open_unitok.eval.core.image_files import read_sample_image
from open_unitok.eval.core.parquet import choose_split, find_splits, holds_parquet, read_parquet

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path, start, count):
    """Rows with an image each but for the second, a list of images, and answers; two rows in a group."""
    numbers = range(start, start + count)
    cells = [None if i == start + 1 else {"bytes": png(i), "path": "image.png"} for i in numbers]
    lists = [[{"bytes": png(100 + i), "path": None}] * (i - start) for i in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({
        "question": [f"question {i}" for i in numbers],
        "image": pyarrow.array(cells, IMAGE),
        "frames": pyarrow.array(lists, pyarrow.list_(IMAGE)),
        "plain": [png(i) for i in numbers],
        "answers": [[{"answer": "red"}] for _ in numbers],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.fixture
def data(tmp_path):
    """Two files of one split, as a clone leaves them."""
    write_rows(tmp_path / "data" / "test-00000-of-00002.parquet", 0, 5)
    write_rows(tmp_path / "data" / "test-00001-of-00002.parquet", 5, 3)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "test-00000-of-00002.parquet").touch()
    return tmp_path


def test_rows_come_in_order_with_references_to_their_images(data):
    split = choose_split(data, defaults=("test",))
    assert (split.configuration, split.split, len(split.files)) == ("data", "test", 2)
    rows = list(read_parquet(split.files, ("question", "image"), images=("plain",)))
    assert [row["question"] for row in rows] == [f"question {i}" for i in range(8)]
    assert rows[3]["answers"] == [{"answer": "red"}] and [len(r["frames"]) for r in rows[:5]] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert rows[1]["image"] is None and rows[6]["image"] is None
    for i, row in enumerate(rows):
        for image, shade in ((row["image"], i), (row["plain"], i), *((f, 100 + i) for f in row["frames"])):
            if image is not None:
                assert np.asarray(read_sample_image(image))[0, 0].tolist() == [shade, 0, 0]
                # the text of an image is enough to find it again, as the report does
                assert parquet.parquet_image(str(image)).read() == image.read()
    assert len({row["plain"].name for row in rows}) == 8
    assert rows[0]["plain"].digest() == rows[0]["image"].digest() != rows[2]["image"].digest()
    assert parquet.parquet_image("images/1.jpg") is None


def test_no_image_is_read_with_the_rows(data, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(parquet, "_image_group", refuse)
    assert len(list(read_parquet(choose_split(data).files))) == 8


def test_splits_and_configurations_of_the_hub(tmp_path):
    for name in (
        "data/test-00000-of-00001.parquet",
        "Full/random-00000-of-00001.parquet",
        "Full/popular-00000-of-00001-53ae1794f93b1e35.parquet",
        "en/dev-00000-of-00001.parquet",
    ):
        write_rows(tmp_path / "hub" / name, 0, 1)
    hub = tmp_path / "hub"
    assert {(s.configuration, s.split) for s in find_splits(hub)} == {
        ("data", "test"), ("Full", "random"), ("Full", "popular"), ("en", "dev"),
    }  # fmt: skip
    assert choose_split(hub).configuration == "data"
    assert choose_split(hub, configurations=("en",)).split == "dev"
    assert (
        choose_split(hub, "popular").configuration
        == choose_split(hub, "Full/popular").configuration
        == "Full"
    )
    with pytest.raises(
        UserError, match=r"found Full/popular, Full/random, data/test, en/dev\. Choose one with --split"
    ):
        choose_split(hub, "Full/nothing")
    with pytest.raises(UserError, match="expected one split"):
        choose_split(hub / "Full")
    file = hub / "data" / "test-00000-of-00001.parquet"
    assert choose_split(file).files == (file,) and holds_parquet(file) and holds_parquet(hub)
    write_rows(tmp_path / "converted" / "default" / "test" / "0000.parquet", 0, 1)
    write_rows(tmp_path / "converted" / "default" / "test" / "0001.parquet", 1, 1)
    split = choose_split(tmp_path / "converted", "test")
    assert split.configuration == "default" and len(split.files) == 2
    assert not holds_parquet(tmp_path / "nowhere")


def test_one_line_for_what_cannot_be_read(data, tmp_path, monkeypatch):
    files = choose_split(data).files
    with pytest.raises(UserError, match="the columns label are missing; there are question, image"):
        list(read_parquet(files, ("label",)))
    (data / "data" / "test-00001-of-00002.parquet").rename(data / "kept")
    with pytest.raises(
        UserError, match="1 of 2 files of split test are missing, the first is test-00001-of-00002"
    ):
        choose_split(data)
    assert choose_split(files[0]).files == files[:1]
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file") as error:
        list(read_parquet([broken]))
    assert "\n" not in str(error.value)
    broken.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        list(read_parquet([broken]))
    with pytest.raises(UserError, match="row 1: image holds no image"):
        parquet.ParquetImage("x", files[0], 1).read()
    # the footer is whole, the pages are not; the same file was readable before
    whole = files[0].read_bytes()
    assert len(list(read_parquet(files[:1]))) == 5
    files[0].write_bytes(b"PAR1" + b"\xff" * 60 + whole[64:])
    with pytest.raises(UserError, match=r"00000-of-00002\.parquet is damaged: ") as error:
        list(read_parquet(files[:1]))
    assert "\n" not in str(error.value)
    files[0].write_bytes(whole)
    assert len(list(read_parquet(files[:1]))) == 5
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    other = tmp_path / "other.parquet"
    other.write_bytes((data / "kept").read_bytes())
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'open-unitok\[eval\]'"):
        list(read_parquet([other]))
