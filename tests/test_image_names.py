"""Which files of a folder are images, and what is left out: suffixes in any case, links, hidden files."""

import os

import pytest
from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.image_names import IMAGE_SUFFIXES, find_images, find_sibling, is_image_name
from open_unitok.eval.core.image_files import image_path_by_stem
from open_unitok.tokenizer import images
from open_unitok.training.data.convert import convert_dataset


def write(path, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, kind)


def names(found, folder):
    return [path.relative_to(folder).as_posix() for path in found.images]


def test_suffixes_have_no_case():
    assert images.IMAGE_SUFFIXES is IMAGE_SUFFIXES and all(s == s.lower() for s in IMAGE_SUFFIXES)
    for name in ("a.JPG", "a.Jpg", "b/c.TIF", "x.y.PnG", "猫.AVIF", "a.heic", "a.Gif", "a.BMP"):
        assert is_image_name(name)
    for name in ("a.svg", "png", ".png", "a.jpg.txt", "a."):
        assert not is_image_name(name)


def test_everything_left_out_is_named(tmp_path):
    folder = tmp_path / "images"
    for name in ("a.Jpg", "sub/b.TIF", "c.BMP"):
        write(folder / name, {"Jpg": "JPEG", "TIF": "TIFF", "BMP": "BMP"}[name[-3:]])
    for name in (".hidden.png", ".folder/x.png", "no_suffix"):
        write(folder / name)
    for name in ("drawing.svg", "photo.psd", "a.txt", ".DS_Store"):
        (folder / name).write_text("")
    os.symlink("missing.png", folder / "broken.png")
    os.mkfifo(folder / "pipe.png")
    found = find_images(folder)
    assert names(found, folder) == ["a.Jpg", "c.BMP", "sub/b.TIF"]
    left_out = {reason: [path.name for path in paths] for reason, paths in found.left_out.items()}
    assert left_out == {
        "hidden": [".folder", ".hidden.png"],
        "links that lead nowhere": ["broken.png"],
        "svg files, which are not read": ["drawing.svg"],
        "files with another suffix": ["no_suffix", "photo.psd"],
        "not regular files": ["pipe.png"],
    }
    assert "1 svg files, which are not read (drawing.svg)" in found.note(folder)
    assert names(find_images(folder, recursive=False), folder) == ["a.Jpg", "c.BMP"]


def test_linked_folders_are_followed_once(tmp_path):
    folder = tmp_path / "images"
    write(folder / "z" / "a.png")
    write(tmp_path / "elsewhere" / "b.png")
    os.symlink(tmp_path / "elsewhere", folder / "link")
    os.symlink(folder / "z", folder / "a_second_name")
    os.symlink(folder, folder / "z" / "loop")
    os.symlink(folder / "z" / "a.png", folder / "one.png")
    found = find_images(folder)
    assert names(found, folder) == ["link/b.png", "one.png", "z/a.png"]
    [(reason, paths)] = found.left_out.items()
    assert reason == "linked folders that are read already" and len(paths) == 2


def test_siblings_in_any_case(tmp_path):
    for name in ("a.PNG", "a.TXT", "b.png", "b.txt", "b.Txt", "c.Caption", "Ä.txt"):
        (tmp_path / name).write_text("")
    suffixes = (".txt", ".caption")
    assert find_sibling(tmp_path / "a.PNG", suffixes) == tmp_path / "a.TXT"
    assert find_sibling(tmp_path / "b.png", suffixes) == tmp_path / "b.txt"
    assert find_sibling(tmp_path / "c.png", suffixes) == tmp_path / "c.Caption"
    assert find_sibling(tmp_path / "d.png", suffixes) is None
    (tmp_path / "d.txt").write_text("")
    assert find_sibling(tmp_path / "d.png", suffixes) == tmp_path / "d.txt"


def test_a_folder_of_svg_says_so(tmp_path):
    folder = tmp_path / "icons"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.svg").write_text("<svg/>")
    with pytest.raises(
        UserError, match=r"5 svg files, which are not read \(0\.svg, 1\.svg, 2\.svg, \.\.\.\)"
    ):
        convert_dataset("folder", folder, tmp_path / "out", quiet=True)


def test_conversion_takes_every_suffix_and_names_the_rest(tmp_path, capsys):
    folder = tmp_path / "images"
    for name, kind in (("a.JPG", "JPEG"), ("b.Tif", "TIFF"), ("c.avif", "AVIF"), ("d.gif", "GIF")):
        write(folder / name, kind)
    (folder / "a.TXT").write_text("a red square")
    write(folder / ".hidden.png")
    counts = convert_dataset("folder", folder, tmp_path / "out", quiet=True)
    assert counts["samples"] == 4 and counts["without a caption"] == 3
    assert "left out: 1 hidden (.hidden.png)" in capsys.readouterr().err


def test_benchmark_images_are_found_with_other_suffixes(tmp_path):
    for name in ("1.JPEG", "2", "3.webp", "4.b.PNG"):
        (tmp_path / name).write_text("")
    stems = ("1", "2", "3", "4.b", "5")
    found = [image_path_by_stem([tmp_path / "none", tmp_path], stem).name for stem in stems]
    assert found == ["1.JPEG", "2", "3.webp", "4.b.PNG", "5.jpg"]
