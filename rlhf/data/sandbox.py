"""The sandbox: a small preference world whose truth is known.

People ask for help with something they own, and may wish for a short or a detailed answer, a friendly or a plain one. Writers
of different care answer. `gold_reward` says how good an answer is *for its prompt*, so everything that learns from this world
can be compared with the truth: a reward model with the labels a perfect judge would give, a policy with the best answer there is.

Everything is made by code from `data.seed`; no files, no torch. The same seed gives the same world on every machine.
"""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import dataclass

import numpy as np

from rlhf.config.constants import SANDBOX_SPLIT
from rlhf.config.schema import Sandbox
from rlhf.data.records import Dataset, Demonstration, Pair, Turn

# ------------------------------------------------------------------------------------------------------------------ vocabulary

# kind of thing -> (things, what one does with such a thing)
KINDS: dict[str, tuple[list[str], list[str]]] = {
    "garden": (
        ["rose", "fern", "tulip", "cactus"],
        [
            "water it slowly",
            "trim the dry leaves",
            "add fresh soil",
            "pull the weeds",
            "move it into the sun",
        ],
    ),
    "kitchen": (
        ["pan", "kettle", "knife", "oven"],
        [
            "rinse it well",
            "scrub off the grease",
            "wipe it with a cloth",
            "let it cool",
            "sharpen the edge",
        ],
    ),
    "music": (
        ["guitar", "piano", "violin", "drum"],
        [
            "tune it by ear",
            "play a slow scale",
            "learn one easy song",
            "close the case",
            "listen to the sound",
        ],
    ),
    "animal": (
        ["cat", "dog", "rabbit", "pony"],
        [
            "fill the bowl",
            "brush the fur",
            "offer a small treat",
            "check the paws",
            "make a soft bed",
        ],
    ),
    "clothes": (
        ["jacket", "scarf", "shirt", "dress"],
        ["wash it cold", "mend the seam", "hang it in the shade", "fold it flat", "iron it gently"],
    ),
    "vehicle": (
        ["bicycle", "scooter", "truck", "tractor"],
        [
            "check the brakes",
            "pump up the tires",
            "oil the chain",
            "tighten the bolts",
            "test the lights",
        ],
    ),
}
KIND_OF = {thing: kind for kind, (things, _) in KINDS.items() for thing in things}
KIND_OF_STEP = {step: kind for kind, (_, steps) in KINDS.items() for step in steps}

QUESTIONS = [
    "How do I look after my {t}?",
    "What does my {t} need?",
    "How should I treat the {t}?",
    "Can you help me with my {t}?",
    "Any advice about the {t}?",
    "What should I do with my {t}?",
    "My {t} looks sad. What now?",
    "I just got a {t}. What now?",
    "How can I keep the {t} in good shape?",
    "What is good for my {t}?",
    "My {t} is old. Can you help?",
    "Is it hard to look after the {t}?",
]
# wishes about length -> number of steps wanted; wishes about tone -> +1 friendly, -1 plain, 0 either
LENGTH_WISHES = {
    "": 2,
    " Keep it short.": 1,
    " One step is enough.": 1,
    " Give me every detail.": 3,
    " I want it step by step.": 3,
}
TONE_WISHES = {
    "": 0,
    " Be nice to me.": 1,
    " I had a hard day.": 1,
    " No small talk.": -1,
    " Just the facts.": -1,
}

OPENERS = ["Happy to help!", "Good question!", "What a lovely idea!", "Thanks for asking!"]
NAMING = [
    "Your {t} needs a little care.",
    "Looking after the {t} is simple.",
    "The {t} will thank you.",
    "Here is what I do for my {t}.",
]
VAGUE = [
    "It needs a little care.",
    "Looking after it is simple.",
    "It will thank you.",
    "Here is what I do.",
]
RUDE = [
    "That is a silly question.",
    "Everybody knows this.",
    "Do not waste my time.",
    "Work it out yourself.",
]
FILLER = [
    "There is a lot to say here.",
    "It depends on many things.",
    "People have many opinions.",
    "I could go on for hours.",
]
MARKERS = ["First", "Next", "Then", "Finally"]
KNOWN_SENTENCES = {
    *OPENERS,
    *VAGUE,
    *RUDE,
    *FILLER,
    *(text.format(t=thing) for text in NAMING for thing in KIND_OF),
}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


@dataclass(frozen=True)
class Writer:
    """How carefully one kind of writer answers. All fields are probabilities."""

    share: float  # of the answers
    heeds_wishes: float  # number of steps and tone as wished, else by chance
    names_thing: float  # mentions the thing asked about
    wrong_thing: float  # mentions another thing (of the rest)
    wrong_kind: float  # steps for another kind of thing
    filler: float  # each of two empty sentences
    rude: float
    cut: float  # stops in the middle of a sentence


WRITERS = [
    Writer(
        0.30,
        heeds_wishes=0.90,
        names_thing=0.9,
        wrong_thing=0.1,
        wrong_kind=0.03,
        filler=0.05,
        rude=0.0,
        cut=0.01,
    ),
    Writer(
        0.40,
        heeds_wishes=0.25,
        names_thing=0.5,
        wrong_thing=0.3,
        wrong_kind=0.15,
        filler=0.25,
        rude=0.1,
        cut=0.05,
    ),
    Writer(
        0.30,
        heeds_wishes=0.00,
        names_thing=0.3,
        wrong_thing=0.4,
        wrong_kind=0.35,
        filler=0.45,
        rude=0.5,
        cut=0.10,
    ),
]


# ---------------------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Request:
    """What a prompt asks for, read off its text."""

    thing: str
    steps: int  # wanted number of steps, 1 to 3
    tone: int  # +1 friendly, -1 plain, 0 no wish


def all_prompts() -> list[str]:
    """Every prompt of the world, in a fixed order: 24 things x 12 questions x 5 length wishes x 5 tone wishes."""
    return [
        question.format(t=thing) + length + tone
        for thing in KIND_OF
        for question in QUESTIONS
        for length in LENGTH_WISHES
        for tone in TONE_WISHES
    ]


@functools.cache  # a prompt is read once for each of its answers
def request_of(prompt: str) -> Request:
    """What a prompt of this world asks for. Raises ValueError when the text names no thing of this world."""
    things = [word for word in words(prompt) if word in KIND_OF]
    if not things:
        raise ValueError(f"not a prompt of the sandbox, it names none of its things: {prompt!r}")
    steps = next(
        (n for wish, n in LENGTH_WISHES.items() if wish and wish.strip() in prompt),
        LENGTH_WISHES[""],
    )
    tone = next(
        (n for wish, n in TONE_WISHES.items() if wish and wish.strip() in prompt), TONE_WISHES[""]
    )
    return Request(things[0], steps, tone)


# ------------------------------------------------------------------------------------------------------------------ gold reward


def factors(prompt: str, answer: str) -> dict[str, float]:
    """The parts of the gold reward, all read off the two texts. Keys are documented at `gold_reward`."""
    request = request_of(prompt)
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]", answer)]
    steps = [
        s.split(", ", 1)[1][:-1] for s in sentences if s.split(", ", 1)[0] in MARKERS and ", " in s
    ]
    known = [step for step in steps if step in KIND_OF_STEP]
    named = {word for word in words(answer) if word in KIND_OF}
    friendly = any(s in OPENERS for s in sentences[:1])
    strange = sum(s not in KNOWN_SENTENCES for s in sentences) - len(known)
    return {
        "length": 2.0 - abs(len(known) - request.steps),
        "tone": 1.5 * request.tone * (1.0 if friendly else -1.0),
        "named": 0.25 * (request.thing in named) - 0.25 * bool(named - {request.thing}),
        "wrong_kind": -0.25 * sum(KIND_OF_STEP[step] != KIND_OF[request.thing] for step in known),
        "filler": -0.5 * sum(s in FILLER for s in sentences),
        "rude": -1.0 * sum(s in RUDE for s in sentences),
        "noise": -0.5 * (strange + len(known) - len(set(known))),
        "unfinished": -1.0 * (not answer.rstrip().endswith((".", "!"))),
    }


def gold_reward(prompt: str, answer: str) -> float:
    """How good `answer` is for `prompt`: the truth of this world.

    length      2 - |steps - wanted|; wanted = 1, 2 or 3 by the wish about length
    tone        +1.5 / -1.5 when a friendly or plain answer was wished for and given / not given (friendly = begins with an opener)
    named       +0.25 for naming the thing asked about, -0.25 for naming another one
    wrong_kind  -0.25 for each step that belongs to another kind of thing
    filler -0.5, rude -1 per sentence; noise -0.5 per sentence that is none of this world's and per repeated step; unfinished -1

    Args: the text of the question, without role markers; the text of the answer.
    Returns: the sum. The best answer has `best_gold(prompt)`.
    Raises: ValueError when the prompt names no thing of this world.
    """
    return sum(factors(prompt, answer).values())


def gold(turns: list[Turn], answer: str) -> float:
    """The gold reward as a source of PPO's score: '+ppo.rewards={gold: {function: "rlhf.data.sandbox:gold"}}'."""
    return gold_reward(turns[-1].text, answer)


def best_gold(prompt: str) -> float:
    """The gold reward of the best possible answer to `prompt`: 2 for length, 1.5 if there is a wish about tone, 0.25 for the name."""
    request = request_of(prompt)
    return 2.25 + 1.5 * abs(request.tone)


# ---------------------------------------------------------------------------------------------------------------------- answers


def ideal_answer(
    request: Request, rng: random.Random, steps: int | None = None, tone: int | None = None
) -> str:
    """An answer without a fault to `request`; `steps` and `tone` replace the wished ones."""
    steps, tone = steps or request.steps, tone if tone is not None else request.tone
    sentences = [rng.choice(OPENERS)] if tone > 0 else []
    sentences.append(rng.choice(NAMING).format(t=request.thing))
    return " ".join(sentences + _steps(rng.sample(KINDS[KIND_OF[request.thing]][1], steps)))


def _steps(steps: list[str]) -> list[str]:
    return [f"{marker}, {step}." for marker, step in zip(MARKERS, steps)]


def write_answer(prompt: str, rng: random.Random) -> str:
    """An answer by a writer drawn from WRITERS."""
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
    sentences = (
        ([rng.choice(OPENERS)] if friendly else [])
        + ([rng.choice(RUDE)] if rng.random() < writer.rude else [])
        + [about, *body]
    )
    answer = " ".join(sentences)
    if rng.random() < writer.cut:
        words = answer.split()
        answer = " ".join(words[: max(2, len(words) - rng.randint(1, 3))]).rstrip(".!?,")
    return answer


# ------------------------------------------------------------------------------------------------------------------- the world


def prefers_first(margin: float, temperature: float) -> float:
    """Bradley-Terry: the probability that the first of two answers is preferred, sigmoid(margin / temperature)."""
    return 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, margin / temperature))))


def calibrate_temperature(margins: list[float], label_noise: float) -> float:
    """The Bradley-Terry temperature at which a perfect judge disagrees with `label_noise` of the labels in expectation.

    Args: gold margins of the pairs, all non-zero; the wanted share of labels against the gold order, in (0, 0.5).
    """
    sizes = np.abs(np.asarray(margins))
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        noise = float((1 / (1 + np.exp(np.minimum(sizes / middle, 50)))).mean())
        low, high = (middle, high) if noise < label_noise else (low, middle)
    return middle


def build_world(cfg: Sandbox, seed: int, eval_rows: int) -> Dataset:
    """Make the world of `data.seed`; the prompts of its parts are disjoint.

    Args:
        cfg: sizes and label noise.  seed: decides the split of the prompts, the answers and the labels.
        eval_rows: held-out prompts that every run is evaluated on; there are four held-out pairs on each.
    Raises: ValueError when there are fewer prompts than that asks for.
    """
    # a stream for each part, so that the size of one does not change another
    rng, rng_sft, rng_rm, rng_eval = (
        random.Random(f"sandbox-{seed}-{part}") for part in ("prompts", "sft", "rm", "eval")
    )
    prompts = all_prompts()
    if eval_rows > len(prompts) // 2:
        raise ValueError(
            f"data.eval_rows={eval_rows}: the sandbox has {len(prompts)} prompts, hold out at most half of them"
        )
    rng.shuffle(prompts)
    held_out, rest = prompts[:eval_rows], prompts[eval_rows:]
    a, b = (int(share * len(rest)) for share in SANDBOX_SPLIT)
    for_sft, for_rm, for_ppo = rest[:a], rest[a:b], rest[b:]

    def demonstrate(prompt: str, rng: random.Random) -> Demonstration:
        return Demonstration([Turn("user", prompt)], write_answer(prompt, rng))

    def compare(source: list[str], n: int, rng: random.Random) -> list[tuple[str, str, str, float]]:
        rows: list[tuple[str, str, str, float]] = []
        while len(rows) < n:
            prompt = rng.choice(source)
            first, second = write_answer(prompt, rng), write_answer(prompt, rng)
            margin = gold_reward(prompt, first) - gold_reward(prompt, second)
            if abs(margin) > 1e-9:  # a tie has no right answer
                rows.append((prompt, first, second, margin))
        return rows

    def label(rows: list[tuple[str, str, str, float]], rng: random.Random) -> list[Pair]:
        labelled = []
        for prompt, first, second, margin in rows:
            if rng.random() >= prefers_first(margin, temperature):
                first, second, margin = second, first, -margin
            labelled.append(
                Pair([Turn("user", prompt)], first, second, gold_margin=margin, source="sandbox")
            )
        return labelled

    def probe(prompt: str, rng: random.Random) -> Pair:
        request = request_of(prompt)
        # the other wishes, the same thing: a judge that does not read the prompt is right half of the time. Two steps are the
        # wrong number in a quarter of the other prompts' pairs, which makes "always two" right half of the time as well
        others = {1: [3, 3, 3, 2], 2: [1, 3], 3: [1, 1, 1, 2]}[request.steps]
        tone = request.tone or rng.choice([1, -1])
        fits = ideal_answer(request, rng, tone=tone)
        misses = ideal_answer(request, rng, steps=rng.choice(others), tone=-request.tone or tone)
        return Pair(
            [Turn("user", prompt)],
            fits,
            misses,
            gold_margin=gold_reward(prompt, fits) - gold_reward(prompt, misses),
        )

    rows, held_out_rows = (
        compare(for_rm, cfg.pairs, rng_rm),
        compare(held_out, 4 * eval_rows, rng_eval),
    )
    temperature = calibrate_temperature([row[3] for row in rows], cfg.label_noise)
    return Dataset(
        sft=[demonstrate(rng_sft.choice(for_sft), rng_sft) for _ in range(cfg.demonstrations)],
        rm=label(rows, rng_rm),
        ppo=[[Turn("user", prompt)] for prompt in for_ppo],
        eval_sft=[demonstrate(prompt, rng_eval) for prompt in held_out],
        eval_rm=label(held_out_rows, rng_eval),
        eval_probe=[probe(prompt, rng_eval) for prompt in held_out],
        eval_prompts=[[Turn("user", prompt)] for prompt in held_out],
        gold=gold,
        best_gold=lambda turns: best_gold(turns[-1].text),
    )
