"""The npm packages of the emoji, and the images that they share by code point.

Apple's and Facebook's images, which other packages of the same family hold, have no licence to learn from.
"""

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import read_json

_DEPTH = 3  # folders below a given one: node_modules/@scope/name
_NPM_TIMEOUT = 1800  # seconds for 150 MB


class EmojiPackage(NamedTuple):
    """An npm package with the images of one style.

    Attributes:
        style: as in keys and file names; `title` as in captions.
        images: folder inside of the package.
        licence: of the images; `attribution` names their authors.
    """

    style: str
    title: str
    name: str
    version: str
    images: str
    suffix: str
    licence: str
    attribution: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"


# the first wanted one's emoji.json lists the emoji; Google's and Twitter's are the same file
EMOJI_PACKAGES = (
    EmojiPackage(
        "google", "Google", "emoji-datasource-google", "16.0.0", "img/google/64", ".png",
        "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0",
        "Noto Emoji, Copyright Google Inc., https://github.com/googlefonts/noto-emoji",
    ),
    EmojiPackage(
        "twitter", "Twitter", "emoji-datasource-twitter", "16.0.0", "img/twitter/64", ".png",
        "Creative Commons Attribution 4.0 (CC-BY 4.0), https://creativecommons.org/licenses/by/4.0/",
        "Twemoji, Copyright Twitter, Inc. and other contributors, https://github.com/jdecked/twemoji",
    ),
    EmojiPackage(
        "fluent", "Fluent 3D", "@lobehub/fluent-emoji-3d", "1.1.0", "assets", ".webp",
        "MIT (as package.json says; the package holds no licence file). Microsoft's repository says that "
        "national flags, the paperclip, technologists and video games are not open source: the package has "
        "such images, too, so do not pass on this style, or a model that reproduces it, without asking",
        "Fluent Emoji, Copyright Microsoft Corporation, https://github.com/microsoft/fluentui-emoji; "
        "packaged by LobeHub, https://github.com/lobehub/fluent-emoji",
    ),
)  # fmt: skip
STYLES = {package.style: package for package in EMOJI_PACKAGES}


class Emoji(NamedTuple):
    """An entry of emoji.json; `code` is its code points in hexadecimal, joined by hyphens."""

    code: str
    name: str
    category: str
    subcategory: str


class EmojiImage(NamedTuple):
    """The image file of an emoji in one style."""

    emoji: Emoji
    style: str
    file: Path

    @property
    def key(self) -> str:
        return f"{self.style}-{self.emoji.code}"


# ---- packages ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def package_folders(
    given: Sequence[str | Path] = (), work: Path | None = None, styles: Sequence[str] = tuple(STYLES)
) -> Iterator[dict[str, Path]]:
    """The unpacked package of each style: those in the given folders or .tgz files, else fetched by npm.

    Args:
        styles: keys of `STYLES`; packages of others are neither fetched nor asked for.
        work: folder for what is fetched or unpacked; removed at the end, and at the start if a killed process
            has left it. None: a temporary one.

    Raises:
        UserError: npm is missing or fails; a package is missing, or has another version.
    """
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    folder = work or Path(tempfile.mkdtemp(prefix="unitok-emoji-"))
    try:
        found: dict[str, Path] = {}
        wanted = [package for package in EMOJI_PACKAGES if package.style in styles]
        for number, place in enumerate([existing(path) for path in given] or _fetch(folder, wanted)):
            if place.is_file():
                place = _unpacked(place, folder / f"unpacked-{number}")
            found |= _packages_below(place)
        missing = [package for package in wanted if package.style not in found]
        if missing:
            raise UserError(
                f"{', '.join(map(str, given))}: {_names(missing)} not found there; --packages takes their "
                f"unpacked folders, a folder that holds them, or the files of `npm pack {_names(missing)}`."
            )
        yield {package.style: found[package.style] for package in wanted}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _names(packages: Sequence[EmojiPackage]) -> str:
    return " ".join(package.spec for package in packages)


def _fetch(folder: Path, packages: Sequence[EmojiPackage]) -> list[Path]:
    """The packed packages, which npm checks against the registry's hashes."""
    npm = shutil.which("npm")
    elsewhere = f"run `npm pack {_names(packages)}` elsewhere and pass its files by --packages"
    if npm is None:
        raise UserError(f"npm is not installed: install it (nodejs.org), or {elsewhere}.")
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", "--no-update-notifier"]
    command += [package.spec for package in packages]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_NPM_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"npm cannot fetch the packages ({error}): {elsewhere}.") from error
    files = sorted(folder.glob("*.tgz"))
    if done.returncode or len(files) != len(packages):
        lines = [line for line in (done.stderr + done.stdout).split("\n") if line.strip()]
        reason = lines[0].strip() if lines else f"exit status {done.returncode}"
        raise UserError(f"npm cannot fetch the packages ({reason}): {elsewhere}.")
    return files


def _unpacked(file: Path, folder: Path) -> Path:
    """The folder of an `npm pack` file, with the members that are read."""
    wanted = ("package/package.json", "package/emoji.json", "package/LICENSE")
    images = tuple(f"package/{package.images}/" for package in EMOJI_PACKAGES)
    try:
        with tarfile.open(file) as tar:
            members = [m for m in tar if m.name in wanted or m.name.startswith(images)]
            tar.extractall(folder, members, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file} is not a file of `npm pack`: {error}.") from error
    return folder


def _packages_below(folder: Path) -> dict[str, Path]:
    """Style -> package, of the packages in a folder and those a few levels below it."""
    found: dict[str, Path] = {}
    by_name = {package.name: package for package in EMOJI_PACKAGES}
    level = [folder]
    for _ in range(_DEPTH + 1):
        for place in level:
            manifest = place / "package.json"
            content = read_json(manifest) if manifest.is_file() else None
            package = by_name.get(content.get("name", "")) if isinstance(content, dict) else None
            if package is None:
                continue
            assert content is not None
            if content.get("version") != package.version:
                raise UserError(
                    f"{place} is version {content.get('version')} of {package.name}; the splits are those of "
                    f"{package.version}: npm pack {package.spec}."
                )
            found[package.style] = place
        # sorted: two copies of a package must not depend on the file system
        level = [
            p
            for place in level
            for p in sorted(place.iterdir())
            if p.is_dir() and place not in found.values()
        ]
    return found


# ---- images ------------------------------------------------------------------------------------------------


def read_emoji(folders: dict[str, Path]) -> list[EmojiImage]:
    """Every emoji in every given style that has it, in the order of emoji.json; skin tones are left out.

    Raises:
        UserError: an emoji.json of another form.
    """
    path = next(iter(folders.values())) / "emoji.json"
    rows = read_json(existing(path))
    found = []
    for number, row in enumerate(rows if isinstance(rows, list) else [None]):
        try:
            emoji = Emoji(row["unified"].lower(), row["name"], row["category"], row["subcategory"])  # pyright: ignore
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}, entry {number} is not an emoji of emoji-datasource: {error!r}."
            ) from error
        if emoji.category == "Component":  # the five skin tones
            continue
        for style, folder in folders.items():
            package = STYLES[style]
            file = _image_file(folder / package.images, emoji.code, package.suffix)
            if file is not None:
                found.append(EmojiImage(emoji, style, file))
    return found


def _image_file(folder: Path, code: str, suffix: str) -> Path | None:
    """The file of a code: as spelt, without the variation selector fe0f, or without leading zeros."""
    short = "-".join(part for part in code.split("-") if part != "fe0f")
    spellings = [code, short, *("-".join(p.lstrip("0") for p in c.split("-")) for c in (code, short))]
    return next((f for spelling in spellings if (f := folder / f"{spelling}{suffix}").is_file()), None)
