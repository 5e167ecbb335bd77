"""Record what we use of a released vLLM, without importing it: `python -m tests.record_vllm_signatures FOLDER`.

FOLDER is the unpacked package (the one that holds `engine`, `v1`, `entrypoints`). Writes tests/vllm_signatures.json.
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("vllm_signatures.json")
CALLS = {
    "v1/engine/async_llm.py": (
        "AsyncLLM",
        (
            "from_engine_args",
            "shutdown",
            "generate",
            "sleep",
            "wake_up",
            "pause_generation",
            "resume_generation",
            "reset_prefix_cache",
            "reset_mm_cache",
            "reset_encoder_cache",
            "compute_weight_checksums",
            "add_lora",
            "remove_lora",
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
            "update_weight_version",
            "collective_rpc",
        ),
    ),
    "distributed/weight_transfer/ipc_engine.py": ("IPCTrainerWeightTransferEngine", ("trainer_init", "send_weights")),
    "distributed/weight_transfer/nccl_engine.py": (
        "NCCLTrainerWeightTransferEngine",
        ("trainer_init", "send_weights"),
    ),
    "distributed/weight_transfer/clients.py": (
        "HTTPVLLMWeightSyncClient",
        (
            "__init__",
            "init_weight_transfer_engine",
            "start_weight_update",
            "update_weights",
            "finish_weight_update",
        ),
    ),
    "distributed/weight_transfer/base.py": ("WeightSource", ("metadata", "iter_full")),
}
FIELDS = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "sampling_params.py": ("SamplingParams", "RequestOutputKind"),
    "lora/request.py": ("LoRARequest",),
    "inputs/llm.py": ("_PromptOptions", "TokensPrompt"),
    "outputs.py": ("CompletionOutput", "SamplingMask", "WeightVersionSpan"),
    "logprobs.py": ("Logprob",),
    "config/weight_transfer.py": ("WeightTransferConfig",),
    "distributed/weight_transfer/base.py": (
        "ParamMeta",
        "TrainerInitInfo",
        "WeightTransferInitRequest",
        "WeightTransferUpdateRequest",
    ),
    "distributed/weight_transfer/ipc_engine.py": ("IPCTrainerInitInfo", "IPCWeightTransferUpdateInfo"),
    "distributed/weight_transfer/nccl_engine.py": ("NCCLTrainerInitInfo",),
    "entrypoints/scale_out/token_in_token_out/protocol.py": (
        "GenerateRequest",
        "GenerateResponseBase",
        "GenerateTokensResponse",
        "GenerateChoiceBase",
        "GenerateTokensChoice",
        "GenerateLogProb",
        "GenerateLogProbsContent",
        "GenerateLogProbs",
        "PlaceholderRangeInfo",
    ),
    "entrypoints/serve/lora/protocol.py": ("LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"),
}
ROUTERS = (
    "entrypoints/scale_out/token_in_token_out/api_router.py",
    "entrypoints/rl/online/api_router.py",
    "entrypoints/serve/dev/cache/api_router.py",
    "entrypoints/serve/dev/rpc/api_router.py",
    "entrypoints/serve/dev/server_info/api_router.py",
    "entrypoints/serve/dev/sleep/api_router.py",
    "entrypoints/serve/lora/api_router.py",
)
FLAGS = ("engine/arg_utils.py", "entrypoints/common/cli_args.py")
FLAG_FIELDS = {"entrypoints/common/cli_args.py": ("BaseFrontendArgs", "FrontendArgs")}
ENVIRONMENT = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ALLOW_INSECURE_SERIALIZATION")


def record(package: Path) -> dict[str, Any]:
    """Version, methods, fields, routes and flags of the package in `package`."""
    flags = {flag for file in FLAGS for flag in _flags(_tree(package, file))}
    for file, classes in FLAG_FIELDS.items():
        for name in classes:
            flags |= {f"--{field.replace('_', '-')}" for field in _fields(_class(_tree(package, file), name))}
    environment = (package / "envs.py").read_text(encoding="utf-8")
    return {
        "version": _version(package),
        "methods": {
            f"{name}.{method}": _signature(_method(_class(_tree(package, file), name), method))
            for file, (name, methods) in CALLS.items()
            for method in methods
        },
        "modules": {
            name: _module(file)
            for file, names in {**{f: (c,) for f, (c, _) in CALLS.items()}, **FIELDS}.items()
            for name in names
        }
        | {name: _module(file) for file, (name, _) in CALLS.items()},
        "fields": {
            name: _fields(_class(_tree(package, file), name)) for file, names in FIELDS.items() for name in names
        },
        "routes": {route: asked for file in ROUTERS for route, asked in _routes(_tree(package, file)).items()},
        "flags": sorted(flags),
        "environment": [name for name in ENVIRONMENT if f'"{name}"' in environment],
    }


def _version(package: Path) -> str:
    for node in ast.walk(_tree(package, "_version.py")):
        names = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
        if "version" in names and isinstance(node.value, ast.Constant):
            return node.value.value
    raise SystemExit(f"{package}/_version.py names no version: is this the vllm package itself?")


def _tree(package: Path, file: str) -> ast.Module:
    return ast.parse((package / file).read_text(encoding="utf-8"))


def _module(file: str) -> str:
    return "vllm." + file.removesuffix(".py").replace("/", ".")


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)


def _method(owner: ast.ClassDef, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return next(n for n in owner.body if isinstance(n, kinds) and n.name == name)


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    """Parameters after self or cls: [name, kind, whether it has a default]; how the function is called."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [False] * (len(positional) - len(a.defaults)) + [True] * len(a.defaults)
    rows = [[p.arg, "positional", d] for p, d in zip(positional, defaults, strict=True)]
    rows += [[p.arg, "keyword", d is not None] for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    yields = any(isinstance(n, ast.Yield) for n in ast.walk(function))
    if isinstance(function, ast.AsyncFunctionDef):
        kind = "async generator" if yields else "async"
    else:
        kind = "generator" if yields else "plain"
    return {"kind": kind, "parameters": rows[1:]}


def _fields(owner: ast.ClassDef) -> list[str]:
    """Annotated names of a class, or an enum's members."""
    annotated = [n.target.id for n in owner.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    assigned = [t.id for n in owner.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    return [n for n in (annotated or assigned) if not n.startswith("_")]


def _routes(tree: ast.Module) -> dict[str, dict[str, Any]]:
    """{"POST /pause": {"query": [...], "body": [...], "model": "..."}} of a router's decorated functions."""
    found = {}
    for function in ast.walk(tree):
        for call in getattr(function, "decorator_list", []):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args):
                continue
            if call.func.attr in ("post", "get") and isinstance(call.args[0], ast.Constant):
                found[f"{call.func.attr.upper()} {call.args[0].value}"] = _asked(function)
    return found


def _asked(function: ast.AsyncFunctionDef | ast.FunctionDef) -> dict[str, Any]:
    asked: dict[str, Any] = {"query": [], "body": [], "model": None}
    defaults = [None] * (len(function.args.args) - len(function.args.defaults)) + function.args.defaults
    for parameter, default in zip(function.args.args, defaults, strict=True):
        text = ast.unparse(parameter.annotation) + (ast.unparse(default) if default is not None else "")
        if "Query(" in text:
            asked["query"].append(parameter.arg)
        elif "Body(" in text:
            asked["body"].append(parameter.arg)
        elif text not in ("Request",):
            asked["model"] = text
    for call in ast.walk(function):  # bodies and queries that the function reads by hand
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
            where = {"body.get": "body", "raw_request.query_params.getlist": "query"}.get(ast.unparse(call.func))
            if where and isinstance(call.args[0], ast.Constant):
                asked[where].append(call.args[0].value)
    return asked


def _flags(tree: ast.Module) -> set[str]:
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute))
    named = (a.value for c in calls if c.func.attr == "add_argument" for a in c.args if isinstance(a, ast.Constant))
    return {flag for flag in named if isinstance(flag, str) and flag.startswith("--")}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("package", type=Path)
    recorded = record(p.parse_args().package)
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(
        f"vLLM {recorded['version']}: {len(recorded['methods'])} methods, {len(recorded['routes'])} routes, in {FILE}"
    )


if __name__ == "__main__":
    main()
