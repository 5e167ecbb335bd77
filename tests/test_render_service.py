"""The render service: real processes on loopback, killed, overrun and left alone by their clients."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from genevolve_fast.cli import main
from genevolve_fast.net.pictures import data_url
from genevolve_fast.render.job import Job
from genevolve_fast.render.pool import Pool, PoolSettings, RefusedError
from genevolve_fast.sandbox.canvas import draw_program
from tests.loopback.render_service import RED, LoopbackRenderService, faulty, own

pytestmark = pytest.mark.slow  # server processes, or pipelines of diffusers

RELEASED = {  # what the released runtime's client sends beside prompt and references
    "seed": 0,
    "true_cfg_scale": 4.0,
    "negative_prompt": " ",
    "num_inference_steps": 40,
    "guidance_scale": 1.0,
    "num_images_per_prompt": 1,
}


def picture_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["success"] is True
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body["image"]))))


def reason_of(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["success"] is False
    return body["message"]


def ask(service: LoopbackRenderService, prompt: str = RED, **fields) -> httpx.Response:
    return httpx.post(f"{service.url}/generate", json={"prompt": prompt, **fields}, timeout=60, verify=False)


def queued(service: LoopbackRenderService) -> tuple[int, int]:
    """Pictures that wait, and that are being drawn."""
    queue = service.health()["queue"]
    return queue["waiting"], queue["drawing"]


def refuses(service: LoopbackRenderService) -> bool:
    try:
        service.health()
    except httpx.TransportError as error:
        return isinstance(error, httpx.ConnectError)
    return False


@contextmanager
def busy(service: LoopbackRenderService, gate: Path) -> Iterator[tuple[ThreadPoolExecutor, Future]]:
    """Threads to ask with, and the answer of a picture that keeps the one worker busy until the file `gate` exists."""
    with ThreadPoolExecutor(16) as threads:
        first = threads.submit(ask, service, f"wait-for {gate} | {RED}")
        try:
            until(lambda: queued(service) == (0, 1))
            yield threads, first
        finally:
            gate.touch()


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # one that nobody has waited for is not alive
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture(scope="module")
def canvas():
    with LoopbackRenderService("--model", "sandbox:canvas", "--queue", "8", "--max-request-mb", "1") as service:
        yield service


@pytest.fixture(scope="module")
def service():
    with LoopbackRenderService("--job-timeout", "2", *faulty()) as service:
        yield service


# --- the contract -----------------------------------------------------------------------------------------------------


def test_released_clients_get_their_picture(canvas):
    emblem = draw_program("Background red.", [], 1)
    prompt = "Background blue. The emblem of image 1 in the middle."
    jpeg_by_name = data_url(emblem).replace("image/png", "image/jpeg")  # they call every file a JPEG
    answer = ask(canvas, prompt, **RELEASED, image_urls=[jpeg_by_name], width=1024, height=1024)
    assert np.array_equal(picture_of(answer), draw_program(prompt, [emblem], 0))
    assert set(answer.json()) == {"success", "image"}
    without = ask(canvas, image_urls=None, **RELEASED)  # Gen-Searcher's, when it found no reference
    assert np.array_equal(picture_of(without), draw_program(RED, [], 0))
    assert np.array_equal(picture_of(ask(canvas, seed=5)), draw_program(RED, [], 5))


BROKEN = base64.b64encode(b"\x89PNG\r\n\x1a\nnothing").decode()
REFUSED = [
    ({"prompt": ""}, 422, "prompt"),
    ({"prompt": " \n"}, 422, "the prompt is empty"),
    ({"prompt": "x" * 40_000}, 422, "prompt"),
    ({"seed": "seven"}, 422, "seed"),
    ({"seed": 2**64}, 422, "seed"),
    ({"num_inference_steps": 0}, 422, "num_inference_steps"),
    ({"num_inference_steps": 10**9}, 422, "num_inference_steps"),
    ({"true_cfg_scale": -1}, 422, "true_cfg_scale"),
    ({"num_images_per_prompt": 4}, 422, "one picture"),
    ({"width": 64}, 422, "go together"),
    ({"width": 10**6, "height": 64}, 422, "width"),
    ({"steps": 3}, 422, "steps"),
    ({"image_urls": "data:"}, 422, "image_urls"),
    ({"image_urls": ["http://169.254.169.254/latest/meta-data"]}, 400, "not fetched"),
    ({"image_urls": ["HTTPS://example.org/a.png"]}, 400, "not fetched"),
    ({"image_urls": ["file:///etc/passwd"]}, 400, "no data URL"),
    ({"image_urls": ["data:image/png;base64,@@@"]}, 400, "broken base64"),
    ({"image_urls": ["data:image/png;base64,aGVsbG8="]}, 400, "neither JPEG"),
    ({"image_urls": [f"data:image/png;base64,{BROKEN}"]}, 400, "broken PNG"),
    ({"image_urls": [data_url(np.zeros((9, 9, 3), np.uint8))] * 3}, 422, "at most 2 references"),
    ({"image_urls": ["data:,"] * 17}, 422, "image_urls"),
]


@pytest.mark.parametrize("fields, status, reason", REFUSED)
def test_bad_requests_are_refused_with_the_reason(canvas, fields, status, reason):
    answer = httpx.post(f"{canvas.url}/generate", json={"prompt": RED, **fields}, timeout=30)
    assert reason in reason_of(answer, status)


def test_bodies_that_are_no_request_are_refused(canvas):
    def post(content: bytes) -> httpx.Response:
        return httpx.post(f"{canvas.url}/generate", content=content, timeout=30)

    bodies = b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"prompt": "a", "true_cfg_scale": NaN}', b"[" * 100_000
    for content in bodies:
        assert reason_of(post(content), 422)
    assert reason_of(httpx.get(f"{canvas.url}/nowhere"), 404)
    assert reason_of(httpx.get(f"{canvas.url}/generate"), 405)
    assert canvas.health()["status"] == "healthy"


def test_extremes_that_the_contract_allows_are_drawn(canvas):
    for seed in (-(2**63), 2**64 - 1, None):
        assert picture_of(ask(canvas, seed=seed)).shape == (96, 96, 3)
    assert picture_of(ask(canvas, "画一只狐狸 🦊 \x00 ‮ " + "x" * 31_000)).shape == (96, 96, 3)
    lone = httpx.post(f"{canvas.url}/generate", content=b'{"prompt": "half a pair \\ud800"}', timeout=30)
    assert lone.status_code in (200, 422) and "success" in lone.json()


def test_damaged_pictures_are_references_or_refused_and_nothing_else():
    from genevolve_fast.render.job import Job
    from genevolve_fast.render.service import parse

    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (40, 30, 3), dtype=np.uint8)
    outcomes = set()
    for i in range(160):
        out = io.BytesIO()
        form, mode = [("PNG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGBA"), ("GIF", "P"), ("PNG", "I;16"), ("JPEG", "L")][
            i % 6
        ]
        Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode).save(out, form)
        data = bytearray(out.getvalue())
        if i % 3:
            data[int(random.integers(len(data)))] ^= int(random.integers(1, 256))
        if i % 5 == 0:
            del data[int(random.integers(len(data))) :]
        url = f"data:image/png;base64,{base64.b64encode(bytes(data)).decode()}"
        try:
            job = parse(json.dumps({"prompt": "a", "image_urls": [url]}).encode(), 40_000_000)
            assert isinstance(job, Job) and job.references[0].dtype == np.uint8 and job.references[0].ndim == 3
            outcomes.add(200)
        except RefusedError as error:
            assert str(error)
            outcomes.add(error.status)
    assert {200, 400} <= outcomes <= {200, 400, 413}


def test_a_bomb_of_a_picture_is_refused_before_it_is_decoded(canvas):
    bomb = io.BytesIO()
    Image.new("L", (8000, 8000)).save(bomb, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(bomb.getvalue()).decode()}"
    assert "pixels" in reason_of(ask(canvas, image_urls=[url]), 413)


def test_a_body_over_the_limit_is_refused_declared_or_not(canvas):
    large = b'{"prompt": "' + b"x" * (3 << 20) + b'"}'
    assert "larger than" in reason_of(httpx.post(f"{canvas.url}/generate", content=large, timeout=30), 413)
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))
    assert "larger than" in reason_of(httpx.post(f"{canvas.url}/generate", content=chunks, timeout=30), 413)


def test_health_and_metrics_tell_what_happens(canvas):
    before = canvas.metric("genevolve_render_requests_total")
    ask(canvas)
    health = canvas.health()
    assert health["model"] == "sandbox:canvas" and health["max_references"] == 2
    assert health["queue"] == {"waiting": 0, "drawing": 0, "limit": 8}
    assert [w["state"] for w in health["workers"]] == ["idle"] and health["workers"][0]["restarts"] == 0
    assert canvas.metric("genevolve_render_requests_total") == before + 1
    assert (
        canvas.metric("genevolve_render_draw_seconds_count") == canvas.metric("genevolve_render_batch_size_count") > 0
    )
    assert canvas.metric("genevolve_render_workers") == 1 and canvas.metric("genevolve_render_queue_depth") == 0


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_picture_that_fails_is_refused_and_the_worker_goes_on(service):
    pid = service.workers()
    assert "as it was told" in reason_of(ask(service, "fail | "), 500)
    assert picture_of(ask(service)).shape == (96, 96, 3) and service.workers() == pid


def test_the_picture_of_a_killed_worker_is_drawn_by_the_next_one(service, tmp_path):
    restarts = service.metric("genevolve_render_worker_restarts_total")
    first, pid = ask(service, f"die-once {tmp_path / 'died'} | {RED}"), service.workers()
    assert picture_of(first).shape == (96, 96, 3)
    assert service.metric("genevolve_render_worker_restarts_total") == restarts + 1
    os.kill(pid[0], signal.SIGKILL)  # this one while it has nothing to do
    until(lambda: service.workers() not in ([], pid))
    assert picture_of(ask(service)).shape == (96, 96, 3)


def test_a_worker_that_the_system_cannot_start_just_now_is_started_later(monkeypatch):
    """fork may fail for want of memory or processes; the device must not be lost to the service for ever."""

    async def main() -> np.ndarray:
        pool = Pool("genevolve_fast.commands.serve_render:open_canvas", {}, ["cpu"], PoolSettings())
        await pool.start()
        try:
            await asyncio.wait_for(pool.submit(Job(RED), pool.reserve()), 60)
            with monkeypatch.context() as broken:
                broken.setattr(sys, "executable", "/nowhere/python")
                os.kill(pool.workers[0].pid, signal.SIGKILL)
                while pool.workers[0].restarts < 2:
                    assert not pool._tasks[0].done(), "nobody looks after the device any more"
                    await asyncio.sleep(0.02)
            assert "cannot be started" in pool.workers[0].reason
            return await asyncio.wait_for(pool.submit(Job(RED), pool.reserve()), 60)
        finally:
            await pool.close()

    assert np.array_equal(asyncio.run(main()), draw_program(RED, [], 0))


@pytest.mark.slow
def test_a_picture_that_kills_every_worker_is_refused_after_two(service):
    restarts = service.metric("genevolve_render_worker_restarts_total")
    assert "two workers ended" in reason_of(ask(service, "die | "), 500)
    assert service.metric("genevolve_render_worker_restarts_total") == restarts + 2
    assert "the device is gone" in reason_of(ask(service, "lost | "), 500)
    assert picture_of(ask(service)).shape == (96, 96, 3)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(service):
    (pid,) = service.workers()
    assert "not drawn within 2 s" in reason_of(ask(service, "hang | "), 504)
    assert picture_of(ask(service)).shape == (96, 96, 3)
    assert not alive(pid)


@pytest.mark.slow
def test_workers_end_with_a_service_that_was_killed():
    with LoopbackRenderService("--devices", "cpu,cpu", *faulty()) as service:
        pids = service.workers()
        assert len(pids) == 2
        service.kill()
        until(lambda: not any(map(alive, pids)))


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_queue_is_refused_with_a_time_to_come_back(tmp_path):
    with (
        LoopbackRenderService("--queue", "3", *faulty()) as service,
        busy(service, tmp_path / "gate") as (threads, first),
    ):
        posts = [threads.submit(ask, service, seed=i) for i in range(11)]
        until(lambda: sum(post.done() for post in posts) == 8)
        refused = [post for post in posts if post.done()]
        for post in refused:
            answer = post.result()
            assert "3 pictures wait" in reason_of(answer, 503) and 1 <= int(answer.headers["Retry-After"]) <= 60
        (tmp_path / "gate").touch()
        for i, post in enumerate(posts):
            assert post in refused or np.array_equal(picture_of(post.result()), draw_program(RED, [], i))
        assert picture_of(first.result()).shape == picture_of(ask(service)).shape == (96, 96, 3)


@pytest.mark.slow
def test_the_job_of_a_client_that_vanished_is_not_drawn(tmp_path):
    async def vanish(service) -> httpx.Response:
        async with httpx.AsyncClient(timeout=60, verify=False) as client:
            posts = [
                asyncio.ensure_future(client.post(f"{service.url}/generate", json={"prompt": RED})) for _ in range(5)
            ]
            await asyncio.to_thread(until, lambda: queued(service) == (5, 1))
            for post in posts[:4]:
                post.cancel()
            await asyncio.gather(*posts[:4], return_exceptions=True)
            await asyncio.to_thread(until, lambda: queued(service) == (1, 1))
            (tmp_path / "gate").touch()
            return await posts[4]

    with LoopbackRenderService(*faulty()) as service, busy(service, tmp_path / "gate") as (_, first):
        last = asyncio.run(vanish(service))
        assert picture_of(first.result()).shape == picture_of(last).shape == (96, 96, 3)
        assert service.metric("genevolve_render_draw_seconds_count") == 2
        assert service.metric("genevolve_render_requests_total", outcome="vanished") == 4


@pytest.mark.slow
def test_a_picture_that_waits_too_long_is_refused(tmp_path):
    service = LoopbackRenderService("--queue-timeout", "0.5", *faulty())
    with service, busy(service, tmp_path / "gate") as (_, first):
        assert "no worker was free for 0.5 s" in reason_of(ask(service), 503)
        (tmp_path / "gate").touch()
        assert picture_of(first.result()).shape == (96, 96, 3)


@pytest.mark.slow
def test_waiting_pictures_are_drawn_together_and_one_that_fails_takes_no_other_with_it(tmp_path):
    service = LoopbackRenderService("--max-batch", "4", "--batch-window-ms", "1", *faulty())
    with service, busy(service, tmp_path / "gate") as (threads, first):
        prompts = [RED, RED, "fail | ", RED, RED, RED, RED, RED]
        posts = [threads.submit(ask, service, prompt, seed=i) for i, prompt in enumerate(prompts)]
        until(lambda: queued(service) == (8, 1))
        (tmp_path / "gate").touch()
        for i, post in enumerate(posts):
            if i == 2:
                assert "as it was told" in reason_of(post.result(), 500)
            else:
                assert np.array_equal(picture_of(post.result()), draw_program(RED, [], i))
        assert picture_of(first.result()).shape == (96, 96, 3)
        assert service.metric("genevolve_render_batch_size_sum") == 9
        assert service.metric("genevolve_render_batch_size_count") == 3


@pytest.mark.slow
def test_a_free_worker_waits_a_moment_for_company():
    service = LoopbackRenderService("--max-batch", "2", "--batch-window-ms", "2000", *faulty())
    with service, ThreadPoolExecutor(2) as threads:
        for answer in threads.map(lambda seed: ask(service, seed=seed), range(2)):
            assert picture_of(answer).shape == (96, 96, 3)
        assert service.metric("genevolve_render_batch_size_count") == 1
        assert service.metric("genevolve_render_batch_size_sum") == 2


@pytest.mark.slow
def test_a_hundred_requests_a_killed_worker_and_clients_that_vanish_lose_nothing():
    from benchmarks.render_load import Load, run

    load = Load(requests=40, vanishing=6, over=5, clients=2, seconds=0.02)
    outcome = run(load)
    assert outcome.lost == []
    assert outcome.counts == {"drawn": 34, "refused": 5}
    assert (outcome.asked, outcome.vanished, outcome.restarts) == (39, 6, 1)
    assert outcome.calls == 34  # nothing is drawn for those that vanished, and nothing twice


# --- start and end ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_finishes_what_was_accepted(tmp_path):
    with LoopbackRenderService(*faulty()) as service, busy(service, tmp_path / "gate") as (threads, first):
        posts = [threads.submit(ask, service, seed=i) for i in range(3)]
        until(lambda: queued(service) == (3, 1))
        service.terminate()
        until(lambda: refuses(service))
        (tmp_path / "gate").touch()
        assert picture_of(first.result()).shape == (96, 96, 3)
        for i, post in enumerate(posts):
            assert np.array_equal(picture_of(post.result()), draw_program(RED, [], i))
        assert service.process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            ask(service)


@pytest.mark.slow
def test_what_is_not_finished_in_the_time_to_end_is_refused(tmp_path):
    with LoopbackRenderService("--drain", "0.3", *faulty()) as service:
        pids = service.workers()
        with busy(service, tmp_path / "gate") as (threads, first):
            second = threads.submit(ask, service)
            until(lambda: queued(service) == (1, 1))
            service.terminate()
            for post in (first, second):
                assert "the service ended" in reason_of(post.result(), 503)
        assert service.process.wait(20) == 0
        assert not any(map(alive, pids))


@pytest.mark.slow
def test_a_pipeline_that_does_not_load_ends_the_service_with_the_reason():
    for flags, reason in ((own("tests.loopback.render_service:nobody"), "no factory"), (faulty(speed=3), "speed")):
        service = LoopbackRenderService(*flags).start(wait=False)
        assert service.process.wait(30) == 2
        assert reason in service.log_tail()


@pytest.mark.slow
def test_the_key_is_asked_for():
    key = {"RENDER_KEY": "only-for-friends"}
    with LoopbackRenderService("--api-key-env", "RENDER_KEY", *faulty(), env=key) as service:
        assert "key" in reason_of(ask(service), 401)
        wrong = {"Authorization": "Bearer only-for-friend"}
        assert httpx.get(f"{service.url}/metrics", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer only-for-friends"}
        answer = httpx.post(f"{service.url}/generate", json={"prompt": RED}, headers=right, timeout=30)
        assert picture_of(answer).shape == (96, 96, 3)
        assert "only-for-friends" not in service.log_tail()


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--host", "0.0.0.0"], "reachable from elsewhere"),
        (["--api-key-env", "NO_SUCH_KEY"], "no such variable"),
        (["--drain", "-5"], "--drain"),
        (["--max-request-mb", "-1"], "--max-request-mb"),
        (["--model", "sandbox:canvas", "--devices", "cpu,cuda:0,cuda:0"], "names a GPU twice"),
        (["--batch-window-ms", "5"], "does nothing without --max-batch"),
        (["--arguments", "{}"], "nothing without --factory"),
        (["--model", "sandbox:canvas", "--steps", "4"], "does nothing with the canvas"),
        (["--factory", "a:b", "--model", "m"], "--model does nothing"),
        (["--factory", "a:b", "--arguments", "["], "no JSON"),
        (["--true-cfg-scale", "-1"], "no scale"),
        (["--devices", "cuda:0,cuda:0"], "twice"),
        (["--model", "sandbox:canvas", "--queue", "0"], "queue must be above 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, reason, capsys, monkeypatch):
    monkeypatch.setattr("genevolve_fast.render.service.serve", lambda settings: pytest.fail("it was started"))
    assert main(["render-serve", *flags]) == 2
    assert reason in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["render-serve", "--model", "sandbox:canvas", "--port", str(port)]) == 2
    assert "in use" in capsys.readouterr().err


# --- diffusers behind it ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_diffusers_pipeline_draws_the_same_over_http(tmp_path, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    from genevolve_fast.render.job import Job
    from genevolve_fast.render.local import DiffusersPipeline, PipelineSettings
    from tests.tiny_pipelines import save_tiny_edit, save_tiny_flux

    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", 56 * 56)
    random = np.random.default_rng(0)
    references = tuple(random.integers(0, 255, (80, 64, 3), dtype=np.uint8) for _ in range(2))
    settings = {"kind": "qwen-image-edit", "model": str(save_tiny_edit(tmp_path / "edit")), "dtype": "float32"}
    pipeline = DiffusersPipeline(PipelineSettings(**settings, device="cpu"))
    with LoopbackRenderService(*own("tests.tiny_pipelines:open_tiny", **settings)) as service:
        for seed in (0, 1):
            asked = {**RELEASED, "num_inference_steps": 2, "seed": seed, "width": 48, "height": 64}
            made = picture_of(ask(service, "a red fox", image_urls=[data_url(r) for r in references], **asked))
            job = Job("a red fox", references, seed, 48, 64, 2, 4.0, 1.0, " ")
            assert np.array_equal(made, pipeline.draw([job])[0])
        assert "text-to-image" in reason_of(ask(service, "a red fox", **RELEASED), 422)
        guided = {"image_urls": [data_url(references[0])], "guidance_scale": 3.0}
        assert "takes no guidance_scale" in reason_of(ask(service, "a fox", **guided), 422)
        odd = {"image_urls": [data_url(references[0])], "width": 50, "height": 64}
        assert "no multiple of 16" in reason_of(ask(service, "a fox", **odd), 422)

    settings = {"kind": "text-to-image", "model": str(save_tiny_flux(tmp_path / "flux")), "dtype": "float32"}
    pipeline = DiffusersPipeline(PipelineSettings(**settings, device="cpu"))
    with LoopbackRenderService(*own("tests.tiny_pipelines:open_tiny", **settings)) as service:
        made = picture_of(ask(service, "a red fox", num_inference_steps=2, width=64, height=64))
        assert np.array_equal(made, pipeline.draw([Job("a red fox", (), 0, 64, 64, 2)])[0])
        assert "qwen-image-edit" in reason_of(ask(service, "a fox", image_urls=[data_url(references[0])]), 422)
