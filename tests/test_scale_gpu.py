"""The comparison of whole steps with TRL: every kind at toy size, rows that are kept, scores from rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, scale_gpu
from benchmarks.scale_gpu import CASES, KINDS, Case, measure
from benchmarks.step_cases import Bench
from genevolve_fast.evaluate.scoreboard import TARGETS

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def rows_in(file: Path) -> list[dict]:
    return json.loads(file.read_text())["rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_the_same_in_both_and_has_its_figures(kind):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    rows = measure(Bench(CPU, 1, toy=True), Case(kind, "8b"))
    assert {n: r["status"] for n, r in rows.items()} == dict.fromkeys(
        ("shared", *(f"trl [batch {n}]" for n in (6, 3, 2, 1))), "timed"
    )
    assert len({r["real_tokens"] for r in rows.values()}) == 1
    for impl, row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(row["real_tokens"] / row["seconds"])
        assert row["total_bytes"] > row["peak_bytes"] > 0 and row["mfu"] is None
        if impl != "shared":
            assert row["gradient_distance"] <= (0.01 if kind == "qlora" else 1e-4), "qlora: TRL's adapters are bf16"
            assert row["ratio"] > 0
    padded, alone = rows["trl [batch 6]"]["model_flops"], rows["trl [batch 1]"]["model_flops"]
    assert padded > alone > rows["shared"]["model_flops"]


def test_one_after_the_other_has_the_same_rows():
    """As on a GPU that cannot hold two such models."""
    pytest.importorskip("trl", reason="trl is in the dev extra")
    rows = measure(Bench(CPU, 1, toy=True), Case("full", "2b"), apart=True)
    assert all(r["status"] == "timed" and "tokens_per_second" in r for r in rows.values()) and len(rows) == 5
    assert rows["trl [batch 6]"]["apart"] is True


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    monkeypatch.setattr(scale_gpu, "relative_distance", lambda have, want: 0.5)
    rows = measure(Bench(CPU, 1, toy=True), Case("lora", "2b"))
    assert rows["shared"]["status"] == "timed"
    assert {r["status"] for n, r in rows.items() if n != "shared"} == {"wrong"}
    assert not any("tokens_per_second" in r for n, r in rows.items() if n != "shared")


def test_rows_are_kept_until_the_code_changes(tmp_path, monkeypatch, capsys):
    file = tmp_path / "scale.json"
    argv = ["--device", "cpu", "--model", "toy", "--kind", "full", "--repeats", "1", "--file", str(file)]
    assert scale_gpu.main(argv) == 0
    first = rows_in(file)
    assert {r["case"] for r in first} == {"8b full", "2b full"} and all(r["stands_for"] in "8b 2b" for r in first)
    assert scale_gpu.main(argv) == 0
    assert rows_in(file) == first and "kept:" in capsys.readouterr().out
    monkeypatch.setattr(scale_gpu, "code", lambda: "other")
    assert scale_gpu.main([*argv, "--minutes", "0.1"]) == scale_gpu.OUT_OF_TIME
    assert "left: 8b full; 2b full" in capsys.readouterr().out


def test_a_toy_gives_no_score(tmp_path, capsys):
    row = hand_made("8b full", "shared", 100.0) | {"model": "toy"}
    file = tmp_path / "scale.json"
    file.write_text(json.dumps({"rows": [row, row | {"impl": "trl [batch 6]", "tokens_per_second": 10.0}]}))
    assert scale_gpu.scores(rows_in(file), "c") and not scale_gpu.scores(scale_gpu.as_meant(rows_in(file)), "c")


def hand_made(case: str, impl: str, speed: float, **more) -> dict:
    model = case.split()[0]
    return dict(
        case=case, impl=impl, model=model, stands_for=model, code="c", status="timed", seconds=1.0, samples=3,
        tokens_per_second=speed,
    ) | more  # fmt: skip


def test_scores_are_over_trls_best_batch_and_the_smaller_model_does_not_hide_the_larger():
    rows = []
    for case in CASES:
        mine = 90.0 if case.model == "8b" else 200.0
        rows += [hand_made(case.name, "shared", mine), hand_made(case.name, "trl [batch 6]", 30.0)]
        rows += [hand_made(case.name, "trl [batch 2]", 40.0, samples=2)]
        rows += [hand_made(case.name, "trl [batch 3]", 80.0) | {"status": "out of memory"}]
    found = scale_gpu.scores(rows, "c")
    assert found.keys() == {n for n in TARGETS if n.startswith("scale/tokens_per_s")}
    assert set(found.values()) == {(90 / 40, 2)}
    rows = [r | ({"status": "out of memory"} if r["case"] == "8b full" else {}) for r in rows]
    assert scale_gpu.scores(rows, "c")["scale/tokens_per_s_vs_trl_full"] == (200 / 40, 2)
    assert scale_gpu.scores(rows, "other code") == {}


def test_the_gpu_command_runs_it(capsys):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    assert {s.options["kind"] for s in gpu.SCALE} == set(KINDS)
    assert gpu.main(["--dry-run", "--only", "scale-lora"]) == 0
    told = capsys.readouterr().out
    assert "== scale-lora" in told and "scale/tokens_per_s_vs_trl_lora" in told


def test_real_sizes_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        scale_gpu.main(["--device", "cpu"])
    assert "--dry-run" in capsys.readouterr().err
