"""Two renderings side by side: rows matched by id, scores subtracted, one bounded file that needs nothing."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genevolve_fast.cli import main
from genevolve_fast.report.build import ReportError
from genevolve_fast.report.compare import MAX_ROWS, THUMBNAIL, build_comparison, read_side

DIMENSIONS = ("faithfulness", "visual_correctness", "text_accuracy", "aesthetics", "overall")


def rows_of(n: int, **more) -> list[dict]:
    return [
        {"id": i, "prompt": f"request {i}", "gen_prompt": f"program {i}", "eval_type": "T", "success": True} | more
        for i in range(n)
    ]


def scores(value: float, **more) -> dict:
    return {"rationale": "because", **dict.fromkeys(DIMENSIONS, value), **more}


def write(folder: Path, rows: list[dict], values: list[float | None] | None = None) -> Path:
    """A folder of pictures, each of its own colour, and where `values` are given their scores."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        if row.get("success"):
            pixels = np.full((600, 900, 3), (7 * i) % 256, np.uint8)
            pixels[0, 0] = len(folder.name), i % 256, i // 256
            Image.fromarray(pixels).save(folder / f"{i}.png")
            row["output_path"] = f"{i}.png"
    (folder / "results.json").write_text(json.dumps(rows))
    if values is not None:
        judged = [
            row | {"eval_success": v is not None, "scores": None if v is None else scores(v), "error": "not_evaluated"}
            for row, v in zip(rows, values, strict=True)
        ]
        text = json.dumps([*judged, {"summary_type": "overall_avg", "avg_scores": {}, "count": 0}])
        (folder / "results_eval.json").write_text(text)
    return folder


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def compare(a: Path, b: Path, **options) -> dict:
    return data_of(build_comparison(read_side(a), read_side(b), a.parent / "compare.html", **options))


def test_rows_are_matched_by_id_and_their_scores_subtracted(tmp_path):
    a = write(tmp_path / "a", rows_of(4), [0.5, 0.5, None, 1.0])
    b = write(tmp_path / "bb", rows_of(3)[::-1], [1.0, 0.0, 0.5])
    made = compare(a, b, interval=lambda d: f"{sum(d):+.2f}")
    assert (made["shared"], made["only"], made["other_programs"]) == (3, [1, 0], 0)
    assert [r["id"] for r in made["rows"]] == ["0", "1", "2"]
    overall = made["summary"][-1]
    assert overall == {"dimension": "overall", "n": 2, "means": [0.5, 0.25], "difference": "-0.50", "higher": [1, 0]}
    first = made["rows"][0]["sides"]
    assert first[0]["scores"] == [0.5] * 5 and first[1]["scores"] == [0.5] * 5 and first[0]["why"] == "because"
    assert made["rows"][2]["sides"][0]["scores"] is None and made["rows"][2]["sides"][0]["why"] == "not_evaluated"
    assert first[0]["program"] == "program 0" and first[1]["program"] is None


def test_text_scores_of_rows_that_need_none_are_left_out(tmp_path):
    a, b = (write(tmp_path / n, rows_of(2), [0.5, 1.0]) for n in ("a", "bb"))
    judged = json.loads((b / "results_eval.json").read_text())
    judged[0]["scores"]["text_accuracy_na"] = True
    (b / "results_eval.json").write_text(json.dumps(judged))
    by_name = {s["dimension"]: s["n"] for s in compare(a, b)["summary"]}
    assert by_name == {"faithfulness": 2, "visual_correctness": 2, "text_accuracy": 1, "aesthetics": 2, "overall": 2}


def test_other_programs_missing_pictures_and_truth_are_shown_as_such(tmp_path):
    rows = rows_of(2, gt_image="truth.png")
    a = write(tmp_path / "a", rows)
    changed = [dict(rows[0], gen_prompt="another"), dict(rows[1], success=False, output_path="", render_error="busy")]
    b = write(tmp_path / "bb", changed)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a" / "truth.png")
    made = compare(a, b)
    assert made["other_programs"] == 1 and made["rows"][0]["sides"][1]["program"] == "another"
    assert made["rows"][1]["sides"][1]["image"] is None and made["rows"][1]["sides"][1]["why"] == "busy"
    assert made["rows"][0]["truth"] == made["rows"][1]["truth"] is not None
    assert made["summary"][-1] == {"dimension": "overall", "n": 0, "means": None, "difference": "", "higher": [0, 0]}


def test_pictures_are_small_and_each_is_in_the_file_once(tmp_path):
    a, b = (write(tmp_path / n, rows_of(3)) for n in ("a", "bb"))
    shutil.copy(a / "0.png", b / "0.png")
    (b / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    made = compare(a, b)
    first, second = (side["image"] for side in made["rows"][0]["sides"])
    assert first == second and made["rows"][1]["sides"][1]["image"] is None and len(made["images"]) == 4
    for uri in made["images"]:
        kind, _, data = uri.partition(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert kind == "data:image/webp;base64" and max(picture.size) == THUMBNAIL


def test_the_page_stays_bounded_and_keeps_the_widest_differences(tmp_path):
    n = MAX_ROWS + 5
    rows = rows_of(n, success=False)
    a = write(tmp_path / "a", [dict(r) for r in rows], [0.5] * n)
    b = write(tmp_path / "bb", [dict(r) for r in rows], [0.5] * (n - 1) + [1.0])
    made = compare(a, b)
    assert len(made["rows"]) == MAX_ROWS and made["shared"] == made["summary"][-1]["n"] == n
    assert made["rows"][-1]["id"] == str(n - 1)


def test_hostile_rows_stay_text(tmp_path):
    evil = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)> \"' __TITLE__ \ud800"
    rows = [{"id": evil, "prompt": evil, "gen_prompt": evil, "eval_type": evil, "output_path": 7, "meta": [1]}]
    a, b = write(tmp_path / "a", rows), write(tmp_path / "b<b>&", [dict(rows[0])])
    page = build_comparison(read_side(a), read_side(b), tmp_path / "c.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2 and "<img src=x" not in text and "<title>a · b&lt;b&gt;&amp; ·" in text
    assert data_of(page)["rows"][0]["prompt"] == evil
    assert not re.search(r'(src|href)="?https?:', text)


def test_rows_that_share_an_id_are_paired_in_order(tmp_path):
    rows = [{"id": 1, "prompt": p, "gen_prompt": p} for p in ("x", "y")]
    made = compare(write(tmp_path / "a", rows), write(tmp_path / "bb", rows))
    assert [(r["id"], r["prompt"]) for r in made["rows"]] == [("1", "x"), ("1 #2", "y")] and not made["other_programs"]


def test_a_bench_folder_brings_its_own_scores(tmp_path):
    write(tmp_path / "bench" / "render", rows_of(2))
    write(tmp_path / "bench" / "score", rows_of(2), [0.5, 1.0])
    side = read_side(tmp_path / "bench")
    assert [side.scores(k)["overall"] for k in side.rows] == [0.5, 1.0] and side.name == "bench"


def test_the_command_writes_the_page_and_refuses_what_cannot_be(tmp_path, capsys):
    a, b = (write(tmp_path / n, rows_of(3), [0.5, 1.0, 0.0]) for n in ("a", "bb"))
    out = tmp_path / "page.html"
    assert (
        main(["report", "--compare", str(a), str(b), "-o", str(out)]) == 0
        and f"comparison: {out}" in capsys.readouterr().out
    )
    assert data_of(out)["summary"][-1]["difference"] == "+0.000 [+0.000, +0.000]"
    other = write(tmp_path / "c", [{"id": "z", "prompt": "p"}])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.json").write_text("{}")
    for flags, told in (
        (["--compare", str(a), str(other)], "share no id"),
        (["--compare", str(a), str(tmp_path / "e")], "cannot be read"),
        (["--compare", str(a), str(tmp_path / "d")], "must hold a list of rows"),
        ([str(a), "--compare", str(a), str(b)], "is a third"),
        ([], "give the folder of a run"),
        ([str(a), "-o", "x.html"], "give the folder of a run"),
    ):
        assert main(["report", *flags]) == 2 and told in capsys.readouterr().err
    with pytest.raises(ReportError, match="not JSON"):
        (tmp_path / "d" / "results.json").write_text("{")
        read_side(tmp_path / "d")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium to run the page")
def test_the_page_runs_and_shows_every_row(tmp_path):
    a, b = (write(tmp_path / n, rows_of(3), [0.5, 1.0, 0.0]) for n in ("a", "bb"))
    page = build_comparison(read_side(a), read_side(b), tmp_path / "c.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<figure>") == 6 and done.stdout.count("data:image/webp") >= 6
    assert "3 rows of the same id" in done.stdout and "what the judge says" in done.stdout
