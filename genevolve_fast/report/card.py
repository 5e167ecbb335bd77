"""The model card of an exported policy: what a run's own files say about it, and nothing of the machine it ran on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTIONS = ("optim", "objective", "experience", "world", "evaluate")  # all of it goes into the card
ROLLOUT = ("prompts_per_step", "num_generations", "temperature", "top_p", "max_tool_calls", "max_rounds")
ROLLOUT += ("max_tokens_per_turn", "max_prompt_length", "max_response_length", "observe_images", "replay_sampling_mask")
POLICY = ("dtype", "freeze_vision", "freeze_head", "lora", "quantize")
PARTS = ("tools", "renderer", "judge", "summarizer", "embedder")  # who they are, not where
WITHOUT_MODEL = ("rules", "hashed", "canvas", "sandbox")
TOP = ("seed", "steps", "epochs", "batch_size", "minutes", "adv_estimator", "teacher", "ema_rate", "teacher_gate")
TOP += ("max_tokens_per_microbatch", "max_failed_share")
CURVES = {
    "reward": "reward",
    "rewards/kscore/mean": "KScore",
    "rewards/program/mean": "program sufficiency",
    "rollouts/valid_program": "share of valid programs",
    "rollouts/failed": "rollouts without a verdict",
    "actor/sdl_kl": "gap to the teacher, nats",
    "actor/entropy": "entropy, nats",
    "loss": "loss, nats per token",
}
BENCH = ("reward", "kscore", "program", "faithfulness", "visual_correctness", "text_accuracy", "aesthetics", "valid")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
_WORD = re.compile(r"(sandbox:)?[\w.+-]+")


@dataclass(frozen=True)
class Model:
    """What was exported; `repo` is its name on the hub or what stands for it, `base` a hub id."""

    repo: str
    step: int | None
    final: bool
    parameters: int
    dtype: str
    vision: bool
    rank: int = 0
    base: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What a run left behind, up to a step."""

    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    benches: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    gain: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return "sft" if "epochs" in self.config else "evolve"


def read_record(run: Path, step: int | None, final: bool) -> Record:
    """Of the run in `run` up to `step`; benches measured the final policy and are left out for another."""
    import yaml

    def rows_of(name: str) -> list[Any]:
        file = run / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []

    rows = []
    file = run / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut by a crash
    benches = {}
    for bench in sorted(run.glob("bench/*/bench.json")) if final else []:
        data = json.loads(bench.read_text(encoding="utf-8"))
        benches[data["name"]] = data["summary"]
    starts = [row for row in rows_of("versions.json") if step is None or row["step"] < step or not row["step"]]
    return Record(
        config=yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
        rows=[row for row in rows if step is None or row["step"] <= step],
        benches=benches,
        gain=(rows_of("summary.json") or {}).get("gain", {}) if final else {},
        versions=starts[-1] if starts else {},
    )


def hub_id(name: str | None) -> str | None:
    """`name` where it is one of the hub's and no folder here."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def license_of(readme: Path | None) -> dict[str, str]:
    """license, license_name and license_link of a model's README.md, as far as it has them."""
    from huggingface_hub import metadata_load

    told = (metadata_load(readme) or {}) if readme else {}
    found = {k: told[k] for k in ("license", "license_name", "license_link") if isinstance(told.get(k), str)}
    return found if "license" in found else {}


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a configuration that say how was trained; no address, folder, host or name of a variable."""

    def part(name: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
        section = config.get(name)
        chosen = section if isinstance(section, dict) else {}
        return {k: v for k, v in chosen.items() if keys is None or k in keys}

    out: dict[str, Any] = {k: config[k] for k in TOP if config.get(k) is not None}
    out |= {name: part(name) for name in SECTIONS} | {"rollout": part("rollout", ROLLOUT)}
    out["policy"] = part("policy", POLICY) | {"path": hub_id(part("policy").get("path")) or _known(config, "policy")}
    out["data"] = part("data", ("limit", "cutoff")) | {"path": dataset(config) or _known(config, "data")}
    for name in PARTS:
        kind, model = part(name).get("kind"), part(name).get("model")
        named = isinstance(model, str) and _public(model) and kind not in WITHOUT_MODEL
        out[name] = {"kind": kind} | ({"model": model} if named else {})
    return _plain({k: v for k, v in out.items() if v not in ({}, {"kind": None})})


def _known(config: Mapping[str, Any], name: str) -> str:
    path = str((config.get(name) or {}).get("path"))
    return path if path.startswith("sandbox") else "(a local folder)"


def _public(name: str) -> bool:
    return bool(_WORD.fullmatch(name) or hub_id(name))


def _plain(value: Any) -> Any:
    """Without texts that could name a place."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if not isinstance(value, str) or _public(value) or value == "(a local folder)" else "(not told)"


def dataset(config: Mapping[str, Any]) -> str | None:
    """The hub id of the data, if it has one."""
    path = (config.get("data") or {}).get("path")
    return hub_id(path) if isinstance(path, str) else None


# --- the page ---------------------------------------------------------------------------------------------------------


def card(model: Model, record: Record | None) -> str:
    """README.md, its metadata as the hub reads them."""
    parts = [about(model, record), training(model, record), results(record), use(model), limits(model, record)]
    return f"---\n{metadata(model, record)}\n---\n\n# {title(model)}\n\n" + "\n".join(filter(None, parts))


def title(model: Model) -> str:
    return model.repo.rsplit("/", 1)[-1]


def metadata(model: Model, record: Record | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["genevolve", "genevolve-fast", "agent", "tool-use", "image-generation"]
    if record is not None:
        tags += ["sft"] if record.method == "sft" else ["reinforcement-learning", "grpo", "self-distillation"]
    data = ModelCardData(
        **model.license,
        library_name="peft" if model.rank else "transformers",
        pipeline_tag="image-text-to-text" if model.vision else "text-generation",
        tags=[*tags, *(["lora"] if model.rank else [])],
        base_model=model.base,
        base_model_relation=("adapter" if model.rank else "finetune") if model.base else None,
        datasets=[name] if record and (name := dataset(record.config)) else None,
    )
    return data.to_yaml().strip()


def about(model: Model, record: Record | None) -> str:
    kind = f"A LoRA adapter of rank {model.rank}" if model.rank else "A model"
    of = f" of [{model.base}](https://huggingface.co/{model.base})" if model.base else ""
    how = "" if record is None else " by supervised fine-tuning" if record.method == "sft" else " by self-evolution"
    return (
        f"{kind}{of}, trained{how} to act as an agent that prepares image generation: it searches, picks reference "
        "images, activates generation skills and writes a prompt-reference program, which an image generator that "
        f"takes references then renders. {_count(model.parameters)} parameters, {model.dtype}.\n"
    )


def training(model: Model, record: Record | None) -> str:
    if record is None:
        return ""
    import yaml

    c, told = record.config, {}
    planned = f" of {c['steps']}" if "steps" in c else ""
    done = model.step if model.step is not None else record.rows[-1]["step"] if record.rows else None
    policy, optim = c.get("policy") or {}, c.get("optim") or {}
    rank = (policy.get("lora") or {}).get("rank", 0)
    told["method"] = "SFT on assistant tokens" if record.method == "sft" else "GRPO with best-worst self-distillation"
    told["steps"] = f"{done}{planned}" if done is not None else None
    told["trained"] = (
        f"LoRA of rank {rank}" if rank else "all weights" + ", vision tower frozen" * bool(policy.get("freeze_vision"))
    )
    if merged := bool(rank and not model.rank):
        told["trained"] += ", merged into the base" * merged
    told["optimizer"] = f"{optim.get('name')}, learning rate {optim.get('lr')}, {optim.get('schedule')}"
    if record.method == "evolve":
        r = c.get("rollout") or {}
        told["a step"] = f"{r.get('prompts_per_step')} requests × {r.get('num_generations')} rollouts"
        told["reward"] = "½ KScore of the picture + ½ sufficiency of the program, by " + _who(c, "judge")
        told["renderer"] = _who(c, "renderer")
    told["data"] = dataset(c) or _known(c, "data")
    made = [f"{k} {record.versions[k]}" for k in ("genevolve_fast", "torch", "transformers") if k in record.versions]
    if record.versions.get("commit"):
        made.insert(1, f"commit {record.versions['commit']}")
    told["made with"] = ", ".join(made).replace("genevolve_fast", "genevolve-fast") or None
    told["on"] = record.versions.get("device")
    table = ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in told.items() if v)]
    config = yaml.safe_dump(shareable(c), sort_keys=False, allow_unicode=True)
    details = f"<details><summary>Configuration</summary>\n\n```yaml\n{config}```\n\n</details>"
    return "## Training\n\n" + "\n".join(table) + f"\n\n{details}\n"


def results(record: Record | None) -> str:
    out = []
    if record and record.rows:
        n = max(1, len(record.rows) // 10)
        lines = [f"| on the training requests | first {n} steps | last {n} |", "|---|---|---|"]
        for name, told in CURVES.items():
            first, last = (_mean(row.get(name) for row in rows) for rows in (record.rows[:n], record.rows[-n:]))
            if not math.isnan(first + last):
                lines.append(f"| {told} (`{name}`) | {first:.4g} | {last:.4g} |")
        if len(lines) > 2:
            out.append("\n".join(lines).replace(f"first {n} steps | last {n}", _spans(n)))
    if record and record.benches:
        shown = [k for k in BENCH if any(k in s for s in record.benches.values())]
        lines = ["| on held-out requests | n | " + " | ".join(k.replace("_", " ") for k in shown) + " |"]
        lines.append("|---|---|" + "---|" * len(shown))
        for name, summary in record.benches.items():
            values = " | ".join(f"{summary.get(k, math.nan):.3f}" for k in shown)
            lines.append(f"| {_shown(name)} | {summary['n']:.0f} | {values} |")
        out.append("\n".join(lines))
    if record and record.gain:
        g = record.gain
        out.append(f"Paired gain in reward: {g['mean']:+.3f}, 95 % interval {g['low']:+.3f} to {g['high']:+.3f}.")
    return "## Results\n\n" + "\n\n".join(out) + "\n" if out else ""


def use(model: Model) -> str:
    served = f"vllm serve {model.repo} --served-model-name GenEvolve"
    ours = f"genevolve-fast serve --model {model.repo}"
    if model.rank:
        base = model.base or "BASE"
        served = f"vllm serve {base} --enable-lora --max-lora-rank {lora_limit(model.rank)} "
        served += f"--lora-modules GenEvolve={model.repo}"
        ours = (
            f"genevolve-fast serve --backend vllm --served-model-name base --model {base} -- {served.split(' ', 3)[3]}"
        )
        load = f"""from peft import PeftModel
from transformers import {_class(model)}, AutoTokenizer

name = "{model.repo}"
base = {_class(model)}.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, name)
"""
    else:
        load = f"""from transformers import {_class(model)}, AutoTokenizer

name = "{model.repo}"
model = {_class(model)}.from_pretrained(name, dtype="auto")
"""
    images = "Pictures go in as `AutoProcessor` prepares them.\n" if model.vision else ""
    return f"""## Use

A server for the agent, and a picture from it:

```bash
{served}
{ours}   # the same by genevolve-fast
genevolve-fast rollout --prompt "A stamp that shows the Eiffel Tower." --output-dir out --model GenEvolve
```

With transformers:

```python
{load}tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "A stamp that shows the Eiffel Tower."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**prompt, max_new_tokens=512)
print(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :]))
```

{images}"""


def limits(model: Model, record: Record | None) -> str:
    c = record.config if record else {}
    said = [
        "It was trained for one protocol, with tools that answer and a generator that takes reference images. Without "
        "them it writes tool calls that nobody answers.",
        "The reward is a judge's opinion: what the judge overlooks was not learnt, and may have been unlearnt.",
        "Pictures that it finds may be protected: nothing here checks the rights to them, or whether a page is right.",
    ]
    if record and record.method == "evolve" and (c.get("judge") or {}).get("kind") == "rules":
        said.insert(0, "It was judged by the rules of a small offline sandbox and knows little beyond that world.")
    if not (record and record.benches):
        said.append("It was not measured on held-out requests.")
    if not model.license:
        said.append("Its licence is not stated here; that of what it was made from holds.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in said) + "\n"


def _class(model: Model) -> str:
    return "AutoModelForImageTextToText" if model.vision else "AutoModelForCausalLM"


def lora_limit(rank: int) -> int:
    """The smallest --max-lora-rank that vLLM takes and that holds `rank`."""
    return next((n for n in (8, 16, 32, 64, 128, 256, 320, 512) if n >= rank), rank)


def _who(config: Mapping[str, Any], name: str) -> str:
    part = config.get(name) or {}
    model = part.get("model")
    return f"{part.get('kind')}" + (f" ({model})" if isinstance(model, str) and _public(model) else "")


def _shown(name: str) -> str:
    """A bench's name without the folders of a policy that it was called after."""
    return re.sub(r"[|\n]", " ", name if hub_id(name) or "/" not in name and "\\" not in name else "this policy")


def _spans(n: int) -> str:
    return f"first {n} steps | last {n}" if n > 1 else "first step | last step"


def _mean(values) -> float:
    kept = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return sum(kept) / len(kept) if kept else math.nan


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} billion" if n >= 1e9 else f"{n / 1e6:.2f} million" if n >= 1e6 else f"{n:,}"
