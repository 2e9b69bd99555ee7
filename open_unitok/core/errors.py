"""UserError, which the command line prints as one line (exit code 2), and hints for mistyped words."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix; the message has the key, the value, what is allowed and a remedy."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped word: " Did you mean 'x'?", or the list of allowed words."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(allowed)}."
