"""Working a batch off: refusals that end it, signals that lose nothing, results written at every end."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal

import pytest

from genevolve_fast.resumable import BatchError, Tally, held, work_off


class Rows(Tally):
    good = "done"
    hopeless = ("refused",)


def worked_off(ends, parallel=1, **options) -> Rows:
    """Items end as `ends` says; the reason is the end's name."""

    async def work(end: str) -> tuple[str, str]:
        await asyncio.sleep(0)
        return end, "" if end == "done" else f"it was {end}"

    return asyncio.run(work_off(ends, work, Rows(), parallel=parallel, **options))


def test_the_same_refusal_again_and_again_ends_the_batch_and_nothing_else_does():
    assert worked_off(["refused"] * 9).ends == {"refused": 3}
    assert worked_off(["refused"] * 9, parallel=5).ends.total() >= 5
    tally = worked_off(["refused", "refused", "done", "refused", "lost", "refused", "lost", "lost", "lost"])
    assert not tally.stopped and tally.failures() == "8 failed (lost 4, refused 4)" and tally.succeeded == 1
    assert worked_off(["refused"] * 3).stopped == "the last 3 rows failed alike: it was refused"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_batch_with_what_is_done_written(number):
    written = []

    async def work(item: int) -> tuple[str, str]:
        if item == 3:
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)
        return "done", ""

    tally = Rows()
    asyncio.run(work_off(range(9), work, tally, parallel=1, write=lambda: written.append(tally.succeeded)))
    assert tally.signal == number and tally.stopped == number.name and written[-1] == 3 and tally.seconds < 30


def test_what_an_item_raises_ends_the_batch_after_the_results_are_written():
    written = []

    async def work(item: int) -> tuple[str, str]:
        if item == 2:
            raise OSError("the disk is full")
        return "done", ""

    with pytest.raises(OSError, match="disk"):
        asyncio.run(work_off(range(9), work, Rows(), parallel=2, write=lambda: written.append(1)))
    assert written


def test_a_file_is_held_by_one_alone_where_the_file_system_knows_locks(tmp_path, monkeypatch):
    with held(tmp_path / "a"):
        with pytest.raises(BatchError, match="another process"):
            held(tmp_path / "a")

        def no_locks(*_):
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        held(tmp_path / "a").close()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    removed, lock = [], fcntl.flock

    def after_its_end(file, how):
        if not removed:  # who held it ends between our opening and our locking
            removed.append(os.unlink(tmp_path / "run" / "a"))
            os.rmdir(tmp_path / "run")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_its_end)
    with held(tmp_path / "run" / "a"), pytest.raises(BatchError, match="another process"):
        held(tmp_path / "run" / "a")
