"""Nearest original of an image by squared pixel difference.

B images, N originals, P pixels x channels.
"""

from collections.abc import Sequence

import numpy as np

from open_unitok.core.errors import UserError


class NearestOriginals:
    """Finds the originals that are nearest to images.

    Args:
        originals: (N, H, W, 3) uint8.
    """

    def __init__(self, originals: np.ndarray):
        self.originals = originals
        self._flat = originals.reshape(len(originals), -1).astype(np.float32)
        self._squares = np.einsum("np,np->n", self._flat, self._flat)

    def nearest(self, image: np.ndarray) -> int:
        """The index of the nearest original to a uint8 (H, W, 3) image; ties go to the first.

        Raises:
            UserError: the image has another size.
        """
        if image.shape != self.originals.shape[1:]:
            raise UserError(f"the image is {image.shape}; the originals are {self.originals.shape[1:]}")
        # |x|^2 is the same for all originals; float32 selects candidates, integers decide
        distances = self._squares - 2 * (self._flat @ image.reshape(-1).astype(np.float32))
        candidates = np.argsort(distances, kind="stable")[:8]
        return int(candidates[np.argmin(self.distances(image, candidates))])

    def distances(self, image: np.ndarray, which: Sequence[int] | np.ndarray) -> np.ndarray:
        """Exact squared differences of an image and some originals."""
        difference = self.originals[np.asarray(which)].astype(np.int64) - image.astype(np.int64)
        return (difference**2).reshape(len(difference), -1).sum(axis=1)
