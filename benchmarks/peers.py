"""One adapter per peer: what it computes, its settings, why it cannot run. `python -m benchmarks.peers` lists them.

A contender offers any of: log-probs of each row (differentiable with any upstream gradient), GRPO's loss, GRPO's loss
with a teacher, mean cross-entropy. What it does not offer is composed from its log-probs with `grpo_sdl` (plain torch
on [rows], free beside the head); without log-probs the mode is not offered, and the row says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import MODES, OBJECTIVE, SEQUENCES, Batch
from genevolve_fast.ops import grpo_sdl, linear_grpo_sdl, linear_logprob, supported


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Contender:
    """Functions of a Batch; None: not offered. Rows with an ignored target have no upstream gradient."""

    name: str
    version: str = ""
    note: str = ""
    logprob: Callable[[Batch], Tensor] | None = None  # [rows]
    objective: Callable[[Batch], Tensor] | None = None  # scalar, GRPO on policy, seq-mean-token-sum
    teacher: Callable[[Batch], Tensor] | None = None  # scalar, with the teacher's distillation
    cross_entropy: Callable[[Batch], Tensor] | None = None  # scalar, mean over the kept rows
    context: Callable[[], AbstractContextManager] = nullcontext
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def per_token(self) -> bool:
        return self.logprob is not None

    def why_not(self, mode: str) -> str | None:
        """The reason why a mode is not offered."""
        own = {"objective": self.objective, "teacher": self.teacher, "ce": self.cross_entropy}.get(mode)
        if own or self.logprob:
            return None
        if self.cross_entropy:
            return "scalar loss only: no log-probs, no gradient per token"
        return "GRPO's loss only: no teacher" if mode == "teacher" else "GRPO's loss only: no log-probs"

    def loss(self, mode: str, b: Batch) -> Tensor:
        """The loss of a mode, a scalar that can be differentiated."""
        if mode == "objective" and self.objective:
            return self.objective(b)
        if mode == "teacher" and self.teacher:
            return self.teacher(b)
        if mode == "ce" and self.cross_entropy:
            return self.cross_entropy(b)
        teacher = None
        if mode == "teacher":
            with torch.no_grad():
                teacher = self.logprob(replace(b, hidden=b.teacher, weight=b.weight.detach()))
        logps = self.logprob(b)
        if mode in ("objective", "teacher"):
            more = dict(teacher_logps=teacher, loss_mask=b.keep, objective=OBJECTIVE)
            return grpo_sdl(logps.float(), advantages=b.advantages, seq_ids=b.seq_ids, **more)[0]
        if mode == "ce":
            return -(logps.mean() if b.keep is None else torch.where(b.keep, logps, 0).sum() / b.keep.sum())
        return (logps * b.upstream).sum()


# --- this library -----------------------------------------------------------------------------------------------------

OURS = "genevolve_fast"


def ours(hidden: Tensor, impl: str = "auto", workspace_mb: float | None = None, main_grad: bool = False) -> Contender:
    """The two operations; raises Unavailable where `impl` cannot run on hidden's device and dtype."""
    parts = [impl] if impl != "auto" else []
    parts += [f"{workspace_mb:g} MB"] if workspace_mb is not None else []
    parts += ["main_grad"] if main_grad else []
    if impl != "auto" and (reason := supported(impl, hidden)):
        raise Unavailable(reason)
    size = dict(impl=impl, workspace_mb=workspace_mb)

    def logprob(b: Batch) -> Tensor:
        return linear_logprob(b.hidden, b.weight, b.targets, **size).logps

    def objective(b: Batch, **teacher) -> Tensor:
        return linear_grpo_sdl(
            b.hidden, b.weight, b.targets, advantages=b.advantages, cu_seqlens=b.borders, objective=OBJECTIVE,
            main_grad=b.main_grad, **teacher, **size,
        )[0]  # fmt: skip

    def teacher(b: Batch) -> Tensor:
        index = torch.arange(len(b.targets), device=b.targets.device)
        return objective(
            b, teacher_hidden=b.teacher, teacher_index=index if b.keep is None else torch.where(b.keep, index, -1)
        )

    return Contender(
        f"{OURS} [{', '.join(parts)}]" if parts else OURS,
        logprob=None if main_grad else logprob,
        objective=objective,
        teacher=teacher,
        settings=dict(implementation=impl, workspace_mb=workspace_mb, main_grad=main_grad),
    )


# --- peers: each maker gets the device and raises Unavailable or ImportError ------------------------------------------

PEERS: dict[str, Callable[[torch.device], Contender]] = {}


def peer(package: str | None) -> Callable:
    """Register a maker under its function's name; `package` is the distribution whose version is recorded."""

    def register(make: Callable[..., dict]) -> Callable:
        def made(where: torch.device) -> Contender:
            parts = make(where)
            note = " ".join((make.__doc__ or "").split())
            return Contender(make.__name__, _version(package) if package else torch.__version__, note, **parts)

        PEERS[make.__name__] = made
        return make

    return register


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def find(name: str, where: torch.device) -> Contender:
    """The contender called `name`; raises Unavailable with the reason where it cannot run."""
    try:
        return PEERS[name](where)
    except ModuleNotFoundError as e:
        raise Unavailable(f"not installed: no module {e.name}") from e
    except Unavailable:
        raise
    except Exception as e:
        raise Unavailable(f"its import fails: {type(e).__name__}: {first_line(e)}") from e


def first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [""])[0][:300]


def _need_cuda(where: torch.device, capability: int = 0) -> None:
    if where.type != "cuda":
        raise Unavailable("needs a CUDA device")
    if torch.cuda.get_device_capability(where)[0] < capability:
        raise Unavailable(f"needs SM{capability}0 or newer")


def _need_triton(where: torch.device) -> None:
    """A CUDA device, or Triton's interpreter."""
    import triton

    if not triton.knobs.runtime.interpret:
        _need_cuda(where)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(name=module)


@contextmanager
def tf32() -> Iterator[None]:
    """fp32 GEMMs on the tensor cores, as `torch.backends.cuda.matmul.allow_tf32 = True` gives them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _full_logits(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return torch.log_softmax((h @ w.T).float(), -1).gather(1, y[:, None])[:, 0]


@peer(None)
def eager(where: torch.device) -> dict:
    """Full logits in the inputs' dtype, fp32 log_softmax, autograd."""
    return dict(logprob=lambda b: _full_logits(b.hidden, b.weight, b.safe_targets))


@peer(None)
def torch_compile(where: torch.device) -> dict:
    """torch.compile of the same, static shapes."""
    compiled = torch.compile(_full_logits, dynamic=False)
    return dict(logprob=lambda b: compiled(b.hidden, b.weight, b.safe_targets))


@peer(None)
def torch_chunked(where: torch.device) -> dict:
    """F.linear_cross_entropy with LinearCrossEntropyOptions() as it picks them; reduction="none" for log-probs."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy: 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()

    def nll(b: Batch, reduction: str) -> Tensor:
        return F.linear_cross_entropy(b.hidden, b.weight, b.targets, reduction=reduction, options=options)

    return dict(logprob=lambda b: -nll(b, "none"), cross_entropy=lambda b: nll(b, "mean"))


def _liger_grpo(where: torch.device) -> dict:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=OBJECTIVE.clip_ratio_low, epsilon_high=OBJECTIVE.clip_ratio_high,
        loss_type="dr_grpo", max_completion_length=1, compiled=where.type == "cuda",
    )  # fmt: skip

    def objective(b: Batch) -> Tensor:
        mask = torch.ones_like(b.targets) if b.keep is None else b.keep
        h = b.hidden.view(SEQUENCES, -1, b.hidden.shape[1])
        ids = b.safe_targets.view(SEQUENCES, -1)
        return loss(h, b.weight, ids, mask.view(SEQUENCES, -1).float(), b.advantages)[0]

    return dict(objective=objective)


@peer("liger-kernel")
def liger_grpo(where: torch.device) -> dict:
    """LigerFusedLinearGRPOLoss as shipped, compiled on a GPU; dr_grpo with length 1 is seq-mean-token-sum."""
    return _liger_grpo(where)


@peer("liger-kernel")
def liger_grpo_tf32(where: torch.device) -> dict:
    """The same with TF32 on for its fp32 gradient GEMMs."""
    _need("liger_kernel")
    _need_cuda(where)
    return _liger_grpo(where) | dict(context=tf32)


@peer("liger-kernel")
def liger_triton_grpo(where: torch.device) -> dict:
    """triton_grpo_loss on full logits, its gradient in place, reduced inside."""
    _need("liger_kernel")
    _need_triton(where)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def objective(b: Batch) -> Tensor:
        h = b.hidden.view(SEQUENCES, -1, b.hidden.shape[1])
        logits = F.pad(h, (0, 0, 0, 1)) @ b.weight.T  # one row a sequence more than targets: the kernel drops the last
        mask = None if b.keep is None else b.keep.view(SEQUENCES, -1).float()
        return triton_grpo_loss(
            logits, None, None, b.safe_targets.view(SEQUENCES, -1), b.advantages, mask, temperature=1.0, beta=0.0,
            eps_low=OBJECTIVE.clip_ratio_low, eps_high=OBJECTIVE.clip_ratio_high, loss_type="dr_grpo",
            max_completion_length=1, reduce=True,
        )[0]  # fmt: skip

    return dict(objective=objective)


@peer("liger-kernel")
def liger_flce(where: torch.device) -> dict:
    """Fused linear cross-entropy (Triton); reduction="none" for log-probs, its gradients then in the backward."""
    _need("liger_kernel")
    _need_triton(where)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as flce

    return dict(
        logprob=lambda b: -flce(b.hidden, b.weight, b.targets, reduction="none"),
        cross_entropy=lambda b: flce(b.hidden, b.weight, b.targets),
    )


@peer("liger-kernel")
def liger_scaled_ce(where: torch.device) -> dict:
    """LigerFusedLinearScaledCrossEntropyFunction: CuTe kernels on SM90, chunks of 512 rows in torch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as function

    if where.type == "cuda" and torch.cuda.get_device_capability(where) == (9, 0):
        _need("cutlass")
    return dict(logprob=lambda b: -function.apply(b.hidden, b.weight, b.targets))


@peer("cut-cross-entropy")
def cut_cross_entropy(where: torch.device) -> dict:
    """linear_cross_entropy(reduction="none") with its default gradient filter; impl cce, torch_compile on a CPU."""
    _need("cut_cross_entropy")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if where.type == "cuda" else "torch_compile"
    return dict(logprob=lambda b: -linear_cross_entropy(b.hidden, b.weight, b.targets, reduction="none", impl=impl))


@peer("quack-kernels")
def quack(where: torch.device) -> dict:
    """chunked_linear_cross_entropy, chunk_size 4096, tuned; on SM90 it picks its scaled-exp pipeline by itself."""
    _need("quack")
    _need_cuda(where, capability=9)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return dict(cross_entropy=lambda b: chunked_linear_cross_entropy(b.hidden, b.weight, b.targets))


def _trl() -> dict:
    _need("trl")
    try:
        from trl.kernels import ChunkedLogProbFunction as function
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns
    except ImportError:  # before it had kernels of its own
        columns = 8192
        try:
            from trl.trainer.utils import _ChunkedLogProbFunction as function
        except ImportError:
            from trl.experimental.async_grpo.chunk_lm_head import _ChunkedLogProbFunction as function
    fixed = dict(bias=None, temperature=1.0, chunk_size=columns, final_logit_softcapping=None, logit_scale=1.0)
    names = list(inspect.signature(function.forward).parameters)[1:]
    if unknown := set(names) - {*fixed, "hidden", "last_hidden", "weight", "targets", "outputs"}:
        raise Unavailable(f"its chunked log-prob has unknown arguments: {', '.join(sorted(unknown))}")

    def logprob(b: Batch) -> Tensor:
        given = dict(hidden=b.hidden, last_hidden=b.hidden, weight=b.weight, targets=b.safe_targets, outputs=())
        return function.apply(*[(given | fixed)[name] for name in names])[0]

    return dict(logprob=logprob)


@peer("trl")
def trl(where: torch.device) -> dict:
    """ChunkedLogProbFunction with the tile that its trainers ask for, log-probs only."""
    return _trl()


@peer("trl")
def trl_tf32(where: torch.device) -> dict:
    """The same with TF32 on, for versions whose gradient GEMMs are fp32."""
    _need("trl")
    _need_cuda(where)
    if importlib.util.find_spec("trl.kernels"):
        raise Unavailable("its gradient GEMMs read 16-bit operands in this version: TF32 changes nothing")
    return _trl() | dict(context=tf32)


@peer("verl")
def verl_triton(where: torch.device) -> dict:
    """verl.utils.kernel.linear_cross_entropy, its default backward."""
    _need("verl")
    _need_cuda(where)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return dict(logprob=lambda b: linear_cross_entropy(b.hidden, b.weight, b.safe_targets, 1.0, "none", None)[0])


@peer("verl")
def verl_torch(where: torch.device) -> dict:
    """FusedLinearForPPO, 512 rows at a time: verl's default backend."""
    _need("verl")
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    op = FusedLinearForPPO(chunk_size=512)
    return dict(logprob=lambda b: op(b.hidden, b.weight, b.safe_targets)[0])


def main() -> None:
    p = argparse.ArgumentParser(description="List every peer: version, modes and settings, or why it cannot run.")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    where = torch.device(p.parse_args().device)
    for name in PEERS:
        try:
            c = find(name, where)
        except Unavailable as e:
            print(f"{name:18} absent: {e}")
            continue
        modes = " ".join(mode for mode in MODES if c.why_not(mode) is None)
        print(f"{name:18} {c.version:14} {modes}\n{'':18} {c.note}")


if __name__ == "__main__":
    main()
