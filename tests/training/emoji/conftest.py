"""Three small packages in the layout of the real ones, and the splits that are frozen for them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from open_unitok.training.emoji import dataset, splits
from open_unitok.training.emoji.packages import EMOJI_PACKAGES, package_folders

# emoji.json's code -> (name, category, the file's name in the Fluent package or None)
EMOJI = {
    "1F600": ("GRINNING FACE", "Smileys & Emotion", "1f600"),
    "2764-FE0F": ("HEAVY BLACK HEART", "Smileys & Emotion", "2764"),  # without the variation selector
    "0023-FE0F-20E3": ("HASH KEY", "Symbols", "23-fe0f-20e3"),  # without leading zeros
    "00A9-FE0F": ("COPYRIGHT SIGN", "Symbols", "a9"),  # without both
    "1F1EA-1F1EC": ("Egypt Flag", "Flags", "1f1ea-1f1ec"),
    "1F1F3-1F1F4": ("Norway Flag", "Flags", "1f1f3-1f1f4"),
    "1F1E7-1F1FB": ("Bouvet Island Flag", "Flags", "1f1e7-1f1fb"),  # looks like Norway's
    "1FA89": ("HARP", "Objects", None),  # Fluent lacks it
    "1F935": ("MAN IN TUXEDO", "People & Body", "1f935"),  # two of this name
    "1F935-200D-2642-FE0F": ("MAN IN TUXEDO", "People & Body", "1f935-200d-2642-fe0f"),
    "1F3FB": ("EMOJI MODIFIER FITZPATRICK TYPE-1-2", "Component", "1f3fb"),  # a skin tone: no emoji
    **{f"1F40{n:X}": (f"ANIMAL {n}", "Animals & Nature", f"1f40{n:x}") for n in range(8)},
}
COUNTS = (2, 3, 2)  # unseen, pairs, validation
IMAGES = 18 * 3 - 1


def draw(seed: int, side: int, mode: str = "RGBA") -> Image.Image:
    """A shape on transparent ground, beneath which there is black."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    box = [int(side * v) for v in (*rng.uniform(0.05, 0.3, 2), *rng.uniform(0.6, 0.95, 2))]
    ImageDraw.Draw(image).ellipse(box, fill=(*map(int, rng.integers(0, 256, 3)), 255))
    ImageDraw.Draw(image).rectangle(box[:2] + [side // 2] * 2, fill=(*map(int, rng.integers(0, 256, 3)), 255))
    return image.convert(mode)


def package_files() -> dict[str, dict[str, bytes]]:
    """Style -> {path in the package: content}."""
    rows = [
        {
            "name": name,
            "unified": code,
            "image": f"{code.lower()}.png",
            "category": category,
            "subcategory": "x",
        }
        for code, (name, category, _) in EMOJI.items()
    ]
    found: dict[str, dict[str, bytes]] = {}
    for number, package in enumerate(EMOJI_PACKAGES):
        manifest = {"name": package.name, "version": package.version}
        files = {"package.json": json.dumps(manifest).encode(), "img/apple/64/1f600.png": b"never read"}
        if package.style != "fluent":
            files |= {"emoji.json": json.dumps(rows).encode(), "LICENSE": b"The MIT License (MIT)\n"}
        for seed, (code, (_, _, fluent)) in enumerate(EMOJI.items()):
            file = fluent if package.style == "fluent" else code.lower()
            if file is None:
                continue
            # Bouvet Island has Norway's flag
            seed = list(EMOJI).index("1F1F3-1F1F4") if code == "1F1E7-1F1FB" else seed
            image = draw(100 * number + seed, 256 if package.style == "fluent" else 64)
            image = image.convert("P") if code == "1F600" and package.style == "twitter" else image
            buffer = io.BytesIO()
            image.save(buffer, "WEBP" if package.style == "fluent" else "PNG", lossless=True)
            files[f"{package.images}/{file}{package.suffix}"] = buffer.getvalue()
        found[package.style] = files
    return found


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """A folder like node_modules with the three packages."""
    folder = tmp_path_factory.mktemp("npm") / "node_modules"
    for package in EMOJI_PACKAGES:
        for name, content in package_files()[package.style].items():
            path = folder / package.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def archives(packages, tmp_path_factory):
    """The three files of `npm pack`."""
    target = tmp_path_factory.mktemp("archives")
    for package in EMOJI_PACKAGES:
        with tarfile.open(target / f"{package.style}.tgz", "w:gz") as tar:
            tar.add(packages / package.name, "package")
    return sorted(target.glob("*.tgz"))


@pytest.fixture(scope="session")
def small_splits(packages):
    with package_folders([packages]) as folders:
        return splits.freeze(folders, COUNTS, splits.SIZES)


@pytest.fixture
def frozen(small_splits, monkeypatch):
    """`splits.json` of the small packages in place of the published one."""
    monkeypatch.setattr(dataset, "load_frozen", lambda: small_splits)
    return small_splits


@pytest.fixture(scope="session")
def emoji(packages, small_splits, tmp_path_factory):
    """The finished data set of the small packages."""
    out = tmp_path_factory.mktemp("emoji") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load_frozen", lambda: small_splits)
        dataset.write_emoji(out, packages=[packages], progress=False)
    return out
