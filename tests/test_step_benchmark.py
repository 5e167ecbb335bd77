"""The step benchmark: its contenders make the same gradient, its rows are kept, its scores come from rows alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, step, step_cases, store
from benchmarks.memory import saved_bytes
from benchmarks.models import MODELS, config_of, loss_mask, random_policy, ready_gradients, rollouts_of, uneven_replies
from benchmarks.step_cases import (
    OBJECTIVE,
    TEMPERATURE,
    Bench,
    Case,
    distance,
    exact_cases,
    gradients_by,
    group_lengths,
    offload_of,
    passes_of,
)
from benchmarks.whole_sequences import former, unshared
from genevolve_fast.batch.groups import PushedTokens, bundles, pushed_tokens
from genevolve_fast.evaluate.scoreboard import TARGETS
from genevolve_fast.profile.flops import SHARED, pushed, sharing_ratio
from genevolve_fast.profile.shapes import ModelShape
from genevolve_fast.train.update import accumulate_gradients

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOY = MODELS["toy"]
ON_GPU = {name for name in TARGETS if name.startswith("step/")} - {
    "step/prefix_attention_error_f64", "step/grad_error", "step/teacher_saved_bytes", "step/demo_train_ratio"
}  # fmt: skip


def toy_rollouts(**more):
    return rollouts_of(48, uneven_replies(64), 4, TOY.shape.vocabulary, turn=9, **more)


# --- what is fed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 600, 8192, 11_878])
def test_a_reply_is_sampled_in_stretches(tokens):
    mask = loss_mask(tokens)
    stretches = int((np.diff(np.concatenate([[0], mask.astype(int), [0]])) == 1).sum())
    assert len(mask) == tokens and mask[0] and mask[-1]
    if tokens > 3:
        assert abs(mask.sum() - 0.3 * tokens) <= 1 and stretches == max(2, round(tokens / 1200))


def test_rollouts_of_a_request_share_their_prompt():
    rollouts = toy_rollouts()
    assert len({r.trajectory.ids[:48].tobytes() for r in rollouts}) == 1
    assert len({r.trajectory.ids[48:].tobytes() for r in rollouts}) == 6
    assert all(r.trajectory.loss_mask.argmax() == 48 and r.advantage and r.experience_ids for r in rollouts)
    assert all(r.trajectory.validate() for r in rollouts)
    other = toy_rollouts(group="1")
    assert other[0].trajectory.ids[:48].tolist() != rollouts[0].trajectory.ids[:48].tolist()


def test_uneven_replies_keep_their_mean():
    assert np.mean(uneven_replies(8192)) == pytest.approx(8192, rel=1e-3) and len(set(uneven_replies(8192))) == 6


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_published_dimensions(name):
    shape = MODELS[name].shape
    assert ModelShape.from_config(config_of(shape).to_dict()) == shape


def test_flops_count_what_the_pass_pushes():
    """The last sampled token of a reply predicts nothing and is not fed."""
    rollouts = [*toy_rollouts(), *toy_rollouts(group="1")]
    policy = random_policy(TOY, CPU)
    made = [make() for make in bundles(rollouts, {}, policy.codec, CPU, max_tokens=256)]
    fed = sum((pushed_tokens(b) for b in made), PushedTokens())
    counted = pushed(group_lengths(rollouts), SHARED)
    assert (counted.prefix.tokens, counted.student.tokens) == (fed.prefix, fed.student + 12)
    assert counted.teacher.tokens == fed.teacher + 12


@pytest.mark.parametrize(("mean", "least", "most"), [(8192, 1.4, 1.5), (2048, 2.5, 2.7)])
def test_the_flop_ratio_is_the_studys(mean, least, most):
    rollouts = rollouts_of(6144, uneven_replies(mean), 600, 1000)
    for lora in (0, 64):
        assert least < sharing_ratio(MODELS["8b"].shape, group_lengths(rollouts), passes_of(lora)) < most


def test_group_lengths_are_the_meters():
    from genevolve_fast.train import profiled

    rollouts = [*toy_rollouts(), *toy_rollouts(group="1")]
    assert group_lengths(rollouts) == profiled.group_lengths(rollouts)


# --- the contenders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [10**6, 90])
@pytest.mark.parametrize("contender", [unshared, former])
def test_whole_sequences_have_the_naive_gradient(contender, max_tokens):
    from naive import gradient, naive_loss

    for name, policy, rollouts, images in exact_cases():
        naive_loss(policy, rollouts, images, OBJECTIVE, TEMPERATURE).backward()
        want = gradient(policy)
        policy.zero_grad()
        contender(policy, rollouts, images, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens)
        assert (gradient(policy) - want).norm() <= 1e-5 * want.norm() > 0, name


@pytest.mark.parametrize("lora", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("batch", [6, 4, 1])
def test_trls_step_has_our_gradient(lora, batch):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    from benchmarks.trl_step import TrlStep

    ours, theirs = (random_policy(TOY, CPU, lora=lora) for _ in range(2))
    rollouts, options = toy_rollouts(), dict(temperature=TEMPERATURE, max_tokens=256)
    want = gradients_by(ours, lambda: accumulate_gradients(ours, rollouts, {}, OBJECTIVE, **options))
    trl = TrlStep(theirs, OBJECTIVE, TEMPERATURE)
    assert distance(theirs, lambda: trl.run(rollouts, batch), want) <= 1e-5
    without = [dataclasses.replace(r, experience_ids=()) for r in rollouts]
    bare = gradients_by(ours, lambda: accumulate_gradients(ours, without, {}, OBJECTIVE, **options))
    assert distance(ours, lambda: trl.run(rollouts, batch), bare) > 1e-3, "the distillation is in the loss"


def test_a_wrong_contender_is_not_timed(monkeypatch):
    monkeypatch.setattr(step_cases, "unshared", lambda policy, *a, **k: ready_gradients(policy))
    rows = step_cases.speedup(Bench(CPU, 1, toy=True), "8b", "reply2k")
    assert rows["unshared"]["status"] == "wrong" and "gradient" in rows["unshared"]["reason"]
    assert "ratio" not in rows["unshared"] and rows["shared"]["status"] == "timed"


def test_a_contender_without_memory_leaves_the_others():
    def too_much():
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench, made = Bench(CPU, 2), []
    runs = {"shared": lambda: made.append(1), "peer": too_much, "late": lambda: too_much() if len(made) > 2 else None}
    rows = {name: bench.weigh(run) for name, run in runs.items()}
    bench.time(rows, runs)
    assert rows["peer"]["status"] == rows["late"]["status"] == "out of memory" and "ratio" not in rows["late"]
    assert rows["shared"]["status"] == "timed" and rows["shared"]["samples"] == 2


def test_ratios_are_of_the_other_over_the_first():
    import time

    bench = Bench(CPU, 3)
    runs = {"shared": lambda: time.sleep(0.01), "peer": lambda: time.sleep(0.03)}
    rows = {name: dict(status="timed") for name in runs}
    bench.time(rows, runs)
    assert 2 < rows["peer"]["ratio_20"] <= rows["peer"]["ratio_80"] < 4 and 2 < rows["peer"]["ratio"] < 4
    assert rows["peer"]["samples"] == 3 and rows["peer"]["seconds"] == pytest.approx(0.03, rel=0.5)


def test_a_peak_counts_no_gradient_that_is_there():
    bench = Bench(CPU, 1, toy=True)
    policy = bench.policy("2b")
    run = bench.shared(policy, toy_rollouts())
    ready = bench.weigh(run)["peak_bytes"]
    policy.zero_grad(set_to_none=True)
    absent = bench.weigh(run)["peak_bytes"]
    bytes_of_gradients = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    assert absent - ready >= 0.5 * bytes_of_gradients


def test_every_layer_input_has_room_in_the_offload():
    bench = Bench(CPU, 1, toy=True)
    policy = bench.policy("8b")
    rollouts = bench.rollouts([4096], TOY.shape.vocabulary)
    policy.offload = offload_of(policy, len(rollouts[0].trajectory), CPU)
    bench.shared(policy, rollouts)()
    rows = len(rollouts[0].trajectory) - 1
    assert policy.offload.peak_bytes >= rows * TOY.shape.layers * TOY.shape.hidden * 4


def test_saved_bytes_sees_what_is_saved():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x.exp() * x) >= 2 * x.nbytes and saved_bytes(lambda: x.detach().exp()) == 0


# --- rows and the command ---------------------------------------------------------------------------------------------


def command(file: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--model", "toy", "--repeats", "1", "--file", str(file), *more]


def rows_in(file: Path) -> dict[tuple[str, str], dict]:
    return {(r["case"], r["impl"]): r for r in json.loads(file.read_text())["rows"]}


def test_a_row_says_everything_a_reader_needs(tmp_path, capsys):
    file = tmp_path / "step.json"
    assert step.main(command(file, "--section", "speedup", "--case", "lora", "reply2k")) == 0
    rows = rows_in(file)
    assert rows.keys() == {("8b lora reply2k", "shared"), ("8b lora reply2k", "unshared")}
    row = rows["8b lora reply2k", "unshared"]
    assert {"command", "versions", "commit", "code", "date", "device", "peak_bytes", "tokens", "ratio_20"} <= row.keys()
    assert row["versions"]["torch"] == torch.__version__ and row["gradient_distance"] < 1e-4
    assert row["model"] == "toy" and row["stands_for"] == "8b"
    assert "step/" not in capsys.readouterr().out, "a toy's rows are no scores"
    assert row["command"] == "python -m benchmarks.step --section speedup --case '8b lora reply2k'"


def use_cases(monkeypatch, **measures):
    """Cases that take no time, called in the order given; returns how often each ran."""
    ran = dict.fromkeys(measures, 0)

    def counted(name, measure):
        def once(bench):
            ran[name] += 1
            return measure(bench)

        return once

    cases = [Case("speedup", name, "8b", 0.0, counted(name, m)) for name, m in measures.items()]
    monkeypatch.setattr(step, "CASES", cases)
    return ran


def quick(bench):
    return {"shared": dict(status="timed", seconds=1.0)}


def no_memory(bench):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more")


def test_rows_are_kept_and_a_failure_ends_its_case_only(tmp_path, monkeypatch):
    file = tmp_path / "step.json"
    ran = use_cases(monkeypatch, first=quick, large=no_memory, broken=lambda b: 1 / 0, last=quick)
    for _ in range(2):
        assert step.main(command(file)) == 0
    assert ran == dict.fromkeys(ran, 1), "rows that are there are not measured again"
    status = {case: r["status"] for (case, _), r in rows_in(file).items()}
    assert status == {"first": "timed", "large": "out of memory", "broken": "failed", "last": "timed"}
    assert rows_in(file)["large", "shared"]["reason"].endswith("Tried to allocate 3 GiB")
    step.main(command(file, "--again"))
    assert ran == {"first": 1, "large": 2, "broken": 2, "last": 1}
    monkeypatch.setattr(step, "code", lambda: "other")
    step.main(command(file))
    assert ran == {"first": 2, "large": 3, "broken": 3, "last": 2}, "other code"


def test_a_case_that_killed_its_process_is_left_out(tmp_path, monkeypatch):
    file = tmp_path / "step.json"
    ran = use_cases(monkeypatch, deadly=quick, last=quick)
    results = store.Results(file, CPU, group=step.GROUP, code=step.code())
    group = dict(
        mode="speedup", case="deadly", model="toy", device=store.device_name(CPU), torch=torch.__version__
    )  # fmt: skip
    results.note(results.stamp(group, "shared", "") | dict(stands_for="8b"))  # and the process dies here
    assert step.main(command(file)) == 0
    assert ran == {"deadly": 0, "last": 1}
    assert "died or was killed" in rows_in(file)["deadly", "shared"]["reason"] and not list(tmp_path.glob(".*"))


def test_out_of_time_leaves_cases_and_says_so(tmp_path, monkeypatch, capsys):
    use_cases(monkeypatch, first=quick)
    monkeypatch.setattr(step, "CASES", [dataclasses.replace(step.CASES[0], minutes=2.0)])
    assert step.main(command(tmp_path / "step.json", "--minutes", "1")) == step.OUT_OF_TIME
    assert "left: speedup first" in capsys.readouterr().out


def test_a_shorter_rollout_is_tried_where_the_longest_failed():
    (shorter,) = [c for c in step_cases.CASES if c.name == "131072 tokens, all layers"]
    row = dict(mode="longest", whole=True, status="timed")
    assert shorter.unless([row]) and not shorter.unless([row | {"status": "out of memory"}]) and not shorter.unless([])
    assert not shorter.unless([row | {"whole": False}])


def test_what_cannot_be_measured_here_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.main(["--device", "cpu", "--section", "bytes"])
    assert "need a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda", "--section", "demo"])
    assert "--device cpu" in capsys.readouterr().err


FAULTS = {"failed", "wrong", "absent"}


def test_the_sections_run_at_toy_size(capsys):
    assert step.main(["--dry-run", "--debug", "--section", "longest", "planner", "exactness"]) == 0
    told = capsys.readouterr().out
    for name in ("longest_rollout_tokens = 2048 ", "planner_error", "grad_error", "teacher_saved_bytes = 0 "):
        assert f"step/{name}" in told
    assert not FAULTS & set(told.replace(":", "").split())


def test_the_dry_run_of_the_gpu_command_covers_every_section(monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: "green")
    assert gpu.main(["--dry-run", "--only", "step"]) == 0
    told = capsys.readouterr().out
    ran, ids = told.split("== tests", 1)[1].split("ids that a GPU run records: ")
    assert all(f"== {name}" in ran for name in gpu.GROUPS["step"]) and set(ids.split()) == ON_GPU
    assert not FAULTS & set(ran.replace(":", "").split())


def test_the_dry_run_covers_the_demo(capsys):
    assert step.main(["--dry-run", "--debug", "--section", "demo"]) == 0
    assert "step/demo_train_ratio = " in capsys.readouterr().out


def test_every_case_belongs_to_a_section_of_the_gpu_command():
    sections = [s.options for s in gpu.STEP]
    for case in step_cases.CASES:
        if case.section in step_cases.ON_CPU:
            continue
        homes = [o for o in sections if o["section"] == case.section and o.get("model", case.model) == case.model
                 and all(word in case.name for word in o.get("case", "").split())]  # fmt: skip
        assert len(homes) == 1, case.name
    full = [s.name for s in gpu.TIERS["full"]]
    assert full.index("step-speedup") < full.index("flat") and not {s.name for s in gpu.CORE} & set(gpu.GROUPS["step"])


# --- scores -----------------------------------------------------------------------------------------------------------


def row(mode, case, impl, **more):
    return dict(
        mode=mode, case=case, impl=impl, model="8b", stands_for="8b", code="c", status="timed", samples=3
    ) | more  # fmt: skip


def hand_made_rows() -> list[dict]:
    rows = [row("speedup", "8b lora reply8k", "shared", seconds=10.0)]
    rows += [row("speedup", "8b lora reply8k", "unshared", ratio=1.4, flop_ratio=1.5)]
    rows += [row("speedup", "8b lora reply2k", "unshared", ratio=2.5, flop_ratio=2.5)]
    rows += [row("speedup", "2b full reply8k", "unshared", ratio=0.1, flop_ratio=1.5)]
    rows += [row("trl", "8b lora reply8k", "shared", peak_bytes=10)]
    rows += [row("trl", "8b lora reply8k", "trl [batch 3]", ratio=5.0, peak_bytes=50, batch=3)]
    rows += [row("trl", "8b lora reply8k", "trl [batch 1]", peak_bytes=20, batch=1)]
    common = dict(prefix=6144, num_generations=1, lora=64, reference=False, rollout=False, max_tokens_per_microbatch=9)
    for offloaded, each in ((False, 300), (True, 100)):
        for teacher in (False, True):
            for tokens in step_cases.ALONE:
                settings = common | dict(tokens=6144 + tokens, teacher="live" if teacher else "off")
                peak = 7 * 2**30 + tokens * 1024 * (each + 5 * teacher)
                rows += [row("bytes", f"{tokens} {teacher} {offloaded}", "shared", peak_bytes=peak, tokens=tokens,
                             teacher=teacher, offloaded=offloaded, settings=settings)]  # fmt: skip
    rows += [row("bytes", "offload cost", "offloaded", ratio=1.06)]
    rows += [row("longest", "a", "shared", tokens=131_072, whole=True)]
    rows += [row("longest", "b", "shared", tokens=262_144, whole=True)]
    rows += [row("longest", "c", "shared", tokens=524_288, whole=False)]
    for i, p in enumerate(step_cases.PLANNED):
        settings = common | dict(tokens=20_000)
        said = step.predicted_bytes(dict(model="8b", settings=settings))
        rows += [row("planner", p.name, "shared", settings=settings, total_bytes=said / (1 + 0.01 * (i - 4)))]
    rows += [row("exactness", "grad error", name, error=e) for name, e in (("a", 1e-7), ("b", 3e-7))]
    rows += [row("exactness", "teacher saved bytes", n, saved_bytes=s, saved_bytes_without=90) for n, s in
             (("a", 90), ("b", 82))]  # fmt: skip
    return [*rows, row("demo", "first step", "former", ratio=1.7)]


def test_scores_are_computed_from_the_rows():
    found = step.scores(hand_made_rows(), "c")
    value = {name.removeprefix("step/"): v for name, (v, n) in found.items()}
    assert value.pop("planner_error") == pytest.approx(0.04)
    assert value.pop("share_of_flop_ratio") == pytest.approx(1.4 / 1.5), "the smaller of 8B's, not 2B's"
    assert value.pop("offload_cost") == pytest.approx(0.06)
    assert value == {
        "speedup_reply8k": 1.4, "speedup_reply2k": 2.5, "speedup_vs_trl": 5.0, "memory_vs_trl": 0.2,
        "kib_per_token_gpu": 305, "kib_per_token_offload": 105, "longest_rollout_tokens": 262_144,
        "grad_error": 3e-7, "teacher_saved_bytes": -8, "demo_train_ratio": 1.7,
    }  # fmt: skip
    assert found.keys() == {n for n in TARGETS if n.startswith("step/")} - {"step/prefix_attention_error_f64"}


def test_scores_without_their_rows_stay_absent():
    assert step.scores(hand_made_rows(), "other code") == {}
    rows = [r | {"status": "wrong"} if r["case"] == "8b lora reply2k" else r for r in hand_made_rows()]
    assert not {"step/speedup_reply2k", "step/share_of_flop_ratio"} & step.scores(rows, "c").keys()
    rows = [r for r in hand_made_rows() if r["case"] not in (step_cases.PLANNED[0].name, "65536 True False")]
    assert not {"step/planner_error", "step/kib_per_token_gpu"} & step.scores(rows, "c").keys()
    assert "step/kib_per_token_offload" in step.scores(rows, "c")
    assert step.as_meant([r | {"model": "toy"} for r in hand_made_rows()]) == []


def test_the_formula_stands_beside_the_measured_slope():
    rows = [r for r in hand_made_rows() if r["mode"] == "bytes" and r.get("offloaded") is False]
    for teacher, (measured, said) in step.kib_per_token(rows).items():
        assert measured == 300 + 5 * teacher and 100 < said < 1000
