"""What is counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Meter:
    """`rows` says how many answers are (decoding, waiting) now; `swaps` how often a name changed its version."""

    def __init__(self, rows: Callable[[], tuple[int, int]], swaps: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "posttrain_serve_requests", "Requests, by endpoint and HTTP status (499: the client left).", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "posttrain_serve_tokens", "Tokens of prompts and answers.", ["model", "kind"], registry=registry
        )
        self.answers = Counter(
            "posttrain_serve_answers", "Answers, by how they ended.", ["model", "finish"], registry=registry
        )
        self.first_token_s = Histogram(
            "posttrain_serve_first_token_seconds",
            "From the request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_s = Histogram(
            "posttrain_serve_request_seconds",
            "From the request to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        decoding = Gauge("posttrain_serve_decoding", "Answers that are decoded now.", registry=registry)
        decoding.set_function(lambda: rows()[0])
        waiting = Gauge("posttrain_serve_waiting", "Answers that wait for a place.", registry=registry)
        waiting.set_function(lambda: rows()[1])
        swapped = Gauge("posttrain_serve_swaps", "How often a name was pointed at another version.", registry=registry)
        swapped.set_function(swaps)

    def page(self) -> bytes:
        return generate_latest(self._registry)
