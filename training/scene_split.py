"""Writes the test split of the scenes as VQAv2, POPE and GenEval lay theirs out."""

from collections.abc import Callable
from pathlib import Path

from .scene_config import SceneConfig


def write_test_split(config: SceneConfig, folder: Path, advance: Callable[[int], object]) -> None:
    """Write test pictures, questions and prompts below `folder`; `advance` hears of every picture written."""
