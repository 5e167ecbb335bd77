"""`export`: a trained policy as a folder for transformers, peft and vLLM, with its model card."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

from genevolve_fast.commands.opening import AddCommand

_STEP = re.compile(r"step_(\d+)")


def add(command: AddCommand) -> None:
    """Add the parsers of this module."""
    p = command(
        "export",
        run_export,
        "Write a trained policy as a folder that transformers and vLLM load, with a model card ready for the hub.",
        "genevolve-fast export runs/demo -o exported/demo --dtype bfloat16\n"
        "  genevolve-fast export runs/lora --adapter --best -o exported/lora --base Qwen/Qwen3-VL-8B-Instruct",
    )
    p.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, checkpoint or policy")
    p.add_argument("-o", "--output", type=Path, required=True, help="folder to write; it appears when it is complete")
    form = p.add_mutually_exclusive_group()
    form.add_argument("--merged", action="store_true", help="whole weights, an adapter merged into its base (default)")
    form.add_argument("--adapter", action="store_true", help="the adapter alone, for peft and vLLM's --lora-modules")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="of a run: its checkpoint of that step")
    which.add_argument(
        "--best", action="store_true", help="of a run: the checkpoint that was best by checkpoint.metric"
    )
    which.add_argument(
        "--last", action="store_true", help="of a run: the newest checkpoint (default: the final policy)"
    )
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the written weights (default: as trained)")
    p.add_argument(
        "--base",
        help="the model that training began with, of an adapter or a checkpoint in shards: where it lies now, or the "
        "hub id that the adapter shall name",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an earlier export in the output folder")
    p.add_argument(
        "--upload", metavar="OWNER/NAME", help="then upload it to the hub; token of `hf auth login`, HF_TOKEN"
    )
    p.add_argument("--private", action="store_true", help="with --upload: a repository that only you see, if it is new")


@dataclass(frozen=True)
class Source:
    """The policy or adapter in `weights`, of a run and step where these are known."""

    weights: Path
    run: Path | None = None
    step: int | None = None
    final: bool = False


def run_export(args: argparse.Namespace) -> int:
    from genevolve_fast.files import replacing_folder, write_text
    from genevolve_fast.policy.adapters import adapter_base
    from genevolve_fast.policy.export import (
        DTYPES,
        ExportError,
        export_adapter,
        export_merged,
        export_sharded,
        model_file,
    )
    from genevolve_fast.policy.shards import FOLDER, in_shards
    from genevolve_fast.report.card import Model, card, hub_id, license_of, read_record
    from genevolve_fast.train.sharded import weight_readers

    if args.private and not args.upload:
        raise ExportError("--private without --upload would do nothing")
    if args.upload:
        check_repository(args.upload)
    source = find_source(args.source, args.step, args.best, args.last, adapter=args.adapter)
    output = check_output(args.output, source, args.overwrite)
    config = read_config(source.run)
    adapter_of, shards = adapter_base(source.weights), in_shards(source.weights)
    if args.base and not adapter_of and not shards:
        raise ExportError(f"--base would do nothing: {source.weights} holds whole weights, not an adapter")
    origin = args.base or adapter_of or origin_of(config)
    base = hub_id(str(origin)) if origin else None
    if args.upload and args.adapter and base is None:
        raise ExportError(f"an uploaded adapter must name its base on the hub, not {origin}: give --base OWNER/NAME")
    dtype = DTYPES[args.dtype] if args.dtype else None
    with replacing_folder(output) as folder:
        if args.adapter:
            written = export_adapter(source.weights, folder, dtype=dtype, base=args.base)
        elif shards:
            trained = weight_readers(source.weights.parent / FOLDER)
            written = export_sharded(source.weights, folder, trained, dtype=dtype, base=origin)
        else:
            if adapter_of and dtype is None and config:
                dtype = DTYPES[config["policy"]["dtype"]]
            origin_files = str(origin) if origin else None
            written = export_merged(source.weights, folder, dtype=dtype, base=args.base, origin=origin_files)
        model = Model(
            repo=args.upload or output.name,
            step=source.step,
            final=source.final,
            parameters=written.parameters,
            dtype=written.dtype,
            vision=written.vision,
            rank=written.rank,
            base=base,
            license=license_of(model_file(origin, "README.md", fetch=True) if origin else None),
        )
        record = read_record(source.run, source.step, source.final) if source.run else None
        write_text(folder / "README.md", card(model, record))
    tell(args, source, written, base or str(origin))
    if args.upload:
        print(f"uploaded: {upload(output, args.upload, args.private)}")
    return 0


def tell(args: argparse.Namespace, source: Source, written, base: str) -> None:
    """What was exported, what was written, what comes next."""
    from genevolve_fast.report.card import lora_limit

    output = args.output
    at = "" if source.step is None else f", step {source.step}{' (final)' if source.final else ''}"
    kind = f"LoRA adapter of rank {written.rank}" if written.rank else written.architecture
    files = f"{written.files} file" + "s" * (written.files > 1)
    print(f"from {source.weights}{at}")
    size = f"{written.nbytes / 1e9:.3g} GB in {files}"
    print(f"{output}: {kind}, {written.parameters:,} parameters, {written.dtype}, {size}")
    if written.rank:
        flags = f"--enable-lora --max-lora-rank {lora_limit(written.rank)} --lora-modules GenEvolve={output}"
        print(f"next: vllm serve {base} {flags}")
    else:
        print(f"next: genevolve-fast serve --model {output}")
    if not args.upload:
        print(f"      hf upload OWNER/NAME {output}   # README.md is its model card: read it first")


# --- what is exported -------------------------------------------------------------------------------------------------


def find_source(path: Path, step: int | None, best: bool, last: bool, *, adapter: bool = False) -> Source:
    """Of a run the final policy, or the checkpoint that was asked for; a checkpoint or policy folder itself.

    Raises ExportError, FileNotFoundError for a folder that is none of these.
    """
    from genevolve_fast.policy.export import ExportError

    path = path.resolve()
    chosen = step is not None or best or last
    if (path / "config.yaml").is_file():
        return _of_checkpoint(_chosen(path, step, best), path) if chosen else _of_run(path, adapter)
    if chosen:
        raise ExportError(f"--step, --best and --last choose a checkpoint of a run, and {path} has no config.yaml")
    if (path / "policy").is_dir():
        return _of_checkpoint(path, _run_of(path.parent.parent))
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        if path.name == "policy" and _STEP.fullmatch(path.parent.name):
            return _of_checkpoint(path.parent, _run_of(path.parent.parent.parent))
        run = _run_of(path.parent) if path.name == "policy" else None
        return Source(path, run, _last_step(run) if run else None, final=run is not None)
    raise FileNotFoundError(f"{path} is no run, checkpoint or policy: it has no config.yaml, policy or config.json")


def _of_run(run: Path, adapter: bool) -> Source:
    """The final policy; where only its adapter is wanted, or there is none yet, the newest checkpoint."""
    from genevolve_fast.policy.export import ExportError

    final = run / "policy"
    if not final.is_dir():
        return _of_checkpoint(_chosen(run, None, False), run)
    if not adapter:
        return Source(final, run, _last_step(run), final=True)
    if not ((read_config(run).get("policy") or {}).get("lora") or {}).get("rank"):
        raise ExportError(f"{run} trained whole weights: there is no adapter to export, use --merged")
    newest, done = _of_checkpoint(_chosen(run, None, False), run), _last_step(run)
    if newest.step != done:
        raise ExportError(
            f"the final policy of {run} is merged, and the adapter of its step {done} was not kept: --last exports "
            f"that of step {newest.step}"
        )
    return replace(newest, final=True)


def _chosen(run: Path, step: int | None, best: bool) -> Path:
    """The checkpoint of `step`, the best, or the newest."""
    from genevolve_fast.policy.export import ExportError
    from genevolve_fast.train.checkpoint import checkpoints, step_of
    from genevolve_fast.train.retention import read_marker

    there = {step_of(p): p for p in checkpoints(run / "checkpoints")}
    if best:
        step = read_marker(run / "checkpoints")[0]
        if step is None:
            raise ExportError(
                f"{run} does not know its best checkpoint: it ran with checkpoint.keep_best 0, or had none with a score"
            )
    if not there:
        raise ExportError(f"{run} has no checkpoint yet")
    if step is None:
        return there[max(there)]
    if step not in there:
        raise ExportError(f"{run} has no checkpoint of step {step}, only of {', '.join(map(str, there))}")
    return there[step]


def _of_checkpoint(folder: Path, run: Path | None) -> Source:
    from genevolve_fast.policy.export import ExportError

    if not (folder / "policy").is_dir():
        raise ExportError(f"{folder} holds no policy folder: it cannot be exported")
    number = _STEP.fullmatch(folder.name)
    return Source(folder / "policy", run, int(number[1]) if number else None)


def _run_of(folder: Path) -> Path | None:
    return folder if (folder / "config.yaml").is_file() else None


def _last_step(run: Path) -> int | None:
    from genevolve_fast.train.retention import logged

    rows = logged(run / "metrics.jsonl")
    return rows[-1]["step"] if rows else None


def read_config(run: Path | None) -> dict:
    """The configuration of a run as it was written; empty where there is none."""
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run else {}


def origin_of(config: dict) -> str | Path | None:
    """The model that a run began with, where it can be found again."""
    from genevolve_fast.sandbox.tiny_policy import start_path

    path = (config.get("policy") or {}).get("path")
    return start_path() if path == "sandbox:start" else None if path == "sandbox:new" else path


def check_output(output: Path, source: Source, overwrite: bool) -> Path:
    """`output`, absolute. Raises ExportError where something is there, or would be replaced, that is no export."""
    from genevolve_fast.policy.export import ExportError

    output = output.resolve()
    inside = [p for p in (source.weights, source.run) if p and (output == p or output in p.parents)]
    if inside or source.weights in output.parents:
        raise ExportError(f"-o {output} and {source.weights} lie within each other: export to another folder")
    if not output.exists():
        return output
    if not output.is_dir():
        raise ExportError(f"-o {output} is a file")
    if any(output.iterdir()):
        if not overwrite:
            raise ExportError(f"-o {output} is not empty: another folder, or --overwrite to replace an earlier export")
        if not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ExportError(f"-o {output} holds something else than a model: --overwrite would delete it")
    return output


# --- the hub ----------------------------------------------------------------------------------------------------------


def check_repository(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from genevolve_fast.policy.export import ExportError

    try:
        validate_repo_id(name)
        well = name.count("/") == 1
    except HFValidationError:
        well = False
    if not well:
        raise ExportError(f"--upload {name}: a repository is called OWNER/NAME")


def upload(folder: Path, repository: str, private: bool) -> str:
    """Send `folder` to the hub; returns its address. The token is huggingface_hub's own. Raises ExportError."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    from genevolve_fast.policy.export import ExportError

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by genevolve-fast")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, ValueError) as error:
        raise ExportError(
            f"{folder} is written, but not uploaded: {' '.join(str(error).split())[:300]}. "
            f"Again, without exporting: hf upload {repository} {folder}"
        ) from error
    return str(made)
