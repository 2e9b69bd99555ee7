"""The mixture: shares, captions as published, the same batches on any number of ranks, exact resume."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from open_unitok.core import distributed
from open_unitok.core.errors import UserError
from open_unitok.core.files import sha256, write_json
from open_unitok.mllm import UniTokProcessor
from open_unitok.training.core.config import build_config
from open_unitok.training.data import text
from open_unitok.training.data.code_shards import CODES_FORMAT, SHUFFLED_TARS, CodeFolder
from open_unitok.training.data.mixture import Mixture
from open_unitok.training.data.mixture_options import MixtureOptions
from open_unitok.training.data.sample_kinds import SAMPLE_KINDS
from open_unitok.training.data.sample_order import ShuffledOrder
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.data.text import TextLines

TOKENS, BOOKS, ENTRIES = 4, 3, 16


def write_codes(folder, samples=40, shards=2, broken=(), info=None):
    """A code folder with random codes; the first code of sample i is i modulo ENTRIES."""
    folder.mkdir()
    listed, number = [], 0
    for shard in range(shards):
        path = folder / f"codes-{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(samples // shards):
                codes = np.random.default_rng(number).integers(0, ENTRIES, (TOKENS, BOOKS)).astype(np.uint16)
                codes[0, 0] = number % ENTRIES
                array = io.BytesIO()
                np.save(array, codes)
                turns = [
                    {"from": "human", "value": f"<image>\nWhat is {number}"},
                    {"from": "gpt", "value": f"a cat {number}"},
                ]
                facts = info or {"captions": [f"a cat {number}", f"a dog {number}"], "conversations": [turns]}
                data = b"nothing" if number in broken else array.getvalue()
                for name, content in (("codes.npy", data), ("json", json.dumps(facts).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
        listed.append({"file": path.name, "samples": samples // shards, "sha256": sha256(path)})
    shapes = {"num_codebooks": BOOKS, "codebook_size": ENTRIES, "num_tokens": TOKENS, "grid": [2, 2]}
    write_json(
        folder / "codes.json", {"format": CODES_FORMAT, "tokenizer": "abc", **shapes, "shards": listed}
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_codes(tmp_path_factory.mktemp("mixture") / "codes")
    (path.parent / "text.txt").write_text("The quick brown fox\n\nA photo of a dog\nin the blue sky\n")
    return path


@pytest.fixture(scope="module")
def sequences(golden):
    path = golden / "mllm" / "tokenizer.model"
    processor = UniTokProcessor.from_text_tokenizer(path, num_image_tokens=TOKENS, template="plain")
    return SequenceBuilder(processor, 200)


@pytest.fixture
def make(folder, sequences):
    def build_mixture(entries=None, batch_size=10, accumulation=1, seed=3, fingerprint="abc", **options):
        entries = entries or [("text_to_image", 0.6), ("conversation", 0.3), ("text", 0.1)]
        listed = [
            {"kind": k, "weight": w, "path": str(folder.parent / "text.txt" if k == "text" else folder)}
            for k, w in entries
        ]
        checked = build_config(MixtureOptions, {"mixture": listed, **options})
        return Mixture(
            checked,
            sequences,
            seed=seed,
            batch_size=batch_size,
            accumulation=accumulation,
            fingerprint=fingerprint,
        )

    return build_mixture


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.kinds.equal(b.kinds) and a[2:-1] == b[2:-1]
        torch.testing.assert_close(a.plan, b.plan, rtol=0, atol=0)
        for name, value in a.inputs.items():
            assert (value is None and b.inputs[name] is None) or value.equal(b.inputs[name]), name


def rows_of(batches):
    """Every sample of some batches: its ids without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"])
    ]


def test_shares_follow_the_weights(make):
    mixture = make()
    kinds = Counter()
    for step in range(1, 8):
        kinds.update(list(SAMPLE_KINDS)[k] for batch in mixture.next() for k in batch.kinds[:, 0])
        for kind, share in (("text_to_image", 0.6), ("conversation", 0.3), ("text", 0.1)):
            assert abs(kinds[kind] - share * 10 * step) <= 1


def test_every_sample_occurs_once_per_epoch(folder):
    sizes = CodeFolder(folder).sizes
    order = ShuffledOrder(sizes, seed=0, name="a")
    epochs = [[order[e * 40 + i] for i in range(40)] for e in range(3)]
    assert all(sorted(epoch) == [(s, i) for s in range(2) for i in range(20)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [ShuffledOrder(sizes, seed=0, name="a")[i] for i in range(40)] == epochs[0]
    assert [ShuffledOrder(sizes, seed=1, name="a")[i] for i in range(40)] != epochs[0]
    many = ShuffledOrder([3, 0, 5] * SHUFFLED_TARS, seed=0, name="a")
    seen = [many[i] for i in range(many.total)]
    assert len(set(seen)) == many.total == 8 * SHUFFLED_TARS
    assert len({shard for shard, _ in seen[: 3 * SHUFFLED_TARS]}) <= SHUFFLED_TARS  # read tar by tar


@pytest.mark.parametrize("options", [{}, {"pack_to": 100}, {"group_by_length": True}])
def test_resumes_exactly(make, options):
    through, before = make(accumulation=2, **options), make(accumulation=2, **options)
    wanted = [through.next() for _ in range(9)]
    for _ in range(4):
        before.next()
    state = json.loads(json.dumps(before.state_dict()))  # plain numbers only
    after = make(accumulation=2, **options)
    after.load_state_dict(state)
    for batches in wanted[4:]:
        same(after.next(), batches)


def test_batches_do_not_depend_on_the_number_of_workers(make):
    """Nine steps over two epochs, stopped at the fourth and at the sixth, with 2, 1 and no processes."""
    single = make()
    wanted = [single.next() for _ in range(9)]
    state = make().state_dict()
    for workers, steps in ((2, range(4)), (1, range(4, 6)), (0, range(6, 9))):
        part = make(workers=workers)
        part.load_state_dict(state)
        for step in steps:
            same(part.next(), wanted[step])
        state = json.loads(json.dumps(part.state_dict()))
    assert state == single.state_dict()


def test_workers_count_bad_samples_and_stop(tmp_path, sequences):
    codes = write_codes(tmp_path / "codes", broken=range(0, 40, 20))
    options = {"mixture": [{"kind": "text_to_image", "path": str(codes)}], "workers": 2}
    mixture = Mixture(build_config(MixtureOptions, options), sequences, seed=0, batch_size=40)
    for _ in range(3):
        mixture.next()
    assert mixture.seen == 120 and mixture.bad >= 6
    many = write_codes(tmp_path / "many", broken=range(10))
    options["mixture"][0]["path"] = str(many)
    mixture = Mixture(build_config(MixtureOptions, options), sequences, seed=0, batch_size=200)
    with pytest.raises(UserError, match="max_bad_share") as error:
        for _ in range(5):
            mixture.next()
    assert "\n" not in str(error.value)


def test_ranks_and_accumulation_split_the_same_batch(make, monkeypatch):
    whole = rows_of(make().next())
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        parts += rows_of(make(batch_size=10).next())
    assert sorted(parts) == sorted(whole)
    monkeypatch.undo()
    assert rows_of(make(accumulation=5).next()) == whole


def test_grouping_by_length_saves_padding(make):
    mixed, grouped = (
        make(batch_size=40, accumulation=4),
        make(batch_size=40, accumulation=4, group_by_length=True),
    )
    first, second = mixed.next(), grouped.next()
    assert sorted(rows_of(first)) == sorted(rows_of(second))
    assert sum(b.kinds.numel() for b in second) < sum(b.kinds.numel() for b in first)


def test_unconditional_share_and_captions(make, sequences):
    mixture = make([("text_to_image", 1.0)], batch_size=400, unconditional=0.25)
    found = Counter(rows_of(mixture.next()))
    bare = sequences.build("text_to_image", None, (TOKENS,)).ids.tolist()
    assert abs(found[tuple(bare)] / 400 - 0.25) < 0.07
    assert len(found) > 70  # of 40 samples with two captions each, nearly all were sampled
    both = make([("text_to_image", 1.0)], batch_size=400, text_to_image_share=0.7, unconditional=0.0)
    kinds = Counter(list(SAMPLE_KINDS)[k] for batch in both.next() for k in batch.kinds[:, 0])
    assert (
        abs(kinds["text_to_image"] / 400 - 0.7) < 0.08 and kinds["captioning"] == 400 - kinds["text_to_image"]
    )


def test_short_captions_are_chosen_as_published(tmp_path, sequences):
    info = {"short_caption": "a cat", "long_caption": "a photo of a red cat"}
    codes = write_codes(tmp_path / "codes", info=info)
    options = {"mixture": [{"kind": "text_to_image", "path": str(codes)}], "unconditional": 0.0}
    mixture = Mixture(build_config(MixtureOptions, options), sequences, seed=0, batch_size=400)
    found = Counter(rows_of(mixture.next()))
    short = tuple(sequences.build("text_to_image", "a cat", (TOKENS,)).ids.tolist())
    assert len(found) == 2 and abs(found[short] / 400 - 0.2) < 0.06


def test_bad_samples_are_replaced_and_counted(tmp_path, sequences, capsys):
    few = write_codes(tmp_path / "few", broken=(3,))
    options = {"mixture": [{"kind": "text_to_image", "path": str(few)}]}
    mixture = Mixture(build_config(MixtureOptions, options), sequences, seed=0, batch_size=40)
    assert len(rows_of(mixture.next())) == 40 and mixture.bad == 1
    assert "codes.npy cannot be read" in capsys.readouterr().err
    many = write_codes(tmp_path / "many", broken=range(10))
    options["mixture"][0]["path"] = str(many)
    mixture = Mixture(build_config(MixtureOptions, options), sequences, seed=0, batch_size=100)
    with pytest.raises(UserError, match="max_bad_share"):
        for _ in range(10):
            mixture.next()


def test_each_entry_has_one_order(make):
    mixture = make()
    assert len(mixture.orders) == len(mixture.entries) == len(mixture.datasets)


def test_conversations_in_code_folders_are_read_as_data_check_reads_them(tmp_path, sequences):
    """As in `data check`: without <image> the image comes first, and `role` may replace `from`."""
    talk = [{"role": "user", "content": "What is it"}, {"role": "assistant", "content": "a cat"}]
    own = write_codes(tmp_path / "own", info={"conversations": [talk]})
    options = build_config(MixtureOptions, {"mixture": [{"kind": "conversation", "path": str(own)}]})
    mixture = Mixture(options, sequences, seed=0, batch_size=4)
    (batch,) = mixture.next()
    assert mixture.bad == 0
    marked = [{"from": "human", "value": "<image>\nWhat is it"}, {"from": "gpt", "value": "a cat"}]
    expected, _ = sequences.build("conversation", json.dumps(marked), (TOKENS,))
    assert batch.inputs["input_ids"][0].tolist() == expected.tolist()


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_lines_are_located_block_by_block(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(text, "SCAN_BLOCK", at_once)
    (tmp_path / "lines.txt").write_bytes(b"\nab\ncde\r\n\n\nf")
    lines = text.FileLines(tmp_path / "lines.txt")
    assert [lines[number] for number in range(len(lines))] == [b"ab", b"cde", b"f"]


def test_error_messages(tmp_path, make, folder):
    with pytest.raises(UserError, match="another visual tokenizer"):
        make(fingerprint="xyz")
    with pytest.raises(UserError, match="extract-codes"):
        CodeFolder(tmp_path / "nothing")
    with pytest.raises(UserError, match="not finished"):
        (tmp_path / "half").mkdir()
        CodeFolder(tmp_path / "half")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no line of text"):
        TextLines(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="is a folder"):
        options = {"mixture": [{"kind": kind, "path": str(folder)} for kind in ("text_to_image", "text")]}
        Mixture(build_config(MixtureOptions, options), None, seed=0, batch_size=4)
    with pytest.raises(UserError, match=r"unconditional is 1\.5"):
        make(unconditional=1.5)
    broken = write_codes(tmp_path / "broken")
    path = broken / "codes-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"codes-000001\.tar is broken"):
        for number in range(20):
            CodeFolder(broken).read(1, number)


def test_other_data_has_another_fingerprint(make, tmp_path, sequences):
    assert make().fingerprint == make().fingerprint != make([("text_to_image", 1.0)]).fingerprint
    assert torch.equal(make().next()[0].kinds, make().next()[0].kinds)


ROWS = {"batch_by": "rows", "pack_to": 64, "max_length": 60}


def samples_of_rows(batches):
    """Every sample of packed batches: its ids, in the order of the rows, without padding."""
    found = []
    for batch in batches:
        found += [x.tolist() for x in batch.inputs["input_ids"].flatten().split(batch.plan.bounds.lengths)]
    return [sample for sample in found if any(sample)]  # padding has id 0


def test_rows_are_filled(make):
    """A step has batch_size rows of at most pack_to tokens, and a sample more would not fit."""
    mixture = make(batch_size=4, **ROWS)
    fill = []
    for _ in range(20):
        (batch,) = mixture.next()
        assert batch.kinds.shape[0] == 4 and batch.kinds.shape[1] <= 64
        fill.append(batch.tokens / (4 * 64))
    assert min(fill) > 0.6 and sum(fill) / len(fill) > 0.75


def test_no_sample_is_lost_or_repeated_between_steps(make):
    """The sample that fits in no row begins the next step: n samples are the first n of the order."""
    mixture = make(entries=[("text_to_image", 1)], batch_size=3, **ROWS)
    numbers = [batch.inputs["image_codes"][:, 0, 0] for _ in range(8) for batch in mixture.next()]
    found = torch.cat([n.sort().values for n in numbers])
    plain = (
        make(entries=[("text_to_image", 1)], batch_size=len(found)).next()[0].inputs["image_codes"][:, 0, 0]
    )
    sizes = [len(n) for n in numbers]
    assert torch.equal(found, torch.cat([n.sort().values for n in plain.split(sizes)]))
    assert int(mixture.counts.sum()) == len(found)


def test_the_sample_that_begins_the_next_step_is_counted_once(tmp_path, make, sequences):
    """Also a bad one, which two steps look at: here the one that no longer fits into the first step."""
    options = {**ROWS, "unconditional": 0.0}
    alike = {"captions": ["a cat"]}  # the same length for all

    def build(name, *broken):
        path = write_codes(tmp_path / name, broken=broken, info=alike)
        listed = [{"kind": "text_to_image", "path": str(path)}]
        return Mixture(
            build_config(MixtureOptions, {"mixture": listed, **options}), sequences, seed=3, batch_size=3
        )

    first = build("whole")
    first.next()
    shard, item = first.orders[0][int(first.counts.sum())]
    mixture = build("broken", shard * 20 + item)
    mixture.next()
    assert (mixture.seen, mixture.bad) == (int(mixture.counts.sum()), 0)
    mixture.next()
    assert (mixture.seen, mixture.bad) == (int(mixture.counts.sum()), 1)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_filled_rows_resume_exactly_with_any_workers(make, workers):
    whole = make(batch_size=4, **ROWS)
    expected = [whole.next() for _ in range(7)]
    first = make(batch_size=4, workers=workers, **ROWS)
    for step in range(3):
        same(first.next(), expected[step])
    state = json.loads(json.dumps(first.state_dict()))
    other = make(batch_size=4, workers=workers, **ROWS)
    other.load_state_dict(state)
    for step in range(3, 7):
        same(other.next(), expected[step])
    assert other.state_dict() == whole.state_dict()


def test_filled_rows_do_not_depend_on_ranks(make, monkeypatch):
    """Rows of 2 ranks x 2 micro-batches, in the order of one rank's single micro-batch."""
    (whole,) = make(batch_size=8, **ROWS).next()
    parts = {}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for a, batch in enumerate(make(batch_size=8, accumulation=2, **ROWS).next()):
            parts[a, rank] = batch
    order = [parts[a, rank] for a in range(2) for rank in range(2)]
    assert samples_of_rows(order) == samples_of_rows([whole])
    assert sum(batch.text_targets for batch in order) == whole.text_targets
    assert sum(batch.code_targets for batch in order) == whole.code_targets


@pytest.mark.parametrize(
    "options",
    [
        {"batch_by": "rows"},
        {"batch_by": "rows", "pack_to": 64},
        {"batch_by": "rows", "pack_to": 64, "max_length": 65},
        {"batch_by": "rows", "pack_to": 64, "max_length": 64, "group_by_length": True},
        {"batch_by": "tokens", "pack_to": 64, "max_length": 64},
    ],
)
def test_wrong_options_of_filled_rows(make, options):
    with pytest.raises(UserError, match="batch_by") as error:
        make(**options)
    assert "\n" not in str(error.value)
