"""Long work on the command line: its bar, and what is told at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from genevolve_fast.incidents import Incidents
from genevolve_fast.resumable import Tally


def open_bar(total: int, what: str, unit: str = "row"):
    """tqdm's bar."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True)


def follow(bar) -> Callable[[Tally], None]:
    """Shows a batch's counts on a bar."""

    def progress(tally: Tally) -> None:
        bar.set_postfix(ok=tally.succeeded, failed=tally.failed, refresh=False)
        bar.update(tally.ends.total() - bar.n)

    return progress


def tell_end(tally: Tally, line: str, incidents: Incidents) -> int:
    """Print how a batch ended; returns 1 where it gave up, 128 + signal where it was interrupted, else 0."""
    tell_attempts(incidents)
    print(line)
    if tally.stopped:
        print(f"stopped: {tally.stopped}\nthe same command continues where it stopped", file=sys.stderr)
    else:
        for failure, reason in sorted(tally.reasons.items()):
            print(f"{failure}, the first of them: {reason}", file=sys.stderr)
    return int(bool(tally.stopped)) if tally.signal is None else 128 + tally.signal


def tell_attempts(incidents: Incidents) -> None:
    """Print the attempts that failed since it was told last."""
    if attempts := incidents.take():
        print("failed attempts: " + ", ".join(f"{what} {n}" for what, n in attempts.items()))
