"""What a configuration names in place of the sandbox's parts is opened, or refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genevolve_fast.cli import main
from genevolve_fast.commands import opening
from genevolve_fast.commands.opening import config_path, open_pool, open_world
from genevolve_fast.experience.summarizer import ChatSummarizer
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.cache import AnswerCache
from genevolve_fast.render.cache import CachedRenderer
from genevolve_fast.render.routed import RoutedRenderer
from genevolve_fast.reward.chat_judges import ChatImageJudge, ChatProgramJudge
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_program
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.config import ConfigError, EvolveConfig, load_config, parse_config

CHAT = "{kind: chat, model: m, base_url: 'http://127.0.0.1:9/v1'}"


def configured(*overrides: str) -> EvolveConfig:
    return load_config(EvolveConfig, config_path("demo"), list(overrides))


def sandbox_set(folder: Path) -> Path:
    """Four requests of the sandbox as GenEvolve-Data-RL, each with a picture of its own."""
    world, rows = SandboxWorld(), []
    (folder / "GenEvolve-Data-RL" / "images").mkdir(parents=True)
    for i, request in enumerate(world.requests("train", 4)):
        name = f"images/case_{i}.png"
        Image.fromarray(np.full((8, 8, 3), 50 * i, np.uint8)).save(folder / "GenEvolve-Data-RL" / name)
        info = {"construction": dict(request.extra)}
        rows.append({"id": i, "question": request.question, "gt_image": name, "extra_info": info})
    table = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "GenEvolve-Data-RL" / "train.jsonl").write_text(table)
    return folder


def test_sections_replace_what_the_sandbox_brings(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    sections = (
        "renderer={kind: qwen-service, urls: ['http://127.0.0.1:9'], text_to_image: {kind: nano-banana, api_key_env: "
        f"A_KEY}}, cache: '{tmp_path / 'pictures'}', cache_mode: record}}",
        f"judge={CHAT}",
        f"summarizer={CHAT}",
    )
    _, world = open_world(configured(*sections))
    assert isinstance(world.renderer, CachedRenderer) and isinstance(world.image_judge, ChatImageJudge)
    assert isinstance(world.program_judge, ChatProgramJudge) and isinstance(world.summarizer, ChatSummarizer)
    assert (world.renderer.min_references, world.renderer.max_references) == (0, 4)
    _, plain = open_world(configured())
    assert isinstance(plain.renderer, CanvasRenderer) and not isinstance(plain.renderer, RoutedRenderer)


def test_requests_and_ground_truth_come_from_a_published_folder(tmp_path):
    data = sandbox_set(tmp_path)
    pool, world = open_pool(configured(f"data.path={data}"))
    assert [r.question for r in pool] == [r.question for r in SandboxWorld().requests("train", 4)]
    assert [int(world.truth(r).max()) for r in pool] == [0, 50, 100, 150]


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["data.path=somewhere"], "pool_size is of data.path 'sandbox'"),
        (["experience.enabled=false", "objective.sdl_coef=0", f"summarizer={CHAT}"], "summarizer without experience"),
        (["renderer.long_side=512"], "long_side with kind canvas: it has nothing to set"),
        (["judge.model=m"], "model with kind rules would do nothing"),
        (["embedder.batch_size=4"], "batch_size with kind hashed would do nothing"),
    ],
)
def test_what_would_do_nothing_is_refused(overrides, told):
    with pytest.raises(ConfigError, match="^(?s:.*)" + told):
        configured("pool_size=400", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "section, told",
    [
        ("renderer={kind: nano-banana, api_key_env: NO_SUCH_KEY}", "NO_SUCH_KEY is not set"),
        ("judge={kind: chat, model: m, base_url: 'http://h/v1', api_key_env: NO_SUCH_KEY}", "NO_SUCH_KEY is not set"),
        ("embedder={kind: qwen, model: /no/such/folder}", "/no/such/folder"),
    ],
)
def test_what_is_missing_is_named_when_the_world_is_opened(section, told):
    with pytest.raises(ConfigError, match=told):
        open_world(configured(section))


# --- requests of one's own --------------------------------------------------------------------------------------------


ASKED = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
SERVICE = {"kind": "qwen-service", "urls": ["http://127.0.0.1:9"]}
SERPER = {"kind": "serper"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A set of somebody's own requests: no checklist, so none of the sandbox's rules can read them."""
    monkeypatch.setenv("SERPER_API_KEY", "loopback")
    Image.fromarray(draw_program("Background red.", [], 0)).save(tmp_path / "gt.png")
    rows = [{"id": i, "question": f"The Eiffel Tower at {i} o'clock", "gt_image": "gt.png"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(tmp_path / "train.jsonl")}


def opened(**sections):
    return open_pool(parse_config(EvolveConfig, sections))


def test_requests_of_ones_own_are_opened_with_services_of_ones_own(own):
    pool, world = opened(data=own, judge=ASKED, summarizer=ASKED, renderer=SERVICE, tools=SERPER)
    assert len(pool) == 3 and world.renderer.name == "qwen-service"
    assert world.truth(pool[0]).shape == (96, 96, 3)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("judge", "judge.kind"),
        ("summarizer", "summarizer.kind"),
        ("renderer", "renderer.kind"),
        ("tools", "tools.kind"),
    ],
)
def test_requests_that_are_not_the_sandboxs_get_nothing_of_the_sandbox(own, missing, named):
    """Its canvas draws a picture of anything, and its search answers everything: a run would go on and learn noise."""
    sections = {"data": own, "judge": ASKED, "summarizer": ASKED, "renderer": SERVICE, "tools": SERPER}
    with pytest.raises(ConfigError, match=f"{named} .*sandbox"):
        opened(**{name: section for name, section in sections.items() if name != missing})


LOCAL = {"kind": "qwen-image-edit", "model": "nowhere"}


@pytest.mark.parametrize(
    "renderer",
    [
        LOCAL,
        {"kind": "text-to-image", "model": "nowhere"},
        SERVICE | {"text_to_image": {"kind": "text-to-image", "model": "nowhere"}},
    ],
)
def test_a_pipeline_does_not_take_the_training_gpu_unasked(monkeypatch, renderer):
    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"renderer\.(text_to_image\.)?device.*render-serve"):
        opened(renderer=renderer)


@pytest.mark.parametrize(
    "renderer",
    [
        LOCAL | {"device": "cuda:1"},
        LOCAL | {"device": "cpu"},
        {"kind": "text-to-image", "urls": ["http://127.0.0.1:9"]},
        SERVICE,
    ],
)
def test_a_renderer_with_a_place_of_its_own_is_opened(monkeypatch, renderer):
    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    assert opened(renderer=renderer)[1].renderer.name == renderer["kind"]


def test_a_replayed_pipeline_needs_no_place(monkeypatch, tmp_path):
    AnswerCache(tmp_path, "record", Incidents()).close()
    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    replay = {"cache": str(tmp_path), "cache_mode": "replay"}
    assert opened(renderer=LOCAL | replay)[1].renderer.name == "qwen-image-edit"


@pytest.mark.parametrize("command", ["demo", "profile", "verify"])
def test_what_is_one_process_does_not_pass_over_ranks(command, tmp_path, monkeypatch, capsys):
    run = [command, "--config", "demo", *(["--runs", str(tmp_path)] if command == "demo" else [])]
    assert main([*run, "--set", "distributed.strategy=fsdp2"]) == 2
    assert f"{command} is one process, and this is 1 with distributed.strategy 'fsdp2'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(run) == 2 and "and this is 2 with distributed.strategy 'ddp'" in capsys.readouterr().err
