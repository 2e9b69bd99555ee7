"""Log lines limited in number: a client must not fill the disk."""

import logging
import re
import threading
import time

_LINES, _SECONDS = 10, 10.0
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


class RateLimit(logging.Filter):
    """Passes a number of records of one text per period; the next period says how many were left out."""

    def __init__(self, lines: int = _LINES, seconds: float = _SECONDS):
        super().__init__()
        self.lines, self.seconds = lines, seconds
        self._lock = threading.Lock()
        # first line without numbers -> (begin of the period, records in it)
        self._periods: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record is logged."""
        # before its arguments are filled in; asyncio writes addresses of objects into the text
        now, text = time.monotonic(), _NUMBER.sub("", str(record.msg).partition("\n")[0][:200])
        with self._lock:
            begin, count = self._periods.get(text, (now, 0))
            left_out = 0
            if now - begin > self.seconds:
                left_out, begin, count = max(0, count - self.lines), now, 0
            if len(self._periods) > 1000:
                self._periods.clear()
            self._periods[text] = (begin, count + 1)
        if left_out:
            record.msg = f"{record.msg} ({left_out} more such lines left out)"
        return count < self.lines


def limit_logs(*names: str) -> None:
    """Limit what these loggers themselves log; a filter does not apply to loggers below."""
    for name in names:
        logger = logging.getLogger(name)
        if not any(isinstance(known, RateLimit) for known in logger.filters):
            logger.addFilter(RateLimit())
