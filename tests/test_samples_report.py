"""The report of what a unified model drew: a grid of samples, losses on their axes, and nothing that acts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from genevolve_fast.cli import main
from genevolve_fast.net.pictures import png_bytes
from genevolve_fast.report.build import build_report
from genevolve_fast.trajectory import json_text
from tests.pages import data_of

PICTURES = [np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8) for n in range(3)]
EVIL = "</script><script>alert(1)</script><!--<script> <img src=x onerror=alert(2)> __TITLE__ __DATA__ \ud800\u2028"


def drawn(folder: Path, requests: list[str], texts: tuple[str, ...] = ("plan", "done")) -> Path:
    """Files as `process draw` writes them: one text more than drafts."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {"texts": texts, "drafts": len(texts) - 1, "steps": 4, "ended": True}
    (folder / "drawn.jsonl").write_bytes(b"".join(json_text({"request": r} | told).encode() + b"\n" for r in requests))
    for n in range(len(requests)):
        for k in range(len(texts) - 1):
            (folder / f"{n:03d}_draft_{k}.png").write_bytes(png_bytes(PICTURES[k]))
    return folder


def run_of(folder: Path, steps: int = 200) -> Path:
    """A run folder as far as the report reads it, its losses falling over three orders of magnitude."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("name: run\n")
    with (folder / "metrics.jsonl").open("w") as f:
        for step in range(1, steps + 1):
            falling = 10 ** (1 - 3 * step / steps)
            row = {"step": step, "loss": falling, "loss/text": falling, "loss/flow": falling, "grad_norm": 1.0 + step}
            row |= {"lr": 1e-7 * step, "perf/throughput": 1e4, "timing_s/update_actor": 1.0, "timing_s/step": 1.0}
            f.write(json.dumps(row) + "\n")
    return folder


def test_the_report_of_drawn_requests_needs_no_run(tmp_path, capsys):
    folder = drawn(tmp_path / "drawn", ["a ring", "two rings", "a ring"])
    assert main(["report", str(folder)]) == 0
    samples = data_of(folder / "report.html")["samples"]
    assert samples["steps"] == [None] and [r["request"] for r in samples["rows"]] == ["a ring", "two rings", "a ring"]
    assert samples["rows"][0]["cells"] == [{"texts": ["plan", "done"], "drafts": [0], "ended": True}]
    (folder / "001_draft_0.png").write_bytes(b"\x89PNG broken")
    (folder / "002_draft_0.png").unlink()
    rows = data_of(build_report(folder, str))["samples"]["rows"]
    assert [r["cells"][0]["drafts"] for r in rows] == [[0], [None], [None]]


def test_a_long_run_shows_some_of_its_steps_and_says_so(tmp_path):
    whole, cut = '{"step": 1, "loss/flow": 1.0, "lr": 1e-7}', '{"step": 2, "lo'  # by a crash
    (tmp_path / "metrics.jsonl").write_text(f"{whole}\n{cut}")
    for step in range(100, 3100, 100):
        drawn(tmp_path / "samples" / f"step_{step:06d}", [f"request {n}" for n in range(40)], ("nothing drawn",))
    drawn(tmp_path / "samples" / ".step_000100.12.tmp", ["half"])
    data = data_of(build_report(tmp_path, str))
    steps = data["samples"]["steps"]
    assert data["metrics"] == [{"step": 1, "loss/flow": 1.0, "lr": 1e-7}]
    assert len(steps) == 12 and (steps[0], steps[-1]) == (100, 3000)
    assert data["samples"]["left_out"] == [4, 18] and len(data["samples"]["rows"]) == 36


def test_what_a_model_wrote_stays_text(tmp_path):
    folder = drawn(tmp_path / "<b>drawn", [EVIL, "a\u2028b\x85"], (EVIL, EVIL))
    text = build_report(folder, str).read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "<!--" not in text and "<img src=x" not in text
    assert "<title>&lt;b&gt;drawn ·" in text
    rows = data_of(folder / "report.html")["samples"]["rows"]
    assert [r["request"] for r in rows] == [EVIL, "a\u2028b\x85"] and rows[0]["cells"][0]["texts"] == [EVIL, EVIL]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"request": "a", "texts": [], "ended": true}',
        '{"request": "a", "texts": [1], "drafts": 0, "ended": true}',
        '{"request": "a", "texts": [], "drafts": 1000000000, "ended": true}',
        '{"request": "a", "texts": [], "drafts": "../../x", "ended": true}',
    ],
)
def test_a_line_that_is_no_drawn_request_is_named(tmp_path, capsys, line):
    good = '{"request": "a", "texts": [], "drafts": 0, "ended": true}'
    (tmp_path / "drawn.jsonl").write_text(f"{good}\n{line}\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "drawn.jsonl, line 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium to run the page")
def test_the_page_runs_and_shows_curves_and_samples(tmp_path):
    folder = run_of(tmp_path / "run")
    drawn(folder / "samples" / "step_000100", ["a ring", "two rings"])
    shown = EVIL.replace("\ud800", "")  # which chromium cannot write out
    drawn(folder / "samples" / "step_000200", ["a ring", shown], (shown, shown))
    page = build_report(folder, str)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    shown = done.stdout.split('<main id="main">')[1].split("</main>")[0]
    for title in ("Text loss", "Flow loss", "Gradient norm", "Learning rate", "Tokens a second", "Samples"):
        assert f">{title}" in shown
    assert shown.count(", log axis") == 4 and "step 200" in shown and shown.count("not drawn") == 2
    assert shown.count("<details") == 4 + 1 and shown.count('alt="draft 1"') == 4  # samples, the configuration
    assert "<script" not in shown and "<img src=" not in shown.replace('<img class="pixel" src=', "")
