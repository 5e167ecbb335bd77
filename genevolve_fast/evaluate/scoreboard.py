"""The scoreboard: what every benchmark command measured, one row an id, never edited by hand."""

from __future__ import annotations

import json
import operator
import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from genevolve_fast.files import write_text

DEFAULT_FILE = Path("benchmarks/results/scoreboard.json")

# id -> (unit, comparison, target); no comparison: recorded without a target
TARGETS: dict[str, tuple[str, str | None, float | None]] = {
    "loop/demo_minutes": ("minutes", "<=", 15),
    "loop/reward_gain": ("reward", ">=", 0.08),
    "loop/reward_gain_low": ("reward", ">", 0),
    "loop/gain_over_more_sft": ("reward", ">", 0),
    "loop/sdl_gain": ("reward", None, None),
    "loop/sdl_gain_over_shuffled": ("reward", None, None),
    "loop/start_valid": ("share", ">=", 0.9),
    "loop/judge_agreement": ("share", ">=", 0.97),
    "loop/grad_error": ("relative", "<=", 1e-5),
    "loop/objective_error_f64": ("absolute", "<=", 1e-10),
    "loop/fuzz_failures": ("count", "==", 0),
    "head/cpu_time_vs_naive": ("ratio", "<=", 1),
    "head/cpu_memory_vs_naive": ("ratio", "<=", 0.1),
    "head/logprob_vs_1gemm": ("ratio", "<=", 1.13),
    "head/frozen_vs_2gemm": ("ratio", "<=", 1.15),
    "head/trainable_vs_3gemm": ("ratio", "<=", 1.18),
    "head/teacher_vs_4.3gemm": ("ratio", "<=", 1.18),
    "head/masked30_vs_dense": ("ratio", "<=", 0.36),
    "head/speedup_trainable_vs_best_peer": ("ratio", ">=", 1.15),
    "head/speedup_frozen_vs_best_peer": ("ratio", ">=", 1.6),
    "head/speedup_vs_liger_grpo": ("ratio", ">=", 5),
    "head/workspace640_peak_mib": ("MiB", "<=", 704),
    "head/workspace640_vs_floor": ("ratio", "<=", 1.4),
    "head/peers_dominating": ("count", "==", 0),
    "head/kernels_compiled_sm90": ("share", "==", 1),
    "step/prefix_attention_error_f64": ("relative", "<=", 1e-10),
    "step/speedup_reply8k": ("ratio", ">=", 1.3),
    "step/speedup_reply2k": ("ratio", ">=", 2),
    "step/share_of_flop_ratio": ("share", ">=", 0.9),
    "step/speedup_vs_trl": ("ratio", ">=", 3),
    "step/memory_vs_trl": ("ratio", "<=", 0.25),
    "step/kib_per_token_gpu": ("KiB", "<=", 400),
    "step/kib_per_token_offload": ("KiB", "<=", 128),
    "step/offload_cost": ("relative", "<=", 0.08),
    "step/longest_rollout_tokens": ("tokens", ">=", 262_144),
    "step/planner_error": ("relative", "<=", 0.07),
    "step/grad_error": ("relative", "<=", 1e-5),
    "step/teacher_saved_bytes": ("bytes", "==", 0),
    "step/demo_train_ratio": ("ratio", None, None),
    "serve/latency_hiding": ("ratio", ">=", 0.9),
    "serve/lost_rollouts": ("count", "==", 0),
    "serve/hostile_failures": ("count", "==", 0),
    "serve/weight_sync_mismatch": ("count", "==", 0),
    "render/lost_requests": ("count", "==", 0),
    "data/chain_steps": ("count", "==", 8),
    "render/hostile_failures": ("count", "==", 0),
    "judge/unjudged_counted_as_zero": ("count", "==", 0),
    "process/position_gain": ("share", ">=", 0.1),
    "process/attribute_gain": ("share", ">=", 0.1),
    "process/forgotten_objects": ("share", None, None),
    "scale/parity_error_ddp": ("absolute", "<=", 1e-5),
    "scale/parity_error_zero2": ("absolute", "<=", 1e-5),
    "scale/parity_error_zero3": ("absolute", "<=", 1e-5),
    "scale/parity_error_fsdp2": ("absolute", "<=", 1e-5),
    "scale/sigterm_seconds": ("seconds", "<=", 30),
    "scale/export_logit_error": ("absolute", "==", 0),
    "scale/resume_other_world_size_error": ("absolute", "<=", 1e-5),
    "scale/tokens_per_s_vs_trl_qlora": ("ratio", ">=", 2),
    "scale/tokens_per_s_vs_trl_lora": ("ratio", ">=", 2),
    "scale/tokens_per_s_vs_trl_full": ("ratio", ">=", 2),
}
_COMPARE = {"<=": operator.le, ">=": operator.ge, ">": operator.gt, "==": operator.eq}


def record(
    name: str,
    value: float,
    *,
    n: int,
    command: str,
    interval: tuple[float, float] | None = None,
    file: Path = DEFAULT_FILE,
    at: str | None = None,
) -> dict[str, Any]:
    """Write the row of `name`, replacing an older one; `ok` follows from TARGETS. Raises KeyError for an unknown id.

    `at` is the commit measured, where the tree is a copy that git does not know.
    """
    unit, comparison, target = TARGETS[name]
    row: dict[str, Any] = {
        "value": value,
        "unit": unit,
        "target": None if comparison is None else f"{comparison} {target:g}",
        "ok": None if comparison is None else bool(_COMPARE[comparison](value, target)),
        "n": n,
        "device": device(),
        "commit": at or commit(),
        "date": date.today().isoformat(),
        "command": command,
    }
    if interval:
        row["interval"] = list(interval)
    rows = load(file)
    rows[name] = row
    write_json(file, dict(sorted(rows.items())))
    print(f"{name} = {value:g} {unit}" + ("" if row["ok"] is None else f" (target {row['target']}: {row['ok']})"))
    return row


def write_json(file: Path, data: Any) -> None:
    write_text(file, json.dumps(data, indent=1) + "\n")


def load(file: Path = DEFAULT_FILE) -> dict[str, dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def device() -> str:
    """GPU name, or processor model and cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def processor() -> str:
    """Processor model and cores."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit measured; -dirty when anything but recorded results differs from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    dirty = any(not line[3:].startswith("benchmarks/results/") for line in changed.splitlines())
    return head.stdout.strip() + ("-dirty" if dirty else "")


def print_table(file: Path = DEFAULT_FILE) -> None:
    """Every measured row, and the ids nobody has measured yet."""
    rows = load(file)
    print(f"{'id':36} {'value':>10} {'target':>10} {'ok':>5} {'n':>6}  {'date':10}  {'commit':18} device")
    for name, row in sorted(rows.items()):
        ok = {None: "", True: "yes", False: "NO"}[row["ok"]]
        low_high = f" [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]" if "interval" in row else ""
        print(
            f"{name:36} {row['value']:10.4g} {row['target'] or '':>10} {ok:>5} {row['n']:>6}  {row['date']:10}  "
            f"{row['commit']:18} {row['device']}{low_high}"
        )
    if absent := sorted(set(TARGETS) - set(rows)):
        print(f"not measured: {', '.join(absent)}")
