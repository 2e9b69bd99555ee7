"""Every source format on twenty samples, from its published layout on disk to a batch: `unitok data convert`,
`unitok extract-codes`, the mixture. Each text has the codes of its images, and labels are correct."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from open_unitok.cli.main import run
from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import load_image, to_pixels
from open_unitok.training.core.config import build_config
from open_unitok.training.data.code_shards import CodeFolder
from open_unitok.training.data.mixture import Mixture
from open_unitok.training.data.mixture_options import MixtureOptions
from open_unitok.training.data.sample_kinds import IGNORE_INDEX
from open_unitok.training.data.sequences import SequenceBuilder

from ..two_ranks import launch

IMAGE, TOKENS = -200, 4
THINGS = ("cat", "dog", "fox", "sky")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tiny visual tokenizer: 32 pixels, 4 visual tokens of 3 codes."""
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


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty images train/00.png to train/19.png."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "train").mkdir()
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(folder / "train" / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def codes_of(tokenizer, images):
    """number -> (N, K) codes of image `number`, as lists."""
    unitok = UniTok.from_pretrained(tokenizer).eval()
    pixels = [to_pixels(load_image(images / "train" / f"{n:02d}.png"), 32) for n in range(20)]
    codes = [unitok.encode(p[None])[0].tolist() for p in pixels]
    assert len({str(c) for c in codes}) > 15
    return codes


@pytest.fixture(scope="module")
def image_codes(tokenizer, images, tmp_path_factory):
    """A code folder of the images without texts."""
    folder = tmp_path_factory.mktemp("images")
    return prepare("folder", images, folder, tokenizer)


def unitok(*words):
    run([str(word) for word in words])


def extract(tokenizer, tars, out, *more):
    given = ("--tokenizer", tokenizer, "--data", f"{tars}/*.tar", "--out", out, "--batch-size", 4)
    unitok("extract-codes", *given, *more)


def prepare(kind, source, folder, tokenizer, *more):
    """Convert and extract; returns the code folder."""
    unitok("data", "convert", kind, source, folder / "tars", "--shard", 7, *more)
    extract(tokenizer, folder / "tars", folder / "codes")
    return folder / "codes"


@pytest.fixture(scope="module")
def mixture(golden, tokenizer):
    """(entries, batch_size, **options) -> a mixture with the plain template."""
    fingerprint = UniTok.from_pretrained(tokenizer).fingerprint()
    path = golden / "mllm" / "tokenizer.model"
    processor = UniTokProcessor.from_text_tokenizer(path, num_image_tokens=TOKENS, template="plain")

    def make(entries, batch_size=20, max_length=400, **options):
        checked = build_config(MixtureOptions, {"mixture": entries, **options})
        sequences = SequenceBuilder(processor, max_length)
        return Mixture(checked, sequences, seed=0, batch_size=batch_size, fingerprint=fingerprint)

    return make


def read_batch(mixture):
    """[(text, [codes of each image], learned text, number of images learned)] of one batch."""
    (batch,) = mixture.next()
    inputs = batch.inputs

    def decode(ids):
        text = mixture.sequences.processor.decode(ids).translate({0: " ", 1: " "})  # boi and eoi are bytes
        return " ".join(text.split())

    codes = iter([] if inputs["image_codes"] is None else inputs["image_codes"].tolist())
    found = []
    for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        images = [next(codes) for _ in range(int((ids == IMAGE).sum()) // TOKENS)]
        learned = labels[(labels != IGNORE_INDEX) & (labels != IMAGE)]
        found.append((decode(ids), images, decode(learned), int((labels == IMAGE).sum()) // TOKENS))
    assert next(codes, None) is None
    return found


def entry(kind, path, **more):
    return {"kind": kind, "path": str(path), **more}


# ---- LLaVA's conversations ---------------------------------------------------------------------------------


def llava_rows():
    """Twenty conversations: one, two or no images, one or two rounds; the answers name the images."""
    rows = []
    for n in range(20):
        images = [f"train/{n:02d}.png", f"train/{(n + 1) % 20:02d}.png"][: n % 3]
        marks = "" if n % 2 else "<image>\n" * len(images)
        turns = [
            {"from": "human", "value": f"{marks}What is in the photo"},
            {"from": "gpt", "value": f"a {THINGS[n % 4]} {n}"},
        ]
        if n % 4 == 0:
            turns += [{"from": "human", "value": "What is it"}, {"from": "gpt", "value": f"a photo {n}"}]
        image = {"image": images[0] if len(images) == 1 else images} if images else {}
        rows.append({"id": f"talk {n}", **image, "conversations": turns})
    return rows


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    (folder / "conversations.json").write_text(json.dumps(llava_rows()))
    (folder / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in llava_rows()))
    return folder


def check_conversations(found, codes_of):
    assert len(found) == 20
    for text, images, learned, generated in found:
        number = int(learned.split()[2])
        assert generated == 0 and learned.startswith(f"a {THINGS[number % 4]} {number}")
        assert learned.endswith(f"a photo {number}") == (number % 4 == 0)
        assert "What" in text and "What" not in learned  # only the assistant's turns are learned
        assert images == [codes_of[(number + i) % 20] for i in range(number % 3)]
    assert sorted(int(learned.split()[2]) for _, _, learned, _ in found) == list(range(20))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_llava_with_images_on_disk(llava, ending, images, tokenizer, mixture, codes_of, tmp_path):
    codes = prepare("llava", llava / f"conversations.{ending}", tmp_path, tokenizer, "--images", images)
    assert json.loads((codes / "codes.json").read_text())["images"] == sum(n % 3 for n in range(20))
    check_conversations(read_batch(mixture([entry("conversation", codes)])), codes_of)


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_llava_with_codes_looked_up(llava, ending, image_codes, mixture, codes_of):
    made = mixture([entry("conversation", llava / f"conversations.{ending}", codes=str(image_codes))])
    check_conversations(read_batch(made), codes_of)


def test_conversations_that_cannot_be_used(image_codes, tokenizer, images, tmp_path, mixture, capsys):
    rows = [
        *llava_rows()[:4],
        {"id": "nowhere", "image": "train/99.png", "conversations": rows_of("<image>\na", "b")},
        {"id": "marks", "image": "train/01.png", "conversations": rows_of("<image><image>a", "b")},
        {"id": "turns", "conversations": [*rows_of("a", "b"), {"from": "gpt", "value": "c"}]},
        {"id": "none"},
        {
            "id": "roles",
            "messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "b"}],
        },
    ]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    made = mixture([entry("conversation", path, codes=str(image_codes))], batch_size=9)
    found = read_batch(made)
    assert made.bad >= 4 and len(found) == 9
    error = capsys.readouterr().err
    for words in ("99.png, which is not in", "marks 2 image(s)", "must alternate", "has no conversations"):
        assert words in error
    given = ("--images", images, "--max-bad-share", 0.5)
    unitok("data", "convert", "llava", path, tmp_path / "tars", *given)
    assert "5 samples" in (out := capsys.readouterr().out) and "4 skipped" in out
    with pytest.raises(UserError, match="not a code folder, as kind text_to_image"):
        mixture([entry("text_to_image", path)])
    with pytest.raises(UserError, match="allowed only with conversations"):
        mixture([entry("text_to_image", image_codes, codes=str(image_codes))])
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match="not a list of conversations"):
        mixture([entry("conversation", tmp_path / "no.json")])


def rows_of(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# ---- interleaved documents ---------------------------------------------------------------------------------


def obelics_rows():
    """Twenty documents: image, text, image, text; every fifth also names a missing image."""
    rows = []
    for n in range(20):
        lost = ["nowhere.png"] if n % 5 == 0 else []
        images = [f"train/{n:02d}.png", None, f"train/{(n + 3) % 20:02d}.png", None, *lost]
        texts = [None, f"a {THINGS[n % 4]} {n}", None, "in the blue sky", *[None for _ in lost]]
        rows.append({"texts": texts, "images": images, "metadata": "{}"})
    return rows


def mmc4_rows():
    """The same documents in MMC4's format."""
    rows = []
    for n in range(20):
        names = [f"train/{n:02d}.png", f"train/{(n + 3) % 20:02d}.png", "nowhere.png"][
            : 3 if n % 5 == 0 else 2
        ]
        info = [{"image_name": name, "matched_text_index": min(i, 1)} for i, name in enumerate(names)]
        rows.append({"text_list": [f"a {THINGS[n % 4]} {n}", "in the blue sky"], "image_info": info})
    return rows


@pytest.mark.parametrize("kind", ["obelics", "mmc4"])
def test_documents(kind, images, tokenizer, mixture, codes_of, tmp_path, capsys):
    source = tmp_path / "documents.jsonl"
    rows = obelics_rows() if kind == "obelics" else mmc4_rows()
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes = prepare(kind, source, tmp_path, tokenizer, "--images", images)
    assert "20 samples, 40 images, 4 lost images" in capsys.readouterr().out
    for role in ("document", "reading"):
        found = read_batch(mixture([entry(role, codes)]))
        numbers = []
        for text, found_codes, learned, generated in found:
            number = int(text.split()[2])
            assert text == learned == f"a {THINGS[number % 4]} {number} in the blue sky"
            assert found_codes == [codes_of[number], codes_of[(number + 3) % 20]]
            assert generated == (2 if role == "document" else 0)
            numbers.append(number)
        assert sorted(numbers) == list(range(20))
    with pytest.raises(UserError, match="cannot be used as text_to_image"):
        mixture([entry("text_to_image", codes)], max_bad_share=1.0).next()


def test_a_long_document_ends_before_an_image_that_does_not_fit(
    images, tokenizer, mixture, codes_of, tmp_path
):
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in obelics_rows()))
    codes = prepare("obelics", source, tmp_path, tokenizer, "--images", images)
    lengths = set()
    for limit in range(10, 26):
        (batch,) = (made := mixture([entry("document", codes)], max_length=limit)).next()
        ids = batch.inputs["input_ids"]
        lengths.add(int(batch.inputs["attention_mask"].sum(1).max()))
        visual = int((ids == IMAGE).sum())
        assert visual % TOKENS == 0 and visual // TOKENS == len(batch.inputs["image_codes"]) and made.bad == 0
        ends = ids[torch.arange(20), batch.inputs["attention_mask"].sum(1) - 1]
        assert made.sequences.processor.boi_token_id not in ends  # no boi without its image
    assert min(lengths) <= 10 and max(lengths) > 20


def test_images_that_img2dataset_fetched_are_found_by_url(images, tmp_path):
    fetched = tmp_path / "fetched" / "00000"
    fetched.mkdir(parents=True)
    (fetched / "000000003.png").write_bytes((images / "train" / "05.png").read_bytes())
    (fetched / "000000003.json").write_text(json.dumps({"url": "https://a.b/c.png", "status": "success"}))
    row = {"texts": [None, "a cat", None], "images": ["https://a.b/c.png", None, "https://a.b/gone.png"]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    given = ("--images", tmp_path / "fetched")
    unitok("data", "convert", "obelics", tmp_path / "d.jsonl", tmp_path / "out", *given)
    assert (tmp_path / "out" / "part-000000.tar").read_bytes().count(b"000000000.png") == 1


# ---- images with captions, plain text --------------------------------------------------------------------


def test_image_text_pairs(images, tokenizer, mixture, codes_of, tmp_path):
    rows = [{"file_name": f"train/{n:02d}.png", "text": f"a {THINGS[n % 4]} {n}"} for n in range(20)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codes = prepare("folder", tmp_path / "m.jsonl", tmp_path, tokenizer, "--images", images)
    generated = read_batch(mixture([entry("text_to_image", codes)], unconditional=0.0))
    captioned = read_batch(mixture([entry("captioning", codes)]))
    for text, found_codes, learned, count in generated:
        assert (found_codes, learned, count) == ([codes_of[int(text.split()[2])]], "", 1)
    for text, found_codes, learned, count in captioned:
        assert (found_codes, learned, count) == ([codes_of[int(text.split()[2])]], text, 0)
    assert len({text for text, *_ in generated}) == len({text for text, *_ in captioned}) == 20


def test_plain_text(tmp_path, mixture):
    (tmp_path / "a.txt").write_text("".join(f"a cat {n}\n\n" for n in range(10)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"a dog\n{n}"}) + "\n" for n in range(10)))
    for name in ("a.txt", "b.jsonl"):
        found = read_batch(mixture([entry("text", tmp_path / name)], batch_size=10))
        assert len({text for text, *_ in found}) == 10
        assert all(text == learned and not images for text, images, learned, _ in found)
    both = read_batch(mixture([entry("text", f"{tmp_path}/*.*")]))
    assert len({text for text, *_ in both}) == 20
    (tmp_path / "c.jsonl").write_text('{"txt": "a"}\n[1]\n{"text"\n"a cat"\n')
    made = mixture([entry("text", tmp_path / "c.jsonl")], batch_size=4)
    assert {text for text, *_ in read_batch(made)} == {"a cat"} and made.bad >= 3
    (tmp_path / "d.txt").write_bytes(b"\x1f\x8b123")
    for path, words in ((tmp_path / "d.txt", "compressed"), (f"{tmp_path}/*.csv", "no file")):
        with pytest.raises(UserError, match=words):
            mixture([entry("text", path)])


# ---- extraction by several processes -----------------------------------------------------------------------


def test_a_sample_without_one_of_its_images_is_skipped(images, tokenizer, tmp_path, capsys):
    rows = [row for row in llava_rows() if row.get("image")]
    (tmp_path / "conversations.json").write_text(json.dumps(rows))
    unitok(
        "data", "convert", "llava", tmp_path / "conversations.json", tmp_path / "whole", "--images", images
    )
    (tmp_path / "tars").mkdir()
    with (
        tarfile.open(tmp_path / "whole" / "part-000000.tar") as whole,
        tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar,
    ):
        for member in whole:
            if member.name != "000000001.1.png":
                tar.addfile(member, whole.extractfile(member))
    extract(tokenizer, tmp_path / "tars", tmp_path / "codes")
    assert "has 0.png, json, expected 2 image(s)" in capsys.readouterr().err
    assert len(CodeFolder(tmp_path / "codes")) == len(rows) - 1


@pytest.mark.slow
def test_torchrun_splits_the_tars(images, tokenizer, image_codes, tmp_path):
    """Two processes without communication write the same files as one."""
    unitok("data", "convert", "folder", images, tmp_path / "tars", "--shard", 7)
    command = ["-m", "open_unitok", "extract-codes", "--tokenizer", tokenizer, "--batch-size", 4]
    given = ["--data", f"{tmp_path}/tars/*.tar", "--out", tmp_path / "codes"]
    launch(*command, *given, timeout=120)
    assert len(CodeFolder(tmp_path / "codes")) == 20
    for path in image_codes.iterdir():
        assert (tmp_path / "codes" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("kind", "mode"), [("llava", "pad"), ("folder", "crop")])
def test_convert_extracts_codes_in_the_mode_of_the_kind(kind, mode, llava, images, tokenizer, tmp_path):
    source = llava / "conversations.json" if kind == "llava" else images
    more = ("--images", images) if kind == "llava" else ()
    unitok("data", "convert", kind, source, tmp_path / "out", "--tokenizer", tokenizer, *more)
    assert CodeFolder(tmp_path / "out" / "codes").manifest["mode"] == mode
