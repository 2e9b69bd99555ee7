"""Text tokenizers of transformers: load and check their files, fingerprint their vocabulary."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer

from open_unitok.core.errors import UserError
from open_unitok.tokenizer.folder_checks import loading, read_config

_CONFIG = "tokenizer_config.json"


def load_text_tokenizer(path: str | os.PathLike[str], legacy: bool) -> Any:
    """A tokenizer from a `tokenizer.model` file, a folder or a hub id; code in the folder is never run.

    Args:
        legacy: passed to LLaMA's tokenizer, whose files do not store it.

    Raises:
        UserError: there is no tokenizer, or its files are missing or broken.
    """
    path = Path(path)
    llama: dict[str, Any] = {"legacy": legacy, "add_bos_token": True, "pad_token": "<unk>"}
    if path.is_file():
        with loading(path), tempfile.TemporaryDirectory() as folder:  # the loader expects this file name
            shutil.copy(path, Path(folder) / "tokenizer.model")
            return LlamaTokenizer.from_pretrained(folder, **llama)
    if path.is_dir():
        return _load_folder(path, llama)
    if path.suffix or path.is_absolute():
        raise UserError(f"{path} is not a text tokenizer: expected a tokenizer.model, a folder or a hub id.")
    with loading(path):
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def _load_folder(path: Path, llama: dict[str, Any]) -> Any:
    described = (path / _CONFIG).exists()
    # saved folders of LLaMA tokenizers: the options in `llama` are not all stored
    kind = read_config(path, _CONFIG).get("tokenizer_class") if described else None
    is_llama = kind in ("LlamaTokenizer", "LlamaTokenizerFast")
    files = [name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    # without its files LLaMA's tokenizer loads with an empty vocabulary: all texts would be alike
    if not files and (is_llama or not described):
        raise UserError(f"{path} has no text tokenizer: neither tokenizer.json nor tokenizer.model.")
    if "tokenizer.json" in files:
        read_config(path, "tokenizer.json", MAX_TOKENIZER_BYTES)
    with loading(path / (files[0] if files else _CONFIG)):
        if is_llama or (not described and files == ["tokenizer.model"]):
            found = LlamaTokenizer.from_pretrained(path, **llama)
        else:
            found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        names = [name for name in type(found).vocab_files_names.values() if name]
        if names and not any((path / name).is_file() for name in [*names, "tokenizer.json"]):
            raise UserError(f"{path} has no text tokenizer: none of {', '.join(names)}.")
        if len(found.get_vocab()) <= len(found.all_special_ids):
            raise UserError(f"The text tokenizer in {path} has no words.")
    return found


MAX_TOKENIZER_BYTES = 256 << 20  # the largest published ones have some 35 MB


def vocabulary_fingerprint(text_tokenizer: Any) -> str:
    """Hex sha256 of all tokens and their ids, added ones included."""
    digest = hashlib.sha256()
    for token, index in sorted(text_tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0])):
        digest.update(f"{index}\t{token}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def find_or_add(text_tokenizer: Any, names: tuple[str, str]) -> int:
    """The id of the first of `names` in the vocabulary; if there is none, add the last one as a token."""
    vocabulary = text_tokenizer.get_vocab()
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    text_tokenizer.add_tokens([names[-1]], special_tokens=True)
    return text_tokenizer.convert_tokens_to_ids(names[-1])
