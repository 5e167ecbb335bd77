"""What keeps memory low and must change no result: released gradients, recomputed dropout, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genevolve_fast.policy.visits import Stream
from genevolve_fast.train.config import ConfigError, EvolveConfig, OptimConfig, SftConfig, parse_config
from genevolve_fast.train.optim import build_optimizer
from genevolve_fast.train.prepare import prepare
from genevolve_fast.train.run import RunError


def one_loss(policy, seed=0):
    """Loss of 40 random tokens through the checkpointed visits."""
    from genevolve_fast.batch.packing import TrainingSequence, pack
    from genevolve_fast.policy.passes import through_layers

    ids = torch.randint(40, 300, (40,), generator=torch.Generator().manual_seed(seed)).numpy()
    mask = ids > 60
    mask[0] = False
    batch = pack([TrainingSequence(ids, mask, (), ())], policy.codec.image_pad_id, policy.codec.merge_size, "cpu")
    rows = batch.stretch
    x, _ = through_layers(policy, None, (rows, Stream(policy.rotary(rows.positions), batch.layout)))
    return policy.decoder.norm(x).square().mean()


def test_released_gradients_give_the_same_weights_and_are_never_all_alive(policy, tokenizer):
    from genevolve_fast.sandbox.tiny_policy import new_policy

    plain, released = policy, new_policy(tokenizer, seed=1).eval()
    most = []
    for p, release in ((plain, False), (released, True)):
        p.freeze_vision()
        p.gradient_checkpointing = True
        optimizer = build_optimizer(p, OptimConfig(lr=1e-2, max_grad_norm=None, release_gradients=release), 3)
        layers = [x for visit in p.visits for x in visit.layer.parameters()]
        alive = []
        for x in layers:
            x.register_post_accumulate_grad_hook(lambda _, a=alive, all_=layers: a.append(count(all_)))
        for step in range(3):
            one_loss(p, step).backward()
            optimizer.step()
        most.append(max(alive))
    for a, b in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)
    per_layer = len(list(policy.visits[0].layer.parameters()))
    assert most[0] == per_layer * len(policy.visits) and most[1] <= 1


def count(parameters) -> int:
    return sum(x.grad is not None for x in parameters)


def test_dropout_is_drawn_again_as_it_was(policy):
    from genevolve_fast.policy.adapters import add_lora

    policy.freeze_vision()
    add_lora(policy, rank=2, dropout=0.5)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    policy.train()
    gradients = []
    for checkpointing in (False, True):
        policy.gradient_checkpointing = checkpointing
        policy.zero_grad()
        torch.manual_seed(5)
        one_loss(policy).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


RELEASE = dict(optim=dict(release_gradients=True, max_grad_norm=None), policy=dict(gradient_checkpointing=True))


@pytest.mark.parametrize(
    ("kind", "data", "told"),
    [
        (EvolveConfig, dict(optim=dict(release_gradients=True)), "complete only after the last reply"),
        (SftConfig, RELEASE | dict(batch_size=2), "batch_size 1"),
        (SftConfig, RELEASE | dict(batch_size=1, optim=dict(release_gradients=True)), "max_grad_norm null"),
        (SftConfig, RELEASE | dict(batch_size=1, policy=dict()), "gradient_checkpointing"),
        (EvolveConfig, dict(policy=dict(offload_gib=4)), "need gradient_checkpointing"),
        (EvolveConfig, dict(policy=dict(tile_tokens=64)), "need gradient_checkpointing"),
    ],
)
def test_what_cannot_work_is_refused(kind, data, told):
    with pytest.raises(ConfigError, match=told):
        parse_config(kind, data)


def test_release_is_accepted_where_it_works():
    parse_config(SftConfig, RELEASE | dict(batch_size=1))


@pytest.mark.parametrize(
    ("field", "value", "told"), [("offload_gib", 1.0, "from a GPU to the host"), ("liger", True, "needs a GPU")]
)
def test_a_cpu_is_refused_what_only_a_gpu_can(policy, field, value, told):
    config = parse_config(EvolveConfig, dict(policy={"gradient_checkpointing": True, field: value})).policy
    with pytest.raises(RunError, match=told):
        prepare(policy, config, 0)


def test_host_memory_that_is_not_there_is_refused(policy, monkeypatch):
    from genevolve_fast.train import prepare as module

    monkeypatch.setattr(module, "available_memory", lambda device: 2**30)
    with pytest.raises(RunError, match="exceeds the host's available memory of 1.0 GiB"):
        module.pinned_buffer(1.5, torch.device("cuda"))


def test_attention_dropout_is_refused_not_ignored(policy):
    policy.model.config.text_config.attention_dropout = 0.1
    with pytest.raises(RunError, match="attention_dropout=0.1 to 0"):
        prepare(policy, SftConfig().policy, 0)


def test_the_section_reaches_the_layers(policy):
    section = SftConfig(policy=dict(gradient_checkpointing=True, tile_tokens=33)).policy
    prepare(policy, section, 0)
    assert all(visit.checkpoint and visit.tile_rows == 33 for visit in policy.visits)


def test_sft_gives_the_host_buffer_back_after_every_micro_batch(policy):
    from genevolve_fast.data.conversations import Conversation
    from genevolve_fast.policy.offload import ActivationOffload
    from genevolve_fast.train.sft import accumulate

    policy.freeze_vision()
    policy.gradient_checkpointing = True
    rows = np.arange(20) % 5 + 50
    batch = [Conversation(rows, rows > 51, (), ()) for _ in range(3)]
    one = 20 * policy.text_config.hidden_size * policy.head_weight.element_size() * len(policy.visits)
    policy.offload = ActivationOffload(one + 512 * len(policy.visits), policy.device)
    accumulate(policy, [[c] for c in batch], 36)
    assert policy.offload.peak_bytes >= one and policy.offload._used == 0


def test_a_frozen_head_and_a_small_workspace_reach_the_pass(policy, pictures):
    from grouped import mixed_batch

    from genevolve_fast.ops import Objective
    from genevolve_fast.train.update import accumulate_gradients

    rollouts, images = mixed_batch(policy.codec, pictures)
    prepare(policy, parse_config(EvolveConfig, dict(policy=dict(freeze_head=True))).policy, 0)
    shared = dict(temperature=1.0, max_tokens=10**6)
    accumulate_gradients(policy, rollouts, images, Objective(kl_coef=0.0), **shared)
    assert policy.head_weight.grad is None and policy.decoder.norm.weight.grad is not None
    with pytest.raises(ValueError, match="workspace_mb"):
        accumulate_gradients(policy, rollouts, images, Objective(kl_coef=0.0), workspace_mb=0.001, **shared)
    with pytest.raises(ConfigError, match="freeze_head with lora"):
        parse_config(EvolveConfig, dict(policy=dict(freeze_head=True, lora=dict(rank=2))))
