"""An adapter's directory wherever a model is expected, as a user gives it on the command line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, runs_in, summary, train

from rlhf.base.errors import UserError
from rlhf.chat.models import find_reference, load_model
from rlhf.config.choices import Precision
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer

pytestmark = pytest.mark.full

IDS = torch.tensor([[5, 6, 7, 40, 41, 42, 2]])
LOW_RANK = ["actor.lora.rank=4", "reward.lora.rank=4", "sft.lr=1e-2", "rm.lr=1e-2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an SFT run and a reward model of another command are, with their adapters."""
    root = tmp_path_factory.mktemp("adapters")
    for stage in ("sft", "rm"):
        done = train(f"stage={stage}", *LOW_RANK, "rm.loss=per_token", *SMALL, cwd=root)
        assert done.returncode == 0, done.stderr
        (run,) = runs_in(root)[stage]
        shutil.copytree(run / "model" / "adapter", root / f"{stage}-adapter")
    return root


def trained(root: Path, stage: str) -> Path:
    """The model that the fixture has trained."""
    (run,) = (root / "outputs").glob(f"{stage}-tiny+*")
    return run / "model"


def run(root: Path, *args: str, **env: str) -> Path:
    """Run a command, and find the run directory that it made."""
    before = set((root / "outputs").iterdir())
    done = train(*args, *SMALL, cwd=root, **env)
    assert done.returncode == 0, done.stderr
    (made,) = set((root / "outputs").iterdir()) - before
    return made


def test_the_adapter_of_a_run_stands_for_its_model(root: Path) -> None:
    """Also in another run, whose seed draws other weights for a built-in model."""
    torch.manual_seed(77)
    tokenizer = load_tokenizer(str(root / "sft-adapter"))
    for kind, load in (("sft", load_policy), ("rm", load_scorer)):
        found, expected = (
            load(str(path), tokenizer, Precision.fp32).eval().hf
            for path in (root / f"{kind}-adapter", trained(root, kind))
        )
        logits, wanted = (hf(IDS).logits for hf in (found, expected))
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
        for name in ("score_mean", "score_std", "score_before_eos"):
            assert getattr(found.config, name, None) == getattr(expected.config, name, None)
    assert found.config.score_before_eos, "else the reward model is read at another token"


def test_the_files_of_an_adapter_are_the_same_in_each_run_and_name_their_base(root: Path) -> None:
    settings = json.loads((root / "sft-adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["inference_mode"] is True
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("builtin:tiny", "seed-1")


def test_a_finished_run_can_be_read_by_whom_the_umask_allows(root: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in (root / "outputs").rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) == 4
    private = {
        path.name for path in files if path.stat().st_mode & 0o777 & ~0o111 != 0o666 & ~umask
    }
    assert private == set()


def test_sft_from_an_adapter_makes_an_adapter_of_an_adapter(root: Path) -> None:
    new = run(root, "stage=sft", "actor=custom", "actor.path=sft-adapter", *LOW_RANK)
    settings = json.loads((new / "model/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(root / "sft-adapter"), "and not relative"
    assert "sft-adapter: adapter merged into builtin:tiny" in (new / "train.log").read_text()
    tokenizer = load_tokenizer(str(new / "model" / "adapter"))
    chain, merged, first = (
        load_policy(str(path), tokenizer, Precision.fp32).eval().hf(IDS).logits
        for path in (new / "model" / "adapter", new / "model", root / "sft-adapter")
    )
    torch.testing.assert_close(chain, merged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, first, atol=1e-3)
    card = (new / "model" / "README.md").read_text()
    assert f"the adapter `{root / 'sft-adapter'}`, merged into `builtin:tiny`" in card


def test_ppo_from_adapters_is_ppo_from_the_merged_models(root: Path) -> None:
    models = {kind: str(trained(root, kind)) for kind in ("sft", "rm")}
    results = []
    for sft, rm in (("sft-adapter", "rm-adapter"), (models["sft"], models["rm"])):
        ppo = run(root, "stage=ppo", f"rl.actor={sft}", f"rl.reward={rm}", "seed=2")
        results.append(summary(ppo)["metrics"])
        card = (ppo / "model" / "README.md").read_text()
        said = (
            f"- sft: `{root / sft}`" if sft == "sft-adapter" else f"run `{run_id(sft)}` in `{sft}`"
        )
        assert said in card
    assert results[0]["eval/score"] == pytest.approx(results[1]["eval/score"], abs=1e-3)


def run_id(model: str) -> str:
    return str(summary(Path(model).parent)["id"])


def test_dpo_and_another_reward_from_adapters_at_zero_3(root: Path) -> None:
    """In two processes, which partition the merged model."""
    two = ["deploy.processes_per_node=2", "deploy.zero_stage=3"]
    run(root, "stage=dpo", "dpo.actor=sft-adapter", "dpo.max_steps=1", "dpo.batch_size=16", *two)
    rewards = ["rl.rewards.model=null", "rl.rewards.other.path=rm-adapter"]
    run(root, "stage=grpo", "rl.actor=sft-adapter", *rewards, *two)


def test_eval_of_an_adapter(root: Path) -> None:
    policies = "eval.policies=[base,sft-adapter]"
    judge = ["eval.rewards.model=null", "eval.rewards.other.path=rm-adapter"]
    done = run(root, "stage=eval", policies, "eval.against=base", *judge)
    assert "eval/sft-adapter/perplexity" in summary(done)["metrics"]


def test_chat_with_an_adapter(root: Path) -> None:
    model = trained(root, "sft")
    (hf, tokenizer), (expected, own) = (
        load_model(str(path), "cpu") for path in (model / "adapter", model)
    )
    assert tokenizer.chat_template == own.chat_template
    torch.testing.assert_close(hf(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="trained from an SFT policy, so there is no reference"):
        find_reference(str(root / "sft-adapter"))
