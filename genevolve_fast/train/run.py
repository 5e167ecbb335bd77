"""A run's folder: metrics, phases, progress and what is needed to look at it later."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from tqdm import tqdm

from genevolve_fast.fields import describe
from genevolve_fast.files import write_text
from genevolve_fast.resumable import BatchError, held
from genevolve_fast.train.ranks import Ranks
from genevolve_fast.train.versions import note_versions

# What a resumed run may change: it says who answers, how long one waits and what is kept, not what is learnt.
MAY_CHANGE = re.compile(
    r"(.*\.)?(urls|(program_)?(base_url|api_key_env)|patience_s|(request_|picture_)?timeout_s|attempts|concurrency"
    r"|requests_per_minute)|minutes|(distributed|checkpoint|samples)\..*|optim\.skip_nonfinite"
)


class RunError(RuntimeError):
    """The run cannot start or go on; the message says what to do."""


def peak_memory_gb(device: torch.device) -> float:
    """Peak bytes allocated on a GPU, or this process's peak resident set on CPU, in GB, since the last reset.

    Run.phase resets a GPU's, profile.meter.PeakBytes both.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


_CLAIMED: set[Path] = set()  # by this process


@contextmanager
def claimed(folder: Path, config: BaseModel, resume: bool, ranks: Ranks | None = None) -> Iterator[None]:
    """No other process trains in the folder while inside; may be nested.

    Raises RunError, on every rank, where another one does, where the folder cannot be written, and like
    refuse_another_run.
    """
    with ExitStack() as ends:

        def claim() -> None:
            if (own := folder.resolve()) not in _CLAIMED:
                try:
                    ends.enter_context(held(folder / ".lock"))
                except BatchError as error:
                    raise RunError(f"{error}; --set another name=") from None
                _CLAIMED.add(own)
                ends.callback(_CLAIMED.remove, own)
                ends.callback(_leave, folder)
            refuse_another_run(folder, config, resume)

        (ranks or Ranks()).from_first(claim)
        yield


def _leave(folder: Path) -> None:
    """What was refused before anything was written leaves no folder."""
    with suppress(OSError):  # somebody may have removed it meanwhile
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            folder.rmdir()


def refuse_another_run(folder: Path, config: BaseModel, resume: bool) -> None:
    """Raise RunError where `folder` holds a run that is not to be continued, or not with this configuration."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    if not resume:
        raise RunError(f"{folder} already holds a run: continue it with --resume or --set another name=")
    before = _completed(yaml.safe_load(path.read_text(encoding="utf-8")), type(config))
    if changed := [c for c in _differences(before, _plain(config)) if not MAY_CHANGE.fullmatch(c)]:
        raise RunError(f"{folder} was started with another configuration ({', '.join(changed)})")


class Run:
    """`runs/NAME`: config.yaml, versions.json, metrics.jsonl, phases.jsonl, tensorboard/, rollouts/, checkpoints/."""

    def __init__(
        self,
        folder: str | Path,
        config: BaseModel,
        *,
        device: torch.device,
        total: int,
        resume: bool,
        ranks: Ranks | None = None,
    ) -> None:
        """Ranks but the first measure and write nothing."""
        self._ranks = ranks or Ranks()
        self.folder = Path(folder)
        self.device = device
        self.started = time.time()
        self._phase_seconds: dict[str, float] = {}
        self._phase_memory: dict[str, float] = {}
        self._ranks.from_first(lambda: self._settle(config, resume))
        self._total, self._minutes = total, getattr(config, "minutes", None)
        self._bar: tqdm | None = None
        self._board = None

    def _settle(self, config: BaseModel, resume: bool) -> None:
        path = self.folder / "config.yaml"
        if resume and not path.exists():
            print(f"{self.folder} holds no run yet: starting it", flush=True)
        write_text(path, yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True))

    def begin(self, step: int) -> None:
        """Start at `step`: metrics of later steps, written before a crash, are forgotten and will be written again."""
        if self._ranks.first:
            self._forget_after(step)
        # a run that ends by the clock cannot tell from its steps when
        timed = f"{{desc}}: {{n_fmt}} steps [{{elapsed}} of {self._minutes} min, {{rate_fmt}}{{postfix}}]"
        self._bar = tqdm(
            total=self._total,
            initial=step,
            desc=self.folder.name,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format=timed if self._minutes else None,
            disable=not self._ranks.first,
        )

    def _forget_after(self, step: int) -> None:
        note_versions(self.folder, step)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    continue  # a line cut by the crash
            write_text(path, "".join(f"{line}\n" for line in kept))

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Time a phase of a step; its beginning stands in phases.jsonl so that a crash can be located."""
        self.mark(name, step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._bar.set_postfix_str(name, refresh=True)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + time.perf_counter() - begin
            self._phase_memory[name] = peak_memory_gb(self.device)

    def mark(self, name: str, step: int) -> None:
        """Write a phase's beginning into phases.jsonl; any thread may."""
        if not self._ranks.first:
            return
        with (self.folder / "phases.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "phase": name, "time": time.time()}) + "\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write one step's metrics (phase times and memory added) to metrics.jsonl, TensorBoard and the bar."""
        row = {name: float(value) for name, value in metrics.items()}
        row |= {f"timing_s/{name}": seconds for name, seconds in self._phase_seconds.items()}
        row |= {f"memory_gb/{name}": peak for name, peak in self._phase_memory.items()}
        row["timing_s/step"] = sum(self._phase_seconds.values())
        self._phase_seconds, self._phase_memory = {}, {}
        if self._ranks.first:
            self._write(step, row)
        return row

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
            f.flush()
            os.fsync(f.fileno())
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        self._bar.update(step - self._bar.n)
        shown = {"reward": "reward", "loss": "loss", "tok/s": "perf/throughput", "GB": "perf/max_memory_allocated_gb"}
        told = {"samples": f"{row['samples']:.0f}"} if "samples" in row else {}
        self._bar.set_postfix(told | {k: f"{row[v]:.3g}" for k, v in shown.items() if v in row})

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()


_LOGIN = re.compile(r"(?<=://)[^/?#\s]*@")
_KEY = re.compile(r"(?i)(?<=[?&])([^=&#]*(?:key|token|secret|passw|auth)[^=&#]*=)(?!\{key\})[^&#]+")


def _plain(config: BaseModel) -> dict[str, Any]:
    """The configuration as JSON holds it; what opens somebody's service is left out of its addresses."""
    return _without_keys(json.loads(config.model_dump_json()))


def _without_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_keys(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_keys(each) for each in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    return _KEY.sub(r"\1***", _LOGIN.sub("***@", value))


def _completed(saved: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """A saved configuration with the defaults of the fields that the release that wrote it did not know."""
    for name, default, _ in describe(kind):
        *sections, field = name.split(".")
        section = saved
        for each in sections:
            section = section.setdefault(each, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.setdefault(field, to_jsonable_python(default))
    return saved


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in {**a, **b} for d in _differences(a.get(k), b.get(k), f"{prefix}{k}.")]
    return [] if a == b else [prefix.rstrip(".")]
