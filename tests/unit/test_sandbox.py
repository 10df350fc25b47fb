"""The sandbox, whose gold reward is known, and the built-in tiny model."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import REPO

from rlhf.config.choices import Precision
from rlhf.config.schema import Sandbox
from rlhf.data import encoding
from rlhf.data.records import Pair, Prompt, Turn, World
from rlhf.data.sandbox import build_tiny, ground_truth, vocabulary, world
from rlhf.models.loading import ASSETS, load_policy, load_tokenizer

SIZES = Sandbox(demonstrations=400, pairs=2000, label_noise=0.06)


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


@functools.cache
def make(seed: int = 1) -> World:
    return world.build_world(SIZES, seed, 256)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False).input_ids


# --- sandbox: its truth

SHORT, FRIENDLY, PLAIN = " Keep it short.", " Be nice to me.", " No small talk."
ASK = "How do I look after my rose?"


@pytest.mark.parametrize(
    "prompt, answer, gold",
    [
        # two steps and any tone: 2 for length + 0.25 for the name
        (ASK, "The rose will thank you. First, water it slowly. Next, add fresh soil.", 2.25),
        (
            ASK,
            "Good question! The rose will thank you. First, water it slowly. Next, add fresh soil.",
            2.25,
        ),
        # length: 2 - |steps - wanted|
        (ASK, "First, water it slowly.", 1.0),
        (ASK, "It will thank you.", 0.0),
        (ASK + SHORT, "First, water it slowly.", 2.0),
        (ASK + SHORT, "First, water it slowly. Next, add fresh soil. Then, pull the weeds.", 0.0),
        (
            ASK + " Give me every detail.",
            "First, water it slowly. Next, add fresh soil. Then, pull the weeds.",
            2.0,
        ),
        # tone: +-1.5 where there is a wish; friendly = begins with an opener
        (ASK + SHORT + FRIENDLY, "Good question! First, water it slowly.", 3.5),
        (ASK + SHORT + FRIENDLY, "First, water it slowly.", 0.5),
        (ASK + SHORT + FRIENDLY, "First, water it slowly. Good question!", 0.5),
        (ASK + SHORT + PLAIN, "First, water it slowly.", 3.5),
        (ASK + SHORT + PLAIN, "Good question! First, water it slowly.", 0.5),
        # named: +0.25 the thing asked about, -0.25 another one
        (ASK + SHORT, "Your rose needs a little care. First, water it slowly.", 2.25),
        (ASK + SHORT, "Your cat needs a little care. First, water it slowly.", 1.75),
        (
            ASK + SHORT,
            "Your rose needs a little care. The cat will thank you. First, water it slowly.",
            2.0,
        ),
        # a step for another kind of thing counts for length, and costs 0.25
        (ASK + SHORT, "First, fill the bowl.", 1.75),
        (ASK, "First, fill the bowl. Next, check the paws.", 1.5),
        # filler 0.5, rude 1, a strange sentence 0.5, each time
        (ASK + SHORT, "There is a lot to say here. First, water it slowly.", 1.5),
        (ASK + SHORT, "Everybody knows this. Work it out yourself. First, water it slowly.", 0.0),
        (ASK + SHORT, "Buy gold now. First, water it slowly.", 1.5),
        (ASK + SHORT, "First, paint it green.", 0.5),  # no step of this world: length 1, strange
        # a repeated step counts for length, and costs 0.5
        (ASK, "First, water it slowly. Next, water it slowly.", 1.5),
        # unfinished 1; what it broke off is no sentence
        (ASK + SHORT, "First, water it slowly. Next, add", 1.0),
        (ASK + SHORT, "First, water it slowly", 0.0),  # length 1 for no step, minus 1
        (ASK + SHORT, "", 0.0),
        (
            ASK + FRIENDLY,
            "Do not waste my time. First, fill the bowl. There is a",
            1.0 - 1.5 - 0.25 - 1.0 - 1.0,
        ),
    ],
)
def test_gold_reward_by_hand(prompt: str, answer: str, gold: float) -> None:
    assert ground_truth.gold_reward(prompt, answer) == pytest.approx(gold)


def test_every_prompt_reads_as_what_it_was_made_of() -> None:
    prompts = ground_truth.all_prompts()
    assert len(prompts) == len(set(prompts)) == 24 * 12 * 5 * 5
    parts = iter(prompts)
    for thing in vocabulary.KIND_OF:
        for _ in vocabulary.QUESTIONS:
            for steps in vocabulary.LENGTH_WISHES.values():
                for tone in vocabulary.TONE_WISHES.values():
                    assert ground_truth.request_of(next(parts)) == ground_truth.Request(
                        thing, steps, tone
                    )
    with pytest.raises(ValueError, match="sandbox"):
        ground_truth.request_of("What is the capital of France?")


def test_the_best_answer_has_the_best_gold_for_every_prompt() -> None:
    rng = random.Random(0)
    for prompt in ground_truth.all_prompts():
        assert ground_truth.gold_reward(
            prompt, world.ideal_answer(ground_truth.request_of(prompt), rng)
        ) == pytest.approx(ground_truth.best_gold(prompt))


def test_no_answer_is_better_than_the_best_gold() -> None:
    rng, prompts = random.Random(1), ground_truth.all_prompts()
    gaps = []
    for _ in range(5000):
        prompt = rng.choice(prompts)
        gaps.append(
            ground_truth.best_gold(prompt)
            - ground_truth.gold_reward(prompt, world.write_answer(prompt, rng))
        )
    assert min(gaps) >= -1e-9
    assert sum(gap > 0.5 for gap in gaps) > 0.5 * len(gaps)  # and most leave room to learn


def test_the_sentences_of_the_world_do_not_step_on_each_other() -> None:
    """A step that named a thing, or a sentence of two kinds, would change the gold reward."""
    fixed = (
        vocabulary.OPENERS
        + vocabulary.VAGUE
        + vocabulary.RUDE
        + vocabulary.FILLER
        + list(vocabulary.KIND_OF_STEP)
    )
    assert not [text for text in fixed if set(ground_truth.words(text)) & set(vocabulary.KIND_OF)]
    assert len(vocabulary.KIND_OF_STEP) == sum(len(steps) for _, steps in vocabulary.KINDS.values())
    kinds = [
        vocabulary.OPENERS,
        vocabulary.VAGUE,
        vocabulary.RUDE,
        vocabulary.FILLER,
        vocabulary.NAMING,
    ]
    assert len({text for texts in kinds for text in texts}) == sum(map(len, kinds))


# --- sandbox: its records


def plain(data: World) -> dict[str, Any]:
    """The records of a world, without its two functions."""
    return {name: value for name, value in data._asdict().items() if isinstance(value, list)}


def prompts_of(rows: Sequence[Any]) -> set[str]:
    return {(row.turns if isinstance(row, Prompt) else row.prompt)[-1].text for row in rows}


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    again = world.build_world(SIZES, 1, 256)
    assert plain(again) == plain(make())
    other = plain(make(2))
    assert all(other[name] != rows for name, rows in plain(make()).items())


def test_no_prompt_is_in_two_parts() -> None:
    data = make()
    held_out = (
        prompts_of(data.eval_sft)
        | prompts_of(data.eval_rm)
        | prompts_of(data.eval_probe)
        | prompts_of(data.eval_prompts)
    )
    parts = [prompts_of(data.sft), prompts_of(data.rm), prompts_of(data.ppo), held_out]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))
    assert len(held_out) == 256 == len(prompts_of(data.eval_prompts))


def test_sizes_are_as_asked_for_and_too_many_held_out_prompts_are_refused() -> None:
    data = make()
    assert (
        len(data.sft),
        len(data.rm),
        len(data.eval_sft),
        len(data.eval_probe),
        len(data.eval_rm),
    ) == (400, 2000, 256, 256, 1024)
    with pytest.raises(ValueError, match="held_out_prompts=5000"):
        world.build_world(SIZES, 1, 5000)


def test_the_size_of_one_part_does_not_change_another() -> None:
    base = plain(make())
    more_sft = plain(world.build_world(dataclasses.replace(SIZES, demonstrations=500), 1, 256))
    assert more_sft["sft"][:400] == base["sft"]
    assert {name: rows for name, rows in more_sft.items() if name != "sft"} == {
        name: rows for name, rows in base.items() if name != "sft"
    }
    more_rm = plain(world.build_world(dataclasses.replace(SIZES, pairs=2100), 1, 256))
    for name in ("sft", "ppo", "eval_sft", "eval_prompts", "eval_probe"):
        assert more_rm[name] == base[name], name
    for name in (
        "rm",
        "eval_rm",
    ):  # the label noise is calibrated on the training pairs, so labels may flip; the answers stay
        rows = [[{pair.chosen, pair.rejected} for pair in data[name]] for data in (base, more_rm)]
        assert rows[1][: len(rows[0])] == rows[0], name


def test_margins_and_functions_give_the_gold_reward() -> None:
    data = make()
    assert data.gold and data.best_gold
    for pair in data.rm + data.eval_rm + data.eval_probe:
        margin = data.gold(pair.prompt, pair.chosen) - data.gold(pair.prompt, pair.rejected)
        assert pair.gold_margin == pytest.approx(margin) and margin != 0
    assert all(data.gold(d.prompt, d.response) <= data.best_gold(d.prompt) + 1e-9 for d in data.sft)


def test_labels_are_wrong_as_often_as_configured() -> None:
    for noise in (0.03, 0.2):
        data = world.build_world(Sandbox(demonstrations=1, pairs=4000, label_noise=noise), 1, 1)
        agree = sum(pair.gold_margin > 0 for pair in data.rm) / len(data.rm)
        assert abs((1 - agree) - noise) < 0.01
    agree = sum(pair.gold_margin > 0 for pair in make().rm) / len(make().rm)
    assert agree >= 0.9


def test_calibration_finds_the_temperature_of_the_label_noise() -> None:
    rng = random.Random(0)
    margins = [rng.gauss(0, 2) for _ in range(500)]
    for noise in (0.01, 0.06, 0.3, 0.45):
        temperature = world.calibrate_temperature(margins, noise)
        expected = sum(
            1 - world.prefers_first(abs(margin), temperature) for margin in margins
        ) / len(margins)
        assert expected == pytest.approx(noise, abs=1e-6)


def test_prefers_first_is_the_logistic_function_and_never_overflows() -> None:
    assert world.prefers_first(0.0, 1.0) == 0.5
    assert world.prefers_first(1.0, 2.0) == pytest.approx(0.6224593)
    assert world.prefers_first(2.0, 1.0) + world.prefers_first(-2.0, 1.0) == pytest.approx(1.0)
    assert 0 <= world.prefers_first(-1e9, 1e-3) < 1e-20 and world.prefers_first(
        1e9, 1e-3
    ) == pytest.approx(1.0)


def share_right(rule: Callable[[str], float], pairs: list[Pair]) -> float:
    """How often a judge that does not read the prompt is right; a tie counts half."""
    return sum(
        (rule(p.chosen) > rule(p.rejected)) + 0.5 * (rule(p.chosen) == rule(p.rejected))
        for p in pairs
    ) / len(pairs)


@functools.cache
def many_probes() -> list[Pair]:
    return world.build_world(
        Sandbox(demonstrations=1, pairs=50, label_noise=0.06), 1, 1000
    ).eval_probe


def n_steps(answer: str) -> int:
    return sum(answer.count(f"{marker}, ") for marker in vocabulary.MARKERS)


def test_probe_pairs_differ_only_in_what_the_prompt_wishes() -> None:
    for pair in many_probes():
        request = ground_truth.request_of(pair.prompt[0].text)
        assert pair.gold_margin is not None and pair.gold_margin > 0
        assert ground_truth.gold_reward(pair.prompt[0].text, pair.chosen) == pytest.approx(
            ground_truth.best_gold(pair.prompt[0].text)
        )
        for answer in (pair.chosen, pair.rejected):
            assert {word for word in ground_truth.words(answer) if word in vocabulary.KIND_OF} == {
                request.thing
            }
            faults = ground_truth.factors(pair.prompt[0].text, answer)
            assert all(
                faults[key] == 0 for key in ("wrong_kind", "filler", "rude", "noise", "unfinished")
            )


@pytest.mark.parametrize(
    "rule",
    [
        len,
        n_steps,
        lambda answer: answer.startswith(tuple(vocabulary.OPENERS)),
        lambda answer: -abs(n_steps(answer) - 2),
        lambda answer: zlib.crc32(answer.encode()),
    ],
    ids=["longer", "more steps", "friendly", "two steps", "arbitrary"],
)
def test_a_judge_that_does_not_read_the_prompt_is_right_on_about_half_of_the_probe(
    rule: Callable[[str], float],
) -> None:
    assert 0.45 <= share_right(rule, many_probes()) <= 0.55


# --- built-in model


def test_the_committed_tiny_model_is_what_its_script_builds(tmp_path: Path) -> None:
    build_tiny.build(tmp_path)
    committed = ASSETS / "tiny"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in committed.iterdir())
    assert (tmp_path / "tokenizer.json").read_bytes() == (committed / "tokenizer.json").read_bytes()
    configs = [
        json.loads((directory / "config.json").read_text()) for directory in (tmp_path, committed)
    ]
    versions = [config.pop("transformers_version") for config in configs]
    assert configs[0] == configs[1]
    if versions[0] == versions[1]:
        assert (tmp_path / "config.json").read_bytes() == (committed / "config.json").read_bytes()
    assert sum(p.stat().st_size for p in committed.iterdir()) <= 100_000


def test_the_tiny_model_is_tiny() -> None:
    policy = load_policy("builtin:tiny", tokenizer(), Precision.fp32)
    assert sum(p.numel() for p in policy.parameters()) <= 5_000_000


def test_the_whole_sandbox_fits_its_limits_with_room_for_eos() -> None:
    limits = yaml.safe_load((REPO / "conf/data/sandbox.yaml").read_text())
    prompts = encoding.encode_prompts(
        tokenizer(), [[Turn("user", text)] for text in ground_truth.all_prompts()], 10_000
    )
    longest = max(len(ids) for ids in prompts if ids)
    assert longest < limits["max_prompt_tokens"]
    answers = [d.response for d in make().sft] + [
        text for pair in make().rm for text in (pair.chosen, pair.rejected)
    ]
    answers += [text for pair in make().eval_probe for text in (pair.chosen, pair.rejected)]
    lengths = [len(ids) for ids in encoding.encode_responses(tokenizer(), answers, 10_000)]
    assert max(lengths) < limits["max_response_tokens"]
    from transformers import AutoConfig

    assert (
        limits["max_prompt_tokens"] + limits["max_response_tokens"]
        <= AutoConfig.from_pretrained(ASSETS / "tiny").max_position_embeddings
    )


def test_any_text_survives_the_tiny_tokenizer() -> None:
    for text in ("Sphinx of black quartz!", "Größe 日本 ☃\n\ttabs", "  two  spaces  "):
        assert tokenizer().decode(encode(text)) == text
