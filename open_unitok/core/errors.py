"""The one error class for what a user can mend; the command line prints it as one line and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend: the message names the thing, its value, what is allowed and what to do."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped word: " Did you mean 'x'?", or the list of what is allowed."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(allowed)}."
