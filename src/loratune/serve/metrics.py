"""What is counted, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loratune.serve.worker import Worker, counted

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server; in a registry of its own, so that several may stand in one process."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("loratune_requests", "answers that have ended", registry=self._registry)
        self._prompt = Counter("loratune_prompt_tokens", "tokens of prompts", registry=self._registry)
        self._written = Counter("loratune_generated_tokens", "tokens of answers", registry=self._registry)
        self._first = Histogram(
            "loratune_time_to_first_token_seconds",
            "from a request to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._now = {
            name: Gauge(f"loratune_{name}", text, registry=self._registry)
            for name, text in (
                ("running", "rows that are continued"),
                ("waiting", "rows that wait for a slot"),
                ("adapters", "adapters on the model"),
                ("failed", "steps that failed"),
            )
        }

    def first_token(self, begun: float) -> None:
        """The first token came, of a request that came at `begun` (`time.perf_counter`)."""
        self._first.observe(time.perf_counter() - begun)

    def ended(self, prompt: int, written: int) -> None:
        self._requests.inc()
        self._prompt.inc(prompt)
        self._written.inc(written)

    def text(self, worker: Worker) -> bytes:
        for name, value in counted(worker).items():
            self._now[name].set(value)
        return generate_latest(self._registry)
