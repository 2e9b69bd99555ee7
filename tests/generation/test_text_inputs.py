"""Prompts and questions from files of any editor, FIFOs and /dev/stdin."""

import json
import os
import threading

import pytest

from open_unitok.core.errors import UserError
from open_unitok.generation.image_jobs import read_prompt_file
from open_unitok.generation.question_files import read_questions

BOM = b"\xef\xbb\xbf"


def through_stdin(data: bytes, read):
    """read("/dev/stdin") with `data` there."""
    reader, writer = os.pipe()
    saved = os.dup(0)
    os.dup2(reader, 0)
    try:
        threading.Thread(target=lambda: (os.write(writer, data), os.close(writer))).start()
        return read("/dev/stdin")
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(reader)


def test_prompts(tmp_path):
    data = BOM + "a red\u2028circle\r\n\r\n \r\ntwo\x85 squares".encode()
    (tmp_path / "a.txt").write_bytes(data)
    for prompts in (read_prompt_file(tmp_path / "a.txt"), through_stdin(data, read_prompt_file)):
        assert prompts == ["a red\u2028circle", "two\x85 squares"]
    for content, reason in ((BOM + b"\r\n \n", "holds no prompt"), ("a".encode("utf-16"), "is UTF-16")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_prompt_file(tmp_path / "a.txt")


def test_questions(tmp_path):
    record = {"image": "a.png", "question": "Was?\u2028", "id": 1}
    data = BOM + json.dumps(record, ensure_ascii=False).encode() + b"\r\n\r\n"
    (tmp_path / "q.jsonl").write_bytes(data)
    assert read_questions(tmp_path / "q.jsonl") == [{**record, "image": str(tmp_path / "a.png")}]
    # there is no folder of /dev/stdin: names are relative to the working folder
    assert through_stdin(data, read_questions) == [record]
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "Was?", "id": "\\ud83d"}')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        read_questions(tmp_path / "q.jsonl")
