"""The recipes of README and docs/memory.md, as the planner tells them now: `python -m benchmarks.recipes`."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass

from genevolve_fast.cli import main
from genevolve_fast.profile.plan import GIB, memory_of


@dataclass(frozen=True)
class Recipe:
    """What is trained, by which file, on which GPU, and how many rollouts of which length a step has."""

    what: str
    file: str
    gpu: str
    gpus: str
    rollouts: str
    flags: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        config = f"configs/genevolve_8b_{self.file}.yaml"
        return ["plan", "--config", config, "--model", "qwen3-vl-8b", "--gpu", self.gpu, *self.flags]

    @property
    def command(self) -> str:
        return " ".join(["genevolve-fast", *self.arguments])

    def told(self, *more: str) -> str:
        """What the command prints."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main([*self.arguments, *more])
        return out.getvalue()

    def plan(self) -> dict:
        return json.loads(self.told("--json"))

    def verdict(self) -> str:
        """The command, and of what it prints the part that says whether it fits."""
        blocks = self.told().split("\n\n")
        return f"$ {self.command}\n…\n{next(b for b in blocks if b.startswith(('fits', 'does not fit')))}\n"

    def row(self) -> str:
        """Of the README's table."""
        made = self.plan()
        limit = memory_of(self.gpu) / GIB
        peak = f"{made['total'] / GIB:.1f} of {limit:g} GiB" if made["fits"] else "does not fit"
        host = f"{made['host_bytes'] / GIB:.1f} GiB" if made["host_bytes"] else ""
        changed = "".join(f" `{flag}`" for flag in self.flags if "=" in flag)
        name = f"[{self.file}](configs/genevolve_8b_{self.file}.yaml){changed}"
        return f"| {self.what} | {name} | {self.gpus} | {self.rollouts} | {peak} | {host} |"


EIGHT = ("--gpus-per-node", "8")
PAPER = "8 × 6 of 36,144 tokens"
RECIPES = (
    Recipe("QLoRA", "qlora_24gb", "24GiB", "1 × 24 GB, samples too", "1 × 6 of 14,144 tokens"),
    Recipe("QLoRA", "qlora_2x24gb", "24GiB", "1 × 24 GB, a second serves", PAPER),
    Recipe("LoRA", "lora_40gb", "40GiB", "1 × 40 GB, samples too", PAPER),
    Recipe("LoRA", "lora_48gb", "48GiB", "1 × 48 GB, samples too", PAPER),
    Recipe("all weights", "full_141gb", "h200", "1 × 141 GB, samples too", PAPER),
    Recipe("all weights", "full_8x80gb", "80GiB", "8 × 80 GB, sample too", PAPER, EIGHT),
    Recipe(
        "all weights",
        "full_8x80gb",
        "80GiB",
        "8 × 80 GB, sample too",
        PAPER,
        (*EIGHT, "--set", "distributed.strategy=zero3"),
    ),
    Recipe("LoRA", "lora_48gb", "80GiB", "8 × 80 GB, sample too", PAPER, EIGHT),
)


if __name__ == "__main__":
    print("\n".join(recipe.row() for recipe in RECIPES))
    print("\n" + "\n".join(recipe.verdict() for recipe in RECIPES))
