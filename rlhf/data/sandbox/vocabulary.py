"""The words of the sandbox: things and what one does with them, questions, wishes, sentences."""

from __future__ import annotations

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
# wishes about length -> number of steps; wishes about tone -> +1 friendly, -1 plain, 0 either
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
