"""The planner of several GPUs: what each holds by strategy, a step's time by measured rates, rates that are missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.models import rollouts_of
from benchmarks.step_cases import group_lengths
from genevolve_fast.batch.groups import bundles
from genevolve_fast.cli import main
from genevolve_fast.policy.codec import NO_TOKEN
from genevolve_fast.profile.plan import PlanError, Settings, layer_parameters, plan, trainable, trained_bytes, verdict
from genevolve_fast.profile.rates import NoRate, Rate, Rates, RatesError, head_key, layer_key, model_key, same_device
from genevolve_fast.profile.shapes import BUILT_IN
from genevolve_fast.profile.sharding import DIVIDED, NF4_BITS
from genevolve_fast.profile.step_time import Engines, Streams, expected_groups, step_time, streams_of, time_table

EIGHT = BUILT_IN["qwen3-vl-8b"]
FULL = Settings(tokens=20_144, prefix=6144, rollout=False, bf16="master")
LORA = replace(FULL, lora=64, bf16="nearest")
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def on(s: Settings, strategy: str, gpus: int = 8, nodes: int = 1, **more) -> Settings:
    return replace(s, strategy=strategy, nodes=nodes, gpus_per_node=gpus // nodes, **more)


def terms(made) -> dict[str, int]:
    """Bytes of every term by name; the largest where phases differ."""
    out: dict[str, int] = {}
    for t in (*made.held, *made.host, *(t for terms in made.phases.values() for t in terms)):
        out[t.name] = max(out.get(t.name, 0), t.bytes)
    return out


# --- memory -----------------------------------------------------------------------------------------------------------

OF = {"weights": ("weights",), "gradients": ("gradients",), "state": ("optimizer state", "fp32 weights")}


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_times_gpus_are_the_whole(strategy, settings):
    alone, shared = terms(plan(EIGHT, on(settings, strategy, 1))), terms(plan(EIGHT, on(settings, strategy, 8)))
    for what, names in OF.items():
        for name in names:
            times = 8 if what in DIVIDED[strategy] else 1
            assert times * shared.get(name, 0) == pytest.approx(alone.get(name, 0), abs=8), name
    tower = EIGHT.parameters["vision"] * 2
    assert shared.get("frozen vision tower", 0) == (tower if strategy in ("zero3", "fsdp2") else 0)
    every = sum(shared.get(name, 0) * (8 if "weights" in DIVIDED[strategy] else 1) for name in ("weights", "adapters"))
    whole = EIGHT.total_parameters * 2 + (4 * EIGHT.lora_parameters(64) if settings.lora else 0)
    assert every + shared.get("frozen vision tower", 0) == pytest.approx(whole, abs=16)


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_more_is_divided_and_less_is_held(settings):
    order = [sum(t.bytes for t in plan(EIGHT, on(settings, s)).held) for s in ("zero1", "zero2", "zero3")]
    assert order[0] >= order[1] >= order[2]
    g = {s: terms(plan(EIGHT, on(settings, s)))["gradients"] for s in STRATEGIES}
    assert g["zero2"] == g["zero3"] == 4 * trainable(EIGHT, settings) / 8, "in fp32"
    assert g["ddp"] == g["zero1"] == pytest.approx(8 * g["fsdp2"]), "as they come"
    assert (
        plan(EIGHT, on(FULL, "zero2")).total < plan(EIGHT, on(FULL, "zero1")).total < plan(EIGHT, on(FULL, "ddp")).total
    )
    for strategy in ("zero1", "zero2", "zero3", "fsdp2"):
        totals = [plan(EIGHT, on(settings, strategy, gpus)).total for gpus in (1, 2, 8, 64)]
        assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1], strategy
    one, two = (plan(EIGHT, on(settings, "fsdp2", 16, nodes)).total for nodes in (1, 2))
    assert one == two


def test_what_a_visit_gathers_is_there_while_it_lasts():
    made = plan(EIGHT, on(FULL, "fsdp2"))
    layer = layer_parameters(EIGHT)
    assert layer * EIGHT.layers + EIGHT.hidden == EIGHT.parameters["layers"] + EIGHT.parameters["norms"]
    for phase in ("prefix", "student", "teacher", "backward"):
        assert {t.name: t.bytes for t in made.phases[phase]}["gathered layers"] == 2 * 2 * layer
    assert {t.name: t.bytes for t in made.phases["head"]}["gathered head"] == 2 * EIGHT.vocabulary * EIGHT.hidden
    assert not [t for t in made.phases["step"] if t.name.startswith("gathered")]
    assert "gathered layers" not in terms(plan(EIGHT, on(FULL, "zero2")))


def test_the_step_of_ddp_holds_a_bucket_more():
    made = {t.name: t.bytes for t in plan(EIGHT, on(FULL, "ddp")).phases["step"]}
    assert made["gradients being summed"] == (64 << 20) + 2 * EIGHT.vocabulary * EIGHT.hidden


def test_offloading_moves_what_it_names_to_the_host():
    here, there = (plan(EIGHT, on(FULL, "zero3", offload_optimizer=o)) for o in (False, True))
    learns = trainable(EIGHT, FULL)
    moved = sum(t.bytes for t in here.held) - sum(t.bytes for t in there.held)
    assert moved == pytest.approx(16 * learns / 8, rel=1e-6)  # copies, two moments, gradients
    assert there.host_bytes == pytest.approx(16 * learns / 8, rel=1e-6) and not here.host_bytes
    both = plan(EIGHT, on(FULL, "zero3", offload_optimizer=True, offload_params=True))
    assert "weights" not in {t.name for t in both.held} and both.host_bytes > there.host_bytes
    every = plan(EIGHT, on(FULL, "fsdp2", offload_params=True))
    assert {t.name for t in every.held} == {"frozen vision tower", "frozen copy (reference)"}
    assert {t.name for t in every.host} == {"weights", "gradients", "fp32 weights", "optimizer state"}
    assert not [t for t in every.phases["step"] if t.name == "gradients"]


def test_what_samples_reads_the_weights_whole():
    """The embedded engine, and a vLLM that is given them while it holds its own."""
    text = 2 * (EIGHT.total_parameters - EIGHT.parameters["vision"])
    for strategy, size in (("ddp", 0), ("zero2", 0), ("zero3", text), ("fsdp2", text)):
        s = on(FULL, strategy)
        embedded = plan(EIGHT, replace(s, rollout=True)).phases["rollout"]
        assert sum(t.bytes for t in embedded if t.name == "gathered weights") == size
        beside = plan(EIGHT, replace(s, engine_bytes=36 << 30))
        found = {t.name: t.bytes for t in beside.phases["sync"]}
        assert found.get("gathered weights", 0) == size and found["the engine's weights"] == 2 * EIGHT.total_parameters
        assert {t.name for t in beside.phases["rollout"]} == {"the engine beside the policy"}
    assert "sync" not in plan(EIGHT, on(FULL, "fsdp2")).phases


def test_one_process_of_ddp_is_a_run_alone():
    assert plan(EIGHT, on(LORA, "ddp", 1)) == plan(EIGHT, LORA)


def test_zero_adds_in_fp32_and_gathers_a_bucket():
    bucket, learns = 2 * (16 << 20), trainable(EIGHT, FULL)
    one, two, three = (plan(EIGHT, on(FULL, f"zero{stage}")) for stage in (1, 2, 3))
    of = lambda terms: {t.name: t.bytes for t in terms}  # noqa: E731
    assert of(one.phases["step"])["gradients being summed"] == bucket
    assert "ZeRO's bucket of gradients" not in of((*one.held, *one.phases["backward"]))
    assert of(two.phases["backward"])["ZeRO's bucket of gradients"] == bucket
    assert of(three.held)["ZeRO's bucket of gradients"] == bucket
    assert of(three.phases["backward"])["the bucket, cut for its ranks"] == bucket
    assert of(three.held)["gradients"] == math.ceil(4 * learns / 8)  # kept from the first step to the last
    assert of(one.phases["backward"])["gradients"] == 2 * learns  # as they come: DeepSpeed has no sum of its own yet
    small = of(plan(EIGHT, on(LORA, "zero3")).phases["backward"])
    assert small["the bucket, cut for its ranks"] == min(4 * (16 << 20), 4 * EIGHT.lora_parameters(64))


@pytest.mark.parametrize("phase, rows", [("backward", "student_rows"), ("prefix", "prefix")])
def test_a_layers_new_gradients_lie_beside_the_old_ones_and_are_wide_where_tiles_are_summed(phase, rows):
    def new(**changes) -> int:
        made = plan(EIGHT, replace(FULL, bf16="nearest", **changes))
        return {t.name: t.bytes for t in made.phases[phase]}["a layer's new gradients"]

    layer = EIGHT.linear_parameters // EIGHT.layers + 2 * EIGHT.hidden + 2 * EIGHT.head_dim
    many = getattr(FULL, rows)
    assert new(tile_tokens=many) == 2 * layer, "one tile: as wide as the weights"
    assert new(tile_tokens=many - 1) == 4 * layer
    assert new(tile_tokens=many, dtype="float32") == new(tile_tokens=many - 1, dtype="float32") == 4 * layer
    assert new(lora=64) == 4 * EIGHT.lora_parameters(64) // EIGHT.layers
    assert new(gradient_checkpointing=False) == 2 * max(a * b for a, b in EIGHT.matrices)


def test_four_bit_weights_take_what_bitsandbytes_takes():
    plain, packed = (terms(plan(EIGHT, replace(LORA, quantize=q))) for q in ("none", "nf4"))
    assert plain["weights"] - packed["weights"] == pytest.approx(EIGHT.linear_parameters * (2 - NF4_BITS / 8), abs=2)
    assert packed["a dequantised matrix"] == 2 * EIGHT.hidden * EIGHT.intermediate
    assert abs(NF4_BITS - 4.127) < 0.001


def test_moments_of_eight_bits_are_a_quarter():
    wide, narrow = (
        terms(plan(EIGHT, replace(FULL, bf16="nearest", dtype="float32", implementation=i))) for i in ("fused", "8bit")
    )
    assert narrow["optimizer state"] / wide["optimizer state"] == pytest.approx(0.254, abs=0.001)
    paged = plan(EIGHT, replace(FULL, bf16="nearest", implementation="paged_8bit"))
    assert "optimizer state" not in {t.name for t in paged.held} and paged.host_bytes > 15e9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(nodes=2), "trains on one GPU"),
        (dict(strategy="ddp", gpus_per_node=2, offload_optimizer=True), "offload_optimizer"),
        (dict(strategy="zero2", gpus_per_node=2, offload_params=True), "offload_params"),
        (dict(strategy="fsdp2", gpus_per_node=2, optimizer="muon"), "whole matrices"),
        (dict(strategy="fsdp2", gpus_per_node=2, offload_optimizer=True), "offload_params is its switch"),
        (dict(strategy="zero3", gpus_per_node=2, implementation="cpu"), "give it with strategy zero3"),
        (dict(strategy="zero2", gpus_per_node=2, implementation="8bit"), "moments of whole weights"),
        (dict(strategy="fsdp2", gpus_per_node=2, bf16="stochastic"), "bf16 master"),
        (dict(strategy="zero1", gpus_per_node=2, freeze_vision=False), "vision tower"),
        (dict(quantize="nf4"), "set a rank"),
        (dict(strategy="fsdp2", gpus_per_node=2, lora=8, quantize="nf4"), "cannot divide"),
        (dict(gpus_per_node=0), "gpus_per_node"),
    ],
)
def test_placements_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(PlanError, match=message):
        Settings(tokens=1000, **wrong)


# --- rates ------------------------------------------------------------------------------------------------------------

H100 = "NVIDIA H100 80GB HBM3"


def made_up(spans: str = "node", nodes: int = 1) -> Rates:
    """Round numbers for every rate that an 8B step needs: they test the arithmetic and are recorded nowhere."""
    layer = dict(layer=layer_key(EIGHT), dtype="bfloat16", quantize="none", rows=8192)
    heads = dict(heads=[32, 8, 128], dtype="bfloat16", length=8192)
    head = dict(head=head_key(EIGHT), dtype="bfloat16", rows=8192)
    moved = dict(spans=spans, ranks=8 * nodes, nodes=nodes, backend="nccl", bytes=400 << 20)
    step = dict(optimizer="adamw", implementation="fused", parameters=8e8, where="device")
    found = [
        *(Rate(H100, "layer_forward", 5e14, "FLOP/s", layer | dict(adapters=a)) for a in (False, True)),
        *(
            Rate(H100, "layer_backward", 4e14, "FLOP/s", layer | dict(adapters=a, checkpointing=c))
            for a in (False, True) for c in (False, True)
        ),
        Rate(H100, "attention_forward", 4e14, "FLOP/s", heads),
        Rate(H100, "attention_backward", 3e14, "FLOP/s", heads),
        *(Rate(H100, f"head_{k}", 4e14, "FLOP/s", head) for k in ("objective", "frozen", "score")),
        Rate(H100, "optimizer", 1e10, "parameters/s", step | dict(bf16="master", dtype="float32")),
        *(Rate(H100, n, 2e11, "bytes/s", moved) for n in ("all_gather", "reduce_scatter", "all_reduce")),
        *(Rate(H100, n, 5e10, "bytes/s", dict(bytes=256 << 20)) for n in ("host_to_device", "device_to_host")),
        Rate(H100, "checkpoint_write", 2e9, "bytes/s"),
    ]  # fmt: skip
    sampling = dict(model=model_key(EIGHT), dtype="bfloat16", engine="server", quantize="none", open=48, context=20_144)
    return Rates((*found, Rate(H100, "sampling", 5000.0, "tokens/s", sampling)))


def test_a_rate_is_found_by_its_conditions_and_the_nearest_of_those():
    at = dict(dtype="bfloat16")
    rates = Rates(tuple(Rate(H100, "head", v, "FLOP/s", at | dict(rows=n)) for n, v in ((1024, 1.0), (8192, 2.0))))
    assert rates.find("h100", "head", near={"rows": 6000}, dtype="bfloat16").value == 2
    assert rates.find(H100, "head", near={"rows": 100}, dtype="bfloat16").value == 1
    for device, near, dtype in (("h100", 6000, "float32"), ("h200", 6000, "bfloat16"), ("h100", 200_000, "bfloat16")):
        with pytest.raises(NoRate, match="benchmarks.rates"):
            rates.find(device, "head", near={"rows": near}, dtype=dtype)


def test_devices_are_the_same_by_their_own_names_only():
    assert same_device(H100, "h100") and same_device("AMD EPYC, 2 cores", "AMD EPYC, 2 cores")
    assert not same_device(H100, "h200") and not same_device("AMD EPYC", "Intel Xeon")


@pytest.mark.parametrize("text", ["{", '{"devices": {"x": {}}}', '{"devices": {"x": {"rates": [{"name": 1}]}}}', "[]"])
def test_a_file_that_holds_no_rates_is_told(tmp_path, text):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(RatesError, match="rates.json"):
        Rates.read(tmp_path / "rates.json")


# --- the time of a step -----------------------------------------------------------------------------------------------


def seconds(made) -> dict[str, float | None]:
    return {line.name: line.seconds for line in made.lines}


def test_seconds_are_work_over_rate():
    made = step_time(EIGHT, on(FULL, "fsdp2"), made_up(), "h100")
    found = seconds(made)
    prefix = 2 * EIGHT.linear_parameters * 6144 / 5e14 + 4 * EIGHT.q * EIGHT.layers * 6144 * 6145 / 2 / 4e14
    assert found["prefix"] == pytest.approx(prefix)
    assert found["optimizer"] == pytest.approx(trainable(EIGHT, FULL) / 8 / 1e10)
    assert made.training[0] < made.training[1] and not made.missing
    assert made.training[1] == pytest.approx(sum(v for n, v in found.items() if not n.startswith("a checkpoint")))
    assert made.training[0] == pytest.approx(
        max(sum(line.seconds for line in made.of(k)) for k in ("arithmetic", "transfer"))
    )


def test_what_moves_between_gpus():
    layers, tables = 2 * layer_parameters(EIGHT) * EIGHT.layers, 2 * EIGHT.vocabulary * EIGHT.hidden
    s = on(replace(FULL, reference=False, teacher="off"), "fsdp2")
    streams = streams_of(s, expected_groups(s))
    assert streams == Streams(1, 6), "six replies of 14,000 tokens, one a micro-batch"
    found = seconds(step_time(EIGHT, s, made_up(), "h100"))
    gathered = 7 * 2 * (layers + tables) + 6 * 2 * tables
    assert found["gathering weights"] == pytest.approx(gathered * 7 / 8 / 2e11)
    assert found["reducing gradients"] == pytest.approx(2 * (7 * (layers + tables) + 6 * tables) * 7 / 8 / 2e11)
    zero = seconds(step_time(EIGHT, replace(s, strategy="zero3"), made_up(), "h100"))
    assert 2 * zero["reducing gradients"] == pytest.approx(found["reducing gradients"]), "FSDP2 sums in fp32"
    lora = replace(s, lora=64, bf16="nearest")
    learns = trainable(EIGHT, lora) * trained_bytes(lora)
    found = seconds(step_time(EIGHT, lora, made_up(), "h100"))
    assert found["reducing gradients"] == pytest.approx(7 * learns * 7 / 8 / 2e11)
    found = seconds(step_time(EIGHT, replace(lora, strategy="ddp"), made_up(), "h100"))
    assert found["reducing gradients"] == pytest.approx(2 * learns * 7 / 8 / 2e11) and "gathering weights" not in found
    alone = seconds(step_time(EIGHT, replace(lora, strategy="none", gpus_per_node=1), made_up(), "h100"))
    assert not {"gathering weights", "reducing gradients"} & set(alone)


def test_groups_are_not_split_and_gpus_without_one_are_named():
    s = on(FULL, "zero3", 16, 2)
    made = step_time(EIGHT, s, made_up("nodes", 2), "h100")
    assert made.idle == 8 and "8 of 16 GPUs have no group" in time_table(made, s)
    half = step_time(EIGHT, on(FULL, "zero3", 4), made_up(), "h100")
    whole = step_time(EIGHT, on(FULL, "zero3", 8), made_up(), "h100")
    assert seconds(half)["student"] == pytest.approx(2 * seconds(whole)["student"])


def test_without_a_rate_there_is_no_estimate_of_the_line_nor_of_the_step():
    one_node = made_up()
    made = step_time(EIGHT, on(FULL, "zero3", 16, 2), one_node, "h100")
    assert {line.name for line in made.missing} == {"gathering weights", "reducing gradients"}
    assert made.training is None and made.step is None
    told = time_table(made, on(FULL, "zero3", 16, 2))
    assert "no rate all_gather (spans nodes" in told and "no estimate of the step" in told and "torchrun" in told
    every = step_time(EIGHT, FULL, Rates(), "h100")
    assert all(line.seconds is None for line in every.lines) and len(every.missing) == len(every.lines) - 1
    assert "estimated" not in time_table(every, FULL)


@pytest.mark.parametrize("dropped", sorted({r.name for r in made_up().rates} - {"all_reduce", "checkpoint_write"}))
def test_every_rate_is_needed(dropped):
    engines = Engines(4, engine="vllm")
    s = on(replace(FULL, offload_gib=8.0), "zero3")
    s = replace(s, offload_optimizer=dropped == "host_to_device")
    rates = Rates(tuple(r for r in made_up().rates if r.name != dropped))
    if dropped == "head_frozen":
        s = replace(s, freeze_head=True)
    assert step_time(EIGHT, s, rates, "h100", engines=engines).step is None


def test_rollouts_take_turns_with_training_or_overlap_it():
    s = on(FULL, "fsdp2")
    times = {n: step_time(EIGHT, s, made_up(), "h100", engines=Engines(n, engine="vllm")) for n in (4, 8)}
    rollout = seconds(times[4])["rollout"]
    assert rollout == pytest.approx(48 * 14_000 / 4 / 5000)
    assert seconds(times[8])["rollout"] == pytest.approx(rollout / 2)
    assert times[4].step[1] == pytest.approx(rollout + times[4].training[1])
    off = step_time(EIGHT, s, made_up(), "h100", engines=Engines(4, True, "vllm"))
    assert off.step == (max(rollout, off.training[0]), max(rollout, off.training[1]))
    with pytest.raises(PlanError, match="rollout_gpus"):
        Engines(0, True)


@pytest.mark.parametrize("most", [500, 1100, 2200, 3500, 5000, 20_000])
def test_replies_stream_as_the_training_pass_lays_them_out(most):
    codec = SimpleNamespace(image_pad_id=NO_TOKEN, merge_size=1, image_grid=None)
    groups = [rollouts_of(100, [1000] * 4, 50, 900, group=str(g)) for g in range(3)]
    made = [make() for make in bundles([r for g in groups for r in g], {}, codec, "cpu", max_tokens=most)]
    s = Settings(tokens=1100, prefix=100, num_generations=4, prompts_per_step=3, max_tokens_per_microbatch=most)
    found = streams_of(s, group_lengths([r for g in groups for r in g]))
    assert (found.bundles, found.microbatches) == (len(made), max(len(b.microbatches) for b in made))


# --- the command line -------------------------------------------------------------------------------------------------

PLANNED = [
    "plan",
    "--model",
    "qwen3-vl-8b",
    "--tokens",
    "20144",
    "--prefix",
    "6144",
    "--gpu",
    "h100",
    "--training-only",
]


def written(tmp_path: Path, rates: Rates) -> Path:
    rows = [
        dict(name=r.name, value=r.value, unit=r.unit, at=dict(r.at), commit="abc", date="2026-01-01")
        for r in rates.rates
    ]
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"devices": {H100: {"rates": rows}}}))
    return file


def test_several_gpus_on_the_command_line(tmp_path, capsys):
    file = written(tmp_path, made_up())
    flags = ["--gpus-per-node", "8", "--strategy", "fsdp2", "--bf16", "master", "--rates", str(file)]
    assert main([*PLANNED, *flags]) == 0
    told = capsys.readouterr().out
    assert "memory of each of 8 GPUs, fsdp2" in told and "estimated from [" in told and H100 in told
    assert main([*PLANNED, *flags, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    want = step_time(EIGHT, on(FULL, "fsdp2"), Rates.read(file), "h100")
    assert made["step_time"]["training"] == pytest.approx(list(want.training))
    assert main([*PLANNED, *flags, "--nodes", "2"]) == 0
    assert "no rate all_gather" in capsys.readouterr().out
    assert main([*PLANNED, "--gpus-per-node", "2"]) == 2
    assert "trains on one GPU" in capsys.readouterr().err


def test_a_plan_without_rates_says_why_there_is_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(PLANNED)
    assert "no estimate: no benchmarks/results/rates.json here" in capsys.readouterr().out
    main([*PLANNED, "--gpu", "80GiB"])
    assert "80GiB is a size" in capsys.readouterr().out
    assert main([*PLANNED, "--rates", "nowhere.json"]) == 2
    assert "no nowhere.json" in capsys.readouterr().err


def test_vllm_beside_the_policy_takes_its_share(capsys):
    config = ["plan", "--config", "genevolve_8b", "--model", "qwen3-vl-8b", "--json"]
    main([*config, "--gpu", "h200"])
    made = json.loads(capsys.readouterr().out)
    (term,) = (t for t in made["phases"]["rollout"]["terms"] if t["name"].startswith("the engine"))
    assert term["bytes"] == int(0.45 * (139 << 30))
    main([*config, "--gpu", "24GiB"])
    made = json.loads(capsys.readouterr().out)
    (term,) = (t for t in made["phases"]["rollout"]["terms"] if t["name"].startswith("the engine"))
    assert term["bytes"] == 2 * (EIGHT.total_parameters + 36_144 * 36 * 2 * 1024), "less would hold no rollout"
    main([*config, "--gpu", "24GiB", "--set", "rollout.vllm.tensor_parallel_size=2"])
    made = json.loads(capsys.readouterr().out)
    (half,) = (t for t in made["phases"]["rollout"]["terms"] if t["name"].startswith("the engine"))
    assert half["bytes"] == int(0.45 * (24 << 30)), "half of it is less than its share"
    main([*config, "--gpu", "h200", "--training-only"])
    assert "rollout" not in json.loads(capsys.readouterr().out)["phases"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_what_would_help_can_be_planned(strategy, settings):
    """No switch that the verdict offers is one that is refused."""
    told = verdict(EIGHT, on(settings, strategy), 10 << 30)
    assert told.startswith("does not fit") and "saves" in told
