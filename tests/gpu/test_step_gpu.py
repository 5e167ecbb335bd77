"""The training pass where its kernels, streams and pinned memory are real: gradients, offload, teacher, no waiting.

What needs no GPU also runs on a CPU, so that the checks are known to work.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from naive import naive_loss  # noqa: E402

from benchmarks.models import rollouts_of  # noqa: E402
from benchmarks.step_cases import saved_bytes  # noqa: E402
from benchmarks.whole_sequences import unshared  # noqa: E402
from genevolve_fast.batch.groups import bundles  # noqa: E402
from genevolve_fast.ops import Objective  # noqa: E402
from genevolve_fast.policy.adapters import add_lora  # noqa: E402
from genevolve_fast.policy.codec import NO_TOKEN  # noqa: E402
from genevolve_fast.policy.model import Policy  # noqa: E402
from genevolve_fast.policy.offload import ActivationOffload  # noqa: E402
from genevolve_fast.policy.passes import Prefix, reading, through_layers  # noqa: E402
from genevolve_fast.policy.visits import PrefixCache, Stream  # noqa: E402
from genevolve_fast.train.update import accumulate_gradients  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")
# every token is distilled: a selection could fall either way with rounding
OBJECTIVE, TEMPERATURE, VOCABULARY = Objective(kl_coef=0.0, sdl_permille=1000), 0.7, 1000
CODEC = types.SimpleNamespace(image_pad_id=NO_TOKEN, merge_size=1, image_grid=None)


def qwen3(dtype=torch.bfloat16, device=DEVICE, lora=0, layers=4) -> Policy:
    """A small Qwen3 with random weights; the same numbers for every dtype and device, rounded to bf16 first."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=1 << 16,
    )  # fmt: skip
    policy = Policy(Qwen3ForCausalLM(config).eval().bfloat16().float(), CODEC)
    if lora:
        add_lora(policy, rank=lora)
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
    for name, p in policy.named_parameters():
        if "lora_" not in name:  # adapters stay fp32
            p.data = p.data.to(dtype)
    policy.to(device)
    policy.gradient_checkpointing = True
    return policy


def two_groups(scale=1):
    """Mixed lengths, a one-token reply, one rollout without experience."""
    a = rollouts_of(60 * scale, (90 * scale, 1, 33 * scale), 7, VOCABULARY, turn=20)
    b = rollouts_of(35 * scale, (20 * scale, 64 * scale), 5, VOCABULARY, group="1", turn=20)
    return [*a, dataclasses.replace(b[0], experience_ids=()), b[1]]


def gradient(policy: Policy) -> torch.Tensor:
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().cpu().flatten() for p in trained])


def shared(policy: Policy, rollouts, max_tokens=10**6) -> torch.Tensor:
    policy.zero_grad()
    accumulate_gradients(policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=max_tokens)
    return gradient(policy)


def distance(got, want) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [0, 8], ids=["full", "lora"])
@pytest.mark.parametrize("max_tokens", [10**6, 150, 1], ids=["one bundle", "streamed", "alone"])
def test_gradient_against_naive_fp32(max_tokens, lora):
    """As near to fp32's naive passes as bf16's own rounding lets whole sequences come."""
    exact, rollouts = qwen3(torch.float32, "cpu", lora), two_groups()
    naive_loss(exact, rollouts, {}, OBJECTIVE, TEMPERATURE).backward()
    want = gradient(exact)
    policy = qwen3(lora=lora)
    unshared(policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=10**6)
    rounding = distance(gradient(policy), want)
    assert 0 < rounding < 0.1
    assert distance(shared(policy, rollouts, max_tokens), want) <= 1.5 * rounding + 1e-3


@gpu_only
def test_gradient_in_fp32_on_a_gpu():
    """No bf16 rounding to hide behind: the attention of fp32, and products without TF32."""
    exact, rollouts = qwen3(torch.float32, "cpu"), two_groups()
    naive_loss(exact, rollouts, {}, OBJECTIVE, TEMPERATURE).backward()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        got = shared(qwen3(torch.float32), rollouts, 150)
    finally:
        torch.set_float32_matmul_precision(before)
    assert distance(got, gradient(exact)) <= 1e-4


@contextmanager
def deterministic():
    """Flash attention's backward adds up in any order unless it is told not to."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 1.0], ids=["some layers", "all layers"])
def test_offload_changes_no_bit(share):
    policy, rollouts = qwen3(), two_groups()
    with deterministic():
        want, again = shared(policy, rollouts, 150), shared(policy, rollouts, 150)
        rows = sum(len(r.trajectory) for r in rollouts)
        policy.offload = ActivationOffload(int(share * rows * 4 * (256 * 2 + 512)), DEVICE)
        got = shared(policy, rollouts, 150)
    assert policy.offload.peak_bytes > 0
    assert distance(got, want) <= 2 * distance(again, want), "0 where the same call repeats itself bit for bit"


@gpu_only
def test_offload_frees_the_device():
    """What one layer's input less of the device costs, for all layers but those whose copies are on their way."""
    layers, policy = 12, qwen3(layers=12)
    rollouts = rollouts_of(64, (40_000,), 16, VOCABULARY)
    shared(policy, rollouts)  # gradients are there, kernels are loaded

    def peak() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        shared_again(policy, rollouts)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    on_the_gpu = peak()
    one_input = 40_000 * 256 * 2
    policy.offload = ActivationOffload(2 * layers * one_input, DEVICE)
    assert policy.offload._buffer.is_pinned(), "else every copy waits"
    assert on_the_gpu - peak() >= (layers - 4) * one_input


@gpu_only
def test_the_offload_takes_no_more_than_it_asks_for():
    """1.1 GiB would be 2 GiB in torch's pool, which keeps them; here they are back at once."""

    def resident() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) * 1024

    nbytes, before = (11 << 30) // 10, resident()
    offload = ActivationOffload(nbytes, DEVICE)
    assert offload._buffer.is_pinned() and resident() - before < 1.2 * nbytes
    del offload
    assert resident() - before < 0.2 * nbytes


def shared_again(policy: Policy, rollouts) -> None:
    for p in policy.parameters():
        p.grad.zero_()
    accumulate_gradients(policy, rollouts, {}, OBJECTIVE, temperature=TEMPERATURE, max_tokens=10**6)


def one_microbatch(policy: Policy, rollouts):
    """(prefix, rows of student, rows of teacher) of a bundle."""
    (make,) = bundles(rollouts, {}, policy.codec, DEVICE, max_tokens=10**6)
    bundle = make()
    prefix = Prefix(policy, bundle.prefix, bundle.layout, bundle.last_rows, None)
    (micro,) = bundle.microbatches
    student = reading(policy, micro.student, micro.student_layout, prefix)
    return bundle, prefix, student, reading(policy, micro.teacher, micro.teacher_layout, prefix)


def test_the_teacher_saves_nothing():
    policy = qwen3()
    _, prefix, student, teacher = one_microbatch(policy, two_groups())
    alone = saved_bytes(lambda: through_layers(policy, None, student))
    assert alone > 0 and saved_bytes(lambda: through_layers(policy, None, student, teacher)) == alone


@gpu_only
@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offloaded"])
def test_no_synchronisation(offload):
    """Prefix, replies with their teacher, and all of it back: the host waits for nothing."""
    policy, rollouts = qwen3(lora=8), two_groups(scale=4)
    if offload:
        policy.offload = ActivationOffload(1 << 28, DEVICE)

    def passes(bundle, rows_of_prefix, d_x, d_last) -> None:
        with policy.frame():
            x, _ = through_layers(policy, None, (bundle.prefix, rows_of_prefix))
            rows_of_prefix.fills.collect_gradients()
            (micro,) = bundle.microbatches
            fake = types.SimpleNamespace(cache=rows_of_prefix.fills)
            with policy.frame():
                y, _ = through_layers(
                    policy, None, reading(policy, micro.student, micro.student_layout, fake),
                    reading(policy, micro.teacher, micro.teacher_layout, fake),
                )  # fmt: skip
                y.backward(d_x)
            x.backward(d_last)

    (make,) = bundles(rollouts, {}, policy.codec, DEVICE, max_tokens=10**6)
    bundle = make()
    (micro,) = bundle.microbatches
    gradients = [torch.randn(len(rows), 256, device=DEVICE).bfloat16() for rows in (micro.student, bundle.prefix)]

    def stream() -> Stream:
        return Stream(policy.rotary(bundle.prefix.positions), bundle.layout, fills=PrefixCache())

    passes(bundle, stream(), *gradients)  # what is loaded and compiled the first time may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes(bundle, stream(), *gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_passes_of_that_test_make_a_gradient():
    """The same calls on any device, so that the check above is of something."""
    policy = qwen3(lora=8)
    _, prefix, student, teacher = one_microbatch(policy, two_groups())
    x, taught = through_layers(policy, None, student, teacher)
    assert x.requires_grad and not taught.requires_grad and len(taught) > len(x)
    x.backward(torch.ones_like(x))
    prefix.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in policy.named_parameters() if "lora_" in n)


def test_weights_are_the_same_numbers_everywhere():
    exact, policy = qwen3(torch.float32, "cpu", 8), qwen3(lora=8)
    for (name, p), (_, q) in zip(exact.named_parameters(), policy.named_parameters(), strict=True):
        assert torch.equal(p, q.float().cpu()), name
