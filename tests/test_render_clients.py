"""Renderer clients against real services on loopback: failover, circuits, patience, typed failures, cache."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time

import numpy as np
import pytest
from loopback.canvas_service import GEMINI, GENERATE, LoopbackCanvas
from loopback.web import free_port, png

from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.net.web import FetchError
from genevolve_fast.protocols import Renderer, RenderError
from genevolve_fast.render.cache import CachedRenderer
from genevolve_fast.render.config import RendererConfig, open_renderer
from genevolve_fast.render.endpoints import CallError, CallLimits, Endpoint, Endpoints, _Pool
from genevolve_fast.render.nano_banana import NanoBanana
from genevolve_fast.render.routed import RoutedRenderer
from genevolve_fast.render.service_client import ServiceRenderer, output_size
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_reference
from genevolve_fast.trajectory import Program, Reference

pytestmark = pytest.mark.slow

KEY = "sk-render-0123456789"
ANCHOR = draw_reference("anchor", "red")
EDIT = Program("Background blue. The emblem of the first reference image at the middle.", (Reference("IMG_001"),))
TEXT = Program("Background green. The text 'NOVA' at the top left.")
QUICK = CallLimits(request_timeout_s=10, picture_timeout_s=30, attempts=3, patience_s=0, probe_after_s=0.2)


@pytest.fixture(scope="module")
def service():
    with LoopbackCanvas() as server:
        yield server


@pytest.fixture(scope="module")
def second():
    with LoopbackCanvas() as server:
        yield server


@pytest.fixture(autouse=True)
def _in_order(request):
    yield
    for name in {"service", "second"} & set(request.fixturenames):
        server = request.getfixturevalue(name)
        for path in (GENERATE, GEMINI):
            server.fault(path, "", 0)


def quick(**changes) -> CallLimits:
    from dataclasses import replace

    return replace(QUICK, **changes)


def render(renderer: Renderer, program: Program = EDIT, references=None, seed: int = 0) -> np.ndarray:
    given = [ANCHOR] * len(program.reference_images) if references is None else references
    return asyncio.run(renderer.render(program, given, seed))


def canvas(program: Program = EDIT, seed: int = 0) -> np.ndarray:
    return render(CanvasRenderer(), program, seed=seed)


def client(*servers: LoopbackCanvas, limits: CallLimits = QUICK, **more) -> ServiceRenderer:
    return ServiceRenderer([s.url for s in servers], limits=limits, **more)


def banana(server: LoopbackCanvas, limits: CallLimits = QUICK, **more) -> NanoBanana:
    return NanoBanana(KEY, base_url=server.gemini, limits=limits, **more)


def failure(renderer: Renderer, program: Program = EDIT) -> RenderError:
    with pytest.raises(RenderError) as raised:
        render(renderer, program)
    return raised.value


# --- the released service ---------------------------------------------------------------------------------------------


def test_a_service_draws_what_the_canvas_draws(service):
    assert np.array_equal(render(client(service), seed=3), canvas(seed=3))
    asked = json.loads(service.asked()[-1]["body"])
    assert asked.pop("image_urls")[0].startswith("data:image/png;base64,")
    assert asked == {
        "prompt": EDIT.gen_prompt, "seed": 3, "true_cfg_scale": 4.0, "negative_prompt": " ", "num_inference_steps": 40,
        "guidance_scale": 1.0, "num_images_per_prompt": 1, "width": 1024, "height": 1024,
    }  # fmt: skip


def test_the_picture_has_the_shape_of_the_first_reference():
    wide, tall = np.zeros((300, 400, 3), np.uint8), np.zeros((999, 333, 3), np.uint8)
    assert output_size([wide, tall], 1024, 16) == (1024, 768)
    assert output_size([tall], 1024, 16) == (336, 1024)
    assert output_size([], 1024, 16) == (1024, 1024)
    assert output_size([np.zeros((4, 400, 3), np.uint8)], 1024, 16) == (1024, 16)


@pytest.mark.parametrize(
    ("fault", "kind", "calls"),
    [
        ("status:500", "server_error", 2),
        ("status:429,0", "rate_limited", 2),
        ("failed:CUDA error", "server_error", 2),
        ("cut", "bad_response", 2),
        ("html", "bad_response", 2),
        ("deep", "bad_response", 2),
        ("list", "bad_response", 2),
        ("not_base64", "bad_response", 2),
        ("number", "bad_response", 2),
        ("bomb", "too_large", 2),
        ("hangup", "connect", 2),
        ("error:400,no such picture", "client_error", 1),
        ("error:422,width", "client_error", 1),
        ("status:401", "client_error", 1),
        ("status:404", "client_error", 1),
        ("status:302", "bad_response", 2),
    ],
)
def test_failures_have_a_type_and_every_attempt_is_counted(service, fault, kind, calls):
    service.fault(GENERATE, fault)
    incidents, before = Incidents(), service.calls()
    error = failure(client(service, limits=quick(attempts=2), incidents=incidents))
    assert error.kind == kind and service.calls() - before == calls
    assert incidents.take() == {f"render/{kind}": calls}


def test_what_the_service_says_is_told_without_the_key(service):
    service.fault(GENERATE, f"error:400,no picture for {KEY}")
    error = failure(client(service, api_key=KEY))
    assert "no picture for ***" in str(error) and KEY not in str(error)
    service.fault(GENERATE, f"failed:boom {KEY}", 3)
    assert "boom ***" in str(failure(client(service, api_key=KEY, limits=quick(attempts=1))))
    assert service.asked()[-1]["headers"]["authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(client(service, api_key=KEY))


@pytest.mark.parametrize("room", range(285, 300, 3))
def test_a_key_at_the_end_of_what_is_told_is_not_told_in_part(service, room):
    """What services say is cut to a length; a key cut by it is no longer found, and stands there all but whole."""
    padding = "x" * (room - len("Inference failed: "))
    service.fault(GENERATE, f"failed:{padding}{KEY}", 1)
    told = [str(failure(client(service, api_key=KEY, limits=quick(attempts=1))))]
    for fault in (f"failed:{'x' * room}{KEY}", f"text:{'x' * (room - 100)}{KEY}", f"reason:{'x' * 50}{KEY}SAFETY"):
        service.fault(GEMINI, fault, 1)
        told.append(str(failure(banana(service, quick(attempts=1)), TEXT)))
    assert not any(KEY[:8] in said for said in told), told


def test_a_login_in_the_address_is_not_told(service):
    login = base64.b64encode(b"reader:pass-word-77").decode()
    renderer = ServiceRenderer([service.url.replace("://", "://reader:pass-word-77@")], limits=quick(attempts=1))
    for fault in (f"error:400,Basic {login}", "error:400,no pass-word-77", f"failed:Basic {login}, pass-word-77"):
        service.fault(GENERATE, fault, 1)
        said = str(failure(renderer))
        assert "***" in said and login not in said and "pass-word" not in said


def test_a_failed_attempt_goes_to_another_address_at_once(service, second):
    service.fault(GENERATE, "status:500")
    incidents, renderer = Incidents(), None
    renderer = client(service, second, limits=quick(attempts=2), incidents=incidents)
    for seed in range(4):
        assert np.array_equal(render(renderer, seed=seed), canvas(seed=seed))
    assert incidents.take()["render/server_error"] >= 1


def test_an_address_that_wants_something_else_is_passed_over(service, second):
    service.fault(GENERATE, "status:404")
    assert np.array_equal(render(client(service, second)), canvas())


def test_the_least_busy_address_is_asked(service, second):
    service.fault(GENERATE, "delay:0.6")
    before = service.calls(), second.calls()
    renderer = client(service, second, limits=quick(concurrency=2))

    async def many():
        return await asyncio.gather(*(renderer.render(EDIT, [ANCHOR], seed) for seed in range(10)))

    assert len(asyncio.run(many())) == 10
    slow, fast = service.calls() - before[0], second.calls() - before[1]
    assert slow + fast == 10 and 1 <= slow < fast


def test_the_choice_goes_by_what_failed_here_then_by_health_then_by_load_then_in_turn():
    async def taken(*changes: tuple[int, int], avoid: int | None = None) -> list[str]:
        pool = _Pool([f"http://{name}:1" for name in "abc"], quick(concurrency=9))
        for endpoint, (active, failed) in zip(pool.endpoints, changes, strict=True):
            endpoint.active, endpoint.failed = active, failed
        hated = None if avoid is None else pool.endpoints[avoid]
        return [(await pool.take(hated, None, 0.0, None)).where[0] for _ in range(3)]

    assert asyncio.run(taken((2, 0), (0, 0), (1, 0))) == ["b", "c", "b"]
    assert asyncio.run(taken((0, 0), (0, 0), (0, 0))) == ["a", "b", "c"]
    assert asyncio.run(taken((0, 1), (3, 0), (3, 0))) == ["b", "c", "b"]
    assert asyncio.run(taken((0, 0), (5, 2), (5, 2), avoid=0)) == ["b", "c", "b"]


@pytest.mark.slow
def test_no_address_gets_more_requests_at_a_time_than_allowed():
    with LoopbackCanvas() as server:
        server.fault(GENERATE, "delay:0.05")
        renderer = client(server, limits=quick(concurrency=2))

        async def many():
            await asyncio.gather(*(renderer.render(EDIT, [ANCHOR], seed) for seed in range(8)))

        asyncio.run(many())
        assert server.peak()[GENERATE] == 2


def test_an_open_circuit_is_not_asked_and_half_open_once():
    clock, endpoint = 100.0, Endpoint("http://h:1/generate", quick(break_after=2, probe_after_s=10.0))
    away = CallError("gone", "connect", "away")
    for _ in range(2):
        assert endpoint.ready(clock + 5)
        endpoint.failed_with(away, clock)
    assert endpoint.broken and not endpoint.ready(clock + 9) and endpoint.ready(clock + 10)
    endpoint.active = 1  # the probe
    assert not endpoint.ready(clock + 10)
    endpoint.succeeded()
    assert endpoint.ready(clock + 10)


def test_circuits_that_stay_open_fail_without_a_request(service):
    service.fault(GENERATE, "status:500")
    renderer = client(service, limits=quick(break_after=2, attempts=2, probe_after_s=60.0))

    async def twice():
        with pytest.raises(RenderError):
            await renderer.render(EDIT, [ANCHOR], 0)
        before = service.calls()
        with pytest.raises(RenderError, match="2 times in a row"):
            await renderer.render(EDIT, [ANCHOR], 0)
        assert service.calls() == before

    asyncio.run(twice())


def test_busy_services_are_given_the_time_they_ask_for_and_break_no_circuit(service):
    service.fault(GENERATE, "status:503,1", 1)
    started = time.monotonic()
    picture = render(client(service, limits=quick(patience_s=30, break_after=1, attempts=1)))
    assert np.array_equal(picture, canvas()) and time.monotonic() - started >= 1
    for kind in ("rate_limited", "server_error"):
        busy = Endpoint("http://h:1", quick(break_after=1))
        busy.failed_with(CallError("full", kind, "away", 2.0), 100.0)
        assert not busy.broken and not busy.ready(101.9) and busy.ready(102.0)
    asks_for_hours = Endpoint("http://h:1", quick())
    asks_for_hours.failed_with(CallError("full", "rate_limited", "away", 99_999.0), 100.0)
    assert asks_for_hours.ready(160.0)


@pytest.mark.slow
def test_a_service_that_restarts_is_waited_for():
    with LoopbackCanvas() as server:
        renderer = client(server, limits=quick(patience_s=60))
        server.kill()
        back = threading.Timer(1.0, server.start)
        back.start()
        incidents = renderer.incidents
        assert np.array_equal(render(renderer), canvas())
        back.join()
        assert incidents.take()["render/connect"] >= 1


def test_a_service_that_is_gone_is_given_up():
    renderer = ServiceRenderer([f"http://127.0.0.1:{free_port()}"], limits=quick(attempts=2))
    error = failure(renderer)
    assert error.kind == "connect" and "attempts" in str(error)


def test_a_picture_ends_by_its_deadline(service):
    service.fault(GENERATE, "delay:20")
    started = time.monotonic()
    limits = quick(request_timeout_s=0.4, picture_timeout_s=0.6, attempts=9, patience_s=60)
    assert failure(client(service, limits=limits)).kind == "timeout"
    assert time.monotonic() - started < 10


def test_cancelled_pictures_give_their_turn_back(service):
    service.fault(GENERATE, "delay:3", 1)
    renderer = client(service, limits=quick(concurrency=1))

    async def cancel():
        first = asyncio.create_task(renderer.render(EDIT, [ANCHOR], 0))
        await asyncio.sleep(0.3)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return await asyncio.wait_for(renderer.render(EDIT, [ANCHOR], 0), 2.5)

    assert np.array_equal(asyncio.run(cancel()), canvas())


def test_edit_services_refuse_programs_without_references_with_the_reason(service):
    before = service.calls()
    error = failure(client(service), TEXT)
    assert error.kind == "bad_arguments" and "needs at least 1 reference image; configure text_to_image" in str(error)
    assert service.calls() == before


def test_one_client_serves_several_event_loops(service):
    renderer, pictures = client(service), []
    threads = [threading.Thread(target=lambda: pictures.append(render(renderer))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pictures) == 3 and all(np.array_equal(p, canvas()) for p in pictures)


# --- Gemini -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [EDIT, TEXT])
def test_the_image_api_draws_with_and_without_references(service, program):
    assert np.array_equal(render(banana(service), program, seed=5), canvas(program, 5))
    asked = service.asked()[-1]
    body = json.loads(asked["body"])
    assert asked["headers"]["x-goog-api-key"] == KEY and KEY not in asked["path"]
    parts = body["contents"][0]["parts"]
    assert parts[0] == {"text": program.gen_prompt} and len(parts) == 1 + len(program.reference_images)
    assert body["generationConfig"] == {"seed": 5}


def test_shape_and_size_are_asked_for(service):
    render(banana(service, aspect_ratio="16:9", image_size="2K"), TEXT)
    asked = json.loads(service.asked()[-1]["body"])["generationConfig"]
    assert asked["imageConfig"] == {"aspectRatio": "16:9", "imageSize": "2K"}


@pytest.mark.parametrize(
    ("fault", "kind", "calls", "said"),
    [
        ("blocked:PROHIBITED_CONTENT", "blocked", 1, "PROHIBITED_CONTENT"),
        ("blocked:OTHER", "blocked", 1, "it breaks a rule"),
        ("reason:IMAGE_SAFETY", "blocked", 1, "IMAGE_SAFETY"),
        ("reason:RECITATION", "blocked", 1, "RECITATION"),
        ("reason:STOP", "bad_response", 2, "without a picture"),
        ("text:I cannot draw", "bad_response", 2, "I cannot draw"),
        ("failed:internal", "server_error", 2, "internal"),
        (f"error:400,API key not valid {KEY}", "client_error", 1, "API key not valid ***"),
        ("status:403", "client_error", 1, "403"),
        ("status:503", "server_error", 2, "503"),
        ("bomb", "too_large", 2, "pixels"),
        ("not_base64", "bad_response", 2, "not base64"),
    ],
)
def test_answers_without_a_picture_have_a_type(service, fault, kind, calls, said):
    service.fault(GEMINI, fault)
    before, incidents = service.calls(), Incidents()
    error = failure(banana(service, quick(attempts=2), incidents=incidents), TEXT)
    assert (error.kind, service.calls() - before) == (kind, calls)
    assert said in str(error) and KEY not in str(error)
    assert incidents.take() == {f"render/{kind}": calls}


def test_the_delay_that_the_api_asks_for_is_waited(service):
    service.fault(GEMINI, "busy:1.2", 1)
    started = time.monotonic()
    assert np.array_equal(render(banana(service), TEXT), canvas(TEXT))
    assert time.monotonic() - started >= 1.2


def test_drafts_of_a_thinking_model_are_not_the_picture(service):
    final = np.full((6, 5, 3), (1, 2, 3), np.uint8)
    service.file("final", png(final))
    service.fault(GEMINI, "thought:final", 1)
    assert np.array_equal(render(banana(service), TEXT), final)


# --- routing, cache, configuration ------------------------------------------------------------------------------------


def test_programs_without_references_go_to_the_other_renderer(service, second):
    routed = RoutedRenderer(client(service), banana(second))
    before = service.calls(), second.calls()
    assert np.array_equal(render(routed, EDIT), canvas(EDIT))
    assert np.array_equal(render(routed, TEXT), canvas(TEXT))
    assert (service.calls() - before[0], second.calls() - before[1]) == (1, 1)
    with pytest.raises(ValueError, match="needs references"):
        RoutedRenderer(banana(second), client(service))


def cached(folder, server, mode="record", incidents=None, **identity) -> CachedRenderer:
    incidents = incidents or Incidents()
    return CachedRenderer(client(server, incidents=incidents), identity, AnswerCache(folder, mode, incidents))


def test_nothing_is_drawn_twice(service, tmp_path):
    first = render(cached(tmp_path, service))
    before = service.calls()
    assert np.array_equal(render(cached(tmp_path, service)), first) and service.calls() == before
    assert np.array_equal(render(cached(tmp_path, service, "replay")), first) and service.calls() == before


def test_whatever_changes_a_picture_is_in_the_key(service, tmp_path):
    render(cached(tmp_path, service))
    before = service.calls()
    render(cached(tmp_path, service), seed=1)
    render(cached(tmp_path, service), references=[draw_reference("key", "red")])
    render(cached(tmp_path, service), Program(EDIT.gen_prompt + " Nothing else.", EDIT.reference_images))
    render(cached(tmp_path, service, steps=8))
    assert service.calls() - before == 4


def test_failures_are_not_remembered_and_a_replay_says_what_it_lacks(service, tmp_path):
    service.fault(GENERATE, "error:400,no", 1)
    assert failure(cached(tmp_path, service)).kind == "client_error"
    render(cached(tmp_path, service))
    incidents = Incidents()
    replayed = cached(tmp_path, service, "replay", incidents)
    with pytest.raises(RenderError, match="not recorded") as raised:
        render(replayed, seed=77)
    assert raised.value.kind == "not_recorded" and incidents.take() == {"render/not_recorded": 1}


def test_a_configuration_opens_what_it_names(service, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_API_KEY", KEY)
    config = RendererConfig(
        kind="qwen-service",
        urls=(service.url,),
        cache=tmp_path / "cache",
        cache_mode="record",
        seed=4,
        text_to_image={"kind": "nano-banana", "base_url": service.gemini},
    )
    opened = open_renderer(config, Incidents())
    assert (opened.min_references, opened.max_references) == (0, 4)
    for program in (EDIT, TEXT):
        assert np.array_equal(render(opened, program, seed=9), canvas(program, 4))
    before = service.calls()
    monkeypatch.delenv("GOOGLE_API_KEY")
    replayed = open_renderer(config.model_copy(update={"cache_mode": "replay"}), Incidents())
    assert np.array_equal(render(replayed, TEXT), canvas(TEXT, 4)) and service.calls() == before


def test_text_to_image_services_are_sent_no_pictures(service):
    opened = open_renderer(RendererConfig(kind="text-to-image", urls=(service.url,)), Incidents())
    assert np.array_equal(render(opened, TEXT), canvas(TEXT))
    asked = json.loads(service.asked()[-1]["body"])
    assert asked["image_urls"] == [] and asked["width"] == asked["height"] == 1024
    assert not {"num_inference_steps", "true_cfg_scale", "guidance_scale", "negative_prompt"} & set(asked)
    assert "draws from text alone" in str(failure(opened, EDIT))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "canvas", "patience_s": 3}, "patience_s with kind canvas: it has nothing to set would do nothing"),
        ({"kind": "canvas", "cache": "x", "cache_mode": "record"}, "would do nothing"),
        ({"kind": "qwen-service"}, "needs urls"),
        ({"kind": "qwen-image-edit", "urls": ["http://h"]}, "urls with kind qwen-image-edit would do nothing"),
        ({"kind": "nano-banana", "num_inference_steps": 4}, "num_inference_steps with kind nano-banana"),
        ({"kind": "text-to-image", "concurrency": 2}, "concurrency with kind text-to-image without urls"),
        ({"kind": "qwen-service", "urls": ["h:1"]}, "urls is no http or https address"),
        ({"kind": "qwen-service", "urls": ["http://h/generate"]}, "without /generate"),
        ({"kind": "qwen-service", "urls": ["http://h?x=1"]}, "no effect"),
        ({"kind": "qwen-service", "urls": ["http://h", "http://h"]}, "twice"),
        ({"kind": "qwen-service", "urls": ["http://u:secret@h"], "api_key_env": "K"}, "only one of them"),
        ({"kind": "qwen-service", "urls": ["http://h"], "device": "cpu"}, "device with kind qwen-service"),
        ({"kind": "qwen-service", "urls": ["http://h"], "cache": "x"}, "go together"),
        ({"kind": "qwen-service", "urls": ["http://h"], "picture_timeout_s": 5}, "the picture ends first"),
        ({"kind": "nano-banana", "aspect_ratio": "wide"}, "such as 16:9"),
        ({"kind": "qwen-service", "urls": ["http://h"], "text_to_image": {"kind": "canvas"}}, "does not draw without"),
        (
            {"kind": "qwen-image-edit", "text_to_image": {"kind": "nano-banana", "seed": 3}},
            "the seed of the renderer around it",
        ),
        ({"kind": "nano-banana", "text_to_image": {"kind": "text-to-image"}}, "text_to_image with kind nano-banana"),
        ({"kind": "sdxl"}, "Input should be"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(fields, said):
    with pytest.raises(ValueError) as raised:
        RendererConfig(**fields)
    assert said in str(raised.value) and "secret" not in str(raised.value)


def test_missing_keys_are_named(monkeypatch):
    for name in ("GOOGLE_API_KEY", "GEMINI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="GOOGLE_API_KEY or GEMINI_API_KEY is not set"):
        open_renderer(RendererConfig(kind="nano-banana"), Incidents())
    with pytest.raises(ValueError, match="MY_KEY is not set"):
        open_renderer(RendererConfig(kind="qwen-service", urls=("http://h",), api_key_env="MY_KEY"), Incidents())
    monkeypatch.setenv("MY_KEY", "two\nlines")
    with pytest.raises(ValueError, match="cannot be sent") as raised:
        open_renderer(RendererConfig(kind="nano-banana", api_key_env="MY_KEY"), Incidents())
    assert "lines" not in str(raised.value)
    with pytest.raises(ValueError, match="the sandbox brings its own renderer"):
        open_renderer(RendererConfig(), Incidents())


def test_the_identity_holds_what_changes_pictures_and_nothing_else():
    base = {"kind": "qwen-service", "urls": ["http://a"]}
    plain = RendererConfig(**base).identity()
    for same in ({"urls": ["http://b", "http://c"]}, {"patience_s": 1}, {"concurrency": 9}, {"seed": 3}):
        assert RendererConfig(**base | same).identity() == plain
    for other in ({"num_inference_steps": 8}, {"long_side": 512}, {"model": "x"}, {"negative_prompt": "blur"}):
        assert RendererConfig(**base | other).identity() != plain


def test_an_answer_with_line_breaks_and_a_data_url_is_read(service):
    picture = png(np.full((3, 3, 3), 7, np.uint8))
    for text in (base64.encodebytes(picture).decode(), f"data:image/png;base64,{base64.b64encode(picture).decode()}"):
        service.file("raw", json.dumps({"success": True, "image_base64": text}).encode())
        service.fault(GENERATE, "raw:raw", 1)
        assert (render(client(service)) == 7).all()


def test_patience_begins_when_a_service_goes_away_not_when_the_picture_was_asked_for():
    began = time.monotonic()
    times = []

    async def ask(endpoint, seconds):
        times.append(time.monotonic() - began)
        if len(times) == 1:
            await asyncio.sleep(0.6)  # drawing, longer than the patience
            raise FetchError("gone", "connect")
        return "picture"

    limits = quick(attempts=1, patience_s=0.4)
    assert asyncio.run(Endpoints(["http://h:1"], limits, Incidents()).call(ask)) == "picture"
    assert len(times) == 2


@pytest.mark.slow
def test_waiting_for_a_turn_uses_up_neither_patience_nor_deadline(service):
    service.fault(GENERATE, "delay:0.3")
    renderer = client(service, limits=quick(concurrency=1, request_timeout_s=1.2, picture_timeout_s=1.2, attempts=1))

    async def many():
        return await asyncio.gather(*(renderer.render(EDIT, [ANCHOR], seed) for seed in range(6)))

    assert len(asyncio.run(many())) == 6


def test_a_service_that_stays_away_is_given_up_by_the_deadline():
    async def never(endpoint, seconds):
        raise FetchError("away", "server_error")

    limits = quick(picture_timeout_s=0.7, request_timeout_s=0.5, patience_s=30, probe_after_s=0.05)
    with pytest.raises(RenderError, match="away"):
        asyncio.run(Endpoints(["http://h:1"], limits, Incidents()).call(never))
