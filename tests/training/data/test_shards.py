"""Reading tars: order, exact resume, ranks and workers, broken samples and tars."""

import gzip
import io
import json
import tarfile
from collections import Counter

import pytest

from open_unitok.core.errors import UserError
from open_unitok.training.core.options import DataSource, ShardOptions
from open_unitok.training.data.shards import BadSample, ShardStream, build_loader, read_batches
from open_unitok.training.data.tar_index import matching_files, scan_tar


def write_tar(path, keys, extra=()):
    """A tar of key.txt and key.json for every key."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key in keys:
            for extension, data in (
                ("txt", f"text {key}".encode()),
                ("json", json.dumps({"k": key}).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        for name, data in extra:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture
def tars(tmp_path):
    """Four tars of 10 samples, keys 0 to 39."""
    for tar in range(4):
        write_tar(tmp_path / f"s-{tar:03d}.tar", [f"{n:04d}" for n in range(10 * tar, 10 * tar + 10)])
    return tmp_path


class Keys:
    """Decode a tar sample to its number and its own random number; the numbers in `bad` are unusable."""

    def __init__(self, bad=()):
        self.bad = set(bad)

    def __call__(self, record, rng):
        number = int(record.text("txt").split()[1])
        if number in self.bad:
            raise BadSample("is bad")
        assert record.json()["k"] == record.key
        return number, rng.random()


def collate(samples):
    return {"numbers": [n for n, _ in samples], "random": [d for _, d in samples]}


def options(folder, **changes):
    return ShardOptions(**{"sources": [DataSource(path=f"{folder}/s-*.tar")], "shuffle": 12, **changes})


def stream(folder, rank=0, ranks=1, bad=(), micro_batch=4, seed=0, **changes):
    return ShardStream(
        options(folder, **changes), Keys(bad), seed=seed, micro_batch=micro_batch, rank=rank, ranks=ranks
    )


def first(batches, count):
    rows = read_batches(batches)
    return [next(rows) for _ in range(count)]


def test_each_epoch_has_every_sample_once_in_another_order(tars):
    batches = first(build_loader(stream(tars), collate), 20)
    numbers = [n for batch in batches for n in batch["numbers"]]
    one, two = numbers[:40], numbers[40:]
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two and one != sorted(one)
    repeated = [n for batch in first(build_loader(stream(tars), collate), 20) for n in batch["numbers"]]
    other = [n for batch in first(build_loader(stream(tars, seed=1), collate), 20) for n in batch["numbers"]]
    assert repeated == numbers != other


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("split", ["samples", "shards"])
def test_exact_resume_in_the_middle_of_an_epoch(tars, workers, split):
    """7 + 13 batches equal the 20 batches of an uninterrupted reader, across the end of an epoch."""
    whole = first(build_loader(stream(tars, workers=workers, split=split), collate), 20)
    started = build_loader(stream(tars, workers=workers, split=split), collate)
    rows = read_batches(started)
    parts = [next(rows) for _ in range(7)]
    state = started.state_dict()
    resumed = build_loader(stream(tars, workers=workers, split=split), collate)
    resumed.load_state_dict(state)
    parts += first(resumed, 13)
    assert parts == whole
    if split == "samples":
        counts = Counter(n for batch in parts for n in batch["numbers"])
        assert set(counts.values()) == {2} and len(counts) == 40


def read_some(tars, ranks, workers, steps, states=None, earlier=None, batch_size=8, **options):
    """Global batches of `steps` steps of this layout, and the states of its loaders."""
    loaders = []
    for rank in range(ranks):
        own = stream(tars, rank, ranks, workers=workers, micro_batch=batch_size // ranks, **options)
        if earlier is not None:
            own.continue_after(earlier)
        loaders.append(build_loader(own, collate))
        if states is not None:
            loaders[-1].load_state_dict(states[rank])
    parts = [first(loader, steps) for loader in loaders]
    batches = [[n for part in parts for n in part[step]["numbers"]] for step in range(steps)]
    return batches, [loader.state_dict() for loader in loaders]


# (ranks, workers, steps) of the parts of a run
LAYOUTS = [
    [(2, 0, 2), (1, 0, 3), (2, 0, 6)],
    [(1, 3, 2), (4, 0, 1), (2, 2, 8)],
    [(4, 2, 1), (2, 1, 1), (4, 0, 1), (1, 2, 1), (2, 0, 7)],
]


@pytest.mark.parametrize("bad", [(), (3, 17)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_ranks_and_workers_read_the_same_samples_in_order(tars, layout, bad):
    steps = sum(part[2] for part in layout)
    whole, _ = read_some(tars, 1, 0, steps, bad=bad)
    found, states = [], None
    for ranks, workers, count in layout:
        batches, states = read_some(tars, ranks, workers, count, earlier=states, bad=bad)
        found += batches
    flat = [n for batch in found for n in batch]
    if not bad:
        assert found == whole
        return
    # a bad sample shifts the micro-batches of its rank: the same samples, in another order
    left = 40 - len(bad)
    assert Counter(flat[: left - 8]).most_common(1)[0][1] == 1
    assert set(flat) <= set(range(40)) - set(bad)


@pytest.mark.parametrize("shuffle", [1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_other_readers_of_shards_read_every_sample_once(tars, layout, shuffle):
    """Two epochs of 40 samples, of which readers of another layout read the first parts."""
    layout = [(ranks, min(workers, 4 // ranks), 1) for ranks, workers, _ in layout[:2]] + [(1, 0, 8)]
    found, states = [], None
    for ranks, workers, count in layout:
        batches, states = read_some(
            tars, ranks, workers, count, earlier=states, split="shards", shuffle=shuffle
        )
        found += [n for batch in batches for n in batch]
    # a reader without tars of the first epoch begins the second one early
    assert Counter(found) == dict.fromkeys(range(40), 2)


@pytest.mark.parametrize("split", ["samples", "shards"])
def test_a_run_on_other_ranks_resumes_exactly(tars, split):
    """The state in the middle of what earlier readers left."""
    _, states = read_some(tars, 2, 0, 1, split=split)
    whole, _ = read_some(tars, 1, 2, 9, earlier=states, split=split)
    begun, middle = read_some(tars, 1, 2, 1, earlier=states, split=split)
    rest, _ = read_some(tars, 1, 2, 8, states=middle, split=split)
    assert begun + rest == whole


def test_states_of_other_data_are_rejected(tars):
    started = build_loader(stream(tars), collate)
    first(started, 2)
    more = ShardOptions(sources=[DataSource(path=f"{tars}/s-*.tar")] * 2)
    with pytest.raises(UserError, match="another number of data"):
        ShardStream(more, Keys(), seed=0, micro_batch=1).continue_after([started.state_dict()])
    with pytest.raises(UserError, match="does not record the position"):
        stream(tars).continue_after([{}])
    _, states = read_some(tars, 2, 0, 1, split="shards")
    with pytest.raises(UserError, match=r"data\.split=shards"):
        stream(tars).continue_after(states)


def test_global_batches_do_not_depend_on_ranks_and_workers(tars):
    single = first(build_loader(stream(tars, micro_batch=8), collate), 6)
    ranks = [first(build_loader(stream(tars, rank=r, ranks=2, micro_batch=4), collate), 6) for r in (0, 1)]
    joined = [[*a["numbers"], *b["numbers"]] for a, b in zip(*ranks)]
    assert joined == [batch["numbers"] for batch in single]
    random = [[*a["random"], *b["random"]] for a, b in zip(*ranks)]
    assert random == [batch["random"] for batch in single]
    workers = first(build_loader(stream(tars, micro_batch=8, workers=2), collate), 6)
    assert [b["numbers"] for b in workers] == [batch["numbers"] for batch in single]


def test_split_by_shards_is_disjoint(tars):
    seen = [
        {
            n
            for batch in first(build_loader(stream(tars, rank=r, ranks=2, split="shards"), collate), 5)
            for n in batch["numbers"]
        }
        for r in (0, 1)
    ]
    assert seen[0] | seen[1] == set(range(40)) and not seen[0] & seen[1]
    with pytest.raises(UserError, match=r"4 tar\(s\) for 3 rank\(s\) x 2 worker"):
        stream(tars, rank=0, ranks=3, workers=2, split="shards")


def test_sources_are_mixed_by_weight(tars, tmp_path):
    write_tar(tmp_path / "other.tar", [f"{n:04d}" for n in range(100, 105)])
    mixed = ShardOptions(
        sources=[DataSource(path=f"{tars}/s-*.tar", weight=3), DataSource(path=f"{tmp_path}/other.tar")],
        shuffle=10,
    )
    batches = first(build_loader(ShardStream(mixed, Keys(), seed=0, micro_batch=50), collate), 20)
    other = sum(n >= 100 for batch in batches for n in batch["numbers"])
    assert 200 < other < 300


def test_bad_samples_are_counted_logged_and_skipped(tars, capfd):
    batches = first(build_loader(stream(tars, bad=[7, 23]), collate), 19)
    numbers = [n for batch in batches for n in batch["numbers"]]
    assert sum(batch["skipped"] for batch in batches) == 4
    assert Counter(numbers).keys() == set(range(40)) - {7, 23}
    assert "sample 0007 is skipped: is bad" in capfd.readouterr().err
    in_process = ShardStream(
        ShardOptions(sources=[DataSource(path=f"{tars}/*.tar")]), Keys({7}), seed=0, micro_batch=1
    )
    samples = iter(in_process)
    for _ in range(100):
        next(samples)
    # in each of the epochs it is skipped, and named once
    assert in_process.bad >= 2 and capfd.readouterr().err.count("0007 is skipped") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tars, workers):
    with pytest.raises(UserError, match="samples cannot be used") as error:
        first(build_loader(stream(tars, bad=range(0, 40, 3), workers=workers), collate), 200)
    assert "\n" not in str(error.value) and "max_bad_share" in str(error.value)


def test_no_readable_sample(tars):
    with pytest.raises(UserError, match="200 of 200 samples cannot be used"):
        first(build_loader(stream(tars, bad=range(40)), collate), 1)


def damage(path, at=None, cut=None):
    data = bytearray(path.read_bytes())
    if at is not None:
        data[at : at + 512] = b"\xff" * 512
    path.write_bytes(bytes(data[:cut]))


def test_broken_tars_give_their_intact_samples_and_too_many_stop(tars, capfd):
    damage(tars / "s-001.tar", cut=5 * 2048 + 1024 + 100)
    found = scan_tar(str(tars / "s-001.tar"))
    assert len(found.samples) == 6 and "ends at byte" in str(found.problem)
    numbers = [n for b in first(build_loader(stream(tars, micro_batch=5), collate), 7) for n in b["numbers"]]
    assert sorted(numbers) == [*range(15), *range(20, 40)]  # sample 15 has no .json
    error = capfd.readouterr().err
    assert error.count("s-001.tar is broken") == 1 and "0015 is skipped" in error
    damage(tars / "s-002.tar", at=0)
    with pytest.raises(UserError, match=r"2 of 4 tars are broken"):
        first(build_loader(stream(tars), collate), 20)


def test_a_header_in_the_middle_is_damaged(tars):
    damage(tars / "s-003.tar", at=4 * 1024)
    found = scan_tar(str(tars / "s-003.tar"))
    assert [r.key for r in found.samples] == ["0030", "0031"]
    assert "header at byte 4096 is damaged" in str(found.problem)


def test_tar_member_names(tmp_path):
    long = "folder/" + "x" * 120
    path = write_tar(
        tmp_path / "a.tar",
        [],
        [(f"{long}.seg.PNG", b"1"), (f"{long}.png", b"0"), ("b/c.txt", b"22"), ("b/c.json", b"{}")],
    )
    assert [(r.key, set(r.members)) for r in scan_tar(path).samples] == [
        (long, {"seg.png", "png"}),
        ("b/c", {"txt", "json"}),
    ]
    assert scan_tar(path).samples[0].read("seg.png") == b"1"
    with pytest.raises(BadSample, match=r"has no \.png"):
        scan_tar(path).samples[1].read("png")


def test_a_rewritten_tar_is_indexed_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", ["0001"])
    assert scan_tar(path).samples[0].text("txt") == "text 0001"
    write_tar(tmp_path / "a.tar", ["0002", "0003"])
    assert [r.text("txt") for r in scan_tar(path).samples] == ["text 0002", "text 0003"]


def test_patterns(tars):
    assert len(matching_files(f"{tars}/s-{{000..002}}.tar")) == 3
    for pattern, words in [
        (f"{tars}/x-*.tar", "no file"),
        (f"{tars}/s-{{000..009}}.tar", "s-004.tar"),
        (str(tars), "folders"),
    ]:
        with pytest.raises(UserError, match=words):
            matching_files(pattern)
    (tars / "s-000.tar").write_bytes(gzip.compress((tars / "s-000.tar").read_bytes()))
    with pytest.raises(UserError, match="compressed"):
        scan_tar(str(tars / "s-000.tar"))


def test_fingerprint_changes_with_the_data(tars):
    before = stream(tars).fingerprint()
    assert before == stream(tars).fingerprint()
    write_tar(tars / "s-000.tar", [f"{n:04d}" for n in range(1, 11)])
    assert before != stream(tars).fingerprint()
