"""A unified model at work: it writes, opens an image or ends, draws by Euler steps, reads what it drew, and goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from genevolve_fast.policy.model import ImageFeatures
from genevolve_fast.process.trace import MAX_CYCLES
from genevolve_fast.process.unified.latents import to_latents, to_pictures
from genevolve_fast.process.unified.model import Unified
from genevolve_fast.process.unified.sequences import shifted
from genevolve_fast.train.collect import stable_seed

MAX_DRAFTS = 2 * MAX_CYCLES  # a sketch and a corrected draft a cycle


@dataclass(frozen=True)
class Drawing:
    """How a model draws. temperature 0 is greedy. `steps`: Euler steps of one draft."""

    steps: int = 10
    max_drafts: int = MAX_DRAFTS
    max_text: int = 160  # tokens between two drafts
    temperature: float = 0.0
    shift: float | None = None  # of the times; None: that of the training
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.max_drafts < 1 or self.max_text < 1:
            raise ValueError("steps, max_drafts and max_text must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift must be above 0, got {self.shift}")


@dataclass
class Drawn:
    """What came of one request: `ids` of prompt and reply, `drafts` in order, `texts` before each and after the last.

    `steps`: Euler steps of all drafts together. `ended`: the model closed its turn itself.
    """

    ids: list[int]
    texts: list[str] = field(default_factory=list)
    drafts: list[np.ndarray] = field(default_factory=list)
    steps: int = 0
    ended: bool = False

    @property
    def result(self) -> np.ndarray | None:
        """The last draft; None where nothing was drawn."""
        return self.drafts[-1] if self.drafts else None


class _Cache:
    """Keys and values [requests, kv_heads, room, d] of each layer, `length` [requests] of them written."""

    def __init__(self, policy: Unified, requests: int, room: int) -> None:
        c = policy.text_config
        shape = (c.num_hidden_layers, 2, requests, c.num_key_value_heads, room, c.head_dim)
        self.store = torch.zeros(shape, dtype=policy.head_weight.dtype, device=policy.device)
        self.length = torch.zeros(requests, dtype=torch.int64, device=policy.device)

    def grown(self, room: int) -> None:
        """Make room for `room` more rows of the longest."""
        if (missing := int(self.length.max()) + room - self.store.shape[4]) > 0:
            self.store = torch.nn.functional.pad(self.store, (0, 0, 0, max(missing, 64)))


class Sketcher:
    """Several requests at once on one model, each with its cache; the same seed gives the same drafts."""

    def __init__(self, policy: Unified, drawing: Drawing) -> None:
        self.policy, self.drawing, self.codec = policy, drawing, policy.codec
        self.side = self.codec.size // self.codec.patch
        self.numbers = policy.flow.leave.out_features

    @torch.no_grad()
    def draw(self, requests: Sequence[str], seeds: Sequence[int], steps: Sequence[int] | None = None) -> list[Drawn]:
        """One process a request, its noise drawn from its seed. `steps`: of each request's drafts, not the setting."""
        if not requests:
            return []
        prompts = [self._prompt(r) for r in requests]
        self.drawn = [Drawn(list(p)) for p in prompts]
        self.steps = list(steps) if steps is not None else [self.drawing.steps] * len(requests)
        self.cache = _Cache(self.policy, len(requests), max(map(len, prompts)) + self.drawing.max_text)
        self.position = torch.zeros(len(requests), dtype=torch.int64, device=self.policy.device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        alive = list(range(len(requests)))
        logits = self._read(alive, prompts)
        while alive:
            opened = self._write(alive, logits)
            if not opened:
                break
            latents = self._flow(opened)
            logits = self._look(opened, latents)
            alive = opened
        return self.drawn

    def _prompt(self, request: str) -> list[int]:
        asks, answers = f"<|im_start|>user\n{request}", "<|im_end|>\n<|im_start|>assistant\n"
        return self.codec.encode(asks) + self.codec.encode(answers)  # as trace.Interleaved does

    # --- text ---------------------------------------------------------------------------------------------------------

    def _write(self, alive: list[int], logits: Tensor) -> list[int]:
        """Sample texts until each request opened an image or ended; the requests that opened one."""
        written: dict[int, list[int]] = {i: [] for i in alive}
        opened: list[int] = []
        while alive:
            tokens = self._sample(alive, logits)
            going, given = [], []
            for i, token in zip(alive, tokens, strict=True):
                self.drawn[i].ids.append(token)
                if token == self.codec.end_of_turn_id:
                    self.drawn[i].ended = True
                elif token == self.codec.opens_image_id:
                    if len(self.drawn[i].drafts) < self.drawing.max_drafts:
                        opened.append(i)
                        going.append(i)
                        given.append([token])
                else:
                    written[i].append(token)
                    if len(written[i]) < self.drawing.max_text:
                        going.append(i)
                        given.append([token])
            if going:
                logits = self._read(going, given)
            keep = [n for n, i in enumerate(going) if i not in opened]
            alive = [going[n] for n in keep]
            logits = logits[keep] if going else logits
        for i, ids in written.items():
            self.drawn[i].texts.append(self.codec.decode(ids))
        return sorted(opened)

    def _sample(self, rows: list[int], logits: Tensor) -> list[int]:
        if self.drawing.temperature == 0:
            return logits.argmax(-1).tolist()
        p = (logits.float() / self.drawing.temperature).softmax(-1).cpu()
        return [int(torch.multinomial(p[n], 1, generator=self.generators[i])) for n, i in enumerate(rows)]

    def _read(self, rows: list[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """Feed texts of several lengths; logits [rows, V] behind the last token of each."""
        counts = torch.tensor([len(x) for x in ids], device=self.policy.device)
        width = int(counts.max())
        padded = torch.tensor([[*x, *[0] * (width - len(x))] for x in ids], device=self.policy.device)
        index = torch.tensor(rows, device=self.policy.device)
        at = self.position[index, None] + torch.arange(width, device=index.device)
        hidden = self._pass(index, padded, at, causal=True)
        self.cache.length[index] += counts
        self.position[index] += counts
        logits = hidden[torch.arange(len(rows)), counts - 1] @ self.policy.head_weight.T
        logits[:, self.codec.image_pad_id] = float("-inf")  # a placeholder without a picture
        return logits

    # --- images -------------------------------------------------------------------------------------------------------

    def _flow(self, rows: list[int]) -> Tensor:
        """Latents [rows, patches, numbers] from noise to picture, each request in its own number of steps."""
        patches = self.side**2
        z = torch.stack([torch.randn(patches, self.numbers, generator=self.generators[i]) for i in rows])
        z = z.to(self.policy.device, self.policy.head_weight.dtype)
        steps = torch.tensor([self.steps[i] for i in rows], device=z.device)
        shift = self.policy.shift if self.drawing.shift is None else self.drawing.shift
        for done in range(int(steps.max())):
            going = (steps > done).nonzero()[:, 0]
            times, after = (shifted(1 - (done + ahead) / steps[going].to(z.dtype), shift) for ahead in (0, 1))
            v = self._velocity([rows[n] for n in going.tolist()], z[going], times)
            z[going] += (after - times)[:, None, None] * v
        for n, i in enumerate(rows):
            self.drawn[i].steps += int(steps[n])
        return z

    def _velocity(self, rows: list[int], z: Tensor, times: Tensor) -> Tensor:
        t = times.repeat_interleave(z.shape[1])
        hidden = self._image_pass(rows, z, t)
        return self.policy.flow.velocity(hidden.flatten(0, 1), z.flatten(0, 1), t).view_as(z)

    def _look(self, rows: list[int], latents: Tensor) -> Tensor:
        """Keep the drafts as pixels, read them as any clean image, and close it; logits behind the closing marker."""
        pictures = to_pictures(latents, self.codec.patch, self.codec.size)
        for i, picture in zip(rows, pictures, strict=True):
            self.drawn[i].drafts.append(picture)
            self.drawn[i].ids += [self.codec.image_pad_id] * latents.shape[1] + [self.codec.closes_image_id]
        seen = to_latents(pictures, self.codec.patch).to(latents).view_as(latents)
        self._image_pass(rows, seen, seen.new_zeros(seen.shape[0] * seen.shape[1]))
        index = torch.tensor(rows, device=seen.device)
        self.cache.length[index] += latents.shape[1]
        self.position[index] += self.side
        return self._read(rows, [[self.codec.closes_image_id]] * len(rows))

    def _image_pass(self, rows: list[int], z: Tensor, t: Tensor) -> Tensor:
        """Hidden states [rows, patches, H] of latents z [rows, patches, numbers] at times t [rows · patches]."""
        index = torch.tensor(rows, device=z.device)
        n, patches = z.shape[:2]
        embeds = self.policy.flow.embed(z.flatten(0, 1), torch.arange(patches, device=z.device).repeat(n), t)
        ids = torch.full((n, patches), self.codec.image_pad_id, device=z.device)
        at = self.position[index, None].expand(n, patches)
        return self._pass(index, ids, at, causal=False, embeds=embeds)

    # --- the decoder --------------------------------------------------------------------------------------------------

    def _pass(self, index: Tensor, ids: Tensor, at: Tensor, *, causal: bool, embeds: Tensor | None = None) -> Tensor:
        """Hidden states [rows, new, H] of new rows behind what the cache holds; they are written, but not counted."""
        new = ids.shape[1]
        self.cache.grown(new)
        length = self.cache.length[index]
        reach = int(length.max()) + new
        columns = torch.arange(reach, device=ids.device)
        within = torch.arange(new, device=ids.device)
        seen = length[:, None] + (within + 1 if causal else torch.full_like(within, new))
        mask = (columns < seen[..., None])[:, None]
        where = index[:, None], length[:, None] + within

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
            for held, x in zip(self.cache.store[layer], (k, v), strict=True):
                held.transpose(1, 2)[where] = x.transpose(1, 2)
            full = self.cache.store[layer][:, index, :, :reach]
            return scaled_dot_product_attention(q, *full, attn_mask=mask, scale=scale, enable_gqa=True)

        features, image_rows = None, None
        if embeds is not None:
            features, image_rows = ImageFeatures(embeds, ()), torch.arange(ids.numel(), device=ids.device)
        return self.policy.hidden(ids, at.expand(3, *at.shape), attend, image_rows, features)


def draw(
    policy: Unified, requests: Sequence[str], drawing: Drawing, *, steps: Sequence[int] | None = None, batch: int = 64
) -> list[Drawn]:
    """One process a request, `batch` of them at a time; what a request gets does not depend on the others.

    `steps`: Euler steps of each request's drafts, instead of drawing.steps.
    """
    seeds = [stable_seed("draw", drawing.seed, n, request) for n, request in enumerate(requests)]
    out: list[Drawn] = []
    for first in range(0, len(requests), batch):
        part = slice(first, first + batch)
        out += Sketcher(policy, drawing).draw(requests[part], seeds[part], None if steps is None else steps[part])
    return out


def strip(drafts: Sequence[np.ndarray], scale: int = 4) -> np.ndarray:
    """The drafts beside each other, each pixel `scale` wide, with a grey line between them."""
    large = [d.repeat(scale, 0).repeat(scale, 1) for d in drafts]
    line = np.full((large[0].shape[0], scale, 3), 128, dtype=np.uint8)
    return np.concatenate([part for d in large for part in (line, d)][1:], axis=1)
