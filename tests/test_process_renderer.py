"""The process as a renderer: it grows, keeps every stage, goes on after a kill, and lives with budgets and failures."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from loopback.chat import LoopbackChat

from genevolve_fast.cli import main
from genevolve_fast.commands.opening import open_any_renderer
from genevolve_fast.incidents import Incidents
from genevolve_fast.net.chat import ChatEndpoint
from genevolve_fast.process.growing import GrowthSettings
from genevolve_fast.process.renderer import ProcessRenderer, chat_talk, token_talk
from genevolve_fast.process.trace import Correction, Inspection, Plan
from genevolve_fast.protocols import RenderError
from genevolve_fast.render.config import RendererConfig
from genevolve_fast.report.processes import process_folders, read_strip
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_program, draw_reference
from genevolve_fast.sandbox.process_writer import symbolic_talk
from genevolve_fast.trajectory import Program, Reference, image_hash

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EMBLEM = draw_reference("key", "red")
PROGRAM = Program(
    "Background yellow. A blue circle left of a green star. The emblem of Bel Abo at the top left. "
    "The text 'OPEN' at the bottom center.",
    (Reference("IMG_001", sha256=image_hash(EMBLEM)),),
)
RIGHT = (
    "Background yellow. A blue circle at the middle left. A green star at the middle right. "
    "The emblem of the first reference image at the top left. The text 'OPEN' at the bottom center."
)


class Watched:
    """The canvas; remembers what it was asked for, and fails at the n-th draft."""

    name, min_references = "canvas", 0

    def __init__(self, failing: int | None = None, max_references: int = 2, kind: str = "timeout") -> None:
        self.asked: list[tuple[str, list[str], list[str], int]] = []
        self.max_references, self._failing, self._kind = max_references, failing, kind

    async def render(self, program, references, seed):
        ids = [r.img_id for r in program.reference_images]
        self.asked.append((program.gen_prompt, ids, [image_hash(r) for r in references], seed))
        if len(self.asked) - 1 == self._failing:
            raise RenderError("the service is away", self._kind)
        return await CanvasRenderer().render(program, references, seed)


def grow(folder, renderer=None, program=PROGRAM, references=(EMBLEM,), seed=3, incidents=None, talk=None, **settings):
    settings = GrowthSettings(**settings)
    opened = talk or symbolic_talk(settings.max_cycles)
    process = ProcessRenderer(renderer or Watched(), opened, settings, folder, {"process": {}}, incidents)
    return asyncio.run(process.grow(program, list(references), seed))


def told(grown) -> dict:
    return json.loads((grown.folder / "process.json").read_text())


def drafts(grown) -> list[str]:
    return [s["sha256"] for s in told(grown)["steps"] if s["what"] == "draft"]


# --- growing ----------------------------------------------------------------------------------------------------------


def test_a_program_grows_over_cycles_and_ends_right_where_one_pass_goes_wrong(tmp_path):
    canvas = Watched()
    grown = grow(tmp_path, canvas)
    right = draw_program(RIGHT, [EMBLEM], 3)
    assert np.array_equal(grown.picture, right) and grown.end == "done"
    assert not np.array_equal(draw_program(PROGRAM.gen_prompt, [EMBLEM], 3), right)
    steps = [(s["what"], s["stage"], s["cycle"]) for s in told(grown)["steps"]]
    assert steps == [
        ("text", "plan", 0), ("draft", "sketch", 0), ("text", "inspect", 0), ("text", "refine", 0),
        ("draft", "refine", 0), ("text", "plan", 1), ("draft", "sketch", 1), ("text", "inspect", 1),
        ("text", "refine", 1), ("draft", "refine", 1), ("text", "plan", 2), ("draft", "sketch", 2),
        ("text", "inspect", 2), ("text", "plan", 3),
    ]  # fmt: skip
    assert told(grown)["steps"][-1]["ended"] and told(grown)["steps"][12]["verdict"] == "sound"
    assert canvas.asked[-1][0] == RIGHT and {seed for *_, seed in canvas.asked} == {3}
    assert told(grown)["picture"] == image_hash(right) == drafts(grown)[-1]


def test_drafts_go_back_to_the_renderer_after_the_programs_references(tmp_path):
    canvas = Watched()
    grown = grow(tmp_path / "a", canvas)
    made = drafts(grown)
    assert [ids for _, ids, *_ in canvas.asked] == [["IMG_001"]] + [["IMG_001", "IMG_DRAFT"]] * 4
    assert [given for _, _, given, _ in canvas.asked] == [
        [image_hash(EMBLEM)] + ([made[n - 1]] if n else []) for n in range(5)
    ]
    full = Watched(max_references=1)
    grow(tmp_path / "b", full)
    assert all(ids == ["IMG_001"] for _, ids, *_ in full.asked)  # no room for the draft


def test_edits_are_asked_for_by_the_change_and_the_whole_scene(tmp_path):
    canvas = Watched()
    grow(tmp_path, canvas, Program("A red ring at the center."), (), prompts="edit", max_cycles=1)
    assert canvas.asked[0][0] == "Paint: A red ring at the center. A red ring at the center."
    with pytest.raises(ValueError, match="takes no references"):
        grow(tmp_path, Watched(max_references=0), prompts="edit")


def test_a_process_that_has_ended_is_not_grown_again_and_another_seed_is_another_process(tmp_path):
    first = grow(tmp_path)
    canvas = Watched()
    again = grow(tmp_path, canvas)
    assert np.array_equal(first.picture, again.picture) and not canvas.asked and again.folder == first.folder
    other = grow(tmp_path, canvas, seed=4)
    assert canvas.asked and other.folder != first.folder
    assert len(process_folders(tmp_path)) == 2
    next((first.folder / "drafts").glob(f"{image_hash(first.picture)[:32]}*")).write_bytes(b"something else")
    with pytest.raises(RenderError, match="remove"):
        grow(tmp_path)


def test_two_of_one_program_at_once_grow_once(tmp_path):
    canvas = Watched()
    process = ProcessRenderer(canvas, symbolic_talk(), GrowthSettings(), tmp_path, {})

    async def both():
        return await asyncio.gather(*(process.render(PROGRAM, [EMBLEM], 0) for _ in range(2)))

    a, b = asyncio.run(both())
    assert np.array_equal(a, b) and len(canvas.asked) == 5


# --- killed and continued ---------------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from genevolve_fast.process import record
from genevolve_fast.process.growing import GrowthSettings
from genevolve_fast.process.renderer import ProcessRenderer
from genevolve_fast.resumable import Ledger
from genevolve_fast.sandbox.canvas import CanvasRenderer, draw_program
from genevolve_fast.sandbox.judges import look, Sight
from genevolve_fast.sandbox.process_writer import meant, symbolic_talk
from genevolve_fast.sandbox.scene import Scene
from genevolve_fast.trajectory import Program, image_hash

def run(folder, kill_at):
    seen = [0]
    def point():
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(work):
        def watched(*a, **k):
            point(); out = work(*a, **k); point()
            return out
        return watched
    Ledger.add, record.write_bytes, record.write_text = map(around, (Ledger.add, record.write_bytes, record.write_text))
    process = ProcessRenderer(CanvasRenderer(), symbolic_talk(), GrowthSettings(), folder, {})
    return image_hash(asyncio.run(process.render(Program(sys.argv[2]), [], 3)))

warm = Sight(draw_program(sys.argv[2], [], 3))
look(Scene("yellow", tuple(m.item for s in sys.argv[2].split(".") for m in meant(s, set(), []) if m.item)), warm, warm)
folder, killed = Path(sys.argv[1]), 0
for n in range(1, 200, int(sys.argv[3])):  # forked before any thread is started
    child = os.fork()
    if child == 0:
        run(folder / str(n), n)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    killed += 1
    child = os.fork()
    if child == 0:
        (folder / f"{n}.txt").write_text(run(folder / str(n), 0))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print(killed)
"""


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_write_it_goes_on_to_the_same_bits(tmp_path, every):
    """SIGKILL before and after every line, draft and file of the process; each time it is started once more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = Program("Background yellow. A blue circle left of a green star. A red ring at the top left.")
    command = [sys.executable, "-c", KILLED, str(tmp_path), program.gen_prompt, str(every)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    writes = 2 * (9 + 3 + 1)  # before and after lines, drafts, process.json
    assert int(done.stdout) == len(range(1, writes + 1, every))
    right = grow(tmp_path / "whole", program=program, references=())
    for n in range(1, writes + 1, every):
        assert (tmp_path / f"{n}.txt").read_text() == image_hash(right.picture), n
        (folder,) = process_folders(tmp_path / str(n))
        keys = [json.loads(line)["key"] for line in (folder / "steps.jsonl").read_text().splitlines()[1:]]
        assert keys == [f"{i:04d}" for i in range(9)], n  # nothing was written or drawn twice
        steps = json.loads((folder / "process.json").read_text())["steps"]
        for step, wanted in zip(steps, told(right)["steps"], strict=True):
            assert step | {"seconds": 0} == wanted | {"seconds": 0}, n


def test_the_policys_ids_come_back_and_what_follows_is_sampled_as_if_never_interrupted(policy, tmp_path):
    """The tiny policy writes noise: three plans that cannot be read. Cut off after one or two, it samples the same."""
    from genevolve_fast.process.record import Record
    from genevolve_fast.rollout.transformers_engine import TransformersEngine

    settings = dict(max_tokens_per_stage=24, attempts=3, max_cycles=2)

    def lines(folder) -> list[dict]:
        (steps,) = folder.glob("*/steps.jsonl")
        return [json.loads(line) | {"step": None} for line in steps.read_text().splitlines()[1:]]

    def run(folder, until=None):
        incidents = Incidents()
        talk = token_talk(TransformersEngine(policy, deterministic=False), policy.codec)
        real, calls = Record._add, []

        def add(record, step, **more):
            real(record, step, **more)
            calls.append(step)
            if len(calls) == until:
                raise KeyboardInterrupt

        Record._add = add
        try:
            with pytest.raises(KeyboardInterrupt if until else RenderError) as ended:
                grow(folder, program=Program("A red ring."), references=(), incidents=incidents, talk=talk, **settings)
        finally:
            Record._add = real
        return ended.value, incidents.take(), len(calls)

    error, counted, calls = run(tmp_path / "whole")
    assert error.kind == "bad_response" and "no plan could be drawn" in str(error) and calls == 3
    assert counted == {"process/bad_response": 3}
    for until in (1, 2):
        run(tmp_path / str(until), until)
        _, counted, calls = run(tmp_path / str(until))
        assert calls == 3 - until and counted == {"process/bad_response": 3 - until}
        assert lines(tmp_path / str(until)) == lines(tmp_path / "whole")
    assert len({tuple(line["said"]["ids"]) for line in lines(tmp_path / "whole")}) == 3


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "end", "drawn"),
    [
        (dict(max_cycles=1), "cycles", 2),
        (dict(max_cycles=2), "cycles", 4),
        (dict(max_renders=1), "renders", 1),
        (dict(max_renders=2), "renders", 2),
        (dict(max_tokens=150), "tokens", 2),
    ],
)
def test_every_budget_ends_it_with_the_last_draft(tmp_path, settings, end, drawn):
    canvas = Watched()
    grown = grow(tmp_path, canvas, **settings)
    assert grown.end == end and len(canvas.asked) == drawn
    assert image_hash(grown.picture) == drafts(grown)[-1]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_the_first_draft_failing_is_the_renderers_failure_and_is_tried_again_later(tmp_path):
    incidents = Incidents()
    with pytest.raises(RenderError, match="away") as failed:
        grow(tmp_path, Watched(failing=0), incidents=incidents)
    assert failed.value.kind == "timeout"
    assert np.array_equal(grow(tmp_path).picture, draw_program(RIGHT, [EMBLEM], 3))


@pytest.mark.parametrize("failing", [1, 2])
def test_a_later_draft_failing_keeps_the_last_good_one(tmp_path, failing):
    incidents, canvas = Incidents(), Watched(failing=failing, kind="server_error")
    grown = grow(tmp_path, canvas, incidents=incidents)
    assert incidents.take() == {"draft/server_error": 1}
    (step,) = [s for s in told(grown)["steps"] if s["what"] == "draft" and not s["sha256"]]
    assert (step["fault"], step["kind"]) == ("the service is away", "server_error")
    assert image_hash(grown.picture) == next(sha for sha in reversed(drafts(grown)) if sha)
    assert canvas.asked[failing + 1][2][-1] == drafts(grown)[failing - 1]  # the last good one goes back
    last = grow(tmp_path / "last", Watched(failing=1), max_cycles=1)
    assert last.end == "cycles" and image_hash(last.picture) == drafts(last)[0]


# --- a chat server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    server = LoopbackChat().start()
    yield server
    server.kill()


def asked_of(server, incidents=None, attempts=1):
    return chat_talk(
        lambda: ChatEndpoint("m", server.url, incidents=incidents, attempts=attempts, source="process.engine")
    )


FIRST = Plan("Paint a red ring.", "Background white. A red ring at the center.")
SECOND = Plan("Add a blue star.", "Background white. A red ring at the center. A blue star at the top left.")


def replies(*texts) -> list[dict]:
    return [{"text": str(t)} if not isinstance(t, dict) else t for t in texts]


def test_a_chat_model_sees_its_drafts_and_decides_when_it_is_done(server, tmp_path):
    fault = Inspection(draft="the ring is green")
    mended = Correction("Background white. A red ring at the top center.")
    thought = f"<think>\nWell.\n</think>\n{SECOND}"
    server.faults(*replies(FIRST, fault, mended, thought, Inspection(), "Done."))
    incidents = Incidents()
    grown = grow(tmp_path, program=Program("A ring."), references=(), talk=asked_of(server, incidents), seed=5)
    assert grown.end == "done" and not incidents.take()
    assert np.array_equal(grown.picture, draw_program(SECOND.description, [], 5))
    bodies = [call["body"] for call in server.seen()]
    assert len(bodies) == 6 and [b["seed"] for b in bodies] == [5000 + n for n in range(6)]
    assert bodies[0]["messages"][1] == {"role": "user", "content": "A ring."}
    roles = [m["role"] for m in bodies[-1]["messages"]]
    assert roles == ["system", "user"] + ["assistant", "user"] * 5
    said = [[m["content"] for m in b["messages"] if isinstance(m["content"], list)] for b in bodies]
    shown = [sum(part["type"] == "image_url" for parts in all_ for part in parts) for all_ in said]
    assert shown == [0, 1, 1, 2, 3, 3]
    server.faults()
    again = grow(tmp_path, program=Program("A ring."), references=(), talk=asked_of(server), seed=5)
    assert not server.seen() and again.folder == grown.folder


def test_a_stage_that_cannot_be_read_is_asked_again_and_then_the_process_ends_with_what_it_has(server, tmp_path):
    server.faults(*replies("Sure! Here is a plan.", FIRST, "It looks fine.", "<inspect>fine</inspect>", "Really."))
    incidents = Incidents()
    grown = grow(tmp_path, program=Program("A ring."), references=(), talk=asked_of(server), incidents=incidents)
    assert grown.end == "format" and np.array_equal(grown.picture, draw_program(FIRST.description, [], 3))
    assert incidents.take() == {"process/bad_response": 4}
    corrections = server.seen()[1]["body"]["messages"][-1]["content"]
    assert "could not be read" in corrections and "<ins>" in corrections
    faults = [s["fault"] for s in told(grown)["steps"] if s["fault"]]
    assert len(faults) == 4 and faults[0].startswith("a plan is <ins>")


def test_a_server_failing_before_a_draft_is_a_typed_failure_and_after_one_keeps_it(server, tmp_path):
    refused = {"status": 400, "message": "no such model"}
    server.faults(refused)
    incidents = Incidents()
    with pytest.raises(RenderError, match="no such model") as failed:
        talk = asked_of(server, incidents)
        grow(tmp_path, program=Program("A ring."), references=(), talk=talk, incidents=incidents)
    assert failed.value.kind == "client_error"  # counted: the attempt, and the process that it ended
    assert incidents.take() == {"process.engine/client_error": 1, "process/client_error": 1}
    server.faults(*replies(FIRST, refused))
    grown = grow(tmp_path, program=Program("A ring."), references=(), talk=asked_of(server))
    assert grown.end == "engine/client_error" and np.array_equal(grown.picture, draw_program(FIRST.description, [], 3))
    server.faults()
    again = grow(tmp_path, program=Program("A ring."), references=(), talk=asked_of(server))
    assert again.end == grown.end and not server.seen()  # it has ended


def test_what_a_server_said_before_a_renderer_failed_is_not_asked_again(server, tmp_path):
    program, asked = Program("A ring."), asked_of(server)
    server.faults(*replies(FIRST))
    with pytest.raises(RenderError, match="away"):
        grow(tmp_path, Watched(failing=0), program=program, references=(), talk=asked)
    server.faults(*replies(Inspection(), "done"))
    grown = grow(tmp_path, program=program, references=(), talk=asked)
    assert grown.end == "done" and [c["body"]["seed"] for c in server.seen()] == [3001, 3002]
    assert server.seen()[0]["body"]["messages"][2] == {"role": "assistant", "content": str(FIRST)}


# --- configuration and commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="canvas", process={}), "process with kind canvas"),
        (dict(kind="process", cache="c", cache_mode="record"), "cache, cache_mode with kind process"),
        (dict(process={"renderer": {"kind": "process"}}), "cannot grow in another"),
        (dict(process={"renderer": {"kind": "nano-banana"}}), "writes what the canvas draws"),
        (dict(process={"renderer": {"kind": "canvas"}, "prompts": "edit"}), "edits none"),
        (dict(process={"max_cycles": 2, "max_renders": 4}), "would do nothing: 2 cycles draw 4"),
        (dict(process={"writer": "chat"}), "needs model and base_url"),
        (dict(process={"writer": "policy"}), "needs policy"),
        (dict(process={"model": "m"}), "model with writer sandbox would do nothing"),
        (dict(process={"temperature": 0.1}), "temperature with writer sandbox"),
        (dict(process={"writer": "policy", "policy": "p", "max_tokens": 64}), "max_tokens_per_stage above max_tokens"),
        (dict(process={"max_cycles": 6}), "less than or equal to 5"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RendererConfig(**{"kind": "process"} | fields)


def test_a_section_opens_as_a_process_where_it_has_a_folder(tmp_path, monkeypatch):
    config = RendererConfig(kind="process", seed=7, process={"max_cycles": 1})
    with pytest.raises(ValueError, match="folder is not set"):
        open_any_renderer(config, Incidents())
    renderer = open_any_renderer(config, Incidents(), tmp_path)
    asyncio.run(renderer.render(PROGRAM, [EMBLEM], 0))
    (folder,) = process_folders(tmp_path)
    assert json.loads((folder / "process.json").read_text())["seed"] == 7
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    chat = {"writer": "chat", "model": "m", "base_url": "http://a/v1", "api_key_env": "NO_SUCH_KEY"}
    with pytest.raises(ValueError, match="NO_SUCH_KEY is not set"):
        open_any_renderer(RendererConfig(kind="process", process=chat), Incidents(), tmp_path)


def test_a_config_names_the_process_and_what_of_it_changes_pictures():
    plain = RendererConfig(kind="process").identity()
    assert plain["process"]["renderer"] == {"kind": "canvas"} and plain["process"]["prompts"] == "scene"
    assert RendererConfig(kind="process", process={"max_cycles": 2}).identity() != plain
    assert RendererConfig(kind="process", process={"folder": "elsewhere"}).identity() == plain


def test_the_strip_is_a_png_and_the_report_shows_the_drafts(tmp_path, capsys):
    grown = grow(tmp_path / "out.process", incidents=Incidents())
    strip = read_strip(grown.folder)
    assert [(c.cycle, c.stage, c.sound) for c in strip.cells] == [
        (0, "sketch", False), (0, "refine", None), (1, "sketch", False), (1, "refine", None), (2, "sketch", True),
    ]  # fmt: skip
    assert strip.cells[0].said.startswith("Paint: Background yellow.") and "blue circle" in strip.cells[0].found
    png = tmp_path / "strip.png"
    assert main(["process", "strip", str(tmp_path / "out.process"), "-o", str(png)]) == 0
    from PIL import Image

    with Image.open(png) as picture:
        assert picture.width == 18 + 5 * (192 + 18)
        shown = np.asarray(picture.convert("RGB"))
    colours = {tuple(c) for c in shown.reshape(-1, 3)}
    assert {(250, 214, 60), (42, 98, 196), (48, 150, 84)} <= colours  # the canvas's own yellow, blue and green
    assert main(["report", str(tmp_path / "out.process")]) == 0
    html = (tmp_path / "out.process" / "report.html").read_text()
    assert "Grown pictures" in html and strip.cells[0].found in html and html.count("data:image/png") == 5
    assert main(["process", "strip", str(tmp_path / "nothing"), "-o", str(png)]) == 2
    assert "no process.json" in capsys.readouterr().err


@pytest.mark.slow
def test_generate_grows_a_picture_and_leaves_its_process_beside_it(tmp_path, capsys):
    question = "Draw on a green background the words 'SHOP' at the top center and 'EXIT' at the bottom center."
    output = tmp_path / "out.png"
    agent = ["--policy", "sandbox:start", "--tools", "sandbox", "--observe-images", "tokens"]
    assert main(["generate", question, "-o", str(output), *agent, "--renderer", "process"]) == 0
    made = json.loads(output.with_suffix(".json").read_text())
    said = capsys.readouterr().out
    assert f"process     {read_strip(Path(made['process'])).line()}" in said and "not a measurement" in said
    assert made["renderer"]["process"]["writer"] == "sandbox" and Path(made["process"], "process.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out.json", "out.png", "out.process", "out.strip.png"}


def test_training_refuses_a_second_policy_on_its_gpu(monkeypatch):
    import torch

    from genevolve_fast.commands import opening
    from genevolve_fast.train.config import ConfigError

    monkeypatch.setattr(opening, "device", lambda: torch.device("cuda"))
    writer = {"writer": "policy", "policy": "p"}
    with pytest.raises(ConfigError, match="second policy"):
        opening.refuse_shared_gpu(RendererConfig(kind="process", process=writer))
    local = {"writer": "chat", "model": "m", "base_url": "http://a/v1", "renderer": {"kind": "text-to-image"}}
    with pytest.raises(ConfigError, match="renderer.process.renderer.device is not set"):
        opening.refuse_shared_gpu(RendererConfig(kind="process", process=local))
    opening.refuse_shared_gpu(RendererConfig(kind="process"))


def test_flags_name_who_draws_and_who_writes(tmp_path):
    from genevolve_fast.commands.render import open_chosen_renderer
    from genevolve_fast.resumable import BatchError

    def flags(*pairs):
        return Namespace(renderer="process", renderer_set=list(pairs), service_url=[], seed=None, output_dir=tmp_path)

    renderer, identity = open_chosen_renderer(flags("process.max_cycles=2"), Incidents())
    assert renderer.folder == tmp_path / "processes" and identity["process"]["max_cycles"] == 2
    with pytest.raises(BatchError, match="process.*there is no such field"):
        open_chosen_renderer(flags("process.cycles=2"), Incidents())
