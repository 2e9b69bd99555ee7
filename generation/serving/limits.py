"""The limits of one server."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one server; sizes of what a client sends, and how long it may take.

    Attributes:
        max_batch_size: images or answers per batch.
        max_queue_size: waiting images and answers; more are rejected with 429.
        max_body: bytes of a request body, and of a file that a file: URL names.
        max_side: pixels of an input image's longer side.
        max_pixels: of all input images of one request, each counted as the square around it.
        max_new_tokens: of one answer.
        max_connections: open connections; None = as many as the process has file descriptors for, up to 1024.
        timeout: seconds from the arrival of a request to the end of its response; then 504.
        body_timeout: seconds for the body to arrive; then 408.
        idle_timeout: seconds without a complete request head, or without reading the response; then the
            connection is closed.
        batch_window: seconds that a batch waits for further requests.
    """

    max_batch_size: int = 16
    max_queue_size: int = 64
    max_body: int = 20 * 2**20
    max_side: int = 8192
    max_pixels: int = 2**27
    max_new_tokens: int = 1024
    max_connections: int | None = None
    timeout: float = 300.0
    body_timeout: float = 30.0
    idle_timeout: float = 10.0
    batch_window: float = 0.01
