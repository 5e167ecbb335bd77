"""One process, one device, one pipeline: `python -m genevolve_fast.render.worker MODULE:FUNCTION DEVICE JSON`.

Frames on stdin and stdout: eight bytes of length, then a pickle. In come lists of jobs, out go ("ready", Offer) or
("failed", reason) once, then ("drawn", outcomes), or ("lost", reason) as its last. It ends when its stdin does.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, BinaryIO

from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import DeviceLostError, Pipeline, draw_each

HEADER = 8


def frame(message: Any) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER, "big") + body


def make_pipeline(factory: str, device: str, arguments: dict[str, Any]) -> Pipeline:
    """`factory` is "module:function", called with the device and `arguments`. Raises RenderError."""
    module, _, function = factory.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RenderError(f"no factory {factory!r}: {error}") from None
    try:
        return made(device=device, **arguments)
    except (TypeError, ValueError) as error:
        raise RenderError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    factory, device, arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which ends its workers itself
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the frames
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, jobs), daemon=True).start()
    try:
        pipeline = make_pipeline(factory, device, json.loads(arguments))
        pipeline.load()
    except RenderError as error:
        _send(out, ("failed", str(error)))
        return 1
    _send(out, ("ready", pipeline.offer))
    while True:
        try:
            outcomes = draw_each(pipeline, jobs.get())
        except DeviceLostError as error:
            _send(out, ("lost", str(error)))
            return 1
        _send(out, ("drawn", outcomes))


def _send(out: BinaryIO, message: Any) -> None:
    out.write(frame(message))
    out.flush()


def _read(stdin: BinaryIO, jobs: queue.SimpleQueue) -> None:
    while len(header := stdin.read(HEADER)) == HEADER:
        jobs.put(pickle.loads(stdin.read(int.from_bytes(header, "big"))))
    os._exit(0)  # the service is gone: nobody wants what is being drawn


if __name__ == "__main__":
    sys.exit(main())
