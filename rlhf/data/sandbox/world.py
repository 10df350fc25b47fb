"""Make the world: the answers of its writers, the noisy labels, and the parts of the stages."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf.base.constants import SANDBOX_SPLIT
from rlhf.config.schema import Sandbox
from rlhf.data.records import Demonstration, Pair, Prompt, Turn, World
from rlhf.data.sandbox.ground_truth import (
    Request,
    all_prompts,
    best_gold_of_turns,
    gold_of_turns,
    gold_reward,
    request_of,
)
from rlhf.data.sandbox.vocabulary import (
    FILLER,
    KIND_OF,
    KINDS,
    MARKERS,
    NAMING,
    OPENERS,
    RUDE,
    VAGUE,
)

PAIRS_PER_PROMPT = 4  # held-out pairs for each held-out prompt


@dataclass(frozen=True)
class Writer:
    """How carefully one kind of writer answers. All fields are probabilities."""

    share: float  # of the answers
    heeds_wishes: float  # number of steps and tone as the prompt wishes, else by chance
    names_thing: float  # mentions the thing asked about
    wrong_thing: float  # mentions another thing (of the rest)
    wrong_kind: float  # steps for another kind of thing
    filler: float  # each of two empty sentences
    rude: float
    breaks_off: float  # stops in the middle of a sentence


WRITERS = [
    Writer(
        share=0.30,
        heeds_wishes=0.90,
        names_thing=0.9,
        wrong_thing=0.1,
        wrong_kind=0.03,
        filler=0.05,
        rude=0.0,
        breaks_off=0.01,
    ),
    Writer(
        share=0.40,
        heeds_wishes=0.25,
        names_thing=0.5,
        wrong_thing=0.3,
        wrong_kind=0.15,
        filler=0.25,
        rude=0.1,
        breaks_off=0.05,
    ),
    Writer(
        share=0.30,
        heeds_wishes=0.00,
        names_thing=0.3,
        wrong_thing=0.4,
        wrong_kind=0.35,
        filler=0.45,
        rude=0.5,
        breaks_off=0.10,
    ),
]


def ideal_answer(
    request: Request, rng: random.Random, steps: int | None = None, tone: int | None = None
) -> str:
    """A perfect answer to `request`; `steps` and `tone` replace those that it asks for."""
    steps, tone = steps or request.steps, tone if tone is not None else request.tone
    sentences = [rng.choice(OPENERS)] if tone > 0 else []
    sentences.append(rng.choice(NAMING).format(t=request.thing))
    return " ".join(sentences + _steps(rng.sample(KINDS[KIND_OF[request.thing]][1], steps)))


def _steps(steps: list[str]) -> list[str]:
    return [f"{marker}, {step}." for marker, step in zip(MARKERS, steps)]


def write_answer(prompt: str, rng: random.Random) -> str:
    """An answer of a writer drawn from WRITERS."""
    request = request_of(prompt)
    writer = rng.choices(WRITERS, [w.share for w in WRITERS])[0]
    heeds = rng.random() < writer.heeds_wishes
    n_steps = request.steps if heeds else rng.choice([0, 1, 1, 2, 2, 3])
    friendly = request.tone > 0 if heeds and request.tone else rng.random() < 0.5
    kind = KIND_OF[request.thing]
    if rng.random() < writer.wrong_kind:
        kind = rng.choice([k for k in KINDS if k != kind])
    body = _steps(rng.sample(KINDS[kind][1], n_steps))
    for sentence in rng.sample(FILLER, sum(rng.random() < writer.filler for _ in range(2))):
        body.insert(rng.randint(0, len(body)), sentence)
    if rng.random() < writer.names_thing:
        about = rng.choice(NAMING).format(t=request.thing)
    elif rng.random() < writer.wrong_thing:
        about = rng.choice(NAMING).format(t=rng.choice([t for t in KIND_OF if t != request.thing]))
    else:
        about = rng.choice(VAGUE)
    sentences = [rng.choice(OPENERS)] if friendly else []
    if rng.random() < writer.rude:
        sentences.append(rng.choice(RUDE))
    answer = " ".join([*sentences, about, *body])
    if rng.random() < writer.breaks_off:
        split = answer.split()
        answer = " ".join(split[: max(2, len(split) - rng.randint(1, 3))]).rstrip(".!?,")
    return answer


def prefers_first(margin: float, temperature: float) -> float:
    """Bradley-Terry: the probability that the first of two answers is preferred.

    Args: margin: gold reward of the first minus that of the second.
    Returns: sigmoid(margin / temperature).
    """
    return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, margin / temperature))))


def calibrate_temperature(margins: list[float], label_noise: float) -> float:
    """The Bradley-Terry temperature at which the expected share of wrong labels is `label_noise`.

    Args: margins: gold margins of the pairs, none of them zero.  label_noise: in (0, 0.5).
    """
    sizes = np.abs(np.asarray(margins))
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        noise = float((1 / (1 + np.exp(np.minimum(sizes / middle, 50)))).mean())
        low, high = (middle, high) if noise < label_noise else (low, middle)
    return middle


class Comparison(NamedTuple):
    """Two answers to a prompt, without a label."""

    prompt: str
    first: str
    second: str
    margin: float  # gold reward of the first minus that of the second; never 0


def build_world(cfg: Sandbox, seed: int, held_out_prompts: int) -> World:
    """Make the world of `data.seed`.

    Args:
        cfg: sizes and label noise.
        seed: decides the split of the prompts, the answers and the labels.
        held_out_prompts: prompts that nothing is trained on, each with PAIRS_PER_PROMPT pairs.
    Raises: ValueError when there are not enough prompts.
    """
    prompts = all_prompts()
    if held_out_prompts > len(prompts) // 2:
        raise ValueError(f"held_out_prompts={held_out_prompts}: at most half of {len(prompts)}")
    # a stream for each part, so that the size of one does not change another
    rng, rng_sft, rng_rm, rng_eval = (
        random.Random(f"sandbox-{seed}-{part}") for part in ("prompts", "sft", "rm", "eval")
    )
    rng.shuffle(prompts)
    held_out, rest = prompts[:held_out_prompts], prompts[held_out_prompts:]
    a, b = (int(share * len(rest)) for share in SANDBOX_SPLIT)
    for_sft, for_rm, for_ppo = rest[:a], rest[a:b], rest[b:]
    comparisons = _compare(for_rm, cfg.pairs, rng_rm)
    held_out_comparisons = _compare(held_out, PAIRS_PER_PROMPT * held_out_prompts, rng_eval)
    temperature = calibrate_temperature([one.margin for one in comparisons], cfg.label_noise)
    # the arguments below draw from the streams in this order
    return World(
        sft=[_demonstrate(rng_sft.choice(for_sft), rng_sft) for _ in range(cfg.demonstrations)],
        rm=[_label(one, temperature, rng_rm) for one in comparisons],
        ppo=[Prompt([Turn("user", prompt)]) for prompt in for_ppo],
        eval_sft=(references := [_demonstrate(prompt, rng_eval) for prompt in held_out]),
        eval_rm=[_label(one, temperature, rng_eval) for one in held_out_comparisons],
        eval_probe=[_probe(prompt, rng_eval) for prompt in held_out],
        eval_prompts=[Prompt([Turn("user", prompt)]) for prompt in held_out],
        score_unit=references,
        gold=gold_of_turns,
        best_gold=best_gold_of_turns,
    )


def _demonstrate(prompt: str, rng: random.Random) -> Demonstration:
    return Demonstration([Turn("user", prompt)], write_answer(prompt, rng))


def _compare(prompts: list[str], n: int, rng: random.Random) -> list[Comparison]:
    """Answers to random prompts, two of each; without ties, which have no right label."""
    rows: list[Comparison] = []
    while len(rows) < n:
        prompt = rng.choice(prompts)
        first, second = write_answer(prompt, rng), write_answer(prompt, rng)
        margin = gold_reward(prompt, first) - gold_reward(prompt, second)
        if abs(margin) > 1e-9:
            rows.append(Comparison(prompt, first, second, margin))
    return rows


def _label(one: Comparison, temperature: float, rng: random.Random) -> Pair:
    """A pair whose label is drawn from Bradley-Terry."""
    turns = [Turn("user", one.prompt)]
    if rng.random() >= prefers_first(one.margin, temperature):
        return Pair(turns, one.second, one.first, gold_margin=-one.margin, source="sandbox")
    return Pair(turns, one.first, one.second, gold_margin=one.margin, source="sandbox")


def _probe(prompt: str, rng: random.Random) -> Pair:
    """A perfect answer, and one that fits the opposite wishes about the same thing.

    A judge that does not read the prompt is right on half of these pairs. Two steps are the wrong
    number in a quarter of the other prompts' pairs, so "always two" is right on half as well.
    """
    request = request_of(prompt)
    others = {1: [3, 3, 3, 2], 2: [1, 3], 3: [1, 1, 1, 2]}[request.steps]
    tone = request.tone or rng.choice([1, -1])
    fits = ideal_answer(request, rng, tone=tone)
    misses = ideal_answer(request, rng, steps=rng.choice(others), tone=-request.tone or tone)
    margin = gold_reward(prompt, fits) - gold_reward(prompt, misses)
    return Pair([Turn("user", prompt)], fits, misses, gold_margin=margin)
