"""An adapter is merged into the weights while sampling, and nothing of that is left afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import IDS, build, logits, update, with_adapter
from families import FAMILIES
from torch import Tensor, nn

from rlhf.data.batches import uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.models.lora import lora_layers, merged_adapter
from rlhf.rl import experience
from rlhf.rl.experience import Models, Prompts, sample_responses
from rlhf.sampling.token_choice import Sampling


def state(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """All weights of a module, and whether they are trained."""
    return {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_the_same_and_restores_every_bit(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None, family: str
) -> None:
    engine = build(with_adapter("sft"), base(family), tokenizer, tmp_path, "actor")
    engine.train()
    update(engine)  # B is zero before
    engine.eval()
    hf, before = engine.module.hf, state(engine.module)
    with torch.no_grad():
        expected = logits(engine.module)
        with pytest.raises(KeyError), merged_adapter(hf):
            assert all(layer.disable_adapters for _, layer in lora_layers(hf))
            found = logits(engine.module)
            raise KeyError  # whatever happens meanwhile
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert not torch.equal(found, expected)  # it was another computation
        assert torch.equal(logits(engine.module), expected)
    after = state(engine.module)
    assert all(torch.equal(w, after[k][0]) and t == after[k][1] for k, (w, t) in before.items())
    update(engine)  # and it can be trained


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_the_same_tokens_are_sampled(
    tokenizer: Any,
    tmp_path: Path,
    one_process: None,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = with_adapter("sft", f"deploy.zero_stage={zero_stage}")
    torch.manual_seed(0)
    engine = build(cfg, "builtin:tiny", tokenizer, tmp_path, "actor")
    engine.train()
    update(engine, ids=IDS % 100)
    engine.eval()
    ids = [[5, 6, 7], [8, 9], [20, 21, 22, 23]]
    prompts = Prompts(
        [Prompt([Turn("user", "Hi")])] * 3, ids, uniforms("rollout", range(3), 0, 0, 9)
    )
    merged = []

    def sampled(merge: bool = True) -> Any:
        models = Models(tokenizer, engine, merge=merge)
        return sample_responses(models, prompts, range(3), Sampling(), 2)

    def watched(*args: Any, **options: Any) -> Any:
        merged.append(1)
        return merged_adapter(*args, **options)

    monkeypatch.setattr(experience, "merged_adapter", watched)
    found = sampled()
    assert merged == [1]  # once per rollout
    expected = sampled(merge=False)
    assert merged == [1]
    assert torch.equal(found.response_ids, expected.response_ids)
    torch.testing.assert_close(
        found.sampler_logprobs, expected.sampler_logprobs, atol=1e-5, rtol=1e-5
    )
