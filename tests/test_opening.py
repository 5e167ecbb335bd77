"""What a configuration of `evolve` opens, and what it is refused for before a model is loaded."""

from __future__ import annotations

import json

import pytest

from genevolve_fast.commands import opening
from genevolve_fast.sandbox.canvas import draw_program
from genevolve_fast.train.config import ConfigError, EvolveConfig, parse_config

CHAT = {"kind": "chat", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
SERVICE = {"kind": "qwen-service", "urls": ["http://127.0.0.1:9"]}
SERPER = {"kind": "serper"}


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A set of somebody's own requests: no checklist, so none of the sandbox's rules can read them."""
    from PIL import Image

    monkeypatch.setenv("SERPER_API_KEY", "loopback")
    Image.fromarray(draw_program("Background red.", [], 0)).save(tmp_path / "gt.png")
    rows = [{"id": i, "question": f"The Eiffel Tower at {i} o'clock", "gt_image": "gt.png"} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(tmp_path / "train.jsonl")}


def opened(**sections):
    return opening.open_pool(parse_config(EvolveConfig, sections))


def test_requests_of_ones_own_are_opened_with_services_of_ones_own(published):
    pool, world = opened(data=published, judge=CHAT, summarizer=CHAT, renderer=SERVICE, tools=SERPER)
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
def test_requests_that_are_not_the_sandboxs_get_nothing_of_the_sandbox(published, missing, named):
    """Its canvas draws a picture of anything, and its search answers everything: a run would go on and learn noise."""
    sections = {"data": published, "judge": CHAT, "summarizer": CHAT, "renderer": SERVICE, "tools": SERPER}
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
    import torch

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
    import torch

    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    assert opened(renderer=renderer)[1].renderer.name == renderer["kind"]


def test_a_replayed_pipeline_needs_no_place(monkeypatch, tmp_path):
    import torch

    from genevolve_fast.incidents import Incidents
    from genevolve_fast.net.cache import AnswerCache

    AnswerCache(tmp_path, "record", Incidents()).close()
    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    replay = {"cache": str(tmp_path), "cache_mode": "replay"}
    assert opened(renderer=LOCAL | replay)[1].renderer.name == "qwen-image-edit"
