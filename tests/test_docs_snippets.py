"""Every Python block of docs/integrations.md, and of the README's section on it, runs as it stands on a tiny model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs/integrations.md", ROOT / "README.md"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(heading, code) in the page's order."""
    heading, found = "", []
    for title, code in re.findall(r"^##+ (.+?)$|^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


def tiny(tokens: int):
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, head_dim=8)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=tokens, num_key_value_heads=2, **sizes))


def own(tmp_path, tokenizer):
    ids, mask = torch.randint(97, (2, 9)), torch.rand(2, 9) < 0.6
    teacher = -3 * torch.rand(int(mask[:, 1:].sum()))
    return dict(model=tiny(97), ids=ids, loss_mask=mask, advantages=torch.tensor([1.0, -1.0]), teacher_logps=teacher)


def trl(tmp_path, tokenizer):
    pytest.importorskip("trl", reason="trl is in the dev extra")
    from datasets import Dataset
    from trl import GRPOConfig

    config = GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
        use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": "a sign that says NOVA"}] * 4)
    reward = lambda completion_ids, **_: [float(sum(x) % 7) for x in completion_ids]  # noqa: E731
    return dict(model=tiny(len(tokenizer)), reward=reward, config=config, prompts=prompts, tokenizer=tokenizer)


def verl(tmp_path, tokenizer):
    pytest.importorskip("verl", reason="see tests/test_verl.py for how to install verl")
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.config import ActorConfig

    row = torch.randn(2, 5)
    return dict(
        policy_loss=POLICY_LOSS_REGISTRY.get("genevolve_sdl"),
        config=ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1),
        old_log_prob=row, log_prob=row.clone().requires_grad_(), advantages=torch.ones(2, 5), teacher=row - 0.1,
        response_mask=torch.ones(2, 5),
    )  # fmt: skip


def liger(tmp_path, tokenizer):
    logps = -3 * torch.rand(2, 5)
    return dict(
        model=tiny(97), hidden=torch.randn(2, 5, 32, requires_grad=True), completion_ids=torch.randint(97, (2, 5)),
        completion_mask=torch.ones(2, 5), advantages=torch.tensor([1.0, -1.0]), old=logps, ref=logps, teacher=logps,
    )  # fmt: skip


def cce(tmp_path, tokenizer):
    ids = torch.randint(97, (2, 9))
    return dict(model=tiny(97), ids=ids, labels=ids)


NEEDS = {
    "Your own trainer": own,
    "TRL": trl,
    "verl": verl,
    "Liger's signature": liger,
    "cut-cross-entropy's signature": cce,
}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")
    yield
    if "genevolve_fast.integrations.verl" in sys.modules:
        sys.modules["genevolve_fast.integrations.verl"].unregister_verl()


@pytest.mark.parametrize(
    ("page", "heading"),
    [(page, heading) for page in PAGES for heading in dict.fromkeys(h for h, _ in blocks(page)) if heading in NEEDS],
    ids=lambda x: x.name if isinstance(x, Path) else x,
)
def test_the_page(page, heading, tmp_path, tokenizer):
    names = {}
    for code in (code for title, code in blocks(page) if title == heading):
        names |= NEEDS[heading](tmp_path, tokenizer)
        exec(compile(code, f"{page.name}: {heading}", "exec"), names)
    loss = names.get("loss")
    assert loss is None or torch.isfinite(loss)


def test_every_block_is_run():
    assert {heading for heading, _ in blocks(PAGES[0])} == set(NEEDS)
