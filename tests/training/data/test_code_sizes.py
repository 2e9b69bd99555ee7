"""Code folders, usage and dead codes of sub-codebooks of unequal size."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch

from open_unitok.core.errors import UserError
from open_unitok.eval.metrics.image_quality import CodebookUsage
from open_unitok.training.data.check import check_dataset
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.tar_index import BadSample
from open_unitok.training.tokenizer.dead_codes import usage_and_perplexity


def write_folder(path, codes, **changes):
    data = io.BytesIO()
    np.save(data, codes.astype(np.uint16))
    with tarfile.open(path / "codes-000000.tar", "w") as tar:
        for name, content in (("a.codes.npy", data.getvalue()), ("a.json", b'{"captions": ["x"]}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256((path / "codes-000000.tar").read_bytes()).hexdigest()
    manifest = {"format": "open-unitok codes 1", "tokenizer": "f", "num_codebooks": 2, "codebook_size": 9,
                "num_tokens": 4, "shards": [{"file": "codes-000000.tar", "samples": 1, "sha256": digest}],
                **changes}  # fmt: skip
    (path / "codes.json").write_text(json.dumps(manifest))
    return CodeFolder(path)


CODES = np.array([[0, 8], [4, 0], [1, 1], [2, 2]])


def test_codes_are_checked_against_their_own_book(tmp_path):
    folder = write_folder(tmp_path, CODES, code_sizes=[5, 9])
    assert folder.code_sizes == [5, 9] and (folder.read(0, 0).codes == CODES).all()
    equal = write_folder(tmp_path, CODES)
    assert equal.code_sizes == [9, 9] and equal.fingerprint != folder.fingerprint
    wrong = CODES.copy()
    wrong[1, 0] = 5
    with pytest.raises(BadSample, match=r"codes go up to \[5, 8\], which are not below \[5, 9\]"):
        write_folder(tmp_path, wrong, code_sizes=[5, 9]).read(0, 0)


def test_shares_refer_to_each_book(tmp_path):
    write_folder(tmp_path, CODES, code_sizes=[5, 9])
    lines = check_dataset(tmp_path, quiet=True).lines
    assert any("codes use 44.4% to 80.0% of a sub-codebook's entries" in line for line in lines)
    counter = CodebookUsage(2, [5, 9])
    counter.add(CODES)
    assert counter.usage() == pytest.approx([4 / 5, 4 / 9])
    with pytest.raises(UserError, match=r"Codes go up to \[5, 0\], but the sub-codebooks have \[5, 9\]"):
        counter.add(np.array([[5, 0]]))
    used, perplexity = usage_and_perplexity(torch.from_numpy(counter.counts / 4), [5, 9])
    assert used == pytest.approx([80.0, 400 / 9]) and perplexity == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("sizes", [[5], [5, 8], [0, 9], ["5", 9], 9])
def test_wrong_sizes_in_a_manifest_are_named(tmp_path, sizes):
    with pytest.raises(UserError, match="is damaged: code_sizes is"):
        write_folder(tmp_path, CODES, code_sizes=sizes)
