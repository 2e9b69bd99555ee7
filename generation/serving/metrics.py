"""The Prometheus metrics of one server, in a separate registry."""

from collections.abc import Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class ServerMetrics:
    """Counters, histograms and gauges; thread-safe.

    Label values come from code, never from requests: each value creates a time series that is never deleted.

    Args:
        waiting: returns the queue length. running: returns the number of jobs in the current batches.
    """

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]):
        # no `_created` series: an extra one per counter that no dashboard uses
        prometheus_client.disable_created_metrics()
        # the global registry would reject a second server in the same process
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "unitok_requests_total",
            "Requests by route and status; 499: the client disconnected.",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "unitok_request_seconds",
            "Seconds from the arrival of a request to the end of its response.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.batch_rows = Histogram(
            "unitok_batch_rows",
            "Images or answers per batch.",
            ["kind"],
            registry=registry,
            buckets=_BATCH_SIZES,
        )
        self.images = Counter("unitok_images_total", "Images generated.", registry=registry)
        self.tokens = Counter(
            "unitok_tokens_total",
            "Text tokens of prompts and of completions.",
            ["kind"],
            registry=registry,
        )
        self.cancelled = Counter(
            "unitok_cancelled_total",
            "Images and answers cancelled because the client disconnected or the request timed out.",
            registry=registry,
        )
        Gauge("unitok_waiting", "Images and answers in the queue.", registry=registry).set_function(waiting)
        Gauge("unitok_running", "Images and answers in the current batches.", registry=registry).set_function(
            running
        )

    def text(self) -> str:
        """The metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry).decode()
