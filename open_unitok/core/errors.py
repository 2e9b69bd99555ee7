"""UserError, which the command line prints as one line (exit code 2), and hints for mistyped words."""

import difflib
import errno
from collections.abc import Iterable

# errno of a full, read-only or failing disk
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class UserError(ValueError):
    """An error that the user can fix; the message has the key, the value, what is allowed and a remedy."""

    exit_code = 2  # of the command line


class StorageError(UserError):
    """A run that was stopped by a full, read-only or failing disk; run the same command again to resume."""

    exit_code = 1


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """A hint for a mistyped word: " Did you mean 'x'?", or the list of allowed words."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(word, allowed, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Allowed: {', '.join(allowed)}."
