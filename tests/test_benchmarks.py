"""The benchmarks: adapters against float64, wrong peers refused, rows kept, every section of the GPU run on a CPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, group, plot, run, store
from benchmarks.check import Truth, errors
from benchmarks.inputs import LOGITS, MODES, OWN_MODES, SEQUENCES, SHAPES, Inputs, Shape
from benchmarks.peers import OURS, PEERS, Contender, Unavailable, find, ours
from benchmarks.timing import quantiles, take_turns
from genevolve_fast.evaluate.scoreboard import TARGETS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
COMPILED = {"torch_compile", "cut_cross_entropy"}  # seconds of compilation for each shape
NAMES = [OURS, *(pytest.param(n, marks=pytest.mark.slow) if n in COMPILED else n for n in PEERS)]


def contender(name: str) -> Contender:
    if name == OURS:
        return ours(torch.empty(1, 8))
    try:
        return find(name, CPU)
    except Unavailable as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def truths():
    """(logits, ratio) -> float64 of toy inputs."""
    torch.manual_seed(0)
    shape = Shape("toy", 32, 1408, torch.float32)
    cases = [*((logits, 1.0) for logits in LOGITS), ("peaked", 0.5)]
    return {case: Truth(Inputs.make(shape, 128, CPU, *case, lengths="uneven")) for case in cases}


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", [("peaked", 1.0), ("flat", 1.0), ("peaked", 0.5)])
def test_an_adapter_gives_the_numbers_of_float64(name, case, truths):
    c, truth = contender(name), truths[case]
    offered = [mode for mode in MODES if c.why_not(mode) is None]
    assert offered
    for mode in offered:
        for layout in ("dense",) if case[1] == 1 else ("compact", "ignore"):
            found = errors(c, mode, truth, layout)
            want = {"error_d_hidden"} if mode != "logprob" else {"error_logp"}
            assert want <= found.keys()
            assert all(error <= 2e-4 for error in found.values()), (mode, layout, found)


def test_main_grad_is_judged_too(truths):
    c = ours(torch.empty(1, 8), main_grad=True)
    truth = truths["peaked", 1.0]
    into = torch.full_like(truth.inputs.weight, torch.nan)  # zeroed before it is added to
    found = errors(c, "objective", truth, "dense", into)
    assert found["error_d_weight"] <= 2e-4 and found["error_d_hidden"] <= 2e-4


@pytest.mark.slow
def test_every_peer_runs_or_says_why_not():
    assert len(PEERS) >= 14
    for name in PEERS:
        try:
            c = find(name, CPU)
        except Unavailable as e:
            assert str(e) and len(str(e)) < 400
        else:
            assert c.version and c.note
            assert all(c.why_not(mode) is None or "only" in c.why_not(mode) for mode in MODES)


def test_a_scalar_loss_is_not_taken_for_log_probs():
    c = Contender("scalar", cross_entropy=lambda b: b.hidden.sum())
    assert [mode for mode in MODES if c.why_not(mode) is None] == ["ce"]
    assert "scalar" in c.why_not("objective")
    c = Contender("grpo", objective=lambda b: b.hidden.sum())
    assert [mode for mode in MODES if c.why_not(mode) is None] == ["objective"]
    assert "teacher" in c.why_not("teacher")


@pytest.mark.parametrize("logits", LOGITS)
def test_inputs_are_what_their_name_says(logits, truths):
    truth = truths[logits, 1.0]
    z = truth.hidden @ truth.weight.T
    if logits == "normal":
        assert 2.7 < z.std() < 3.3 and abs(z.mean()) < 0.2
    if logits == "flat":
        assert (truth.logps + torch.log(torch.tensor(1408.0))).abs().max() < 0.5
    if logits == "peaked":
        assert -15 < z.mean() < -13
        assert 0.2 < truth.logps.exp().median() < 0.8


def test_loss_tokens_are_as_many_in_every_sequence(truths):
    x = truths["peaked", 0.5].inputs
    per_sequence = torch.bincount(x.loss_rows // (128 // SEQUENCES), minlength=SEQUENCES)
    assert per_sequence.tolist() == [4] * SEQUENCES and len(x.loss_rows.unique()) == 64
    b = x.batch(x.hidden, x.weight, "objective", "ignore")
    assert ((b.targets >= 0) == b.keep).all() and (b.upstream[~b.keep] == 0).all() and b.keep.sum() == 64
    b = x.batch(x.hidden, x.weight, "objective", "compact")
    assert torch.equal(b.targets, x.targets[x.loss_rows]) and torch.equal(b.hidden, x.hidden[x.loss_rows])


def test_uneven_sequences_are_the_teachers_only(truths):
    x = truths["peaked", 0.5].inputs
    for layout, n in (("ignore", 128), ("compact", 64)):
        teacher = x.batch(x.hidden, x.weight, "teacher", layout)
        lengths = torch.tensor(teacher.borders).diff()
        assert teacher.borders[0] == 0 and teacher.borders[-1] == n and len(set(lengths.tolist())) > 3
        assert torch.equal(torch.bincount(teacher.seq_ids, minlength=SEQUENCES), lengths)
        equal = x.batch(x.hidden, x.weight, "objective", layout)
        assert set(torch.tensor(equal.borders).diff().tolist()) == {n // SEQUENCES}
    rows = x.batch(x.hidden, x.weight, "teacher", "ignore").seq_ids[x.loss_rows]
    assert torch.equal(rows, x.batch(x.hidden, x.weight, "teacher", "compact").seq_ids)


def test_rows_that_make_no_equal_sequences_are_refused():
    with pytest.raises(ValueError, match="rows must be a multiple of 16, got 100"):
        Inputs.make(SHAPES["toy"], 100, CPU)


# --- measuring --------------------------------------------------------------------------------------------------------


def command(file: Path, *more: str) -> list[str]:
    return f"--device cpu --shapes 32x384xfloat32 --rows 64 --repeats 2 --file {file}".split() + list(more)


def phantom(b):
    """A log-sum-exp over columns that do not exist: padding whose logits are 0."""
    z = (b.hidden @ b.weight.T).float()
    lse = torch.cat([z, z.new_zeros(len(z), 640)], 1).logsumexp(1)
    return z.gather(1, b.safe_targets[:, None])[:, 0] - lse


def explode(b):
    raise MemoryError("too large for this machine\nand a second line")


def test_a_wrong_peer_is_reported_and_not_timed(tmp_path, monkeypatch):
    bad = {
        "phantom": lambda where: Contender("phantom", "1", logprob=phantom),
        "nan": lambda where: Contender("nan", "1", logprob=lambda b: b.hidden.sum(1) * torch.nan),
        "exploding": lambda where: Contender("exploding", "1", logprob=explode),
    }
    for name, make in bad.items():
        monkeypatch.setitem(PEERS, name, make)
    file = tmp_path / "head.json"
    assert run.main(command(file, "--modes", "trainable", "--peers", "eager", *bad)) == 0
    rows = {r["impl"]: r for r in json.loads(file.read_text())["rows"]}
    assert rows[OURS]["status"] == rows["eager"]["status"] == "timed"
    assert rows["phantom"]["status"] == "wrong" and "error_logp" in rows["phantom"]["reason"]
    assert rows["nan"]["status"] == "wrong"
    assert rows["exploding"]["status"] == "failed"
    assert rows["exploding"]["reason"] == "MemoryError: too large for this machine"
    assert not any("ms" in rows[name] for name in bad)


def test_nothing_is_timed_while_our_own_numbers_are_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(group, "judge", lambda *a: "error_logp 1 > 0.001")
    with pytest.raises(SystemExit, match="genevolve_fast is wrong in mode frozen"):
        run.main(command(tmp_path / "head.json", "--modes", "frozen", "--peers", "none"))
    assert not (tmp_path / "head.json").exists()


def test_a_row_says_everything_a_reader_needs(tmp_path):
    file = tmp_path / "head.json"
    run.main(command(file, "--modes", "objective", "--peers", "eager", "quack", "--ratio", "0.5"))
    data = json.loads(file.read_text())
    rows = {r["impl"]: r for r in data["rows"]}
    mine = rows[OURS]
    assert mine["ms_20"] <= mine["ms"] <= mine["ms_80"] and mine["samples"] == 2
    assert mine["ratio_to_floor"] == pytest.approx(mine["ms"] / (3 * mine["gemm_ms"] * 0.5))
    assert mine["tflops"] == pytest.approx(3 * 2 * 32 * 32 * 384 / mine["ms"] / 1e9)
    assert 0 < mine["peak_mib"] < mine["formula_mib"]
    assert mine["gemm_ms"] == rows["eager"]["gemm_ms"], "the floor belongs to the turns, not to a contender"
    assert {"commit", "code", "date", "device", "torch", "dtype", "logits", "layout", "error_d_hidden"} <= mine.keys()
    assert rows["quack"]["status"] == "absent" and rows["quack"]["reason"]
    assert data["machine"]["torch"] == torch.__version__


@pytest.mark.slow
def test_recorded_rows_are_kept_while_the_code_is_the_same(tmp_path, monkeypatch, capsys):
    file = tmp_path / "head.json"

    def times(*more: str) -> list[float]:
        run.main(command(file, "--modes", "logprob", "frozen", *more))
        return [r["ms"] for r in json.loads(file.read_text())["rows"]]

    first = times("--peers", "eager")
    assert times("--peers", "eager") == first and "kept: " in capsys.readouterr().out
    assert times("--peers", "none") == first, "asking for fewer forgets nothing"
    assert len(times("--peers", "eager", "liger_scaled_ce")) == 6, "a new peer is timed in turns with the others"
    fresh = times("--peers", "eager", "--fresh")
    assert len(fresh) == 4 and not set(fresh) & set(first)
    monkeypatch.setattr(store, "fingerprint", lambda: "other code")
    assert not set(times("--peers", "eager")) & set(fresh)


def test_a_contender_that_killed_its_process_is_left_out(tmp_path):
    file = tmp_path / "head.json"
    results = store.Results(file, CPU)
    args = run.parser().parse_args(command(file, "--modes", "logprob"))
    (what,) = run.groups_of(args, CPU)
    results.note(results.stamp(what, "eager", find("eager", CPU).version))  # and the process dies here
    run.main(command(file, "--modes", "logprob", "frozen", "--peers", "eager"))
    rows = {(r["impl"], r["mode"]): r for r in json.loads(file.read_text())["rows"]}
    assert "died or was killed in mode logprob" in rows["eager", "logprob"]["reason"]
    assert rows["eager", "frozen"]["reason"].startswith("not tried again")
    assert [rows[OURS, mode]["status"] for mode in ("logprob", "frozen")] == ["timed", "timed"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_section_survives_a_crash(tmp_path, monkeypatch):
    crash = "import os, runpy, sys; from benchmarks import peers; a = lambda b: os.abort()\n"
    crash += "peers.PEERS['eager'] = lambda where: peers.Contender('eager', '1', logprob=a)\n"
    crash += "sys.argv = sys.argv[1:]; from benchmarks import run; raise SystemExit(run.main(sys.argv[1:]))"
    script = tmp_path / "crash.py"
    script.write_text(crash)
    started = []

    def started_by_script(command, **options):
        started.append(command)
        return subprocess.CompletedProcess(
            command, subprocess.call([sys.executable, script, *command[2:]], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        )

    monkeypatch.setattr(gpu.subprocess, "run", started_by_script)
    file = tmp_path / "head.json"
    assert gpu.run_section(command(file, "--modes", "logprob", "--peers", "eager"), 120) == "done"
    rows = {r["impl"]: r["status"] for r in json.loads(file.read_text())["rows"]}
    assert rows == {OURS: "timed", "eager": "failed"} and len(started) == 2


def test_out_of_time_leaves_groups_and_says_so(tmp_path, capsys):
    more = ["--modes", "logprob", "frozen", "--peers", "none", "--minutes", "0"]
    assert run.main(command(tmp_path / "head.json", *more)) == run.OUT_OF_TIME
    assert (
        "left: 32x384xfloat32 64 rows normal logprob; 32x384xfloat32 64 rows normal frozen" in capsys.readouterr().out
    )


def test_the_cpu_ids_are_the_worst_mode_against_its_target(tmp_path, monkeypatch):
    results, told = store.Results(tmp_path / "head.json", CPU), {}
    for mode, ms in {"logprob": 9.0, "frozen": 0.8, "trainable": 1.2, "objective": 0.9, "teacher": 1.1}.items():
        for name, each, peak in ((OURS, ms, 8.0 + ms), ("eager", 1.0, 100.0)):
            row = run.CPU_CASE | dict(mode=mode, impl=name, ms=each, peak_mib=peak, samples=5, status="timed")
            results.data["rows"].append(row | {"code": results.code})
    monkeypatch.setattr(run, "record", lambda name, value, **more: told.update({name: value}))
    args = run.parser().parse_args([])
    run.record_cpu(results, args)
    assert told == {"head/cpu_time_vs_naive": 1.1, "head/cpu_memory_vs_naive": pytest.approx(0.092)}
    told.clear()
    results.data["rows"].pop()
    run.record_cpu(results, args)
    assert not told, "a mode is missing"


def test_runs_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = take_turns(runs, CPU, 3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert [len(t) for t in times.values()] == [3, 3, 3]
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


def test_a_slow_contender_stops_after_its_share():
    import time

    times = take_turns({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, CPU, 8, seconds=0.03, least=2)
    assert len(times["slow"]) == 2 and len(times["quick"]) == 8


def test_help_teaches_every_mode_and_option(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    told = capsys.readouterr().out
    assert all(meaning in told for _, _, meaning in MODES.values()) and "examples:" in told
    assert all(name in told for name in LOGITS)


# --- the GPU's command ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_dry_run_covers_every_section(capsys):
    of_head = [s.name for s in gpu.TIERS["full"] if not (s.of_step or s.of_scale)]
    assert gpu.main(["--dry-run", "--only", *of_head, "--peers", "eager", "liger_grpo"]) == 0
    told = capsys.readouterr().out
    assert all(f"== {name}" in told for name in of_head)
    ids = told.split("ids that a GPU run records: ")[1].split()
    cpu_ids = {"head/cpu_time_vs_naive", "head/cpu_memory_vs_naive", "head/kernels_compiled_sm90"}
    assert set(ids) == {name for name in TARGETS if name.startswith("head/")} - cpu_ids


TOY = {"device": "cpu", "shapes": "toy", "rows": "64", "modes": "frozen", "peers": "eager", "repeats": "1"}


def gpu_args(file: Path) -> argparse.Namespace:
    return argparse.Namespace(file=file, step_file=file.with_name("gpu_step.json"), tier="core", commit="abc")


@pytest.mark.slow
def test_sections_run_in_order_until_time_is_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: "green")
    recorded = {}
    monkeypatch.setattr(gpu, "record", lambda name, value, **more: recorded.update({name: (value, more)}))
    monkeypatch.setattr(gpu, "CORE_CASE", dict(shape="toy", rows=64, logits="peaked"))
    sections = [
        gpu.Section("first", 0.5, TOY, ""),
        gpu.Section("unknown", 0.1, TOY | {"modes": "none"}, ""),
        gpu.Section("long", 60.0, TOY, ""),
    ]
    file = tmp_path / "gpu_head.json"
    assert gpu.measure(gpu_args(file), sections, 3.0) == 1
    data = json.loads(file.read_text())
    outcomes = {name: s["outcome"] for name, s in data["sections"].items()}
    assert outcomes == {
        "tests": "green", "first": "done", "unknown": "failed: benchmarks.run exits with 2", "long": "left: no time"
    }  # fmt: skip
    assert {r["impl"] for r in data["rows"]} == {OURS, "eager"} and {r["commit"] for r in data["rows"]} == {"abc"}
    assert recorded.keys() == {"head/frozen_vs_2gemm", "head/speedup_frozen_vs_best_peer"}
    value, more = recorded["head/frozen_vs_2gemm"]
    assert value > 0 and more == dict(n=1, command="python -m benchmarks.gpu --tier core", at="abc")
    assert "left or failed: unknown, long" in capsys.readouterr().out


def test_nothing_is_timed_on_red_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: "red (pytest exits with 1)")
    monkeypatch.setattr(gpu, "run_section", lambda *a: pytest.fail("a section ran"))
    file = tmp_path / "gpu_head.json"
    assert gpu.measure(gpu_args(file), [gpu.Section("first", 0.1, TOY, "")], 3.0) == 1
    data = json.loads(file.read_text())
    assert data["sections"].keys() == {"tests"} and data["sections"]["tests"]["outcome"].startswith("red")


def test_a_gpu_is_asked_for(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["--tier", "core"])
    assert "no GPU: --dry-run" in capsys.readouterr().err


def gpu_row(mode, impl, ms, peak=1000.0, ratio=1.0, floor=100.0):
    return gpu.CORE_CASE | dict(
        mode=mode, impl=impl, ms=ms, peak_mib=peak, ratio=ratio, layout="dense" if ratio == 1 else "compact",
        ratio_to_floor=ms / floor, samples=10, code="c", status="timed",
    )  # fmt: skip


def test_scores_are_computed_from_the_rows():
    rows = [gpu_row(mode, OURS, 110.0 + i) for i, mode in enumerate(OWN_MODES)]
    rows += [gpu_row(mode, OURS, 33.0, ratio=0.3) for mode in OWN_MODES]
    rows += [gpu_row(mode, f"{OURS} [{mb} MB]", 120.0, peak=mb + 10.0) for mode in OWN_MODES for mb in gpu.WORKSPACES]
    rows += [gpu_row(mode, f"{OURS} [640 MB, main_grad]", 130.0, peak=660.0) for mode in ("objective", "teacher")]
    rows += [gpu_row("objective", "eager", 150.0, peak=9000.0), gpu_row("objective", "liger_grpo", 900.0)]
    rows += [gpu_row("frozen", "lean", 119.0, peak=700.0), gpu_row("frozen", "quick", 100.0, peak=5000.0)]
    rows += [gpu_row("frozen", "wrong", 1.0, peak=1.0) | {"status": "wrong"}]
    rows += [gpu_row("frozen", "old", 1.0, peak=1.0) | {"code": "before"}]
    value = {name: v for name, (v, n) in gpu.scores(rows, "c").items()}
    at = {mode: 110.0 + i for i, mode in enumerate(OWN_MODES)}
    assert value["head/logprob_vs_1gemm"] == at["logprob"] / 100
    assert value["head/trainable_vs_3gemm"] == at["objective"] / 100, "the objective with a trainable head"
    assert value["head/teacher_vs_4.3gemm"] == at["teacher"] / 100
    assert value["head/masked30_vs_dense"] == 33 / 110, "the worst mode"
    assert value["head/speedup_trainable_vs_best_peer"] == 150 / at["objective"]
    assert value["head/speedup_frozen_vs_best_peer"] == 100 / at["frozen"]
    assert value["head/speedup_vs_liger_grpo"] == 900 / at["objective"]
    assert value["head/workspace640_peak_mib"] == 660 and value["head/workspace640_vs_floor"] == 1.3
    assert value["head/peers_dominating"] == 1, "`lean` beats the frozen mode at 1280 MB; `quick` is faster, not leaner"


def test_scores_without_their_rows_stay_absent():
    assert gpu.scores([gpu_row("frozen", OURS, 110.0)], "c").keys() == {"head/frozen_vs_2gemm"}


# --- plot and compiled kernels ----------------------------------------------------------------------------------------


def test_the_plot_shows_every_point_inside_its_panel():
    rows = [gpu_row("objective", impl, 10.0 * n * k, peak=50.0 * k) | {"rows": 1024 * n, "gemm_ms": 4.0 * n}
            for k, impl in enumerate((OURS, "eager", "liger_grpo"), 1) for n in (1, 2, 4)]  # fmt: skip
    rows = [r | {"floor_gemms": 3} for r in rows]
    svg = ET.fromstring(plot.draw(rows, "Objective", "somewhere <&>"))
    circles = svg.findall("{*}circle")
    assert len(circles) == 9 + 9
    for c in circles:
        x, y = float(c.get("cx")), float(c.get("cy"))
        left = plot.LEFT if x <= plot.LEFT + plot.WIDTH else plot.LEFT + plot.WIDTH + plot.GAP
        assert left < x < left + plot.WIDTH and plot.TOP < y < plot.TOP + plot.HEIGHT
    words = {t.text for t in svg.findall("{*}text")}
    assert {"GEMM floor", "eager torch", OURS, "rows", "somewhere <&>"} <= words


def test_a_plot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no timed row"):
        plot.draw([], "", "")


@pytest.mark.slow
def test_triton_kernels_are_compiled_for_sm90():
    code = "from benchmarks.compiled import triton_kernels as kernels; found = kernels(90)\n"
    code += "print(len(found), set(found.values()))"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    count, verdicts = told.stdout.splitlines()[-1].split(" ", 1)
    assert int(count) >= 2 and verdicts == "{None}", told.stdout + told.stderr
