"""The shared passes: a prefix once, replies streamed against its keys and values, the teacher beside the student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from genevolve_fast.ops.prefix_attention import Layout
from genevolve_fast.policy.model import ImageFeatures, Policy
from genevolve_fast.policy.visits import Packed, PrefixCache, Stream, in_tiles


class Prefix:
    """Prompts that passed the layers once: what replies read of them, and the one backward when all replies are done.

    `last` [groups, H] are the last layer's outputs at `last_rows`: they predict the first token of every reply.
    """

    def __init__(
        self, policy: Policy, rows: Packed, layout: Layout, last_rows: Tensor, features: ImageFeatures | None
    ) -> None:
        self.cache = PrefixCache()
        self.layout = layout
        stream = Stream(policy.rotary(rows.positions), layout, fills=self.cache)
        x, _ = through_layers(policy, features, (rows, stream))
        self._graph = x[last_rows]
        self.last = self._graph.detach()
        if torch.is_grad_enabled():
            self.last.requires_grad_().register_hook(Tensor.clone)  # a view would keep all rows' gradient alive
            self.cache.collect_gradients()

    def backward(self, backward: Callable[[Tensor], None] = Tensor.backward) -> None:
        """Hand what the replies gathered to the prompts' own layers, embeddings and images."""
        grad = torch.zeros_like(self.last) if self.last.grad is None else self.last.grad
        backward((self._graph * grad).sum())  # a scalar with that gradient: engines take losses
        del self.cache, self._graph


Rows = tuple[Packed, Stream]


def through_layers(
    policy: Policy, features: ImageFeatures | None, student: Rows | None, teacher: Rows | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Last layer's outputs [n, H] of the student's rows and, made in the same visits without a graph, the teacher's.

    The final norm is not applied: only the rows that reach the head need it.
    """
    x, teacher_x = policy.embed(student and student[0], teacher and teacher[0], features=features)
    parking = policy.offload.layer if policy.offload and torch.is_grad_enabled() else nullcontext
    for index, visit in enumerate(policy.visits):
        with parking():
            x, teacher_x = visit(x, student and student[1], teacher_x, teacher and teacher[1])
        if student:
            x = policy.add_deepstack(x, index, student[0], features)
        if teacher:
            with torch.no_grad():
                teacher_x = policy.add_deepstack(teacher_x, index, teacher[0], features)
    return x, teacher_x


def reading(
    policy: Policy,
    rows: Packed | None,
    layout: Layout,
    prefix: Prefix,
    phase: Callable[[], AbstractContextManager] = nullcontext,
) -> Rows | None:
    """`rows` with the prefix they attend to; None where there are none."""
    if rows is None or not len(rows):
        return None
    return rows, Stream(policy.rotary(rows.positions), layout, reads=prefix.cache, phase=phase)


def predicting(prefix: Prefix, x: Tensor | None, rows: Tensor) -> Tensor:
    """Last layer's outputs [len(rows), H] that the head reads: `rows` index the prefix's last rows, then those of x."""
    states = prefix.last if x is None else torch.cat([prefix.last, x])
    return states[rows]


def normed(policy: Policy, x: Tensor) -> Tensor:
    """The final norm of x [n, H]; it widens one tile of rows at a time, and saves only x where layers do.

    Called inside `policy.exit`, where its weights are whole.
    """
    if policy.gradient_checkpointing or not torch.is_grad_enabled():
        return in_tiles(policy.decoder.norm, x, policy.tile_tokens)
    return policy.decoder.norm.forward(x)
