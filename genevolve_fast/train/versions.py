"""What made a run: versions and, from a checkout, the commit. Its model card tells them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from genevolve_fast import __version__
from genevolve_fast.files import write_text

FILE = "versions.json"  # in a run's folder, one row for each start


def note_versions(folder: Path, step: int) -> None:
    """Add a row for a start of the run at `step`."""
    file = folder / FILE
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    write_text(file, json.dumps([*rows, {"step": step, **versions()}], indent=1) + "\n")


def versions() -> dict[str, Any]:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    made = {"genevolve_fast": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return made | {"device": device, "commit": commit()}


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with -dirty; None where git does not track it."""
    here = Path(__file__)

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", here.parent, *command], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a checkout may hold an environment with this package installed
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * dirty
    except (OSError, subprocess.CalledProcessError):
        return None
