"""Rows in the schema of every public data set of conf/data, and what is read from them."""

from __future__ import annotations

from typing import Any

from chinese_japanese_sets import CHINESE_JAPANESE
from format_rows import assistant, message, user

from rlhf.data.records import Pair, Turn

HH = [
    (
        {
            "prompt": "\n\nHuman: What is the tallest tree? \n\nAssistant:",
            "response": " A redwood.",
            "chosen": " A redwood.",
            "rejected": " An oak.",
        },
        Pair([user("What is the tallest tree?")], "A redwood.", "An oak."),
    ),
    (
        {
            "prompt": (
                "\n\nHuman: Hi\n\nAssistant: Hello! I am the Assistant: ask me.\n\nHuman: How "
                "do I boil an egg?\n\nAssistant:"
            ),
            "response": " Eight minutes.\n\nNo more.",
            "chosen": " Eight minutes.\n\nNo more.",
            "rejected": " Do you mean a hen's egg?",
        },
        Pair(
            [
                user("Hi"),
                assistant("Hello! I am the Assistant: ask me."),
                user("How do I boil an egg?"),
            ],
            "Eight minutes.\n\nNo more.",
            "Do you mean a hen's egg?",
        ),
    ),
    (
        {
            "prompt": "\n\nHuman: Hm?\n\nAssistant:",
            "response": "",
            "chosen": " ",
            "rejected": " What is it?",
        },
        "empty answer",
    ),
]


def webgpt(
    answers: tuple[str, str], scores: tuple[float, float], question: str = "Why is the sky blue?"
) -> dict[str, Any]:
    quotes = {"title": ["Sky (www.example.org)"], "extract": ["Rayleigh scattering ..."]}
    return {
        "question": {"dataset": "eli5", "id": "1abc", "full_text": question},
        **{f"quotes_{i}": quotes for i in (0, 1)},
        **{f"answer_{i}": answer for i, answer in enumerate(answers)},
        **{f"tokens_{i}": {"prefix": [1, 2], "completion": [3]} for i in (0, 1)},
        **{f"score_{i}": score for i, score in enumerate(scores)},
    }


def shp(
    answers: tuple[str, str], scores: tuple[int, int], history: str = "Can I freeze soup?"
) -> dict[str, Any]:
    return {
        "post_id": "q1",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": history,
        "human_ref_A": answers[0],
        "human_ref_B": answers[1],
        "labels": int(scores[0] > scores[1]),
        "score_A": scores[0],
        "score_B": scores[1],
        "score_ratio": max(scores) / min(scores),
    }


def ultrafeedback(
    answers: tuple[str, str], scores: tuple[float, float], prompt: str = "Name a prime."
) -> dict[str, Any]:
    chosen, rejected = (
        [message("user", prompt), message("assistant", answer)] for answer in answers
    )
    return {
        "prompt": prompt,
        "prompt_id": "ab12",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


SETS: dict[str, list[tuple[dict[str, Any], Pair | str]]] = {
    "rm_static": HH,
    "full_hh": HH,
    "anthropic_hh": [
        (
            {
                "chosen": (
                    "\n\nHuman: Is it late?\n\nAssistant: Are you tired?\n\nHuman: Yes\n\n"
                    "Assistant: Then it is."
                ),
                "rejected": (
                    "\n\nHuman: Is it late?\n\nAssistant: Are you tired?\n\nHuman: Yes\n\n"
                    "Assistant: No."
                ),
            },
            Pair(
                [user("Is it late?"), assistant("Are you tired?"), user("Yes")],
                "Then it is.",
                "No.",
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: Is it late?\n\nAssistant: No.",
                "rejected": "\n\nHuman: Is it late?\n\nAssistant:",
            },
            "empty answer",
        ),
        (
            {"chosen": "\n\nHuman: Hello?", "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi."},
            "empty answer",
        ),
    ],
    "synthetic_instruct": [
        (
            {
                "prompt": "What do the words Human: and Assistant: mean here?",
                "chosen": "They are roles.",
                "rejected": "Nothing.",
            },
            Pair(
                [user("What do the words Human: and Assistant: mean here?")],
                "They are roles.",
                "Nothing.",
            ),
        ),
        ({"prompt": "Say yes.", "chosen": "yes", "rejected": " yes\n"}, "chosen equals rejected"),
    ],
    "rlhf_reward": [
        (
            {
                "prompt": (
                    "\n\nHuman: Tell me a tale.\n\nAssistant: Which one?\n\nHuman: A short one.\n\n"
                ),
                "chosen": "Assistant: Once she said: Assistant: I obey. The end.",
                "rejected": "Assistant: No.",
            },
            Pair(
                [user("Tell me a tale."), assistant("Which one?"), user("A short one.")],
                "Once she said: Assistant: I obey. The end.",
                "No.",
            ),
        ),
        (
            {
                "prompt": "Human: Tell me a tale. ",
                "chosen": "Assistant: Once.",
                "rejected": "Assistant:Twice.",
            },
            Pair([user("Tell me a tale.")], "Once.", "Twice."),
        ),
        (
            {"prompt": "\n\nHuman: Hm? ", "chosen": "Assistant: ", "rejected": "Assistant: No."},
            "empty answer",
        ),
    ],
    "webgpt": [
        (
            webgpt(
                ("Air (mostly nitrogen) scatters blue light [1, 2].", "It is not [1][2]."),
                (0.5, -0.5),
            ),
            Pair(
                [user("Why is the sky blue?")],
                "Air (mostly nitrogen) scatters blue light.",
                "It is not.",
            ),
        ),
        (
            webgpt(
                (
                    "Because.",
                    "Blue [sic] light is scattered (more than red)[3]. [4] Thus (see above) blue.",
                ),
                (-0.25, 0.25),
            ),
            Pair(
                [user("Why is the sky blue?")],
                "Blue [sic] light is scattered (more than red). Thus (see above) blue.",
                "Because.",
            ),
        ),
        (webgpt(("One.", "Two."), (0.0, 0.0)), "tie"),
        (webgpt(("", "Two."), (-1.0, 1.0)), "empty answer"),
    ],
    "shp": [
        (
            shp(("Yes (but not with cream) [1].", "No."), (12, 5)),
            Pair([user("Can I freeze soup?")], "Yes (but not with cream) [1].", "No."),
        ),
        (
            shp(("No.", "Yes."), (5, 6), "Can I freeze soup?\n\nHuman: I ask for a friend."),
            Pair([user("Can I freeze soup?\n\nHuman: I ask for a friend.")], "Yes.", "No."),
        ),
    ],
    "sharegpt": [
        (
            {"prompt": "USER: Is a USER: mark a word? ASSISTANT:", "label": "It is not."},
            Pair([user("Is a USER: mark a word?")], "It is not.", None),
        ),
        (
            {
                "prompt": (
                    "USER: Hi\nASSISTANT: Hello, USER!\nUSER: What is an ASSISTANT: mark?\n"
                    "ASSISTANT:"
                ),
                "label": " A word. ",
            },
            Pair(
                [user("Hi"), assistant("Hello, USER!"), user("What is an ASSISTANT: mark?")],
                "A word.",
                None,
            ),
        ),
        (
            {"prompt": "USER: one ASSISTANT: two</s>USER: three ASSISTANT:", "label": "four</s>"},
            Pair([user("one"), assistant("two"), user("three")], "four", None),
        ),
        ({"prompt": "USER: Hi ASSISTANT:", "label": ""}, "empty answer"),
    ],
    **CHINESE_JAPANESE,
    "ultrafeedback": [
        (ultrafeedback(("7", "8"), (8.5, 2.0)), Pair([user("Name a prime.")], "7", "8")),
        (ultrafeedback(("7", "Seven"), (8.0, 8.0)), "tie"),
        (ultrafeedback(("7", ""), (8.0, 1.0)), "empty answer"),
    ],
    # how columns reach reward functions: test_verifiable_sets.py
    "gsm8k": [
        (
            {"question": "What is 40 + 2? ", "answer": "It is 42.\n#### 42"},
            Pair([user("What is 40 + 2?")], "It is 42.\n#### 42", None),
        ),
    ],
    "math": [
        (
            {
                "problem": "Find $40+2$.",
                "level": "Level 1",
                "type": "Prealgebra",
                "solution": "$\\boxed{42}$",
            },
            Pair([user("Find $40+2$.")], "$\\boxed{42}$", None),
        ),
    ],
    "deepscaler": [
        (
            {"problem": "Find $40+2$.", "answer": "42", "solution": ""},
            Pair([user("Find $40+2$.")], "", None),
        ),
    ],
    "dapo_math": [
        (
            {
                "prompt": "Find $40+2$.",
                "solution": "42",
                "data_source": "math_dapo",
                "source_prompt": [message("user", "Solve it. Find $40+2$.")],
                "ability": "MATH",
                "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
            },
            Pair([user("Find $40+2$.")], "", None),
        ),
    ],
    "verl": [
        (
            {
                "data_source": "openai/gsm8k",
                "prompt": [message("system", "Think."), message("user", "What is 40 + 2?")],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "42"},
                "extra_info": {"split": "train", "index": 0},
            },
            Pair([Turn("system", "Think."), user("What is 40 + 2?")], "", None),
        ),
    ],
}
