"""A command that ends with whoever started it: `python -m genevolve_fast.rollout.guard COMMAND ARGUMENT...`.

The command runs in a session of its own and all its processes are ended together: when stdin ends, which is when the
starter does, however it ends; when the starter is gone; and by SIGTERM. They get SIGTERM, and SIGKILL after GRACE_S.
The exit status is the command's, 128 + signal where one ended it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 10.0  # our server lets calls finish for five seconds
_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def main(argv: Sequence[str] | None = None) -> int:
    command = sys.argv[1:] if argv is None else list(argv)
    starter = os.getppid()
    asked: list[int] = []
    wake, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.set_wakeup_fd(waking)  # a signal ends the select below
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    preexec = _die_with_the_guard if sys.platform == "linux" else None
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=preexec)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    while child.poll() is None and not asked and os.getppid() == starter:
        ready, _, _ = select.select([sys.stdin, wake], [], [], _LOOK_S)
        if wake in ready:
            os.read(wake, 64)
        if sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096):
            break
    _end(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen) -> None:
    """SIGTERM for the command's processes, then SIGKILL for those that are left."""
    _signal(child.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while time.monotonic() < until and (child.poll() is None or _signal(child.pid, 0)):
        time.sleep(0.05)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: int) -> bool:
    """Whether the group has processes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


def _die_with_the_guard() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
