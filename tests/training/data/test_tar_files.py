"""Tars from commands, servers and compressed files: streaming, resume, breaks, and who may run a command."""

import contextlib
import gzip
import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training.core.config import to_yaml
from open_unitok.training.core.options import DataSource, ShardOptions
from open_unitok.training.data import check, tar_files
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.shards import ShardStream, build_loader, read_batches
from open_unitok.training.data.tar_files import StreamedTar, matching_shards, shown, source_name, tar_writer
from open_unitok.training.data.tar_index import BadSample, matching_files, scan_tar
from open_unitok.training.run import load_run_config


def write_tar(path, numbers):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = f"text {number}".encode() + b" " * 3000
            member = tarfile.TarInfo(f"{number:04d}.txt")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def tars(tmp_path):
    """Four tars of 10 samples, keys 0 to 39."""
    for tar in range(4):
        write_tar(tmp_path / f"s-{tar}.tar", range(10 * tar, 10 * tar + 10))
    return tmp_path


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `folder`; the first `breaks` answers end in the middle."""

    folder, breaks, ranges, status, requests = None, 0, True, None, []

    def do_GET(self):
        cls = type(self)
        cls.requests.append((self.path, self.headers.get("Range")))
        path = cls.folder / self.path.strip("/").partition("?")[0]
        if cls.status or not path.is_file():
            self.send_error(cls.status or 404)
            return
        data, start = path.read_bytes(), 0
        if cls.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{len(data)}"')
        self.end_headers()
        if cls.breaks > 0:
            cls.breaks -= 1
            data = data[: start + (len(data) - start) // 2]
        with contextlib.suppress(OSError):
            self.wfile.write(data[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tars, monkeypatch):
    monkeypatch.setattr(tar_files, "PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    Server.folder, Server.breaks, Server.ranges, Server.status, Server.requests = tars, 0, True, None, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def read(source):
    """The numbers of a stream's samples, and its problem."""
    stream = StreamedTar(source)
    return [int(sample.text("txt").split()[1]) for sample in stream], stream.problem


@pytest.mark.parametrize("packed", [False, True])
def test_commands_and_compressed_files_are_streamed(tars, packed):
    path = tars / "s-1.tar"
    if packed:
        path = tars / "s-1.tar.gz"
        path.write_bytes(gzip.compress((tars / "s-1.tar").read_bytes()))
        assert read(str(path)) == (list(range(10, 20)), None)
    assert read(f"pipe:cat {path}") == (list(range(10, 20)), None)
    sample = next(iter(StreamedTar(f"pipe:cat {path}")))
    with pytest.raises(BadSample, match=r"has no \.jpg"):
        sample.read("jpg")


def test_a_command_that_fails_is_named(tars):
    path = tars / "s-0.tar"
    assert read(f"pipe:head -c 9000 {path}")[1].startswith("it ends at byte 9000 inside a member")
    # all samples came, but a command that fails may have left some out
    assert read(f"pipe:cat {path}; exit 3") == (list(range(10)), "its command ended with exit status 3")
    numbers, problem = read(f"pipe:head -c 9000 {path}; exit 4")
    assert numbers == [0, 1] and "exit status 4" in problem
    assert "exit status 127" in read("pipe:no-such-command-here 2> /dev/null")[1]
    (tars / "cut.tar.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    numbers, problem = read(str(tars / "cut.tar.gz"))
    assert numbers and problem


def test_a_connection_that_breaks_is_continued(tars, server):
    assert read(f"{server}/s-2.tar") == (list(range(20, 30)), None)
    for ranges in (True, False):
        Server.breaks, Server.ranges, Server.requests = 2, ranges, []
        assert read(f"{server}/s-2.tar") == (list(range(20, 30)), None)
        assert len(Server.requests) == 3 and Server.requests[1][1].startswith("bytes=")
    Server.breaks, Server.requests = 99, []
    numbers, problem = read(f"{server}/s-2.tar")
    assert numbers and "connection ended at byte" in problem and len(Server.requests) == tar_files.TRIES
    assert read(f"{server}/none.tar") == ([], "it cannot be read: HTTP 404")
    Server.status, Server.requests = 503, []
    assert read(f"{server}/s-2.tar")[1] == "it cannot be read: HTTP 503"
    assert len(Server.requests) == tar_files.TRIES


def test_a_server_that_is_not_there(server):
    host = server.rsplit(":", 1)[0]
    assert "Connection refused" in read(f"{host}:1/a.tar")[1]


def options(sources, **changes):
    return ShardOptions(**{"sources": [DataSource(path=sources)], "shuffle": 12, **changes})


def decode(record, rng):
    return int(record.text("txt").split()[1]), rng.random()


def collate(samples):
    return {"numbers": [number for number, _ in samples], "random": [value for _, value in samples]}


def loader(sources, **changes):
    return build_loader(ShardStream(options(sources, **changes), decode, seed=0, micro_batch=4), collate)


def first(batches, count):
    rows = read_batches(batches)
    return [next(rows) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["samples", "shards"])
def test_training_from_streams_is_that_from_files_and_resumes_exactly(tars, split, workers):
    files = first(loader(f"{tars}/s-*.tar", split=split, workers=workers), 20)
    pipes = f"pipe:cat {tars}/s-{{0..3}}.tar"
    assert first(loader(pipes, split=split, workers=workers), 20) == files
    started = loader(pipes, split=split, workers=workers)
    rows = read_batches(started)
    parts = [next(rows) for _ in range(7)]
    resumed = loader(pipes, split=split, workers=workers)
    resumed.load_state_dict(
        json.loads(json.dumps(started.state_dict(), default=str)) if not workers else started.state_dict()
    )
    assert parts + first(resumed, 13) == files


def test_training_from_a_server_resumes_and_skips_what_breaks(tars, server, capfd):
    urls = [f"{server}/s-{n}.tar?signed=secret" for n in range(4)]
    files = first(loader(f"{tars}/s-*.tar"), 12)
    assert first(loader(urls), 12) == files
    (tars / "s-3.tar").write_bytes((tars / "s-3.tar").read_bytes()[:20000])
    numbers = {n for batch in first(loader(urls), 9) for n in batch["numbers"]}
    assert numbers >= set(range(30)) and 39 not in numbers
    error = capfd.readouterr().err
    assert error.count("s-3.tar is broken: it ends at byte") == 1 and "secret" not in error


def test_other_readers_of_streams_read_the_rest(tars):
    pipes = f"pipe:cat {tars}/s-{{0..3}}.tar"
    started = loader(pipes, shuffle=4)
    before = [n for batch in first(started, 3) for n in batch["numbers"]]
    other = ShardStream(options(pipes, shuffle=4, split="shards"), decode, seed=0, micro_batch=1)
    other.continue_after([started.state_dict()])
    rest = [n for batch in first(build_loader(other, collate), 40 - len(before)) for n in batch["numbers"]]
    assert sorted(before + rest) == list(range(40))


def test_sources_are_checked_before_they_are_read(tars):
    assert matching_shards([f"{tars}/s-0.tar", "https://h/{a,b}.tar", "-"]) == [
        "-", str(tars / "s-0.tar"), "https://h/a.tar", "https://h/b.tar",
    ]  # fmt: skip
    for source, words in (("ftp2://a/b.tar", "scheme 'ftp2'"), (f"{tars}/none.tar", "no file")):
        with pytest.raises(UserError, match=words):
            matching_shards(source)
    with pytest.raises(UserError, match="only once"):
        ShardStream(options("-"), decode, seed=0, micro_batch=1)
    assert shown("https://me:pass@host/a.tar?key=1") == "https://host/a.tar"
    assert source_name("pipe:curl -H secret").startswith("pipe:") and "secret" not in source_name(
        "pipe:secret"
    )
    # everything but the command line and a run's YAML uses this one
    with pytest.raises(UserError, match="no file matches pipe:"):
        matching_files(f"pipe:touch {tars}/ran")
    with pytest.raises(OSError):
        scan_tar(f"pipe:touch {tars}/ran")
    assert not (tars / "ran").exists()


def test_written_tars_are_the_same_bytes_and_webdataset_reads_them(tmp_path):
    import webdataset

    for name in ("a.tar", "b.tar"):
        with open(tmp_path / name, "wb") as file, tar_writer(file) as writer:
            tar_files.write_sample(writer, "k" * 150, {"txt": b"1", "json": b"{}"})
            tar_files.write_sample(writer, "猫", {"txt": b"2", "json": b"{}"})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    assert [(s["__key__"], s["txt"]) for s in found] == [("k" * 150, b"1"), ("猫", b"2")]
    assert [list(r.members) for r in scan_tar(str(tmp_path / "a.tar")).samples] == [["txt", "json"]] * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "stage_widths": (8, 16), "stage_depths": (1, 1), "hidden_size": 32}
    decoder = {"decoder_widths": (16, 8), "decoder_depths": (1, 1), "num_attention_heads": 2}
    codes = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 4, "num_hidden_layers": 1}
    text = {"text_hidden_size": 16, "text_num_layers": 1, "text_num_heads": 2, "text_vocab_size": 20}
    folder = tmp_path_factory.mktemp("tokenizer") / "unitok"
    UniTok(UniTokConfig(image_size=32, embed_dim=8, **sizes, **decoder, **codes, **text)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def images(tars):
    """A tar of five images with captions, and one file that is none."""
    with tarfile.open(tars / "images.tar", "w") as tar:
        for number in range(5):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            for name, content in ((f"i.{number}.png", data.getvalue()), (f"i.{number}.txt", b"a")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo(".DS_Store"))
    return tars / "images.tar"


def extract(tokenizer, source, out, *more):
    main_words = ["extract-codes", "--tokenizer", str(tokenizer), "--data", *source, "--out", str(out), *more]
    run(main_words)
    return CodeFolder(out)


def test_codes_of_streams_are_those_of_files(images, tokenizer, server, capsys, monkeypatch):
    root = images.parent
    expected = extract(tokenizer, [str(images)], root / "a")
    assert "1 hidden files left out" in capsys.readouterr().out
    packed = root / "images.tgz"
    packed.write_bytes(gzip.compress(images.read_bytes()))
    sources = (f"pipe:cat {images}", f"{server}/images.tar?token=1", str(packed), "-")
    for number, source in enumerate(sources):
        if source == "-":
            monkeypatch.setattr(
                "sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(images.read_bytes())))
            )
        codes = extract(tokenizer, [source], root / f"b{number}", "--batch-size", "2")
        assert "1 hidden files left out" in capsys.readouterr().out
        assert (root / f"b{number}" / "codes-000000.tar").read_bytes() == (
            root / "a" / "codes-000000.tar"
        ).read_bytes()
        assert len(codes) == len(expected) == 5
    # complete shards are not read again, and neither command nor signature is stored
    images.unlink()
    stored = extract(tokenizer, [sources[0]], root / "b0").manifest
    extract(tokenizer, [f"{server}/images.tar?token=2"], root / "b1")
    text = json.dumps(stored) + (root / "b0" / "codes-000000.json").read_text()
    assert "cat " not in text and "token=" not in (root / "b1" / "codes-000000.json").read_text()
    with pytest.raises(UserError, match="another extraction"):
        extract(tokenizer, ["pipe:cat other.tar"], root / "b0")


def test_extraction_refuses_a_stream_that_breaks(images, tokenizer, server):
    root = images.parent
    for source, words in (
        (f"pipe:head -c 9000 {images}", "is broken: it ends at byte"),
        (f"pipe:cat {images}; exit 5", "exit status 5"),
        (f"{server}/none.tar", "HTTP 404"),
        ("pipe:true", "is empty"),
    ):
        with pytest.raises(UserError, match=words) as error:
            extract(tokenizer, [source], root / "out")
        assert "\n" not in str(error.value) and not (root / "out" / "codes.json").exists()
    with pytest.raises(UserError, match="cannot be mixed"):
        extract(tokenizer, ["-", str(images)], root / "out")


def test_check_reads_streams_and_samples_many(images, capsys, monkeypatch):
    for source in (str(images), f"pipe:cat {images}"):
        run(["data", "check", source])
        out = capsys.readouterr().out
        assert "5 samples, 5 checked" in out and "1 hidden files left out (first: .DS_Store)" in out
    monkeypatch.setattr(check, "_MANY", 2)
    run(["data", "check", str(images)])
    assert "5 samples, 3 checked (every 2th; --samples 0 checks all)" in capsys.readouterr().out
    for workers in ("0", "3"):
        run(["data", "check", str(images), "--samples", "0", "--workers", workers])
        assert "5 samples, 5 checked\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 problem"):
        run(["data", "check", f"pipe:head -c 9000 {images}"])


def test_a_run_directory_may_not_name_commands(tmp_path):
    own, command = tmp_path / "mine.yaml", f"data.sources=[{{path: 'pipe:touch {tmp_path}/ran'}}]"
    shipped = load_run_config("configs/tokenizer/unitok_base.yaml", [command])
    own.write_text(to_yaml(shipped))
    assert load_run_config(str(own), []).data.sources[0].path.startswith("pipe:")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text(own.read_text())
    with pytest.raises(UserError, match="belongs to a run directory") as error:
        load_run_config(str(folder / "config.yaml"), [])
    assert "\n" not in str(error.value)
    assert load_run_config(str(folder / "config.yaml"), [command])
    assert not (tmp_path / "ran").exists()


def test_notes_explain_why_extraction_stops(images, tokenizer, capsys):
    with tarfile.open(images, "a") as tar:
        for number in range(3):
            link = tarfile.TarInfo(f"link{number}.png")
            link.type, link.linkname = tarfile.LNKTYPE, "i.0.png"
            tar.addfile(link)
            tar.addfile(tarfile.TarInfo(f"link{number}.txt"))
    with pytest.raises(UserError, match="3 of 8 images are unreadable"):
        extract(tokenizer, [str(images)], images.parent / "out")
    assert "3 links left out (first: link0.png)" in capsys.readouterr().err


def test_a_checkpoint_names_no_sources(tars):
    """The state of a loader holds numbers of tars; names that somebody adds are not read."""
    batches = loader(f"{tars}/s-*.tar")
    first(batches, 2)
    state = batches.state_dict()

    def plant(value):
        if isinstance(value, dict):
            inner = {key: plant(item) for key, item in value.items()}
            return {**inner, "tars": [f"pipe:touch {tars}/ran"] * 4} if "cursor" in inner else inner
        return [plant(item) for item in value] if isinstance(value, list) else value

    planted = plant(state)
    assert "pipe:touch" in str(planted)
    resumed = loader(f"{tars}/s-*.tar")
    resumed.load_state_dict(planted)
    assert first(resumed, 3) == first(loader(f"{tars}/s-*.tar"), 5)[2:]
    assert not (tars / "ran").exists()
