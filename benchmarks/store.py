"""Rows on disk: written after every group, kept while the measured code is the same, and a witness of crashes."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from genevolve_fast.evaluate.scoreboard import commit, processor, write_json

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("genevolve_fast/ops/*.py", "kernels/*.py", "csrc/*.cu") + tuple(
    f"benchmarks/{name}.py" for name in ("inputs", "peers", "check", "memory", "timing", "group")
)
GROUP = (
    "shape",
    "rows",
    "ratio",
    "layout",
    "logits",
    "mode",
    "lengths",
    "dtype",
    "device",
    "torch",
)  # measured in one go

Row = dict[str, Any]


def freeze_imports() -> None:
    """What is imported by now need not be looked at by each collection between measurements."""
    gc.collect()
    gc.freeze()


def fingerprint(measured: Sequence[str] = MEASURED) -> str:
    """12 hex digits of everything whose change makes a recorded time worthless."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in measured for p in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """`rows` of a results file. `note` names what is about to run; a process that dies leaves it behind.

    `group`: the fields that rows measured in one go have in common. `code`: fingerprint of what is measured.
    """

    def __init__(
        self,
        file: Path,
        where: torch.device,
        *,
        fresh: bool = False,
        at: str | None = None,
        group: Sequence[str] = GROUP,
        code: str | None = None,
    ) -> None:
        self.file, self.where, self.group = file, where, group
        self.commit = at or commit()
        self.code = code or fingerprint()
        self.data = read(file)
        if fresh:
            self.data["rows"] = []
        self._witness = file.with_name(f".{file.name}.running")
        if self._witness.exists():
            died = json.loads(self._witness.read_text(encoding="utf-8"))
            why = f"its process died or was killed in mode {died['mode']}"
            self.add([died | {"status": "failed", "fatal": True, "reason": why}])
            self._witness.unlink()

    @property
    def rows(self) -> list[Row]:
        return self.data["rows"]

    def stamp(self, group: Row, impl: str, version: str) -> Row:
        return {
            "impl": impl,
            "version": version,
            **group,
            "commit": self.commit,
            "code": self.code,
            "date": date.today().isoformat(),
        }

    def find(self, group: Row, impl: str, version: str) -> Row | None:
        """The row of this contender that still holds: same group, same code, same version."""
        for row in self.rows:
            same = row["impl"] == impl and row["version"] == version and row["code"] == self.code
            if same and all(row[k] == group[k] for k in self.group):
                return row
        return None

    def fatal(self) -> dict[str, str]:
        """Contender -> how it killed its process, as long as the code is the same."""
        return {r["impl"]: r["reason"] for r in self.rows if r.get("fatal") and r["code"] == self.code}

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in place of older ones of their contender, and of any of their group that other code measured."""
        new = list(rows)
        for row in new:
            key = [row[k] for k in self.group]
            self.data["rows"] = [
                r
                for r in self.rows
                if [r[k] for k in self.group] != key or (r["impl"] != row["impl"] and r["code"] == row["code"])
            ]
        self.rows.extend(new)
        self.save()

    def save(self) -> None:
        self.data.setdefault("machine", {}).update(machine(self.where))
        write_json(self.file, self.data)

    def note(self, row: Row | None) -> None:
        """What runs next; None: nothing that could die unseen."""
        if row is None:
            self._witness.unlink(missing_ok=True)
        else:
            write_json(self._witness, row)


def read(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return data if isinstance(data.get("rows"), list) else {"rows": []}


def device_name(where: torch.device) -> str:
    return torch.cuda.get_device_name(where) if where.type == "cuda" else processor()


def machine(where: torch.device) -> dict[str, Any]:
    """Device and versions; driver, clocks and power limit are gpu.py's to add."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "device": device_name(where),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
    }
