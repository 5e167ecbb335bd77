"""The shared pass against whole sequences one at a time: prefixes, streamed replies, riding teachers, memory."""

from __future__ import annotations

import dataclasses
import types
import weakref

import numpy as np
import pytest
import torch
from grouped import group, mixed_batch, text_policy
from naive import gradient, naive_loss

from benchmarks.memory import saved_bytes
from genevolve_fast.batch.groups import PushedTokens, TrainingRollout, bundles, pushed_tokens
from genevolve_fast.ops import Objective, linear_grpo_sdl, linear_logprob
from genevolve_fast.policy.offload import ActivationOffload
from genevolve_fast.policy.passes import Prefix, normed, predicting, reading, through_layers
from genevolve_fast.policy.visits import PrefixCache, Stream
from genevolve_fast.train.update import accumulate_gradients
from genevolve_fast.trajectory import Trajectory

TEMPERATURE = 0.7
OBJECTIVE = Objective(kl_coef=0.0, sdl_permille=300)
BF16 = Objective(kl_coef=0.0, sdl_permille=1000)  # which tokens are selected must not hang on a rounding


def exact_norms(monkeypatch):
    """transformers' norms round to fp32, which would hide errors; these keep float64."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, Qwen3RMSNorm, Qwen3VLTextRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture(params=["Qwen3VL", "Qwen3", pytest.param("Llama", marks=pytest.mark.slow)])
def case(request, tokenizer, pictures, monkeypatch):
    """(policy in float64, rollouts, images)"""
    from genevolve_fast.sandbox.tiny_policy import new_policy

    exact_norms(monkeypatch)
    if request.param == "Qwen3VL":
        policy = new_policy(tokenizer, seed=1).eval()
        rollouts, images = mixed_batch(policy.codec, pictures)
    else:
        policy = text_policy(request.param)
        rollouts, images = mixed_batch(policy.codec, [])
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return policy.double(), rollouts, images


def naive_gradient(policy, rollouts, images, objective=OBJECTIVE):
    policy.zero_grad()
    naive_loss(policy, rollouts, images, objective, TEMPERATURE).backward()
    want = gradient(policy)
    policy.zero_grad()
    return want


def shared_gradient(policy, rollouts, images, *, max_tokens=10**6, objective=OBJECTIVE, **rest):
    policy.zero_grad()
    accumulate_gradients(policy, rollouts, images, objective, temperature=TEMPERATURE, max_tokens=max_tokens, **rest)
    return gradient(policy)


def distance(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["graph", "recompute"])
@pytest.mark.parametrize("max_tokens", [10**6, 90, 1], ids=["one bundle", "streamed", "alone"])
def test_shared_gradient_equals_the_naive_one(case, checkpointing, max_tokens):
    policy, rollouts, images = case
    want = naive_gradient(policy, rollouts, images)
    policy.gradient_checkpointing = checkpointing
    assert want.norm() > 0
    assert distance(shared_gradient(policy, rollouts, images, max_tokens=max_tokens), want) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("tile_rows", [1, 7, 64])
def test_tiles_change_no_gradient(case, tile_rows):
    policy, rollouts, images = case
    want = naive_gradient(policy, rollouts, images)
    policy.gradient_checkpointing = True
    for visit in policy.visits:
        visit.tile_rows = tile_rows
    assert distance(shared_gradient(policy, rollouts, images, max_tokens=90), want) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["graph", "recompute"])
@pytest.mark.parametrize("scope", ["all", "decision"])
def test_adapters_get_the_naive_gradient(case, checkpointing, scope):
    from genevolve_fast.policy.adapters import add_lora

    policy, rollouts, images = case
    add_lora(policy, rank=2)
    policy.double()
    for name, p in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    objective = Objective(kl_coef=0.0, sdl_scope=scope)
    want = naive_gradient(policy, rollouts, images, objective)
    policy.gradient_checkpointing = checkpointing
    got = shared_gradient(policy, rollouts, images, max_tokens=90, objective=objective)
    assert want.norm() > 0 and distance(got, want) < 1e-9
    assert all((p.grad is None) == (not p.requires_grad) for n, p in policy.named_parameters() if ".layers." in n)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["graph", "recompute"])
def test_bf16_with_fp32_adapters_loses_its_rounding_only(case, checkpointing):
    from genevolve_fast.policy.adapters import add_lora

    policy, rollouts, images = case
    policy.bfloat16()
    add_lora(policy, rank=2)
    factors = [p for n, p in policy.named_parameters() if "lora_" in n]
    for p in factors:
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(p.numel()))
    assert {p.dtype for p in factors} == {torch.float32}
    policy.gradient_checkpointing, policy.tile_tokens = checkpointing, 16
    got = shared_gradient(policy, rollouts, images, max_tokens=90, objective=BF16)
    assert {p.grad.dtype for p in factors} == {torch.float32}
    assert distance(got, naive_gradient(policy.double(), rollouts, images, BF16)) < 0.03


@pytest.mark.slow
def test_without_experience_no_teacher_row_passes(case):
    policy, rollouts, images = case
    bare = [dataclasses.replace(r, experience_ids=()) for r in rollouts]
    want = naive_gradient(policy, bare, images)
    metrics, _ = accumulate_gradients(policy, bare, images, OBJECTIVE, temperature=TEMPERATURE, max_tokens=90)
    assert distance(gradient(policy), want) < 1e-9 and metrics["tokens/teacher"] == 0


@pytest.mark.slow
def test_other_weights_make_a_pass_of_their_own(case):
    """The same weights as reference and as separate teacher: no KL, and the gradient of the riding teacher."""
    from genevolve_fast.policy.weights import FrozenCopy

    policy, rollouts, images = case
    trained = [r for r in rollouts if r.advantage or r.experience_ids]
    want = shared_gradient(policy, trained, images)
    same = FrozenCopy(policy)
    apart = shared_gradient(policy, trained, images, max_tokens=90, teacher=same)
    assert distance(apart, want) < 1e-9
    objective = Objective(kl_coef=0.7, sdl_permille=300)
    assert distance(shared_gradient(policy, trained, images, objective=objective, reference=same), want) < 1e-9
    with torch.no_grad():
        for p in same._policy.decoder.layers.parameters():
            p.mul_(1.1)
    assert distance(shared_gradient(policy, trained, images, teacher=same), want) > 1e-4
    assert distance(shared_gradient(policy, trained, images, objective=objective, reference=same), want) > 1e-4


def test_rows_of_separate_passes_are_counted(case):
    from genevolve_fast.policy.weights import FrozenCopy

    policy, rollouts, images = case
    same = FrozenCopy(policy)
    objective = Objective(kl_coef=0.7, sdl_permille=300)
    given = dict(temperature=TEMPERATURE, max_tokens=90)
    metrics, _ = accumulate_gradients(policy, rollouts, images, objective, reference=same, teacher=same, **given)
    seen = {part: metrics[f"tokens/{part}"] for part in ("prefix", "student", "teacher")}
    assert all(seen.values())
    made = [pushed_tokens(make()) for make in bundles(rollouts, images, policy.codec, "cpu", max_tokens=90)]
    of_teacher = sum(b.prefix for b in made if b.teacher)
    assert metrics["tokens/separate_passes"] == seen["prefix"] + seen["student"] + of_teacher


def test_a_frozen_copy_scores_in_tiles_of_the_same_size(case):
    from genevolve_fast.policy.weights import FrozenCopy

    policy, rollouts, images = case
    policy.tile_tokens = 7
    same, widths = FrozenCopy(policy), []
    for module in (same._policy.decoder.norm, same._policy.visits[0].layer.mlp):
        module.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    objective = Objective(kl_coef=0.7, sdl_permille=300)
    shared_gradient(policy, rollouts, images, objective=objective, reference=same, teacher=same)
    assert widths and max(widths) <= 7


def rows_visited(policy, run) -> dict[str, int]:
    """Rows that entered the first layer's visit in forwards, by what they are."""
    seen = {"prefix": 0, "student": 0, "teacher": 0}

    def count(visit, args):
        x, stream, *rest = args
        if x is not None:
            seen["prefix" if stream.fills is not None else "student"] += len(x)
        if rest and rest[0] is not None:
            seen["teacher"] += len(rest[0])

    handle = policy.visits[0].register_forward_pre_hook(count)
    run()
    handle.remove()
    return seen


def test_every_row_passes_once(case):
    policy, rollouts, images = case
    seen = rows_visited(policy, lambda: shared_gradient(policy, rollouts, images, max_tokens=90))
    by_prompt, student, teacher = {}, 0, 0
    for r in rollouts:
        t, at = r.trajectory, r.trajectory.loss_mask.nonzero()[0]
        by_prompt[t.group_id] = at[0]
        student += at[-1] - at[0]
        teacher += bool(r.experience_ids) * (len(r.experience_ids) + at[-1] - t.request_stop)
    assert seen == {"prefix": sum(by_prompt.values()), "student": student, "teacher": teacher}


def test_pushed_tokens_are_those_of_the_formula():
    """Layout (d) with a patch per rollout: 8 prompts of 6144, 48 replies of 8192, patches of 600 at the prompt's end.

    Each reply's last sampled token predicts nothing and is not fed.
    """
    codec = types.SimpleNamespace(image_pad_id=-1, merge_size=1, image_grid=None)
    rollouts = []
    for g in range(8):
        ids = np.arange(6144 + 8192) + 10**5 * g
        for k in range(6):
            mask = np.arange(len(ids)) >= 6144
            t = Trajectory(f"{g}-{k}", str(g), str(g), ids, mask, np.zeros(len(ids), np.float32), 6144, ())
            rollouts.append(TrainingRollout(t, 1.0, tuple(range(600))))
    made = [make() for make in bundles(rollouts, {}, codec, "cpu", max_tokens=37_000)]
    total = sum((pushed_tokens(b) for b in made), PushedTokens())
    assert (total.prefix, total.student + 48, total.teacher + 48) == (8 * 6144, 48 * 8192, 48 * (600 + 8192))
    assert total.prefix + total.student + 48 == 442_368 and total.teacher + 48 == 422_016
    assert all(len(b.layout.cu_seqlens) == 2 for b in made)  # a group is larger than the budget: streamed alone
    assert all(len(m.student) <= 37_000 and len(m.teacher) <= 37_000 for b in made for m in b.microbatches)


def test_prompts_with_other_pixels_share_nothing(policy, pictures):
    (a,), images_a = group(policy.codec, [4, pictures[0]], [[("assistant", [3])]], seed=1)
    (b,), images_b = group(policy.codec, [4, pictures[1]], [[("assistant", [3])]], seed=1)
    assert (a.ids[:10] == b.ids[:10]).all()
    rollouts = [TrainingRollout(a, 1.0), TrainingRollout(b, -1.0)]
    (make,) = bundles(rollouts, images_a | images_b, policy.codec, "cpu", max_tokens=1000)
    assert len(make().layout.cu_seqlens) == 3


@pytest.mark.parametrize("teacher", [False, True])
def test_a_layer_saves_its_input_and_nothing_else(case, teacher):
    policy, rollouts, images = case
    policy.gradient_checkpointing = True
    policy.freeze_vision()
    (make,) = bundles(rollouts, images, policy.codec, "cpu", max_tokens=10**6)
    bundle = make()
    features = policy.image_features(bundle.images)
    prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, features)
    (micro,) = bundle.microbatches
    rows = reading(policy, micro.student, micro.student_layout, prefix)
    beside = reading(policy, micro.teacher, micro.teacher_layout, prefix) if teacher else None
    saved = saved_bytes(lambda: through_layers(policy, features, rows, beside))
    width = policy.text_config.hidden_size * policy.head_weight.element_size()
    per_row = policy.text_config.num_hidden_layers * width + micro.student.ids.element_size()
    images_only = micro.student.image_rows.nbytes
    assert saved == len(micro.student) * per_row + images_only


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.4, 1], ids=["nothing fits", "some layers", "all layers"])
def test_offloaded_inputs_change_no_bit(case, share):
    policy, rollouts, images = case
    policy.gradient_checkpointing = True
    want = shared_gradient(policy, rollouts, images, max_tokens=90)
    row = policy.text_config.num_hidden_layers * policy.text_config.hidden_size * policy.head_weight.element_size()
    policy.offload = ActivationOffload(int(share * 400 * row), policy.device)
    assert torch.equal(shared_gradient(policy, rollouts, images, max_tokens=90), want)
    assert (policy.offload.peak_bytes > 0) == (share > 0) and policy.offload.peak_bytes <= policy.offload.nbytes
    assert policy.offload._used == 0


@pytest.mark.parametrize("embeddings", ["trained", "frozen"])
def test_what_is_offloaded_leaves_the_device(case, embeddings):
    """Two layers' room: the first two layers' inputs are freed, the others' are kept alive by the graph."""
    policy, rollouts, images = case
    policy.decoder.embed_tokens.requires_grad_(embeddings == "trained")
    policy.freeze_vision()
    policy.gradient_checkpointing = True
    (make,) = bundles(rollouts, images, policy.codec, "cpu", max_tokens=10**6)
    bundle = make()
    rows = (bundle.prefix, Stream(policy.rotary(bundle.prefix.positions), bundle.layout, fills=PrefixCache()))
    one = len(bundle.prefix) * policy.text_config.hidden_size * policy.head_weight.element_size()
    policy.offload = ActivationOffload(2 * (one + 512), policy.device)
    inputs = []
    handles = [v.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0]))) for v in policy.visits]
    with policy.frame():
        x, _ = through_layers(policy, policy.image_features(bundle.images), rows)
        alive = [i() is not None for i in inputs]
        assert x.requires_grad and alive == [False, False] + [True] * (len(alive) - 2)
    for handle in handles:
        handle.remove()


def test_what_replies_give_the_prompts_last_rows_keeps_no_reply_alive(case):
    """autograd hands the prompt a view of the gradient of all rows: kept as it is, it would hold the longest reply."""
    policy, rollouts, images = case
    policy.gradient_checkpointing = True
    seen = []
    for make in bundles(rollouts, images, policy.codec, "cpu", max_tokens=90):
        bundle = make()
        features = policy.image_features(bundle.images)
        leaves = features and features.leaves()
        prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, leaves)
        for micro in bundle.microbatches:
            x, _ = through_layers(policy, leaves, reading(policy, micro.student, micro.student_layout, prefix))
            normed(policy, predicting(prefix, x, micro.rows)).square().sum().backward()
            seen.append((prefix.last.grad.untyped_storage().nbytes(), prefix.last.nbytes))
    assert len(seen) >= 3 and all(kept == own for kept, own in seen)


def test_the_final_norm_widens_a_tile_and_saves_its_input(case):
    policy, _, _ = case
    policy.gradient_checkpointing, policy.tile_tokens = True, 7
    x = torch.randn(30, policy.text_config.hidden_size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(30, policy.text_config.hidden_size, dtype=torch.float64)
    norm, widths = policy.decoder.norm, []
    want = torch.autograd.grad(norm(x), (x, norm.weight), g)
    plain = norm.forward
    norm.forward = lambda x: widths.append(len(x)) or plain(x)
    assert saved_bytes(lambda: normed(policy, x)) == x.nbytes
    normed(policy, x).backward(g)
    with torch.no_grad():
        normed(policy, x)
    norm.forward = plain
    assert max(widths) <= 7 and sum(widths) == 4 * 30
    assert distance(x.grad, want[0]) < 1e-12 and distance(norm.weight.grad, want[1]) < 1e-12


def test_a_prompts_cache_is_given_up_layer_by_layer(case):
    policy, rollouts, images = case
    policy.gradient_checkpointing = True
    bundle = bundles(rollouts, images, policy.codec, "cpu", max_tokens=10**6)[0]()
    prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, policy.image_features(bundle.images))
    cache, held = prefix.cache, []

    def count(_):
        held.append(sum(x.numel() > 0 for x in (*cache.keys, *cache.values, *sum(cache.grads, ()))))

    for visit in policy.visits:
        visit.trained[0].register_post_accumulate_grad_hook(count)
    prefix.backward()
    assert held == [4 * i for i in reversed(range(len(policy.visits)))]


def test_fetching_a_layers_input_starts_the_next_and_stays_in_its_frame(case, monkeypatch):
    policy, rollouts, images = case
    policy.gradient_checkpointing = True
    policy.offload = ActivationOffload(1 << 24, policy.device)
    real, below = ActivationOffload._fetch, []

    def fetch(self, parked):
        x = real(self, parked)
        below.append(parked.below and parked.below.here is not None)
        return x

    monkeypatch.setattr(ActivationOffload, "_fetch", fetch)
    shared_gradient(policy, rollouts, images, max_tokens=90)
    one = [True] * (len(policy.visits) - 1) + [None]
    assert len(below) > 2 * len(one) and below == one * (len(below) // len(one))


def test_an_expanded_gradient_is_not_written_to(case):
    """sum() hands out one number for all rows."""
    policy, rollouts, images = case
    bundle = bundles(rollouts, images, policy.codec, "cpu", max_tokens=10**6)[0]()
    rows = bundle.prefix, Stream(policy.rotary(bundle.prefix.positions), bundle.layout)
    gradients = []
    for checkpointing in (False, True):
        policy.gradient_checkpointing = checkpointing
        policy.zero_grad()
        through_layers(policy, policy.image_features(bundle.images), rows)[0].sum().backward()
        gradients.append(gradient(policy))
    assert gradients[0].norm() > 0 and distance(gradients[1], gradients[0]) < 1e-9


def test_row_log_probs_are_returned_where_there_are_any():
    torch.manual_seed(0)
    h, w = torch.randn(6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    y, has = torch.tensor([1, 2, -100, 4, 5, 6]), torch.tensor([True, False, True, True, False, True])
    teacher = torch.tensor([-1.0, -2, -3, -4, -5, -6], dtype=torch.float64)
    options = dict(objective=Objective(kl_coef=0.0), return_logps=True, cu_seqlens=[0, 3, 5, 6])
    a = torch.tensor([1.0, 0.0, 0.5])
    _, _, seen = linear_grpo_sdl(h, w, y, advantages=a, teacher_logps=teacher, sdl_mask=has, **options)
    want = linear_logprob(h, w, y).logps
    live = torch.tensor([True, True, False, True, False, True])  # the second sequence has a teacher in one row only
    assert torch.equal(seen.student.isnan(), ~live) and torch.equal(seen.student[live], want[live])
    eligible = has & (y >= 0)
    assert torch.equal(seen.teacher.isnan(), ~eligible) and torch.equal(seen.teacher[eligible], teacher[eligible])
    _, _, alone = linear_grpo_sdl(h, w, y, advantages=a, **options)
    assert alone.teacher.isnan().all() and not alone.student.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [False, True])
def test_bytes_per_row_are_those_of_the_planner(teacher, request):
    """(peak(2N) - peak(N)) / N of one rollout: layer inputs and one layer's working set; the teacher adds nothing."""
    from benchmarks.memory import peak_bytes
    from genevolve_fast.profile.plan import Settings, plan
    from genevolve_fast.profile.shapes import ModelShape

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # threads have buffers of their own
    policy = text_policy("Qwen3", num_hidden_layers=6, hidden_size=128, head_dim=32, vocab_size=320)
    policy.gradient_checkpointing = True
    policy.tile_tokens = 256
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    peaks, planned = [], []
    for reply in (2048, 4096):
        turns = [("assistant", [1]), ("tool", [reply - 2]), ("assistant", [1])]
        trajectories, _ = group(policy.codec, [20], [turns], 1)
        batch = [TrainingRollout(t, 1.0, (41, 42) if teacher else ()) for t in trajectories]
        settings = dict(tokens=len(trajectories[0]), prefix=25, max_tokens_per_microbatch=1, tile_tokens=256, patch=2)
        settings |= dict(dtype="float32", device="cpu", reference=False, rollout=False, num_generations=1)
        made = plan(
            ModelShape.from_config(policy.model.config.to_dict()),
            Settings(**settings, teacher="live" if teacher else "off", loss_share=0.01),
        )
        planned.append(made.phase_bytes("backward"))

        def run(batch=batch):
            shared = dict(temperature=1.0, max_tokens=10**6)
            accumulate_gradients(policy, batch, {}, Objective(kl_coef=0.0), **shared)
            return []

        run()  # what is made once and kept, such as the workspace's tables
        peaks.append(peak_bytes(run, torch.device("cpu")))
    measured, said = ((b - a) / 2048 for a, b in (peaks, planned))
    assert measured == pytest.approx(said, rel=0.03)
