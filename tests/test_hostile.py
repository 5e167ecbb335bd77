"""What a hostile web may do to a rollout: nothing. All cases: `python -m benchmarks.hostile`."""

from __future__ import annotations

import asyncio

import pytest
from loopback.hostile import Arena, Canary, PeakMemory, cases
from loopback.web import LoopbackWeb

from genevolve_fast.agent.fetch import FetchLimits, ImageFetcher
from genevolve_fast.incidents import KINDS, Incidents
from genevolve_fast.net.web import FetchError

CASES = cases()
MEMORY_LIMIT = 400 << 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    from genevolve_fast.policy.codec import TransformersCodec
    from genevolve_fast.sandbox.tiny_policy import start_path

    codec = TransformersCodec.from_pretrained(start_path())
    with LoopbackWeb() as web, Canary() as canary:
        arena = Arena(web, canary, codec, tmp_path_factory.mktemp("hostile"))
        arena.run(CASES[0])
        yield arena


def test_there_are_enough_cases_and_every_one_is_itself():
    assert len(CASES) >= 200 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("start", range(5))
def test_every_fifth_case(arena, start):
    """A fifth of the tags and types; all files, faults and addresses come by."""
    chosen = [case for i, case in enumerate(CASES) if i % 5 == start]
    wrong = {}
    with PeakMemory() as memory:
        for case in chosen:
            if said := arena.run(case):
                wrong[case.name] = said
    assert not wrong
    assert memory.growth < MEMORY_LIMIT


_GARBAGE = {
    "nothing": b"",
    "binary": bytes(range(256)) * 64,
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "no version": b"200 OK\r\n\r\n",
    "status of letters": b"HTTP/1.1 abc OK\r\n\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (4 << 20),
    "a million headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabcde",
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
    "a chunk of 2^60": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000\r\n" + bytes(1 << 20),
    "informational for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "http/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("name", _GARBAGE)
@pytest.mark.parametrize("hold", [False, True])
def test_servers_that_do_not_speak_http(name, hold):
    """`hold`: the connection stays open after the garbage, as a slow-loris would."""

    async def serve(reader, writer):
        writer.write(_GARBAGE[name])
        await asyncio.sleep(5 if hold else 0)
        writer.close()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        fetcher = ImageFetcher(FetchLimits(timeout_s=0.5, attempts=1), incidents, ("127.0.0.1",))
        with pytest.raises(FetchError) as error:
            await fetcher.download(f"http://127.0.0.1:{port}/x.png")
        server.close()
        return error.value

    incidents = Incidents()
    with PeakMemory() as memory:
        error = asyncio.run(main())
    assert error.kind in set(KINDS) - {"other"} and incidents.take() == {f"image_download/{error.kind}": 1}
    assert memory.growth < MEMORY_LIMIT
