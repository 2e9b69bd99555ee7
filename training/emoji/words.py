"""Words of the training names, in the files that language codebooks read (SweetTok)."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from open_unitok.core.files import write_atomic

WORDS, MODIFIERS, HEADS, EDGES = "words.txt", "modifiers.txt", "heads.txt", "edges.txt"
_RARE_WORD, _RARE_PART = 10, 2  # words that occur this often or less are left out


def write_words(folder: Path, names: Sequence[str]) -> None:
    """Write the words of `names`, one name per image.

    words.txt has all words; modifiers.txt those before the last of a name, heads.txt last ones that are not
    among them: what adjectives and nouns are to captions; edges.txt the pairs of both that occur in a name.
    """
    parts = [re.findall("[a-z]+", name.lower()) for name in names]
    words = Counter(word for part in parts for word in part)
    first = Counter(word for part in parts for word in part[:-1])
    last = Counter(part[-1] for part in parts if part)
    modifiers = {word for word, count in first.items() if count > _RARE_PART}
    heads = {word for word, count in last.items() if count > _RARE_PART} - modifiers
    pairs = {(w, p[-1]) for p in parts for w in p[:-1] if w in modifiers and p[-1] in heads}
    lists = {
        WORDS: [w for w, count in words.items() if count > _RARE_WORD],
        MODIFIERS: modifiers,
        HEADS: heads,
    }
    for file, chosen in lists.items():
        write_atomic(folder / file, "".join(f"{word}\n" for word in sorted(chosen)))
    write_atomic(folder / EDGES, "".join(f"{first}\t{last}\n" for first, last in sorted(pairs)))
