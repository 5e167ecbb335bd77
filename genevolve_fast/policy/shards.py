"""Where the weights of a checkpoint lie that several ranks wrote: in shards beside its policy folder."""

from __future__ import annotations

from pathlib import Path

FOLDER = "state"  # in a checkpoint, beside `policy`


def in_shards(policy: str | Path) -> bool:
    """Whether this policy folder has its weights in shards beside it, and none of its own."""
    policy = Path(policy).resolve()
    return (policy.parent / FOLDER / ".metadata").is_file() and not any(policy.glob("*.safetensors"))


def export_first(policy: str | Path) -> str:
    """What to tell who wants to load such a folder."""
    return (
        f"{policy} holds no weights: several ranks wrote this checkpoint in shards. Export it first: "
        f"genevolve-fast export {Path(policy).resolve().parent} -o FOLDER, and use FOLDER"
    )
