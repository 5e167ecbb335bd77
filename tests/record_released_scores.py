"""Record what the released evaluator writes: `python -m tests.record_released_scores CHECKOUT`.

It runs CHECKOUT/scripts/evaluate_images.py on tests/fixtures/released/scored/results.json against a chat server that
gives the replies of replies.json in order, and keeps the three files it writes beside them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures" / "released" / "scored"
FILES = ("results_eval.json", "summary.json", "summary.csv")
TOTAL_CASES = 16


def lay_out(folder: Path) -> None:
    """results.json with the pictures that it names in `folder`, ground truth in `folder`/bench."""
    from PIL import Image

    for name in ("pictures", "bench/images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / "results.json", folder)
    random = np.random.default_rng(0)
    for row in json.loads((FIXTURES / "results.json").read_text(encoding="utf-8")):
        meta = row.get("meta", {})
        for root, name in (
            (folder, row.get("output_path") or row.get("image_path")),
            (folder / "bench", row.get("gt_image") or meta.get("gt_copied_path")),
        ):
            if name and "missing" not in name:
                Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(root / name)


def run_released(checkout: Path, folder: Path, url: str, *flags: str) -> str:
    """The released script's output on `folder`/results.json; it writes its files there."""
    script = checkout / "scripts" / "evaluate_images.py"
    command = [sys.executable, script, "--results", "results.json", "--gt-root", "bench", "--max-workers", "1"]
    done = subprocess.run(
        [*map(str, command), "--api-key", "k", "--api-base", url, "--total-cases", str(TOTAL_CASES), *flags],
        cwd=folder,
        env={**os.environ, "GENEVOLVE_EVAL_MAX_TRY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def main() -> None:
    from tests.loopback.chat import LoopbackChat

    checkout = Path(sys.argv[1]).resolve()
    server = LoopbackChat().start()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch).resolve()
            lay_out(folder)
            server.faults(*json.loads((FIXTURES / "replies.json").read_text(encoding="utf-8")))
            run_released(checkout, folder, server.url)
            for name in FILES:
                text = (folder / name).read_bytes().decode().replace(str(folder), "FOLDER")
                (FIXTURES / name).write_bytes(text.encode())
    finally:
        server.kill()


if __name__ == "__main__":
    main()
