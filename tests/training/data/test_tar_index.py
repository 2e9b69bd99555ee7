"""Awkward and hostile tars: which samples they hold, and what is left out by count and name."""

import io
import tarfile

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.data.tar_files import StreamedTar
from open_unitok.training.data.tar_index import (
    BadSample,
    describe_notes,
    image_members,
    matching_files,
    scan_tar,
)


def build(path, members, format=tarfile.GNU_FORMAT):
    """A tar of (name, contents) or TarInfo members."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def pair(key, extension="jpg", text="txt"):
    return [(f"{key}.{extension}", b"image of " + key.encode()), (f"{key}.{text}", key.encode())]


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def keys(path):
    """The keys of a tar, the same from a file as from a stream of it; no damage."""
    found, problem, notes = scan_tar(path)
    stream = StreamedTar(path)
    streamed = list(stream)
    assert (problem, notes) == (stream.problem, stream.notes)
    assert [(r.key, r.members, r.file) for r in found] == [(r.key, r.members, r.file) for r in streamed]
    assert [[r.read(m) for m in r.members] for r in found] == [
        [r.read(m) for m in r.members] for r in streamed
    ]
    assert problem is None
    return [record.key for record in found]


@pytest.mark.parametrize(
    "names",
    [
        ["2024.01", "2024.02", "2025.01"],
        ["img.v1.0", "img.v1.1", "photo.one", "z"],
        ["shot.0", "shot.1"],
        ["a", "a.1", "a.b"],
        ["train/a/x", "train/b/x", "v1.0/x"],
        ["k" * 150, "日本語" * 40],
        ["a b", "a_b", "a-b", "é", "e\u0301", "😀"],
    ],
)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_key_is_a_sample_of_its_own(names, format, tmp_path):
    for text in ("txt", "json"):
        path = build(tmp_path / "a.tar", [m for n in names for m in pair(n, text=text)], format)
        assert keys(path) == names
        for record in scan_tar(path).samples:
            assert set(record.members) == {"jpg", text}
            assert record.read("jpg") == b"image of " + record.key.encode()
            assert record.file == f"{record.key}.jpg"


def test_images_without_texts_and_images_of_one_sample(tmp_path):
    images = [(f"2024.{n:02d}.jpg", b"x") for n in range(3)]
    assert keys(build(tmp_path / "a.tar", images)) == ["2024.00", "2024.01", "2024.02"]
    several = [("s.0.jpg", b"0"), ("s.1.png", b"1"), ("s.json", b'{"images": 2}')]
    path = build(tmp_path / "b.tar", [*several, *pair("t"), ("t.seg.png", b"mask")])
    assert keys(path) == ["s", "t"]
    first, second = scan_tar(path).samples
    assert image_members(first)[0] == ["0.jpg", "1.png"]
    assert image_members(second)[0] == ["jpg"] and "seg.png" in second.members


def test_two_images_of_one_name_are_no_sample(tmp_path):
    path = build(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.png", b"2"), ("x.txt", b"x")])
    with pytest.raises(BadSample, match=r"2 images of one name \(.jpg, .png\)"):
        image_members(scan_tar(path).samples[0])


def test_samples_of_one_key_stay_apart_and_are_counted(tmp_path):
    path = build(tmp_path / "a.tar", [*pair("same"), ("same.jpg", b"2"), ("same.txt", b"b"), *pair("other")])
    assert keys(path) == ["same", "same", "other"]
    assert [r.read("txt") for r in scan_tar(path).samples] == [b"same", b"b", b"other"]
    assert "1 keys that occur again" in describe_notes(scan_tar(path).notes)
    apart = build(tmp_path / "b.tar", [*pair("same"), *pair("other"), *pair("same")])
    assert keys(apart) == ["same", "other", "same"] and "(first: same)" in describe_notes(
        scan_tar(apart).notes
    )


def test_what_is_no_sample_is_counted_and_named(tmp_path):
    sparse = special("s.jpg", tarfile.GNUTYPE_SPARSE)
    path = build(
        tmp_path / "a.tar",
        [
            *pair("a"),
            ("._a.jpg", b"\0\5\26\7"), (".DS_Store", b"x"), ("__MACOSX/a.jpg", b"x"), ("README", b"x"),
            ("../b.jpg", b"x"), ("/abs/c.jpg", b"x"),
            special("d", tarfile.DIRTYPE),
            special("e.jpg", tarfile.SYMTYPE, "a.jpg"), special("f.jpg", tarfile.LNKTYPE, "a.jpg"),
            special("g.jpg", tarfile.CHRTYPE), special("h.jpg", tarfile.FIFOTYPE), sparse,
        ],
    )  # fmt: skip
    assert keys(path) == ["a", "abs/c"]
    notes = {reason.split()[0]: found for reason, found in scan_tar(path).notes.items()}
    assert notes == {
        "hidden": (3, "._a.jpg"), "files": (1, "README"), "names": (1, "../b.jpg"), "links": (2, "e.jpg"),
        "device": (2, "g.jpg"), "sparse": (1, "s.jpg"),
    }  # fmt: skip


def patched(path, member, field, value):
    """Overwrite bytes of a member's header and correct its checksum."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[member].offset
    data[start + field : start + field + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)


SIZE, TYPE = 124, 156


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (SIZE, b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True), "size of -1024 bytes"),
        (SIZE, b"\xff" * 8 + (-512).to_bytes(4, "big", signed=True), "size of -512 bytes"),
        (SIZE, b"\x80" + b"\x7f" * 11, "ends at byte"),
        (SIZE, b"77777777777\0", "ends at byte"),
        (TYPE, b"L", None),
        (TYPE, b"x", None),
        (0, b"\xff" * 20, None),
    ],
)
def test_damaged_headers_end_a_tar(field, value, words, tmp_path):
    path = tmp_path / "a.tar"
    build(path, [*pair("a"), *pair("b"), *pair("c")])
    patched(path, 4, field, value)
    found, problem, _ = scan_tar(str(path))
    assert [r.key for r in found][:2] == ["a", "b"]
    stream = StreamedTar(str(path))
    assert [r.key for r in stream] == [r.key for r in found]
    if words is not None:  # others are valid in another way
        assert words in str(problem) and stream.problem
    # a long name that claims gigabytes
    if field == TYPE:
        patched(path, 4, SIZE, b"\x80" + b"\x7f" * 11)
        assert "claims" in str(scan_tar(str(path)).problem)


def test_a_negative_size_in_an_extended_header(tmp_path):
    info = tarfile.TarInfo("b.jpg")
    info.pax_headers = {"size": "-2048"}
    path = build(tmp_path / "a.tar", [*pair("a"), info], tarfile.PAX_FORMAT)
    found, problem, _ = scan_tar(path)
    assert [r.key for r in found] == ["a"] and "size of -2048" in str(problem)


def test_several_tars_in_one_file_and_no_tar(tmp_path):
    build(tmp_path / "a.tar", pair("a"))
    both = tmp_path / "b.tar"
    both.write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    assert "followed by more data" in str(scan_tar(str(both)).problem)
    for data, words in ((b"", "empty"), (b"<html>" * 300, "byte 0 is damaged"), (b"x" * 100, "damaged")):
        both.write_bytes(data)
        assert words in str(scan_tar(str(both)).problem)


def test_patterns_and_odd_files(tmp_path):
    build(tmp_path / "a[1].tar", pair("a"))
    assert matching_files(str(tmp_path / "a[1].tar")) == [str(tmp_path / "a[1].tar")]
    for pattern, words in (
        ("/dev/zero", "device"),
        (f"{tmp_path}/{{a,b.tar", "do not match"),
        (f"{tmp_path}/{{0..99999999}}", "more than"),
    ):
        with pytest.raises(UserError, match=words) as error:
            matching_files(pattern)
        assert "\n" not in str(error.value)
