"""`genevolve-fast rollout`: released inputs and rows, resuming, kills of every side, refusals."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from loopback.chat import ROOT, LoopbackChat
from loopback.web import LoopbackWeb

from genevolve_fast import cli
from genevolve_fast.agent.batch import run_batch
from genevolve_fast.agent.journal import BatchError, Finished, Journal, read_samples
from genevolve_fast.agent.results import AgentResult
from genevolve_fast.cli import main
from genevolve_fast.commands import rollout
from genevolve_fast.sandbox.world import SandboxWorld

pytestmark = pytest.mark.slow

RELEASED = Path(__file__).parent / "fixtures" / "released"
REQUESTS = SandboxWorld().requests("train", 40)


@pytest.fixture(scope="module")
def process():
    server = LoopbackChat().start()
    yield server
    server.kill()


@pytest.fixture
def server(process):
    process.faults()
    return process


def arguments(server, source: Path, folder: Path, *extra: str) -> list[str]:
    where = ["--input", str(source), "--output-dir", str(folder), "--base-url", server.url]
    return ["rollout", *where, "--tools", "sandbox", *extra]


def start(*args) -> subprocess.Popen:
    command = [sys.executable, "-m", "genevolve_fast.cli", *arguments(*args)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def batch_of(folder: Path, count: int) -> Path:
    return write(folder / "prompts.jsonl", [{"id": r.id, "prompt": r.question} for r in REQUESTS[:count]])


def rows_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def journal_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_system_prompt_of_your_own(server, tmp_path):
    prompt = tmp_path / "prompt.txt"
    command = arguments(server, batch_of(tmp_path, 1), tmp_path / "out", "--system-prompt", str(prompt))
    assert main(command) == 2  # not there
    prompt.write_text(" \n")
    assert main(command) == 2  # empty
    prompt.write_text("Draw as you were taught.\n")
    assert main(command) == 0
    assert rows_of(tmp_path / "out")[0]["messages"][0] == {"role": "system", "content": "Draw as you were taught."}
    prompt.write_text("Draw otherwise.")
    assert main(command) == 2  # other rollouts than those the folder holds


# --- the released formats ---------------------------------------------------------------------------------------------


def shape(value):
    """Types and keys of a value, all the way down."""
    if isinstance(value, dict):
        return {k: shape(v) for k, v in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value).__name__


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json"])
def test_rows_are_the_released_ones(server, tmp_path, name):
    assert main(arguments(server, RELEASED / name, tmp_path)) == 0
    released, ours = json.loads((RELEASED / "results.json").read_text()), rows_of(tmp_path)
    result = ["prompt", "gen_prompt", "reference_images", "messages", "termination", "rounds", "error"]
    for theirs, row in zip(released, ours, strict=True):
        assert list(row) == list(theirs) and list(row)[:7] == result
        assert {k: row[k] for k in list(row)[7:]} == {k: theirs[k] for k in list(row)[7:]}
        assert row["rounds"] in (2, 3, 4) and row["error"] is None  # and not what the input calls so
        assert row["prompt"] == theirs["prompt"] and row["messages"][:2] == [
            row["messages"][0],
            {"role": "user", "content": row["prompt"]},
        ]
    assert shape(ours[0]) == shape(released[0])
    assert [r["termination"] for r in ours] == ["answer"] * 5
    assert Path(ours[0]["reference_images"][0]["local_path"]).is_file()


@pytest.mark.slow
def test_a_released_results_file_is_continued(server, tmp_path, capsys):
    released = json.loads((RELEASED / "results.json").read_text())
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(released[:4]))  # stopped before its last row
    assert main(arguments(server, RELEASED / "prompts.jsonl", folder)) == 0
    rows = rows_of(folder)
    assert [rows[i] for i in (0, 2, 3)] == [released[i] for i in (0, 2, 3)]
    assert rows[1]["termination"] == rows[4]["termination"] == "answer"  # the failed one and the missing one
    asked = {call["body"]["messages"][1]["content"] for call in server.seen()}
    assert asked == {released[1]["prompt"], released[4]["prompt"]}
    assert "4 rows of an earlier results.json are kept" in capsys.readouterr().out
    lines = (folder / "rollouts.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.json").write_text(json.dumps(released[:4]))
    (folder / "rollouts.jsonl").write_bytes(b"".join(lines[:3]))  # killed while it took the rows over
    assert main(arguments(server, RELEASED / "prompts.jsonl", folder)) == 0
    assert rows_of(folder)[2:4] == released[2:4] and len(rows_of(folder)) == 5
    (folder / "rollouts.jsonl").unlink()
    for other in ([{"prompt": "x"}], {"rows": []}, [released[0] | {"id": "another"}]):
        (folder / "results.json").write_text(json.dumps(other))
        assert main(arguments(server, RELEASED / "prompts.jsonl", folder)) == 2


def test_rendering_reads_the_rows(server, tmp_path):
    assert main(arguments(server, batch_of(tmp_path, 5), tmp_path / "out")) == 0
    assert main(["render", "--input", str(tmp_path / "out/results.json"), "--output-dir", str(tmp_path / "drawn")]) == 0
    assert all(r["success"] and Path(r["output_path"]).is_file() for r in rows_of(tmp_path / "drawn"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n\n{"prompt": " "}\n', "line 3: neither `prompt` nor `question`"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2: neither"),
        ('{"prompt": "a"}\n[1]\n', "line 2: a row must be a JSON object, not list"),
        ('{"prompt": "a"}\n{"prompt": "b"', "line 2 is not JSON"),
        ('[{"prompt": "a"}, 5]', "row 2: a row must be a JSON object, not int"),
        ('[{"prompt": "a"}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no rows"),
        ("\n\n", "holds no rows"),
    ],
)
def test_a_bad_row_is_named_and_nothing_starts(server, tmp_path, capsys, text, said):
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    assert main(arguments(server, source, tmp_path / "out")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists() and server.seen() == []


def test_rows_keep_ids_of_any_type_and_text_of_any_language(tmp_path):
    rows = [{"prompt": "a", "id": i} for i in (3, "3", None, 1.5, [1], {"a": 2})] + [{"question": "ü\u2028b"}]
    text = "\ufeff" + "".join(json.dumps(r, ensure_ascii=False) + "\r\n" for r in rows)
    (tmp_path / "in").write_text(text, encoding="utf-8")
    samples = read_samples(tmp_path / "in")
    assert [s.id for s in samples] == [3, "3", None, 1.5, [1], {"a": 2}, 6] and samples[-1].prompt == "ü\u2028b"
    (tmp_path / "in").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(BatchError, match="not UTF-8"):
        read_samples(tmp_path / "in")


def test_hostile_ids_and_half_characters_stay_data(server, tmp_path):
    source = tmp_path / "in.jsonl"
    names = ["../../escape", "/tmp/escape", "a\u0000b", "x" * 5000]
    rows = [json.dumps({"id": n, "prompt": REQUESTS[0].question, "note": "half \ud83d"}) for n in names]
    source.write_text("\n".join(rows))
    assert main(arguments(server, source, tmp_path / "deep" / "out")) == 0
    assert [r["id"] for r in rows_of(tmp_path / "deep/out")] == names
    assert sorted(p.name for p in tmp_path.rglob("*") if "images" not in p.parts) == [
        "deep", "in.jsonl", "out", "results.json", "rollouts.jsonl"
    ]  # fmt: skip


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finished_rows_are_kept_and_failed_ones_run_again(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 6), tmp_path / "out"
    server.faults(*[{"status": 500, "retry_after": 0}] * 3)
    assert main(arguments(server, source, folder, "--parallel", "1", "--patience", "0")) == 0
    out = capsys.readouterr().out
    assert "5 answered, 1 failed (engine/server_error 1)" in out and "failed attempts: engine/server_error 3" in out
    assert "tokens/s" in out
    first = rows_of(folder)
    assert first[0]["termination"] == "error" and first[0]["error"].startswith("llm_call_failed")
    server.faults()
    assert main(arguments(server, source, folder)) == 0
    assert "6 answered, 0 failed" in capsys.readouterr().out
    assert rows_of(folder)[1:] == first[1:]
    assert {c["body"]["messages"][1]["content"] for c in server.seen()} == {REQUESTS[0].question}
    server.faults()
    assert main(arguments(server, source, folder)) == 0 and server.seen() == []


@pytest.mark.slow
def test_duplicates_are_told_apart_by_position(server, tmp_path):
    source = write(tmp_path / "in", [{"id": "same", "prompt": REQUESTS[i].question} for i in (0, 0, 1)])
    server.faults(*[{}] * 3, {"status": 404})  # the first row's three replies, then one refusal
    assert main(arguments(server, source, tmp_path / "out", "--parallel", "1")) == 0
    assert [r["termination"] for r in rows_of(tmp_path / "out")] == ["answer", "error", "answer"]
    assert main(arguments(server, source, tmp_path / "out")) == 0
    assert [r["termination"] for r in rows_of(tmp_path / "out")] == ["answer"] * 3
    assert [line["position"] for line in journal_of(tmp_path / "out")[1:]] == [0, 1, 2, 1]


@pytest.mark.slow
def test_a_longer_input_continues(server, tmp_path):
    folder = tmp_path / "out"
    assert main(arguments(server, batch_of(tmp_path, 4), folder, "--max-samples", "2")) == 0
    assert len(rows_of(folder)) == 2
    assert main(arguments(server, batch_of(tmp_path, 6), folder)) == 0
    assert len(rows_of(folder)) == 6 and len(journal_of(folder)) == 7


def test_another_batch_in_the_folder_is_refused_with_the_reason(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 2), tmp_path / "out"
    assert main(arguments(server, source, folder, "--parallel", "1")) == 0
    before = (folder / "rollouts.jsonl").read_bytes()
    changed = write(tmp_path / "other", [{"id": REQUESTS[0].id, "prompt": "something else"}])
    for args, said in [
        ((source, folder, "--temperature", "0.7"), "temperature 0.6 then, 0.7 now"),
        ((source, folder, "--model", "other", "--seed", "3"), "model GenEvolve then, other now, seed None then, 3 now"),
        ((changed, folder), "holds rollouts of another input: row 1 has another prompt"),
    ]:
        assert main(arguments(server, *args)) == 2
        assert said in capsys.readouterr().err and (folder / "rollouts.jsonl").read_bytes() == before
    assert main(arguments(server, changed, folder, "--fresh")) == 1  # the demonstrator does not know this prompt
    assert [r["prompt"] for r in rows_of(folder)] == ["something else"]


def test_a_refused_command_forgets_nothing(server, tmp_path, monkeypatch, capsys):
    source, folder = batch_of(tmp_path, 1), tmp_path / "out"
    assert main(arguments(server, source, folder)) == 0
    before = (folder / "rollouts.jsonl").read_bytes()
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    assert main(arguments(server, source, folder, "--fresh", "--tools", "serper")) == 2
    assert "SERPER_API_KEY" in capsys.readouterr().err and (folder / "rollouts.jsonl").read_bytes() == before


def test_one_process_at_a_time_holds_a_folder(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 1), tmp_path / "out"
    with closing(Journal(folder, read_samples(source), {}, fresh=False)):
        assert main(arguments(server, source, folder)) == 2
        assert "is being written by another process" in capsys.readouterr().err
    assert main(arguments(server, source, folder)) == 0


def test_flags_without_effect_are_refused(server, tmp_path, capsys):
    source = batch_of(tmp_path, 1)
    for extra, said in [
        (("--policy", "sandbox:start"), "--base-url is of a server"),
        (("--tool-cache", "record"), "live tools"),
        (("--tools", "serper", "--tool-cache", "record"), "--tool-cache and --tool-cache-dir go together"),
        (("--tools", "serper", "--tool-set", "top_k=0"), "top_k: Input should be greater than"),
        (("--tools", "searxng"), "tools: kind searxng needs base_url"),
        (("--tools", "serper", "--tool-set", "allow_hosts=[a"), "--tool-set allow_hosts: its value is not YAML"),
        (("--base-url", "localhost"), "base_url must be a URL"),
        (("--output-dir", str(source)), "cannot be written"),
        (("--parallel", "0"), "--parallel must be at least 1"),
        (("--top-p", "0"), "top_p must be in"),
    ]:
        assert main(arguments(server, source, tmp_path / "out", *extra)) == 2
        assert said in capsys.readouterr().err


def test_an_interruption_before_the_first_row_says_nothing_false(server, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "open_runner", interrupted)
    assert main(arguments(server, batch_of(tmp_path, 1), tmp_path / "out")) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"  # a batch has no --resume
    monkeypatch.setattr(cli, "load", interrupted)
    assert main(["evolve", "--config", "demo"]) == 130 and "--resume" in capsys.readouterr().err


def test_a_bug_in_one_row_does_not_end_the_others(tmp_path):
    samples = read_samples(batch_of(tmp_path, 4))

    async def runner(sample):
        if sample.position == 1:
            raise RuntimeError("a bug")
        return Finished(AgentResult(sample.prompt, "p", [], [], "answer", 1))

    with closing(Journal(tmp_path / "out", samples, {}, fresh=False)) as journal:
        batch = asyncio.run(run_batch(samples, journal, runner, parallel=2))
    assert (
        batch.ends == {"answer": 3, "rollout/other": 1}
        and rows_of(tmp_path / "out")[1]["error"] == "RuntimeError: a bug"
    )


def test_a_line_cut_by_a_crash_runs_again(server, tmp_path):
    source, folder = batch_of(tmp_path, 3), tmp_path / "out"
    assert main(arguments(server, source, folder, "--parallel", "1")) == 0
    rows, journal = rows_of(folder), folder / "rollouts.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-40])
    assert main(arguments(server, source, folder)) == 0
    assert rows_of(folder) == rows and journal.read_bytes() == whole
    journal.write_text("something else\n")
    assert main(arguments(server, source, folder)) == 2


# --- live tools -------------------------------------------------------------------------------------------------------

KEY = "serper-very-secret"


@pytest.mark.slow
def test_live_tools_are_recorded_and_replayed_without_the_web(server, tmp_path, capfd, monkeypatch):
    source, cache = batch_of(tmp_path, 6), ["--tool-cache-dir", str(tmp_path / "cache"), "--tool-cache"]
    live = ["--tools", "serper"]
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    assert main(arguments(server, source, tmp_path / "no", *live)) == 2 and "SERPER_API_KEY" in capfd.readouterr().err
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with LoopbackWeb() as web:
        monkeypatch.setenv("SERPER_BASE_URL", web.url)
        allowed = ["--tool-set", f"allow_hosts=['{web.host}']"]
        assert main(arguments(server, source, tmp_path / "a", *live, *allowed, *cache, "record")) == 0
        assert main(arguments(server, source, tmp_path / "refused", *live)) == 0
        assert "image_download/refused_address" in capfd.readouterr().out  # loopback, and not allowed
    assert main(arguments(server, source, tmp_path / "b", *live, *allowed, *cache, "replay")) == 0
    rows, again = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    pictures = [r["local_path"] for row in rows for r in row["reference_images"]]
    assert len(pictures) >= 2 and all(Path(p).is_file() and Path(p).parent == tmp_path / "a/images" for p in pictures)
    assert [r["gen_prompt"] for r in again] == [r["gen_prompt"] for r in rows]
    assert any("  url: " in m["content"] for m in rows[0]["messages"])
    said = capfd.readouterr()
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert KEY not in said.out + said.err and not any(KEY.encode() in data for data in written)


# --- kills ------------------------------------------------------------------------------------------------------------


def wait_for(done, folder: Path, count: int) -> None:
    """Until `count` rows are in the journal."""
    deadline = time.monotonic() + 60
    path = folder / "rollouts.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") <= count:
        assert done.poll() is None and time.monotonic() < deadline, done.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_ends_it_with_every_finished_row(server, tmp_path):
    source, folder = batch_of(tmp_path, 30), tmp_path / "out"
    server.faults(*[{"delay_s": 0.1}] * 200)
    running = start(server, source, folder)
    wait_for(running, folder, 3)
    with_lock = arguments(server, source, folder)
    assert main(with_lock) == 2  # one process at a time holds the folder
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert "stopped: SIGTERM\nthe same command continues where it stopped" in err
    kept = journal_of(folder)[1:]
    assert 3 <= len(kept) < 30 and len(rows_of(folder)) == len(kept)


def test_the_end_says_why_rows_failed(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 2), tmp_path / "out"
    assert main(arguments(server, source, folder, "--base-url", server.url.removesuffix("/v1"))) == 1
    said = capsys.readouterr().err
    assert "engine/client_error, the first of them: llm_call_failed" in said and "mostly ends in /v1" in said


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_batch(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 30), tmp_path / "out"
    server.kill()
    try:
        assert main(arguments(server, source, folder, "--patience", "0", "--parallel", "2")) == 1
    finally:
        server.start()
    said = capsys.readouterr()
    assert "stopped: the last 3 rows failed alike: llm_call_failed" in said.err
    assert "0 answered" in said.out and "engine/connect" in said.out and len(rows_of(folder)) < 6
    assert main(arguments(server, source, folder)) == 0
    assert [r["termination"] for r in rows_of(folder)] == ["answer"] * 30


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_finished(server, tmp_path):
    source, folder = batch_of(tmp_path, 30), tmp_path / "out"
    finished: list[dict] = []
    for kills in range(1, 5):
        server.faults(*[{"delay_s": 0.05}] * 500)
        running = start(server, source, folder)
        wait_for(running, folder, 5 * kills)
        running.kill()
        running.wait()
        lines = (folder / "rollouts.jsonl").read_bytes()
        assert lines.count(b"\n") > 5 * kills
        now = [json.loads(line) for line in lines[: lines.rfind(b"\n")].splitlines()]
        assert now[: len(finished)] == finished
        finished = now
    server.faults()
    assert main(arguments(server, source, folder)) == 0
    rows = rows_of(folder)
    assert [r["id"] for r in rows] == [r.id for r in REQUESTS[:30]]
    assert all(r["termination"] == "answer" for r in rows)
    assert sorted(line["position"] for line in journal_of(folder)[1:]) == list(range(30))  # none ran twice


@pytest.mark.slow
def test_a_server_killed_and_restarted_in_the_middle_loses_no_row(server, tmp_path, capsys):
    source, folder = batch_of(tmp_path, 40), tmp_path / "out"
    faults = ({"status": 500}, {"status": 429, "retry_after": 0.1}, {"delay_s": 1.0}, {"raw": "}{"})
    server.faults(*faults, *[{"delay_s": 0.1}] * 400)

    def restart() -> None:
        while len(server.seen()) < 40:
            time.sleep(0.05)
        server.kill()
        time.sleep(1.0)
        server.start()
        server.faults(*[{"delay_s": 0.05}] * 400)

    killer = threading.Thread(target=restart)
    killer.start()
    assert main(arguments(server, source, folder, "--patience", "60")) == 0
    killer.join()
    out = capsys.readouterr().out
    ends = [r["termination"] for r in rows_of(folder)]
    assert len(ends) == 40 and ends.count("answer") == 39 and "1 failed (engine/bad_response 1)" in out
    for kind in ("engine/bad_response 1", "engine/connect", "engine/rate_limited 1", "engine/server_error 1"):
        assert kind in out.splitlines()[0]


@pytest.mark.slow
def test_a_policy_in_this_process_answers_without_a_server(tmp_path, capsys):
    source, folder = batch_of(tmp_path, 10), tmp_path / "out"
    where = ["rollout", "--input", str(source), "--output-dir", str(folder), "--tools", "sandbox"]
    sampled = ["--policy", "sandbox:start", "--observe-images", "tokens", "--parallel", "5"]
    assert main([*where, *sampled]) == 0
    rows = rows_of(folder)
    assert [r["termination"] for r in rows].count("answer") >= 8 and "tokens/s" in capsys.readouterr().out
    assert main([*where, *sampled, "--fresh", "--parallel", "2"]) == 0
    assert rows_of(folder) == rows  # equal seeds, whatever shares the batch
