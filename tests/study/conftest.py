"""The small emoji data set of the tests of `unitok data emoji`."""

from ..training.emoji.conftest import emoji, packages, small_splits

__all__ = ["emoji", "packages", "small_splits"]
