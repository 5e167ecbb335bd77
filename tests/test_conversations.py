"""Samples that stay on disk: counted once, read when they are due, and noticed when they change."""

from __future__ import annotations

import base64
import json
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from genevolve_fast.data.conversations import ImageFiles, open_conversations
from genevolve_fast.data.prefetch import Prefetch
from genevolve_fast.data.rows import BadRows, DataError

TALK = [{"role": "user", "content": "draw <image> here"}, {"role": "assistant", "content": "drawn"}]


def rows(count: int = 20) -> list[dict]:
    said = lambda i: [*TALK, {"role": "user", "content": "again " * (i % 7)}, {"role": "assistant", "content": f"{i}"}]  # noqa: E731
    return [{"messages": said(i), "images": [f"images/{i % 3}.png"]} for i in range(count)]


def folder(path, count: int = 20):
    (path / "images").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (96, 96), (80 * i, 0, 0)).save(path / "images" / f"{i}.png")
    (path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(count)))
    return path


def opened(data, policy, tmp_path, **options):
    return open_conversations(data, policy.codec, 4096, tmp_path / "index" / "data.npz", **options)


def same(a, b) -> bool:
    pairs = list(zip(a, b, strict=True))
    equal = lambda x, y: len(x) == len(y) and all(map(np.array_equal, x, y))  # noqa: E731
    return len(pairs) > 0 and all(
        np.array_equal(x.ids, y.ids) and np.array_equal(x.loss_mask, y.loss_mask) and equal(x.images, y.images)
        for x, y in pairs
    )


def test_what_was_counted_is_what_is_read(tmp_path, policy):
    samples = opened(folder(tmp_path / "d"), policy, tmp_path)
    assert len(samples) == 20 and samples.tokens.tolist() == [len(c.ids) for c in samples]
    assert samples.loss_tokens.tolist() == [c.loss_mask.sum() for c in samples]
    assert samples.images.tolist() == [1] * 20 and samples[3].grids == (policy.codec.image_grid(samples[3].images[0]),)


def test_every_form_of_table_gives_the_same_samples(tmp_path, policy):
    pytest.importorskip("datasets")
    import pyarrow as pa
    from pyarrow.parquet import write_table

    data = folder(tmp_path / "d")
    want = list(opened(data, policy, tmp_path / "plain"))
    files = [(data / "images" / f"{i}.png").read_bytes() for i in range(3)]
    inline = [r | {"images": [{"bytes": files[i % 3], "path": None}]} for i, r in enumerate(rows())]
    urls = [r | {"images": ["data:image/png;base64," + base64.b64encode(files[i % 3]).decode()]}
            for i, r in enumerate(rows())]  # fmt: skip
    (data / "list.json").write_text(json.dumps(rows()))
    (data / "urls.jsonl").write_text("\n\n".join(map(json.dumps, urls)))
    write_table(pa.Table.from_pylist(rows()), data / "named.parquet")
    write_table(pa.Table.from_pylist(inline), data / "inline.parquet", row_group_size=3)
    for name in ("list.json", "urls.jsonl", "named.parquet", "inline.parquet"):
        assert same(opened(data / name, policy, tmp_path / name), want), name
    (data / "train.jsonl").unlink()
    for shard in range(3):
        part = rows()[7 * shard : 7 * shard + 7]
        (data / f"train-{shard:05d}-of-00003.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    assert same(opened(data, policy, tmp_path / "shards"), want)


def test_lines_go_on_from_shard_to_shard_and_bad_rows_are_remembered(tmp_path, policy):
    data = folder(tmp_path / "d")
    (data / "train.jsonl").unlink()
    (data / "train-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(5)))
    (data / "train-1.jsonl").write_text(json.dumps(rows(1)[0]) + "\n{\n" + json.dumps({"messages": "x"}) + "\n")
    for _ in range(2):  # counted, then read from the index
        bad = BadRows(strict=False)
        assert len(opened(data, policy, tmp_path, bad=bad)) == 6
        assert bad.count == 2 and bad.fields == {"row": 1, "messages": 1}
        assert "train-1.jsonl, line 2: not JSON" in bad.first[0] and "line 8: messages: must be" in bad.first[1]
    with pytest.raises(DataError, match="line 2: not JSON"):
        opened(data, policy, tmp_path)


def test_the_index_is_kept_until_data_or_codec_change(tmp_path, policy, monkeypatch):
    data = folder(tmp_path / "d")
    encoded = []
    real = policy.codec.encode
    monkeypatch.setattr(policy.codec, "encode", lambda text: encoded.append(text) or real(text))

    def counted(**options) -> bool:
        encoded.clear()
        opened(data, policy, tmp_path, **options)
        return bool(encoded)

    assert counted() and not counted()
    os.utime(data / "train.jsonl", (1, 1))
    assert not counted()  # other time, same bytes
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace("drawn", "drown", 1))  # same size
    assert counted() and not counted()
    monkeypatch.setattr(type(policy.codec), "fingerprint", lambda self: "another")
    assert counted() and not counted()
    index = tmp_path / "index" / "data.npz"
    index.write_bytes(index.read_bytes()[:100])  # a broken one is made again
    assert counted() and not counted()


def test_nothing_is_kept_of_an_index_that_was_not_finished(tmp_path, policy, monkeypatch):
    data = folder(tmp_path / "d")
    real, calls = policy.codec.encode, iter(range(10**6))

    def dies(text):
        if next(calls) > 50:
            raise KeyboardInterrupt
        return real(text)

    with monkeypatch.context() as patch:
        patch.setattr(policy.codec, "encode", dies)
        with pytest.raises(KeyboardInterrupt):
            opened(data, policy, tmp_path)
    assert not list((tmp_path / "index").rglob("*.npz*"))
    assert len(opened(data, policy, tmp_path)) == 20


def test_a_run_that_has_begun_refuses_other_data(tmp_path, policy):
    data = folder(tmp_path / "d")
    opened(data, policy, tmp_path)
    before = (tmp_path / "index" / "data.npz").read_bytes()
    text = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(text.replace("drawn", "drown", 1))
    with pytest.raises(DataError, match="not the data this run began with"):
        opened(data, policy, tmp_path, settled=True)
    assert (tmp_path / "index" / "data.npz").read_bytes() == before
    (data / "train.jsonl").write_text(text)
    assert len(opened(data, policy, tmp_path, settled=True)) == 20


def test_a_row_that_changes_under_a_run_is_named(tmp_path, policy):
    data = folder(tmp_path / "d")
    samples = opened(data, policy, tmp_path)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("again", "qzxvj")  # as many bytes
    (data / "train.jsonl").write_text("".join(lines))
    assert len(samples[3].ids) and samples.tokens[4] > 0
    with pytest.raises(DataError, match=r"line 5: \d+ tokens, .* but .* when it was counted"):
        samples[4]
    (data / "images" / "0.png").unlink()
    fresh = open_conversations(data / "train.jsonl", policy.codec, 4096, tmp_path / "other.npz", bad=BadRows(False))
    assert len(fresh) == 13  # rows without their picture are bad rows
    with pytest.raises(DataError, match="cannot read image"):
        opened(data, policy, tmp_path / "again")


def test_a_large_json_list_is_refused_with_the_way_out(tmp_path, policy, monkeypatch):
    from genevolve_fast.data import tables

    data = folder(tmp_path / "d")
    (data / "list.json").write_text(json.dumps(rows()))
    monkeypatch.setattr(tables, "MAX_LIST_BYTES", 1000)
    with pytest.raises(DataError, match=r"write one row a line \(jq"):
        opened(data / "list.json", policy, tmp_path)


def test_a_data_url_that_is_none_is_named(tmp_path, policy):
    data = folder(tmp_path / "d")
    for url, reason in (("data:image/png;base64,%%%", "not base64"), ("data:image/png;base64,QUJD", "neither JPEG")):
        (data / "train.jsonl").write_text(json.dumps({"messages": TALK, "images": [url]}))
        with pytest.raises(DataError, match=rf"line 1: images.*{reason}"):
            opened(data, policy, tmp_path)


def test_decoded_pictures_have_a_limit(tmp_path):
    folder(tmp_path / "d")
    names = [tmp_path / "d" / "images" / f"{i}.png" for i in range(3)]
    one = 96 * 96 * 3
    files = ImageFiles(2 * one)
    for name in names:
        assert files(name).shape == (96, 96, 3)
    assert files._bytes == 2 * one == sum(x.nbytes for x in files._pixels.values())
    assert files(names[2]) is files(names[2]) and list(files._pixels) == names[1:]


# --- ahead of the caller ----------------------------------------------------------------------------------------------


def test_packs_come_in_order_and_few_are_made_ahead():
    made, taken, most = [], 0, 0
    lock = threading.Lock()

    def make(item):
        nonlocal most
        with lock:
            made.append(item)
            most = max(most, len(made) - taken)
        time.sleep(0.001 * (item % 3))
        return item * 10

    packs = [range(3 * i, 3 * i + 3) for i in range(30)]
    with Prefetch(make, iter(packs), threads=4, ahead=2) as feed:
        for pack in packs:
            assert next(feed) == [item * 10 for item in pack]
            taken += 3
        with pytest.raises(StopIteration):
            next(feed)
    assert sorted(made) == list(range(90)) and most <= 3 * 3


def test_an_error_comes_with_its_pack_and_nothing_is_left_running():
    def make(item):
        if item == 4:
            raise DataError("four")
        return item

    before = threading.active_count()
    with Prefetch(make, [[0, 1], [2, 3], [4, 5], [6]], threads=2, ahead=3) as feed:
        assert next(feed) == [0, 1] and next(feed) == [2, 3]
        with pytest.raises(DataError, match="four"):
            next(feed)
    assert threading.active_count() == before


def test_waiting_is_measured():
    with Prefetch(lambda item: time.sleep(0.05) or item, [[0], [1]], threads=1, ahead=1) as feed:
        next(feed)
        first = feed.waited
        time.sleep(0.2)
        next(feed)
    assert first > 0.02 and feed.waited - first < first
