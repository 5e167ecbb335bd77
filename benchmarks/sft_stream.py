"""Supervised data of any size through the loader that `sft` uses, in bounded memory. `python -m benchmarks.sft_stream`.

Writes conversations with pictures in them (JSONL shards, or parquet), counts them into an index, opens the index again,
and streams an epoch of shuffled micro-batches; with `--train-minutes` the tiny policy then trains on them. `--gib 7` is
the size of the published set. Peaks are of the resident memory, above what was held before the data was opened; of
parquet they hold pages of mapped files, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from genevolve_fast.files import replacing
from genevolve_fast.policy.model import Policy
from genevolve_fast.profile.meter import PeakBytes
from genevolve_fast.sandbox.tiny_policy import new_policy, train_tokenizer
from genevolve_fast.sandbox.world import SYSTEM_PROMPT, SandboxWorld, vocabulary_texts
from genevolve_fast.train.config import SftConfig, parse_config
from genevolve_fast.train.sft import Schedule, open_samples, prefetched, sft

SHARD_BYTES = 1 << 30
PICTURE = (192, 160)  # height, width: about 90 kB as PNG, since noise does not compress
REPLY_WORDS = 300


@dataclass(frozen=True)
class Streamed:
    """Bytes, counts and seconds of one data set; growth in bytes, None where the system does not tell."""

    data_bytes: int
    samples: int
    tokens: int
    images: int
    index_seconds: float
    reopen_seconds: float
    stream_seconds: float
    packing_efficiency: float
    index_growth: int | None
    stream_growth: int | None

    def text(self) -> str:
        mb = lambda n: "unknown" if n is None else f"{n / 1e6:.0f} MB"  # noqa: E731
        pace = f"{self.samples / self.stream_seconds:.0f} samples/s, {self.tokens / self.stream_seconds:.0f} tokens/s"
        return "\n".join(
            [
                f"data         {mb(self.data_bytes)}, {self.samples} samples, {self.tokens} tokens, "
                f"{self.images} images",
                f"index        {self.index_seconds:.1f} s, {self.data_bytes / self.index_seconds / 1e6:.1f} MB/s, "
                f"peak growth {mb(self.index_growth)}; opened again in {self.reopen_seconds:.2f} s",
                f"epoch        {self.stream_seconds:.1f} s, {pace}, packed to {self.packing_efficiency:.1%}, "
                f"peak growth {mb(self.stream_growth)}",
            ]
        )


def write_dataset(folder: Path, size: int, *, form: str = "jsonl", seed: int = 0) -> Path:
    """About `size` bytes in the published layout: two rounds a row, a picture lying in it, text of varied length."""
    random = np.random.default_rng(seed)
    words = " ".join(vocabulary_texts(SandboxWorld())).split()
    home, shard = folder / "GenEvolve-Data-SFT", 0
    while size > 0:
        written = _write_shard(home, shard, min(size, SHARD_BYTES), random, words, form)
        size, shard = size - written, shard + 1
    return folder


def _write_shard(home: Path, shard: int, size: int, random, words: list[str], form: str) -> int:
    written = 0
    if form == "parquet":
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter

        picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        schema = pa.schema([("messages", pa.list_(message)), ("images", pa.list_(picture))])
        with replacing(home / f"train-{shard:05d}.parquet") as partial, ParquetWriter(partial, schema) as out:
            while written < size:
                rows = [_row(random, words) for _ in range(32)]
                written += sum(len(row["images"][0]["bytes"]) for row in rows)
                out.write_table(pa.Table.from_pylist(rows, schema))
        return written
    with replacing(home / f"train-{shard:05d}.jsonl") as partial, partial.open("w", encoding="utf-8") as f:
        while written < size:
            row = _row(random, words)
            data = base64.b64encode(row["images"][0]["bytes"]).decode()
            written += f.write(json.dumps(row | {"images": [f"data:image/png;base64,{data}"]}) + "\n")
    return written


def _row(random: np.random.Generator, words: list[str]) -> dict:
    from PIL import Image

    def said(most: int) -> str:
        return " ".join(words[i] for i in random.integers(0, len(words), int(random.integers(most // 8, most))))

    png = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (*PICTURE, 3), dtype=np.uint8)).save(png, "PNG", compress_level=1)
    talk = [("system", SYSTEM_PROMPT), ("user", said(40)), ("assistant", said(REPLY_WORDS))]
    talk += [("user", f"Found: <image> {said(60)}"), ("assistant", said(REPLY_WORDS))]
    messages = [{"role": role, "content": content} for role, content in talk]
    return {"messages": messages, "images": [{"bytes": png.getvalue(), "path": None}]}


def stream(data: Path, config: SftConfig, policy: Policy, index: Path) -> Streamed:
    """Count, open again, read one epoch in the order and packs of a run."""

    def opened():
        begin = time.perf_counter()
        samples, _ = open_samples(config, policy, data, None, index, settled=False)
        return samples, time.perf_counter() - begin

    memory = PeakBytes("cpu")
    _, index_seconds = opened()
    index_growth = memory.read()
    memory = PeakBytes("cpu")
    samples, reopen_seconds = opened()
    schedule = Schedule(config, samples)
    plans = [schedule.plan(step) for step in range(schedule.steps)]
    tokens = sum(plan.tokens for plan in plans)
    budget = sum(plan.budget for plan in plans)
    del plans
    begin, read = time.perf_counter(), 0
    with prefetched(schedule, policy, config, 0) as feed:
        for microbatch in feed:
            read += sum(len(c.ids) for c in microbatch)
    seconds = time.perf_counter() - begin
    assert read == tokens, (read, tokens)
    return Streamed(
        data_bytes=sum(file.stat().st_size for file in data.rglob("train-*")),
        samples=len(samples),
        tokens=tokens,
        images=int(samples.images.sum()),
        index_seconds=index_seconds,
        reopen_seconds=reopen_seconds,
        stream_seconds=seconds,
        packing_efficiency=tokens / budget,
        index_growth=index_growth,
        stream_growth=memory.read(),
    )


def settings(image_cache_mb: int, workers: int | None = None, minutes: float | None = None) -> SftConfig:
    fields = {
        "epochs": 1,
        "batch_size": 32,
        "max_tokens_per_microbatch": 8192,
        "policy": {"path": "sandbox:start", "freeze_vision": False},
        "data": {"image_cache_mb": image_cache_mb, "workers": workers},
        "minutes": minutes,
    }
    return parse_config(SftConfig, fields)


def train(data: Path, config: SftConfig, policy: Policy, folder: Path) -> str:
    """Means over the steps of an `sft` run on the same data, but for its first step, which is longer."""
    sft(config, policy, data, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    names = [name for name in rows[0] if name.startswith("perf/")]
    lines = [f"{name:32} {np.mean([row[name] for row in rows]):.4g}" for name in names]
    return "\n".join([f"{len(rows)} steps, means:", *lines])


def tiny_policy() -> Policy:
    texts = [*vocabulary_texts(SandboxWorld()), SYSTEM_PROMPT]
    return new_policy(train_tokenizer(texts * 4), seed=0)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gib", type=float, default=0.125, help="size of the data (default: %(default)s)")
    p.add_argument("--form", choices=("jsonl", "parquet"), default="jsonl")
    p.add_argument("--image-cache-mb", type=int, default=64, help="data.image_cache_mb (default: %(default)s)")
    p.add_argument("--workers", type=int, help="data.workers (default: one a core, at most 8)")
    p.add_argument("--folder", type=Path, help="where the data is written and kept (default: a temporary folder)")
    p.add_argument("--train-minutes", type=float, help="then train on it for so long")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        data = folder / f"data-{args.gib}-{args.form}"
        if not data.exists():
            write_dataset(data, int(args.gib * 2**30), form=args.form)
        config, policy = settings(args.image_cache_mb, args.workers, args.train_minutes), tiny_policy()
        found = stream(data, config, policy, folder / "index")
        print(json.dumps(asdict(found)) if args.json else found.text(), flush=True)
        if args.train_minutes:
            print(train(data, config, policy, folder / "run"))


if __name__ == "__main__":
    main()
