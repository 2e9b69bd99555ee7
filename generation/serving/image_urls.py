"""Images of a request: data: and file: URLs to pixels, within the limits of the server."""

import base64
import binascii
import os
import re
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokProcessor
from open_unitok.tokenizer.images import to_pil

from ..image_files import image_size, open_image

# data:[<type>][;<parameter>...];base64,<data>, in any case; the type may be missing
_DATA_HEAD = re.compile(r"data:(?P<type>[^;,]{0,100})(?P<parameters>(;[^;,]{0,100}){0,8});base64", re.I)
_MAX_SCANS = 100  # of a JPEG; encoders write about 10
# what base64 needs; urllib's unquote makes an object per escape, gigabytes for a hostile body
_ESCAPES = ((b"%2B", b"+"), (b"%2F", b"/"), (b"%3D", b"="), (b"%0A", b""), (b"%0D", b""), (b"%20", b""))
_SPACE = bytes(range(0x21))  # what the URL standard ignores around and within base64


class Cancelled(Exception):
    """The client left while its images were being decoded."""


class ImageLoader:
    """Reads the images of requests; methods are called on threads.

    Args:
        max_side: pixels of an image's longer side; it determines the cost, because images are padded.
        max_pixels: of all images of one request together.
        max_bytes: of one file.
        files: the folder that file: URLs may read; None = file: URLs are rejected.
    """

    def __init__(
        self,
        processor: UniTokProcessor,
        max_side: int,
        max_pixels: int,
        max_bytes: int,
        files: Path | None = None,
    ):
        self.processor = processor
        self.max_side, self.max_pixels, self.max_bytes = max_side, max_pixels, max_bytes
        self.files = None if files is None else files.resolve()

    def read(self, urls: Sequence[str]) -> tuple[list[bytes], int]:
        """The files behind the URLs, and their pixels together as their headers say; decodes no pixels.

        Raises:
            UserError: a URL is not allowed, not an image, or the images are too large together.
        """
        contents, pixels = [], 0
        for number, url in enumerate(urls):
            name = f"Image {number}"
            try:
                contents.append(self._read_url(url.strip(_SPACE.decode())))
                width, height = image_size(contents[-1])
                # every scan of a progressive JPEG passes over all pixels, and may have few bytes
                if contents[-1][:2] == b"\xff\xd8" and contents[-1].count(b"\xff\xda") > _MAX_SCANS:
                    raise UserError(f"The image has more than {_MAX_SCANS} JPEG scans: save it anew.")
                # images are padded to a square before they are scaled
                if max(width, height) > self.max_side:
                    raise UserError(
                        f"The image has {width} x {height} pixels; the limit per side is {self.max_side}."
                    )
            except UserError as error:
                raise UserError(f"{name}: {error}" if len(urls) > 1 else str(error)) from error
            pixels += max(width, height) ** 2
            if pixels > self.max_pixels:
                raise UserError(
                    f"The images have more than {self.max_pixels:,} pixels together, each counted as the "
                    f"square around it ({name} is {width} x {height}): scale them down."
                )
        return contents, pixels

    def decode(self, contents: Sequence[bytes], cancelled: threading.Event) -> list[Image.Image]:
        """The images padded and scaled to the model's input size.

        Raises:
            UserError: an image is corrupt.
            Cancelled: `cancelled` was set meanwhile.
        """
        images = []
        for content in contents:
            if cancelled.is_set():
                raise Cancelled
            # Scale now: full-size images in the queue would need much memory. Preprocessing on the model's
            # thread is then the identity.
            image = open_image(content, self.max_side, self.processor.image_shape)
            images.append(to_pil(self.processor.pixels(image)))
        return images

    def _read_url(self, url: str) -> bytes:
        if self.files is not None and url[:5].lower() == "file:":
            return read_file_url(url, self.files, self.max_bytes)
        return read_data_url(url)


def read_data_url(url: str) -> bytes:
    """Decode data:image/...;base64,...; the image's real format is found in its content.

    Raises:
        UserError: not a data: URL of an image, or invalid base64.
    """
    # URLs are never fetched: a server that fetches can be used to reach hosts behind its firewall
    head, comma, body = url.partition(",")
    match = _DATA_HEAD.fullmatch(head)
    kind = match["type"].strip().lower() if match else "-"
    if not comma or not (kind in ("", "image", "application/octet-stream") or kind.startswith("image/")):
        raise UserError(
            "image_url must be data:image/TYPE;base64,... of a png, jpeg, webp, gif, bmp, avif or heic: URLs "
            "are not fetched."
        )
    if not body.isascii():
        raise UserError("image_url is not valid base64: it holds characters that are not ASCII.")
    data = body.encode()
    if b"%" in data:
        for escape, character in _ESCAPES:
            data = data.replace(escape, character).replace(escape.lower(), character)
    data = data.translate(None, _SPACE).rstrip(b"=")
    try:
        # padding is optional in a URL
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"image_url is not valid base64: {error}.") from error


def read_file_url(url: str, folder: Path, max_bytes: int) -> bytes:
    """The regular file below `folder` (resolved) that a file: URL names.

    Raises:
        UserError: another place, not a regular file, or more than `max_bytes`.
    """
    rejected = UserError("image_url is a file outside the folder that this server may read.")
    try:
        parts = urlsplit(url)
        if parts.netloc.lower() not in ("", "localhost"):
            raise rejected
        # resolve before the check: absolute paths, `..` and links may point outside the folder
        path = (folder / unquote(parts.path)).resolve()
        if not path.is_relative_to(folder):
            raise rejected
        rejected = UserError("image_url is not a readable file of the folder that this server may read.")
        # a FIFO must not block; a link put there since must not be followed
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    # not an address, too long, a NUL, a loop of links, missing, not readable
    except (OSError, ValueError, RuntimeError) as error:
        raise rejected from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise rejected
        if found.st_size > max_bytes:
            raise UserError(
                f"image_url is a file of {found.st_size:,} bytes; at most {max_bytes:,} are read."
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)  # it may grow meanwhile
    finally:
        os.close(descriptor)
