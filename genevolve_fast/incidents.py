"""Failures of servers and tools, counted by who failed and how: a run reports them instead of losing rollouts."""

from __future__ import annotations

import threading
from collections import Counter

KINDS = (
    "connect",  # refused, reset, no route, no such name
    "timeout",
    "rate_limited",  # HTTP 429
    "server_error",  # HTTP 5xx
    "client_error",  # any other HTTP 4xx
    "bad_response",  # not what the protocol promises
    "too_large",
    "not_an_image",
    "refused_address",  # private, link-local or loopback, and not in allow_hosts
    "not_recorded",  # replaying, and this was never asked before
    "blocked",  # the service's own rules forbid what was asked
    "bad_arguments",  # the policy's own fault
    "stale_weights",  # an engine answered with weights of another step
    "other",
)


class Incidents:
    """A counter of failed attempts by `source/kind`, shared by the engine and the tools of a run; thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, source: str, kind: str) -> None:
        """Count one failed attempt of `source` (a tool's name, or "engine")."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of failure {kind!r}: one of {', '.join(KINDS)}")
        with self._lock:
            self._counts[f"{source}/{kind}"] += 1

    def __repr__(self) -> str:
        with self._lock:
            return f"Incidents({dict(sorted(self._counts.items()))})"

    def take(self) -> dict[str, int]:
        """The counts since the last call, {"search/timeout": 3}."""
        with self._lock:
            counts, self._counts = dict(sorted(self._counts.items())), Counter()
        return counts
