"""The house: quick import, arrows that run one way, a command line that explains itself."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from genevolve_fast.cli import main, parser

ROOT = Path(__file__).parents[1]
FLOOR = {"trajectory", "protocols", "incidents", "event_loop", "fields", "files", "resumable", "net"}
ALLOWED = {  # room -> rooms it may import besides its own and the ground floor
    "net": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "policy": {"ops"},
    "agent": set(),
    "render": set(),
    "reward": set(),
    "experience": set(),
    "report": set(),
    "batch": {"ops", "policy"},
    "rollout": {"policy"},
    "data": {"agent", "experience"},
    "profile": {"ops", "policy"},
    "train": {
        "agent",
        "batch",
        "data",
        "experience",
        "ops",
        "policy",
        "profile",
        "render",
        "report",
        "reward",
        "rollout",
    },
    "evaluate": {"agent", "data", "train"},
    "process": {"agent", "batch", "data", "ops", "policy", "profile", "render", "reward", "rollout", "train"},
    "integrations": {"ops", "policy"},
    "sandbox": {"agent", "data", "experience", "policy", "process", "train"},
}
MODEL_FILES = {"experience/qwen_embedder.py", "render/local.py"}  # torch inside their functions, in rooms without it
OPTIONAL = {"flash_attn"}  # of the operations: imported where it is asked for, never when they are
SUBCLASSES = {"process/unified/model.py"}  # of transformers' models; imported by nobody before there is one to open
NO_TORCH = {"net", "agent", "reward", "experience", "report", "render"}


def modules():
    for path in sorted((ROOT / "genevolve_fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py")):
        relative = path.relative_to(ROOT)
        room = "kernels" if relative.parts[0] == "kernels" or relative.parts[1] == "kernels" else relative.parts[1]
        if room in ALLOWED:
            yield room, path


def imports(path: Path, top_level_only: bool = False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_run_one_way(room):
    seen = 0
    for its_room, path in modules():
        if its_room != room:
            continue
        seen += 1
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "genevolve_fast" and len(parts) > 1:
                assert parts[1] in ALLOWED[room] | FLOOR | {room}, f"{path} imports {name}"
            if room in ("kernels", "ops"):
                needed = {"torch", "triton", "genevolve_fast", *sys.stdlib_module_names}
                always = {n.split(".")[0] for n in imports(path, top_level_only=True)}
                assert parts[0] in needed or parts[0] in OPTIONAL - always, name
            if room in NO_TORCH and not any(path.match(file) for file in MODEL_FILES):
                assert parts[0] not in ("torch", "transformers", "triton"), f"{path} imports {name}"
    assert seen


def test_heavy_libraries_load_on_first_use():
    for room, path in modules():
        always = {n.split(".")[0] for n in imports(path, top_level_only=True)}
        assert not always & {"transformers", "diffusers"} or any(path.match(file) for file in SUBCLASSES), path
        assert room not in NO_TORCH or "torch" not in always, path


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import genevolve_fast; print(time.perf_counter() - t)"
    times = sorted(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))
    assert times[1] < 0.3


def test_kernels_leaves_the_top_level_name_to_its_owner(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("owner = 'theirs'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.owner)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "theirs"


@pytest.mark.slow
def test_the_wheel_is_complete_and_says_what_it_runs_on(tmp_path):
    wanted = ("genevolve_fast", "kernels", "csrc", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    source = tmp_path / "source"
    source.mkdir()
    for name in wanted:  # a copy, so that the build leaves nothing beside the sources
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("_csrc", "__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "kernels/logprob_epilogue.py",
        "configs/demo.yaml",
        "agent/skills/spatial_layout.md",
        "report/template.html",
        "evaluate/published_results.json",
        "sandbox/start/model.safetensors",
    ):
        assert f"genevolve_fast/{name}" in names, name
    compiled = "genevolve_fast/_csrc/libgenevolve.so" in names
    assert compiled == (shutil.which("nvcc") is not None)
    assert wheel.name.endswith("-py3-none-any.whl") != compiled


def test_every_command_explains_itself(capsys):
    commands = {"demo", "sft", "evolve", "bench", "generate", "render", "render-serve", "report", "score", "scoreboard"}
    listed = next(a for a in parser()._actions if a.dest == "command").choices
    assert commands <= set(listed)
    for name in commands:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and f"example:\n  genevolve-fast {name}" in capsys.readouterr().out


def test_errors_are_one_line(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    assert main(["evolve", "--config", "nowhere"]) == 2
    assert "neither a file nor one of demo" in capsys.readouterr().err


def test_fields_are_listed(capsys):
    assert main(["evolve", "--config", "demo", "--fields"]) == 0
    assert "rollout.num_generations" in capsys.readouterr().out


def test_scoreboard_rows_follow_their_targets(tmp_path, capsys):
    from genevolve_fast.evaluate.scoreboard import TARGETS, load, record

    file = tmp_path / "s.json"
    assert record("loop/reward_gain", 0.1, n=200, command="c", file=file)["ok"] is True
    assert record("loop/reward_gain", 0.01, n=200, command="c", file=file)["ok"] is False
    assert record("loop/sdl_gain", -1, n=3, command="c", interval=(-2, 1), file=file)["ok"] is None
    rows = load(file)
    assert len(rows) == 2 and set(rows["loop/reward_gain"]) == {
        "value", "unit", "target", "ok", "n", "device", "commit", "date", "command",
    }  # fmt: skip
    with pytest.raises(KeyError):
        record("loop/unknown", 1, n=1, command="c", file=file)
    assert main(["scoreboard", "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "loop/reward_gain" in out and "not measured" in out and len(TARGETS) == 60


@pytest.mark.slow
def test_a_wrong_flag_is_told_without_loading_torch(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    output = ["--input", str(tmp_path / "results.json"), "--output-dir", str(tmp_path / "out")]
    judge = ["score", "--results", str(tmp_path / "results.json"), "--judge-set"]
    for command, told in (
        (["render", *output, "--renderer-set", "a.b=1"], "a: there is no such field"),
        (["render", *output, "--renderer-set", "cache=x", "--renderer-set", "cache.b=1"], "cache is not a section"),
        ([*judge, "tries=1"], "tries: there is no such field"),
        (["rollout", "--prompt", "a", *output[2:], "--tool-set", "deep"], "--tool-set takes FIELD=VALUE, not 'deep'"),
        (["data", "filter", *output, "--set", "a=["], "--set a: its value is not YAML"),
    ):
        code = f"import sys; from genevolve_fast.cli import main; print(main({command!r}), 'torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert told in done.stderr and done.stdout == "2 False\n", (command, done)
