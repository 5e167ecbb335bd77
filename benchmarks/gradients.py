"""The packed step's gradient against the naive formulation, in float64: `python -m benchmarks.gradients`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from genevolve_fast.evaluate.scoreboard import record
from genevolve_fast.ops import Objective, grpo_sdl, linear_logprob
from genevolve_fast.ops.reference import logprobs
from genevolve_fast.policy.model import Policy
from genevolve_fast.sandbox.tiny_policy import start_path
from genevolve_fast.sandbox.world import SandboxWorld
from genevolve_fast.train.update import TrainingRollout, accumulate_gradients

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from naive import gradient, naive_loss  # noqa: E402
from rollouts import demonstrated  # noqa: E402

COMMAND = "python -m benchmarks.gradients"


def model_error(count: int) -> float:
    """Relative error of a whole micro-batch's gradient through the shipped tiny policy."""
    policy = Policy.from_pretrained(start_path()).double()
    world = SandboxWorld()
    trajectories, images = demonstrated(world, policy.codec, world.requests("train", count))
    patch = tuple(policy.codec.encode("<experience>\n- Search the fact before the answer.\n</experience>"))
    rollouts = [TrainingRollout(t, (-1.0) ** i * 0.7, patch if i % 3 else ()) for i, t in enumerate(trajectories)]
    objective = Objective(kl_coef=0.0)
    naive_loss(policy, rollouts, images, objective, 0.7).backward()
    want = gradient(policy)
    policy.zero_grad()
    accumulate_gradients(policy, rollouts, images, objective, temperature=0.7, max_tokens=10**6)
    return float((gradient(policy) - want).norm() / want.norm())


def objective_error(rows: int) -> float:
    """Largest absolute error of d loss / d hidden and d weight of head and objective together, float64."""
    torch.manual_seed(0)
    d = torch.float64
    h, w = torch.randn(rows, 32, dtype=d, requires_grad=True), torch.randn(301, 32, dtype=d, requires_grad=True)
    y, seqs = torch.randint(301, (rows,)), torch.arange(rows) // 16
    count = int(seqs.max()) + 1
    a = torch.randn(count, dtype=d)
    with torch.no_grad():
        now = logprobs(h, w, y, temperature=0.7)[0]
    old, ref = now + 0.3 * torch.randn(rows, dtype=d), now + torch.randn(rows, dtype=d)
    teacher = now + 4 * torch.randn(rows, dtype=d)
    o = Objective(kl_coef=0.01, sdl_permille=300)
    logps = linear_logprob(h, w, y, temperature=0.7, block_rows=50).logps
    loss, _ = grpo_sdl(
        logps, advantages=a, seq_ids=seqs, old_logps=old, ref_logps=ref, teacher_logps=teacher, objective=o
    )
    got = torch.autograd.grad(loss, [h, w])
    z = (h @ w.T / 0.7).log_softmax(-1)[torch.arange(rows), y]
    slope = torch.zeros(rows, dtype=d)
    for s in range(count):
        at = (seqs == s).nonzero()[:, 0].tolist()
        gaps = {i: abs(float(now[i] - teacher[i])) for i in at}
        keep = sorted(at, key=lambda i: (-gaps[i], i))[: max(1, -(-len(at) * 300 // 1000))]
        for i in at:
            ratio = float((now[i] - old[i]).exp())
            free, bounded = ratio * a[s], min(max(ratio, 1 - o.clip_ratio_low), 1 + o.clip_ratio_high) * a[s]
            unclipped = 1 - o.clip_ratio_low <= ratio <= 1 + o.clip_ratio_high or free < bounded
            g = -ratio * float(a[s]) if unclipped else 0.0
            g += o.kl_coef * (1 - float((ref[i] - now[i]).exp()))
            if i in keep:
                g += o.sdl_coef * min(ratio, o.sdl_rho_cap) * max(-10.0, min(10.0, float(now[i] - teacher[i])))
            slope[i] = g / count
    want = torch.autograd.grad((slope * z).sum(), [h, w])
    return max(float((x - y).abs().max()) for x, y in zip(got, want, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--rollouts", type=int, default=24)
    args = p.parse_args()
    record("loop/grad_error", model_error(args.rollouts), n=args.rollouts, command=COMMAND)
    record("loop/objective_error_f64", objective_error(160), n=160, command=COMMAND)


if __name__ == "__main__":
    main()
