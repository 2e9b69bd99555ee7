"""`unitok data emoji`: the join of the packages, the frozen splits, the files, and its errors."""

import collections
import io
import json
import os
import re
import shutil
import tarfile
import tempfile

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from open_unitok.cli.main import main
from open_unitok.core.errors import UserError
from open_unitok.eval.core.image_files import read_sample_image
from open_unitok.tokenizer.words import read_words
from open_unitok.training.data.text import dataset_texts
from open_unitok.training.emoji import packages as emoji_packages
from open_unitok.training.emoji import splits
from open_unitok.training.emoji.dataset import write_emoji
from open_unitok.training.emoji.packages import EMOJI_PACKAGES, STYLES, package_folders, read_emoji
from open_unitok.training.emoji.questions import EMOJI_QUESTIONS
from open_unitok.training.emoji.words import write_words

from .conftest import COUNTS, EMOJI, IMAGES


@pytest.fixture(scope="module")
def images(packages):
    with package_folders([packages]) as folders:
        return read_emoji(folders)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- packages ----------------------------------------------------------------------------------------------


def test_styles_are_joined_by_code_point(images):
    assert len(images) == IMAGES and len({image.key for image in images}) == IMAGES
    fluent = {i.emoji.code: i.file.stem for i in images if i.style == "fluent"}
    assert fluent == {c.lower(): file for c, (_, kind, file) in EMOJI.items() if file and kind != "Component"}
    assert all(i.file.stem == i.emoji.code for i in images if i.style != "fluent")
    assert images[0].emoji == ("1f600", "GRINNING FACE", "Smileys & Emotion", "x")


def test_an_exact_spelling_comes_first(tmp_path):
    for name in ("0023-fe0f-20e3", "23-fe0f-20e3", "0023-20e3"):
        (tmp_path / f"{name}.webp").touch()
    assert emoji_packages._image_file(tmp_path, "0023-fe0f-20e3", ".webp").stem == "0023-fe0f-20e3"
    assert emoji_packages._image_file(tmp_path, "0024-fe0f-20e3", ".webp") is None


def test_packages_are_folders_parents_or_archives(packages, archives):
    each = [packages / package.name for package in EMOJI_PACKAGES]
    for given in ([packages], [packages.parent], each, archives):
        with package_folders(given) as folders:
            assert set(folders) == set(STYLES) and len(read_emoji(folders)) == IMAGES
    # Apple's images are not even unpacked
    with package_folders(archives) as folders:
        assert not list(folders["google"].rglob("apple"))


def test_npm_fetches_them_and_nothing_stays(archives, tmp_path, monkeypatch):
    """A program in npm's place: it gets the three names and leaves their files where it runs."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    copies = "; ".join(f"cp {file} ." for file in archives)
    npm.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{copies}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with package_folders() as folders:
        assert len(read_emoji(folders)) == IMAGES
    assert not list((tmp_path / "temporary").iterdir())
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[0] == "pack" and "--ignore-scripts" in arguments
    wanted = [
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-twitter@16.0.0",
        "@lobehub/fluent-emoji-3d@1.1.0",
    ]
    assert arguments[-3:] == wanted
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    with pytest.raises(
        UserError, match=r"npm cannot fetch the packages \(npm error code E404\): run `npm pack"
    ):
        package_folders().__enter__()
    assert not list((tmp_path / "temporary").iterdir())


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["data", "emoji", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert "npm is not installed" in error[0] and "@lobehub/fluent-emoji-3d@1.1.0" in error[0]
    assert "--packages" in error[0]


def test_two_styles_are_a_part_of_the_published_splits(emoji, packages, frozen, tmp_path, capsys):
    """What may be passed on: without Fluent's package, its images, its name and its licence."""
    out, given = tmp_path / "out", [packages / p.name for p in EMOJI_PACKAGES[:2]]
    command = ["data", "emoji", "--out", str(out), "--styles", "twitter", "google"]
    main([*command, "--packages", *map(str, given)])
    assert f"{out}: 36 image-caption pairs" in capsys.readouterr().out
    for split in ("train", "validation", "pairs", "unseen"):
        all_items = json.loads((emoji / split / "items.json").read_text())
        items = json.loads((out / split / "items.json").read_text())
        assert [i["prompt"] for i in items] == [i["prompt"] for i in all_items if i["style"] != "Fluent 3D"]
        assert json.loads((out / split / "style.json").read_text())["classes"] == ["Google", "Twitter"]
    text = (out / "README.md").read_text()
    assert "Twemoji" in text and "Fluent" not in text and "Microsoft" not in text
    main(command)  # finished: needs no packages
    other = r"other settings \(size 64, google twitter\) than size 64, google twitter fluent: choose another"
    with pytest.raises(UserError, match=other):
        write_emoji(out, packages=[packages], progress=False)
    for styles, words in (
        (["google", "apple"], "'apple' is not a style. Allowed: fluent, google, twitter"),
        (["google", "twiter"], "'twiter' is not a style. Did you mean 'twitter'"),
        (["fluent"], "fluent alone has no list of emoji: add google or twitter"),
        ([], "--styles is empty: give some of google, twitter, fluent"),
    ):
        with pytest.raises(UserError, match=words):
            write_emoji(tmp_path / "none", packages=given, styles=styles, progress=False)


@pytest.mark.parametrize("style", ["google", "twitter"])
def test_one_style_needs_one_package(packages, frozen, tmp_path, style):
    """Each has the list of emoji, so that its images have the frozen hash."""
    facts = write_emoji(
        tmp_path / "out", packages=[packages / STYLES[style].name], styles=[style], progress=False
    )
    assert sum(facts["images"].values()) == 18


@pytest.mark.parametrize("styles", [list(STYLES), ["google", "twitter"], ["twitter"]])
def test_a_package_without_images_is_refused(packages, frozen, tmp_path, styles):
    given = tmp_path / "node_modules"
    shutil.copytree(packages, given)
    for image in (given / "emoji-datasource-twitter/img/twitter/64").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="The 0 images of emoji-datasource-twitter are not those of version"):
        write_emoji(tmp_path / "out", packages=[given], styles=styles, progress=False)
    assert not (tmp_path / "out" / "emoji.json").exists()


def test_missing_foreign_and_changed_packages_are_refused(packages, frozen, tmp_path):
    with pytest.raises(UserError, match=r"fluent-emoji-3d@1.1.0 not found there"):
        write_emoji(tmp_path / "a", packages=[packages / p.name for p in EMOJI_PACKAGES[:2]], progress=False)
    with pytest.raises(UserError, match="does not exist"):
        write_emoji(tmp_path / "b", packages=[tmp_path / "nowhere"], progress=False)
    (tmp_path / "no.tgz").write_bytes(b"not a tar")
    with pytest.raises(UserError, match="is not a file of `npm pack`"):
        write_emoji(tmp_path / "c", packages=[tmp_path / "no.tgz"], progress=False)
    changed = tmp_path / "node_modules"
    shutil.copytree(packages, changed)
    image = changed / "emoji-datasource-twitter/img/twitter/64/1f600.png"
    image.write_bytes((changed / "emoji-datasource-google/img/google/64/1f600.png").read_bytes())
    with pytest.raises(
        UserError, match=r"18 images of emoji-datasource-twitter are not those of version 16.0.0"
    ):
        write_emoji(tmp_path / "d", packages=[changed], progress=False)
    manifest = changed / "emoji-datasource-google/package.json"
    manifest.write_text(manifest.read_text().replace("16.0.0", "15.1.2"))
    with pytest.raises(
        UserError, match=r"is version 15.1.2 of emoji-datasource-google; the splits are those of"
    ):
        write_emoji(tmp_path / "e", packages=[changed], progress=False)
    manifest.write_text(manifest.read_text().replace("15.1.2", "16.0.0"))
    (changed / "emoji-datasource-google/emoji.json").write_text('[{"name": "X"}]')
    with pytest.raises(UserError, match=r"emoji.json, entry 0 is not an emoji"):
        write_emoji(tmp_path / "f", packages=[changed], progress=False)


# ---- splits ------------------------------------------------------------------------------------------------


def test_published_splits():
    """95 emoji unseen in every style and 400 pairs, of 5,664 images; frozen."""
    frozen = splits.load_frozen()
    assert frozen["images"] == {"google": 1906, "twitter": 1906, "fluent": 1852}
    assert frozen["splits"] == {"train": 4729, "validation": 250, "pairs": 400, "unseen": 285}
    assert sum(frozen["splits"].values()) == sum(frozen["images"].values()) == 5664
    assert len(set(frozen["unseen"])) == 95 and len(set(frozen["pairs"])) == 400
    codes = [key.partition("-")[2] for key in (*frozen["pairs"], *frozen["validation"])]
    # an emoji is held out in one style at most, so that the other two are trained
    assert len(set(codes)) == 650 and not set(codes) & set(frozen["unseen"])
    assert {key.partition("-")[0] for key in frozen["pairs"]} == set(STYLES)
    assert not any(code.startswith("1f1e") for code in codes)  # regional indicators: flags
    assert set(frozen["packages"].values()) == {package.spec for package in EMOJI_PACKAGES}
    assert "apple" not in json.dumps(frozen) and "facebook" not in json.dumps(frozen)


def test_what_may_be_held_out(images):
    alike = splits.lookalikes(images)
    assert alike == {"1f1f3-1f1f4", "1f1e7-1f1fb"}
    for seed in range(5):
        chosen = splits.choose_splits(images, alike, seed, COUNTS)
        assert chosen == splits.choose_splits(images[::-1], alike, seed, COUNTS)
        assert [len(chosen[split]) for split in ("unseen", "pairs", "validation")] == list(COUNTS)
        codes = chosen["unseen"] + [key.partition("-")[2] for key in chosen["pairs"] + chosen["validation"]]
        assert len(set(codes)) == sum(COUNTS)
        # two looks, two names, two styles only: these are trained
        assert not set(codes) & {*alike, "1f935", "1f935-200d-2642-fe0f", "1fa89"}
        assert "1f1ea-1f1ec" not in {key.partition("-")[2] for key in chosen["pairs"] + chosen["validation"]}
    assert chosen != splits.choose_splits(images, alike, 0, COUNTS)
    with pytest.raises(UserError, match="Only 13 emoji can be held out: 105 are wanted"):
        splits.choose_splits(images, alike, 0, (5, 50, 50))


def test_mirrored_images_look_alike(images, tmp_path):
    image = Image.open(images[0].file).convert("RGBA").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(tmp_path / "mirrored.png")
    other = images[0].emoji._replace(code="1f9ff")
    mirrored = images[0]._replace(emoji=other, file=tmp_path / "mirrored.png")
    assert splits.lookalikes([*images, mirrored]) >= {"1f600", "1f9ff"}


def test_rendering_is_on_white_square_and_of_the_size(images, tmp_path):
    for image in images:
        rendered = splits.render_emoji(image.file, 64)
        assert rendered.mode == "RGB" and rendered.size == (64, 64)
        assert rendered.getpixel((0, 0)) == (255, 255, 255), image.key  # black lies beneath
    tall = Image.new("RGBA", (20, 40), (255, 0, 0, 255))
    tall.save(tmp_path / "tall.png")
    pixels = np.asarray(splits.render_emoji(tmp_path / "tall.png", 40))
    assert (
        (pixels[:, :10] == 255).all() and (pixels[:, 30:] == 255).all() and (pixels[:, 10:30, 1] == 0).all()
    )


# ---- files -------------------------------------------------------------------------------------------------


def test_every_image_is_in_one_split_with_captions_and_labels(emoji, small_splits):
    facts = json.loads((emoji / "emoji.json").read_text())
    assert facts["images"] == {"train": IMAGES - 6 - 3 - 2, "validation": 2, "pairs": 3, "unseen": 6}
    assert facts["differing"] == [] and facts["size"] == 64
    seen = collections.Counter()
    for split in splits.SPLITS:
        with tarfile.open(emoji / split / "emoji-000000.tar") as tar:
            names = tar.getnames()
            for name in names[2::3]:
                key = name.removesuffix(".json")
                record = json.loads(tar.extractfile(name).read())
                image = Image.open(io.BytesIO(tar.extractfile(f"{key}.png").read()))
                assert image.mode == "RGB" and image.size == (64, 64)
                style, _, code = key.partition("-")
                name, category, _ = EMOJI[code.upper()]
                name = name.lower()
                wanted = [name, f"{name}, {STYLES[style].title} style"]
                assert record["captions"] == wanted and record["category"] == category
                assert [record["short_caption"], record["long_caption"]] == wanted
                assert tar.extractfile(f"{key}.txt").read().decode().splitlines() == wanted
                assert record["style"] == STYLES[style].title and record["code_points"] == code
                seen[key] += 1
                held_out = code in small_splits["unseen"], key in small_splits["pairs"]
                assert (split == "unseen", split == "pairs") == held_out
    assert len(seen) == IMAGES and set(seen.values()) == {1}
    assert sorted(dataset_texts(str(emoji / "pairs/*.tar")))  # training's reader takes the tars


def test_held_out_splits_are_folders_that_evaluation_reads(emoji):
    for split in ("validation", "pairs", "unseen"):
        rows = json.loads((emoji / split / "captions.json").read_text())
        listed = json.loads((emoji / split / "category.json").read_text())
        styles = json.loads((emoji / split / "style.json").read_text())
        files = {f"images/{p.name}" for p in (emoji / split / "images").iterdir()}
        assert {row["file"] for row in rows} == files == set(listed["images"]) == set(styles["images"])
        # unique captions for retrieval, all classes as choices
        assert len({row["captions"][0] for row in rows}) == len(rows)
        assert listed["classes"] == sorted({kind for _, kind, _ in EMOJI.values()} - {"Component"})
        assert styles["classes"] == ["Fluent 3D", "Google", "Twitter"] and styles["templates"] == ["{} style"]
        assert (emoji / split / listed["train"]).exists()


def test_licences_are_written(emoji):
    text = (emoji / "README.md").read_text()
    for words in ("Noto Emoji", "Apache License 2.0", "Twemoji", "CC-BY 4.0", "Microsoft", "The MIT License"):
        assert words in text
    assert "national flags" in text  # which Microsoft does not license


def test_the_same_bytes_again_and_after_an_interruption(emoji, packages, frozen, tmp_path):
    wanted = contents(emoji)
    copy = tmp_path / "data"
    shutil.copytree(emoji, copy)
    # killed before its end
    facts = json.loads((copy / "emoji.json").read_text())
    (copy / "unfinished.json").write_text(json.dumps({key: facts[key] for key in ("size", "packages")}))
    for name in ("emoji.json", "unseen/emoji-000000.tar", "train/style.json", "text/tokenizer.model"):
        (copy / name).unlink()
    (copy / ".packages").mkdir()
    (copy / ".packages/old.tgz").touch()
    kept = (copy / "train/emoji-000000.tar").stat().st_mtime_ns
    write_emoji(copy, packages=[packages], progress=False)
    assert contents(copy) == wanted and (copy / "train/emoji-000000.tar").stat().st_mtime_ns == kept
    # finished: the packages are not needed any more
    assert write_emoji(copy, packages=[tmp_path / "nowhere"], progress=False) == facts
    # an unfinished folder of another size starts anew
    (copy / "emoji.json").rename(copy / "unfinished.json")
    (copy / "unfinished.json").write_text(json.dumps({"size": 128, "packages": facts["packages"]}))
    write_emoji(copy, packages=[packages], progress=False)
    assert contents(copy) == wanted


def test_size_128_and_other_folders(emoji, packages, frozen, tmp_path, capsys):
    out = tmp_path / "large"
    main(["data", "emoji", "--out", str(out), "--size", "128", "--packages", str(packages)])
    assert (
        f"{out}: {IMAGES} image-caption pairs (train 42, validation 2, pairs 3, unseen 6)"
        in capsys.readouterr().out
    )
    image = next((out / "pairs/images").iterdir())
    assert Image.open(image).size == (128, 128)
    for folder, size, words in (
        (out, 64, "holds emoji of other settings .size 128."),
        (out, 96, "--size is 96; it must be 64 or 128"),
        (packages, 64, "holds files that are not the emoji data set"),
    ):
        with pytest.raises(UserError, match=words):
            write_emoji(folder, size, [packages], progress=False)


def test_other_pixels_of_the_same_files_are_noted(packages, frozen, tmp_path, monkeypatch, capsys):
    """Another version of Pillow may scale by other rounding: said, but no reason to stop."""
    monkeypatch.setitem(frozen["pixels"], "64", {**frozen["pixels"]["64"], "pairs": "0"})
    main(["data", "emoji", "--out", str(tmp_path / "out"), "--packages", str(packages)])
    assert "Note: the pixels of pairs differ" in capsys.readouterr().out
    # those of a part of the styles are not known
    command = ["data", "emoji", "--out", str(tmp_path / "part"), "--styles", "google", "twitter"]
    main([*command, "--packages", str(packages)])
    assert "Note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "part" / "emoji.json").read_text())["differing"] is None


# ---- questions ---------------------------------------------------------------------------------------------


def test_items_have_one_question_of_each_kind(emoji, images):
    by_file = {}
    for split in ("train", "validation", "pairs", "unseen"):
        for item in json.loads((emoji / split / "items.json").read_text()):
            kinds = [q["kind"] for q in item["questions"]]
            assert kinds == ["name", "style", "category", "choice"]
            answers = {q["kind"]: q["answer"] for q in item["questions"]}
            assert answers == {k: item.get(k, item["name"]) for k in kinds}
            offered = item["questions"][-1]["question"].removeprefix("Is it ").removesuffix("?").split(" or ")
            assert len(set(offered)) == 2 and item["name"] in offered
            assert item["prompt"] == f"{item['name']}, {item['style']} style"
            assert read_sample_image(emoji / split / item["file"]).size == (64, 64)
            by_file[item["file"].split("/")[-1]] = item
    assert by_file.keys() == {f"{image.key}.png" for image in images}


def test_conversations_are_true_and_name_the_emoji_last(emoji):
    asked = collections.Counter()
    for path in emoji.glob("*/*.tar"):
        with tarfile.open(path) as tar:
            rows = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
        for row in rows:
            for turns in row["conversations"]:
                questions = [t["value"].removeprefix("<image>\n") for t in turns[::2]]
                kinds = [next(k for k, known in EMOJI_QUESTIONS.items() if fits(q, known)) for q in questions]
                truth = [row.get(kind, row["name"]) for kind in kinds]
                assert [t["value"] for t in turns[1::2]] == truth
                assert turns[0]["value"].startswith("<image>\n") and kinds[-1] in ("name", "choice")
                assert not {"name", "choice"} & set(kinds[:-1]) and len(set(kinds)) == len(kinds)
                asked.update(kinds)
    assert asked.keys() == EMOJI_QUESTIONS.keys()


def fits(question, phrases):
    return any(re.fullmatch(re.escape(p).replace(r"\{\}", ".+"), question) for p in phrases)


def test_the_tokenizer_of_the_mllm_knows_questions(emoji):
    both = [
        sentencepiece.SentencePieceProcessor(model_file=str(emoji / "text" / f"{name}.model"))
        for name in ("tokenizer", "mllm")
    ]
    question = "Which category is it?"
    plain, mllm = (len(tokenizer.encode(question)) for tokenizer in both)
    assert mllm < plain / 2 and both[1].decode(both[1].encode(question)) == question


def test_a_folder_of_an_earlier_version_is_named(emoji, packages, frozen, tmp_path):
    shutil.copytree(emoji, tmp_path / "older")
    (tmp_path / "older" / "pairs" / "items.json").unlink()
    with pytest.raises(UserError, match="earlier version, without questions; remove it"):
        write_emoji(tmp_path / "older", packages=[packages], progress=False)
    shutil.copytree(emoji, tmp_path / "capitals")
    items = tmp_path / "capitals" / "train" / "items.json"
    items.write_text(items.read_text().replace("grinning face", "GRINNING FACE"))
    with pytest.raises(UserError, match="earlier version, with names in capitals; remove it"):
        write_emoji(tmp_path / "capitals", packages=[packages], progress=False)


def test_words_of_the_training_names_are_lists_that_language_codebooks_read(emoji, tmp_path):
    names = ["RED HEART"] * 3 + ["Red Apple"] * 8 + ["HEART", "Norway Flag", "keycap: 10"]
    write_words(tmp_path, names)
    lists = {name: (tmp_path / f"{name}.txt").read_text().split() for name in ("words", "modifiers", "heads")}
    assert lists == {"words": ["red"], "modifiers": ["red"], "heads": ["apple", "heart"]}
    assert (tmp_path / "edges.txt").read_text() == "red\tapple\nred\theart\n"
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    files = [tmp_path / "modifiers.txt", tmp_path / "heads.txt"]
    words = read_words(files, tmp_path / "v.npy", tmp_path / "edges.txt")
    assert words.counts == [1, 2] and words.edges.tolist() == [[0, 1], [0, 2]]
    # a data set of an earlier version gets them by the same command
    written = {file.name: file.read_text() for file in (emoji / "text").glob("*.txt")}
    assert set(written) == {"words.txt", "modifiers.txt", "heads.txt", "edges.txt"}
    for name in written:
        (emoji / "text" / name).unlink()
    write_emoji(emoji, progress=False)
    assert {file.name: file.read_text() for file in (emoji / "text").glob("*.txt")} == written
