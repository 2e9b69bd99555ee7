"""The one reader of text: byte-order marks, line ends, FIFOs, and errors that name file, line and byte."""

import ast
import json
import os
import pathlib
import threading

import pytest

from open_unitok.core.errors import UserError
from open_unitok.core.text_files import (
    numbered_csv,
    numbered_lines,
    read_csv,
    read_json,
    read_json_lines,
    read_lines,
    read_text,
)

BOM = b"\xef\xbb\xbf"
# every character at which str.splitlines splits, but a line feed
INSIDE = "a\u2028b\u2029c\x0bd\x0ce\x85f\x1cg\x1dh\x1ei"


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    data = f"{INSIDE}\r\n\r\n \nlast".encode()
    (tmp_path / "a.txt").write_bytes(BOM + data)
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt"), BOM + data, data):
        assert read_lines(source) == [INSIDE, "last"]
        assert list(numbered_lines(source)) == [(1, INSIDE), (2, ""), (3, " "), (4, "last")]
    assert read_text(tmp_path / "a.txt") == data.decode()
    # a mark elsewhere is a character of the text
    assert read_lines(BOM + BOM + b"x\n" + BOM + b"y") == ["\ufeffx", "\ufeffy"]
    assert read_lines(b"") == [] and read_lines(BOM) == [] and read_json_lines(b"\r\n\n") == []


def test_json_lines_and_csv_with_marks_and_windows_line_ends():
    rows = [{"text": INSIDE}, {"text": "two"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()
    for data in (lines, BOM + lines, lines + b"\r\n\r\n", lines.removesuffix(b"\r\n")):
        assert read_json_lines(data) == rows
    assert read_json(BOM + json.dumps(rows).encode()) == rows
    for data in (f'file,text\r\na.png,"{INSIDE}\r\nx, y"\r\n'.encode(), BOM + b"file,text\na.png,b\n"):
        (record,) = read_csv(data)
        assert list(record) == ["file", "text"]
    assert list(read_csv(f'file,text\r\na.png,"{INSIDE}\nx, y"\r\n'.encode())) == [
        {"file": "a.png", "text": f"{INSIDE}\nx, y"}
    ]
    assert list(read_csv(b"a\tb\n1\t" + b"x" * 200_000, delimiter="\t")) == [{"a": "1", "b": "x" * 200_000}]
    assert [number for number, _ in numbered_csv(b'a,b\n1,"2\n3"\n4,5\n')] == [3, 4]
    with pytest.raises(UserError, match="has no column 'c'"):
        list(read_csv(b"a,b\n1,2\n", columns=("a", "c")))


def test_a_fifo_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for read, data, expected in (
        (read_lines, b"one\ntwo\n", ["one", "two"]),
        (read_json_lines, b"1\n2\n", [1, 2]),
        (read_json, b"[1]", [1]),
    ):
        writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(data,))
        writer.start()
        assert read(tmp_path / "fifo") == expected
        writer.join()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("1\ncafé".encode("latin-1"), "line 2, byte 4, is not UTF-8: unexpected end of data (0xe9)."),
        (BOM + b"\xff", "line 1, byte 1, is not UTF-8: invalid start byte (0xff)."),
        ("text".encode("utf-16"), "is UTF-16, expected UTF-8 text: convert it first."),
        (b"\xfe\xff\0t", "is UTF-16, expected UTF-8 text: convert it first."),
        ("text".encode("utf-32"), "is UTF-32, expected UTF-8 text: convert it first."),
        ("text".encode("utf-16-le"), "line 1, byte 2, holds a NUL byte: it is UTF-16 or binary."),
        (b"\x1f\x8b\x08", "is compressed (gzip), expected UTF-8 text: convert it first."),
        (b"PK\x03\x04", "is a zip archive, expected UTF-8 text: convert it first."),
    ],
)
def test_other_bytes_are_refused_by_every_reader(tmp_path, data, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    readers = (read_text, read_lines, read_json, read_json_lines, lambda source: list(read_csv(source)))
    for read in readers:
        with pytest.raises(UserError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}") and str(error.value).endswith(reason)
        with pytest.raises(UserError, match=r"^The text"):
            read(data)


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \nnull\n\xff\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3, is not valid JSON"):
        read_json_lines(path)
    values = read_json_lines(path, lenient=True)
    assert values[0] == {"a": 1} and values[2] is None and len(values) == 4
    assert "line 3" in str(values[1]) and "line 5, byte 1, is not UTF-8" in str(values[3])
    with pytest.raises(UserError, match="is not valid JSON"):
        read_json(b"[" * 100_000)
    with pytest.raises(UserError, match=r"line 2, is not valid CSV"):
        list(read_csv(b"a,b\nx\ry,z\n"))
    for read in (read_text, read_lines):
        with pytest.raises(UserError, match="does not exist"):
            read(tmp_path / "absent")
        with pytest.raises(UserError, match="is a folder, expected a text file"):
            read(tmp_path)


# file -> why it decodes bytes itself
OWN_DECODERS = {
    "open_unitok/core/text_files.py": "the reader",
    "open_unitok/core/devices.py": "/proc",
    "open_unitok/core/memory.py": "/proc",
    "open_unitok/demo.py": "/proc",
    "open_unitok/doctor.py": "a file of the package",
    "tokenizer/cpu.py": "/proc",
    "generation/backends/native_build.py": "/proc",
    "generation/image_files.py": "the record that a PNG of ours holds",
    "generation/serving/request_body.py": "a request's body",
    "training/core/config.py": "a shipped config of the package",
    "training/core/metric_logger.py": "our own records",
    "training/data/shards.py": "the traceback of a worker",
    "training/data/sample_kinds.py": "JSON between two functions",
    "training/scenes/dataset.py": "JSON between two functions",
    "eval/core/harness.py": "our own records, whose last line a kill may cut",
    "eval/judges/llm_judge.py": "a server's reply",
}
DECODERS = ("read_text", "splitlines", "load", "loads", "DictReader", "reader")


def decoding_calls(path: pathlib.Path) -> list[str]:
    """Calls that turn bytes into text, lines, JSON or CSV records."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        owner, _, method = name.rpartition(".")
        if method in ("load", "loads", "DictReader", "reader") and owner not in ("json", "csv"):
            continue
        # lines of an error's message, not of a file
        if method == "splitlines" and "error" in owner:
            continue
        reads = name == "open" and not any(
            isinstance(a, ast.Constant) and isinstance(a.value, str) and set(a.value) & set("bwax")
            for a in (*node.args[1:], *(k.value for k in node.keywords if k.arg == "mode"))
        )
        if (owner and method in DECODERS) or reads:
            found.append(f"{name} (line {node.lineno})")
    return found


def test_no_other_module_decodes_text():
    """Text that a user wrote is read by core/text_files.py, so that one rule holds everywhere."""
    root = pathlib.Path(__file__).resolve().parents[2]
    folders = ("open_unitok", "tokenizer", "mllm", "generation", "training", "eval")
    decoding = {}
    for file in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        if calls := decoding_calls(file):
            decoding[file.relative_to(root).as_posix()] = calls
    assert not {name: calls for name, calls in decoding.items() if name not in OWN_DECODERS}
    assert not OWN_DECODERS.keys() - decoding.keys(), "leave these out of OWN_DECODERS"
