"""Sources of the score: functions and reward models, their units, and messages about errors."""

from __future__ import annotations

import math
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import command, composed, train
from transformers import PreTrainedConfig

from rlhf.base.errors import UserError
from rlhf.config.choices import Template
from rlhf.config.schema import Config
from rlhf.config.stage_graph import parent_stages
from rlhf.config.stage_nodes import RewardSource
from rlhf.config.validation import check_config
from rlhf.data import template
from rlhf.data.records import Pair, Prompt, Turn
from rlhf.evaluation import reward_model
from rlhf.models.loading import load_tokenizer
from rlhf.rewards.process import RewardProcess, Spec
from rlhf.rl import rewards
from rlhf.rl.experience import Experience, Prompts
from rlhf.rl.rewards import Rewards, Source
from rlhf.runs.checks import check_functions
from rlhf.runs.identity import run_identity, run_name

ASKED = [Prompt([Turn("user", text)]) for text in ("a", "b", "c", "d")]


def sources(**settings: dict[str, Any]) -> Config:
    cfg = composed("stage=ppo")
    cfg.rl.rewards = {name: RewardSource(**values) for name, values in settings.items()}
    return cfg


# ---------------------------------------------------------------------------------------- functions


def test_functions_fill_in_their_columns_and_models_theirs(
    experience: Experience, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All responses to a prompt are in one call; None is no score, and leaves the others' sum."""
    (tmp_path / "parts.py").write_text(
        "def length(completions, completion_ids, trainer_state):\n"
        "    assert trainer_state.global_step == 3 and trainer_state.max_steps == 9\n"
        "    return [len(c) + len(i) / 100 for c, i in zip(completions, completion_ids)]\n"
        "def only_a(prompts, completions):\n"
        "    return [1.0 if prompt == 'a' else None for prompt in prompts]\n"
    )
    monkeypatch.chdir(tmp_path)
    specs = {name: Spec(name, f"parts:{name}") for name in ("length", "only_a")}
    process = RewardProcess(specs)
    parts = [Source("length"), Source("model", 2.0, engine=Fixed()), Source("only_a", -1.0)]  # type: ignore[arg-type]
    rewards = Rewards(parts, tokenizer, process, progress=(3, 9))
    experience.scores = rewards(experience, ASKED)
    assert experience.scores[:, [0, 2]].isnan().all()
    of_model = experience.scores[:, 1].clone()
    asked = Prompts(ASKED, [[]] * 4, torch.zeros(4, 1), per_prompt=2)
    rewards.add_functions(experience, asked)
    process.close()
    expected = [
        len(experience.text(i, tokenizer)) + len(experience.tokens(i)) / 100 for i in range(4)
    ]
    scores = experience.scores
    assert scores.dtype == torch.float32 and scores[:, 0].tolist() == pytest.approx(expected)
    assert torch.equal(scores[:, 1], of_model)
    assert scores[0, 2] == 1 and scores[1:, 2].isnan().all()
    total = rewards.total(scores)
    assert total[0] == pytest.approx(expected[0] + 2 * float(of_model[0]) - 1)
    assert total[1:].tolist() == pytest.approx(
        [expected[i] + 2 * float(of_model[i]) for i in (1, 2, 3)]
    )
    assert experience.reward_errors.tolist() == [[0.0] * 3] * 4


def test_functions_get_every_column_of_the_data(
    experience: Experience, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a rollout none of whose rows has it."""
    (tmp_path / "needs.py").write_text(
        "def truth(completions, truth):\n"
        "    return [None if one is None else 1.0 for one in truth]\n"
    )
    monkeypatch.chdir(tmp_path)
    process = RewardProcess({"truth": Spec("truth", "needs:truth")})
    process.columns = {"truth"}
    experience.scores = torch.zeros(4, 1)
    asked = Prompts(ASKED, [[]] * 4, torch.zeros(4, 1))
    Rewards([Source("truth")], tokenizer, process).add_functions(experience, asked)
    process.close()
    assert experience.scores.isnan().all() and not experience.reward_errors.any()


def test_without_any_score_the_sum_is_none() -> None:
    nan = math.nan
    rows = torch.tensor([[1.0, 2.0, 5.0], [nan, 2.0, 5.0], [nan, nan, 5.0], [nan, nan, nan]])
    both = Rewards([Source("a", 2.0), Source("b", -0.5), Source("measured", 0.0)], None)  # type: ignore[arg-type]
    total = both.total(rows)
    assert total[:2].tolist() == [1.0, -1.0] and total[2:].isnan().all()
    only = Rewards([Source("measured", 0.0)], None)  # type: ignore[arg-type]
    assert only.total(torch.tensor([[5.0]])).tolist() == [0.0]
    assert only.total(torch.tensor([[nan]])).isnan().all()


def test_a_module_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = check_functions(sources(mine={"function": "no_such_module.deep:f"}), "ppo")
    assert line.startswith(
        "rl.rewards.mine.function=no_such_module.deep:f: "
        "there is no module no_such_module.deep, neither here"
    )
    assert not list(check_functions(sources(gold={"function": "rlhf.data.sandbox:gold"}), "ppo"))


def test_a_function_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read, and not run."""
    file = tmp_path / "my_scores.py"
    file.write_text(
        "raise SystemExit\ndef short(completions): ...\nbrief = short\n"
        "async def asked(completions): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("short", "brief", "asked"):
        assert not list(check_functions(sources(mine={"function": f"my_scores:{name}"}), "ppo"))
    (line,) = check_functions(sources(mine={"function": "my_scores:long"}), "ppo")
    assert line == f"rl.rewards.mine.function=my_scores:long: there is no long in {file}"
    done = train("stage=ppo", "rl.rewards.mine.function=no_such_module:f", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "there is no module no_such_module" in done.stderr
        and "Traceback" not in done.stderr
    )


# ------------------------------------------------------------------------------------ reward models


class Fixed:
    """A reward model whose score at a token is the token's id."""

    device = torch.device("cpu")

    def __init__(self, before_eos: bool = False):
        settings = types.SimpleNamespace(score_before_eos=before_eos)
        self.module = types.SimpleNamespace(hf=types.SimpleNamespace(config=settings))

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids.float()


def test_the_score_is_read_at_the_last_token_or_before_its_eos(
    experience: Experience,
    tokenizer: Any,
) -> None:
    at_end = Rewards([Source("m", engine=Fixed())], tokenizer)(experience, ASKED)[:, 0]
    before = Rewards([Source("m", engine=Fixed(before_eos=True))], tokenizer)(experience, ASKED)[
        :, 0
    ]
    for i in range(4):
        tokens = experience.response_ids[i][experience.response_mask[i] > 0].tolist()
        assert at_end[i] == tokens[-1]
        assert before[i] == [t for t in tokens if t != tokenizer.eos_token_id][-1]
    assert at_end[1] == tokenizer.eos_token_id != before[1]


def test_the_unit_of_rows_is_their_mean_and_deviation(tokenizer: Any) -> None:
    rows = [[5, 7], [9], [4, 4, 11, 13]]
    mean, std = rewards.score_mean_std(Fixed(), rows, tokenizer, 2)
    assert (mean, std) == pytest.approx(
        (29 / 3, math.sqrt(((7 - 29 / 3) ** 2 + (9 - 29 / 3) ** 2 + (13 - 29 / 3) ** 2) / 3))
    )


@pytest.mark.parametrize("std, unit", [(2.5, (4.0, 2.5)), (0.0, (0.0, 1.0)), (1e-7, (0.0, 1.0))])
def test_equal_scores_are_no_unit(
    std: float, unit: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    """As the score of a single response; in units of 0 all others would be huge."""
    model = Fixed()
    rewards.store_unit(model, 4.0, std, "rl.rewards.mine")
    settings = model.module.hf.config
    assert (settings.score_mean, settings.score_std) == unit
    said = "rl.rewards.mine: the scores of the responses that their unit is measured on are all"
    assert (said in caplog.text) == (std < 1)


def test_the_weighted_sum_and_the_name_of_the_truth() -> None:
    both = Rewards([Source("a", 2.0), Source("b", -0.5)], None)
    assert (
        both.total(torch.tensor([[1.0, 4.0], [3.0, 2.0]])).tolist() == [0.0, 5.0]
        and both.total(torch.tensor([1.0, 0.0])) == 2.0
    )
    (line,) = check_config(sources(gold={"function": "my_rewards:thanks"}))
    assert line.startswith("rl.rewards.gold: gold is the name of the built-in ground truth")
    assert check_config(sources(gold={"function": "rlhf.data.sandbox:gold"})) == []


# ------------------------------------------------------------------------------ as a user sets them


def test_without_the_trained_reward_model_none_is_needed() -> None:
    gold = ["rl.rewards.model=null", "rl.rewards.g.function=rlhf.data.sandbox:gold"]
    plain, other = composed("stage=ppo"), command("stage=ppo", *gold)
    assert list(parent_stages(plain, "ppo")) == ["sft", "rm"]
    assert list(parent_stages(other.cfg, "ppo")) == ["sft"]
    keys = run_identity(other, "ppo")
    assert keys["rl.rewards.g.weight"] == 1.0 and not any(key.startswith("rm.") for key in keys)
    read = {key.rsplit(".", 1)[0] for key in keys if key.startswith("reward.")}
    assert read == {"reward.lora"}  # the critic's adapter
    assert run_name(other, "ppo").startswith("ppo-tiny+rl.rewards.g")


def test_a_reward_model_from_elsewhere_is_asked_in_its_own_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [Turn("user", "Hello?")]
    load_tokenizer("builtin:tiny", Template.chatml).save_pretrained(tmp_path / "own")
    plain = load_tokenizer("builtin:tiny")
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "none")
    with caplog.at_level("INFO", "rlhf"):
        own = rewards.reward_tokenizer(str(tmp_path / "own"), Template.hh, "rl.rewards.judge")
        none = rewards.reward_tokenizer(str(tmp_path / "none"), Template.hh, "rl.rewards.judge")
    assert own is not None and none is None
    assert "<|im_start|>user\nHello?" in template.render_prompt(own, turns)
    assert rewards.needs_text(load_tokenizer("builtin:tiny"), own), "it reads responses as text"
    first, second = caplog.messages
    assert first == "rl.rewards.judge: the reward model is asked in its own chat template"
    assert second.startswith("rl.rewards.judge: asked in data.template=hh, not in its own (")
    assert "has no chat template" in second


def test_a_score_is_read_where_the_reward_models_own_template_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other programs read it at the last token of what the template writes."""
    chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    own = load_tokenizer("builtin:tiny", Template.chatml)
    policy = load_tokenizer("builtin:tiny", Template.chatml)
    assert not rewards.needs_text(policy, own)
    own.chat_template = chat_template
    assert rewards.needs_text(policy, own), "its template writes a line break after the EOS"
    engine = SimpleNamespace(module=SimpleNamespace(hf=SimpleNamespace(config=PreTrainedConfig())))
    source = Source("judge", engine=engine, tokenizer=own, reads_text=True)  # type: ignore[arg-type]
    turns = [Turn("user", "Hello?")]
    said = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    whole = own(own.apply_chat_template(said, tokenize=False), add_special_tokens=False).input_ids
    assert rewards.retokenize(source, turns, "Hi.", finished=True) == whole
    assert own.decode(whole).endswith("Hi.<|im_end|>\n")
    cut = rewards.retokenize(source, turns, "Hi.", finished=False)
    assert own.decode(cut).endswith("assistant\nHi.")
    tools = Turn("tools", '[{"name": "add"}]')
    with pytest.raises(UserError, match="judge is asked in its own chat template, which cannot"):
        rewards.retokenize(source, [tools, *turns], "Hi.", finished=True)
    pair = Pair(turns, "Hi.", "No.")
    with monkeypatch.context() as patched:  # what a judge of pairs reads
        read: list[list[int]] = []
        patched.setattr(
            reward_model, "score_rows", lambda s, rows, *_: read.extend(rows) or [0.0] * len(rows)
        )
        reward_model.score_pairs(engine, own, [pair], 99, 99, 4)  # type: ignore[arg-type]
    assert read[0] == whole and own.decode(read[1]).endswith("No.<|im_end|>\n")
