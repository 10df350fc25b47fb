"""What the dataset doctor (rlhf/stages/inspect.py) found, as one HTML page: tables, histograms, and samples token by token."""

from __future__ import annotations

import io
from html import escape
from typing import Any

import numpy as np

from rlhf.config.schema import Config
from rlhf.data import template
from rlhf.data.batches import first_loss_token
from rlhf.data.records import Turn
from rlhf.data.splits import PARTS
from rlhf.reporting.html import document, html_table

SAMPLES = 3  # rows of a stage that are shown
SHOWN = 200  # tokens shown of each end of a long prompt or answer
Lengths = dict[str, np.ndarray]  # tokens of each prompt, chosen, rejected, before anything is cut


def share(numbers: dict[str, Any], key: str) -> float:
    return numbers.get(key, 0) / max(1, numbers["measured"])


def by_length(numbers: dict[str, Any]) -> float:
    """Share of the pairs in which "the longer answer is the better one" gives the label; equal lengths count half."""
    equal = numbers["pairs"] - numbers["chosen_longer"] - numbers["chosen_shorter"]
    return (numbers["chosen_longer"] + equal / 2) / numbers["pairs"]


# ----------------------------------------------------------------------------------------------------------------------- the page

STYLE = """
.sample { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa;
          border: 1px solid #e4e4e4; padding: .6em; margin: .4em 0; max-height: 30em; overflow: auto; }
.t { border-left: 1px solid #999; padding: 1px 0; unicode-bidi: isolate; }
.given { background: #ececec; color: #555; } .learnt { background: #c8ecc8; } .answer { background: #d4e4fb; }
.eos { outline: 2px solid #e8590c; outline-offset: -1px; font-weight: 700; } .scored { border-bottom: 3px solid #1c4fa0; }
"""
LEGEND = """<p class="note">Each box is a token; hold the mouse over it for its id. <span class="sample" style="padding: 2px 6px">
<span class="t given">given</span> <span class="t learnt">learnt</span> <span class="t answer">answer of a pair</span>
<span class="t answer eos">EOS</span> <span class="t answer scored">scored here</span></span> An answer without EOS was cut.</p>"""


def page(
    found: dict[str, Any],
    lengths: dict[str, Lengths],
    parts: dict[str, Any],
    tokenizer: Any,
    cfg: Config,
) -> str:
    """All of it as one HTML page, which needs no other file and runs no code."""
    data = cfg.data
    settings = (
        f"template {data.template.name}, tokenizer of {cfg.actor.path}, EOS {tokenizer.eos_token}, "
    )
    settings += f"at most {data.max_prompt_tokens:,} tokens of a prompt and {data.max_response_tokens:,} of an answer"
    body = [
        f"<h1>Data: {escape(' + '.join(data.sources))}</h1>",
        f'<p class="note">{escape(settings)}</p>',
    ]
    body += [f'<p class="warning">&#9888; {escape(line)}</p>' for line in found["verdicts"]]
    if not found["verdicts"]:
        body.append('<p class="fine">&#10003; nothing to worry about</p>')

    body += [
        "<h2>Sources</h2>",
        html_table(COLUMNS_OF_SOURCES, [row_of_source(entry) for entry in found["sources"]]),
    ]
    reasons = [
        [name_of(entry), reason, f"{count:,}"]
        for entry in found["sources"]
        for reason, count in entry["left_out"].items()
    ]
    if reasons:
        body += ["<h3>Left out</h3>", html_table(["source", "reason", "rows"], reasons, ["reason"])]
    body += [
        "<h2>Stages</h2>",
        html_table(
            COLUMNS_OF_PARTS,
            [row_of_part(name, numbers) for name, numbers in found["stages"].items()],
        ),
    ]
    body.append(
        '<p class="note">Tokens: median / 95 % / longest, before anything is cut. Of eval only what is evaluated on.</p>'
    )

    body += ["<h2>The same prompt in two places</h2>"]
    shared = [
        [pair.replace(" & ", " and "), f"{count:,}"] for pair, count in found["leakage"].items()
    ]
    body += [
        '<p class="note">Counted anew over all prompts; each must be 0.</p>',
        html_table(["between", "prompts"], shared),
    ]

    measured = {
        **found["stages"],
        **{name_of(entry): entry["tokens"] for entry in found["sources"]},
    }
    biased = {name: numbers for name, numbers in measured.items() if numbers.get("pairs")}
    if biased:
        header = [
            "pairs of",
            "pairs",
            "chosen longer",
            "equal",
            "chosen shorter",
            "mean difference, tokens",
            "same once cut",
        ]
        body += [
            "<h2>Length of chosen and rejected answers</h2>",
            html_table(header, [row_of_bias(*item) for item in biased.items()]),
        ]
        body.append(f'<p class="note">{escape(meaning_of_bias(found["stages"]["rm"]))}</p>')

    body.append("<h2>Lengths in tokens</h2>")
    for name, numbers in measured.items():
        if numbers["rows"]:
            note = (
                f", a random sample of {numbers['measured']:,}"
                if numbers["measured"] < numbers["rows"]
                else ""
            )
            body.append(
                f"<figure><h3>{escape(name)}</h3><p class='note'>{numbers['rows']:,} rows{note}</p>"
            )
            body.append(
                histogram(lengths[name], data.max_prompt_tokens, data.max_response_tokens)
                + "</figure>"
            )

    body += ["<h2>Samples</h2>", LEGEND]
    for name in ("sft", "rm", "ppo"):
        body.append(f"<h3>{name}</h3>")
        body += samples(tokenizer, name, parts[name][0], cfg) or ['<p class="note">no rows</p>']
    return document("Data", body, STYLE)


COLUMNS_OF_SOURCES = [
    "source",
    "rows",
    "left out",
    "chosen = rejected",
    "duplicates",
    "sft",
    "rm",
    "ppo",
    "held out",
]
COLUMNS_OF_PARTS = [
    "",
    "rows",
    "different prompts",
    "prompts",
    "chosen",
    "rejected",
    "prompts dropped",
    "shortened",
    "answers cut",
]


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['source']}/{entry['split']}"


def row_of_source(entry: dict[str, Any]) -> list[str]:
    """Cells under COLUMNS_OF_SOURCES; a stage's with the share of its rows that come from here."""
    counts = [
        entry["rows"],
        sum(entry["left_out"].values()),
        entry["same_answers"],
        entry["duplicates"],
    ]
    stages = [
        f"{entry[part]:,} ({entry['share'].get(part, 0):.0%})" if part in entry else ""
        for part in PARTS
    ]
    return [name_of(entry), *(f"{count:,}" for count in counts), *stages]


def row_of_part(name: str, numbers: dict[str, Any]) -> list[str]:
    """Cells under COLUMNS_OF_PARTS."""
    tokens = [
        " / ".join(f"{n:,}" for n in numbers["tokens"].get(key, {}).values())
        for key in ("prompt", "chosen", "rejected")
    ]
    if "text" in numbers["tokens"]:
        tokens[1] = " / ".join(f"{n:,}" for n in numbers["tokens"]["text"].values())
    limits = [
        f"{share(numbers, key):.1%}" if key in numbers else ""
        for key in ("dropped", "shortened", "cut")
    ]
    sampled = "*" if numbers["measured"] < numbers["rows"] else ""
    distinct = f"{numbers['distinct_prompts']:,}" if "distinct_prompts" in numbers else ""
    return [
        name,
        f"{numbers['rows']:,}",
        distinct,
        *(text and text + sampled for text in tokens + limits),
    ]


def row_of_bias(name: str, numbers: dict[str, Any]) -> list[str]:
    pairs, longer, shorter = (numbers[key] for key in ("pairs", "chosen_longer", "chosen_shorter"))
    shares = [f"{count / pairs:.1%}" for count in (longer, pairs - longer - shorter, shorter)]
    return [
        name,
        f"{pairs:,}",
        *shares,
        f"{numbers['chosen_longer_by']:+.1f}",
        f"{numbers['alike']:,}",
    ]


def meaning_of_bias(numbers: dict[str, Any]) -> str:
    """What the length of the chosen answers tells, in a sentence."""
    if not numbers["pairs"]:
        return "No pairs for the reward model."
    guessed = max(by_length(numbers), 1 - by_length(numbers))
    which = "longer" if by_length(numbers) > 0.5 else "shorter"
    return (
        f"“The {which} answer is the better one” is right on {guessed:.1%} of rm's pairs. The nearer to 50 %, the less a reward model can "
        "gain from length alone, and the less PPO is pulled towards it."
    )


def histogram(lengths: Lengths, max_prompt: int, max_response: int) -> str:
    """Lengths of prompts, and of answers, as an SVG element. The limits are dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("prompts", ["prompt"], max_prompt),
        ("answers", ["chosen", "rejected"], max_response),
        ("texts", ["text"], None),
    ]
    panels = [panel for panel in panels if any(len(lengths.get(name, ())) for name in panel[1])]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 8}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.4 * len(panels), 2.2), squeeze=False, layout="constrained"
        )
        for axis, (title, names, limit) in zip(axes[0], panels):
            values = {name: lengths[name] for name in names if len(lengths.get(name, ()))}
            # a few very long ones would press all others into one bar
            top = max(10.0, *(1.1 * float(np.percentile(some, 99)) for some in values.values()))
            bins = np.linspace(0, top, 41)
            for color, (name, some) in zip(("#1c7ed6", "#e8590c"), values.items()):
                axis.hist(
                    np.minimum(some, top),
                    bins=bins,
                    histtype="stepfilled",
                    alpha=0.5,
                    color=color,
                    label=name,
                )
            if limit is not None and limit <= top:
                axis.axvline(
                    limit, color="#333", linestyle="--", linewidth=1, label=f"limit {limit:,}"
                )
            longer = any(float(some.max()) > top for some in values.values())
            axis.set(
                title=title,
                xlabel="tokens (longer ones in the last bar)" if longer else "tokens",
                ylabel="rows",
                xlim=(0, top),
            )
            axis.legend()
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


# ----------------------------------------------------------------------------------------------------------------------- samples


def samples(tokenizer: Any, stage: str, table: Any, cfg: Config) -> list[str]:
    """A few random rows of a stage as the model will see them, token by token."""
    shown: list[str] = []
    for i in np.random.default_rng(cfg.data.seed).permutation(len(table))[:100].tolist():
        row = table[i]
        [prompt] = template.encode_prompts(
            tokenizer, [[Turn(**turn) for turn in row["prompt"]]], cfg.data.max_prompt_tokens
        )
        if prompt is None:
            continue
        if stage == "ppo":
            shown.append(
                sample(
                    tokenizer, "the policy answers this prompt", prompt, [], ["given"] * len(prompt)
                )
            )
        for name in {"sft": ["chosen"], "rm": ["chosen", "rejected"], "ppo": []}[stage]:
            [answer] = template.encode_responses(
                tokenizer, [row[name]], cfg.data.max_response_tokens
            )
            ended = answer[-1] == tokenizer.eos_token_id
            if stage == "sft":
                first = first_loss_token(prompt, cfg.sft.train_on_prompt)
                kinds = [
                    "learnt" if place >= first else "given"
                    for place in range(len(prompt) + len(answer))
                ]
            else:
                kinds = ["given"] * len(prompt) + ["answer"] * len(answer)
                kinds[-1] += " scored"
            kinds[-1] += " eos" * ended
            shown.append(
                sample(tokenizer, name + ("" if ended else ", cut"), prompt, answer, kinds)
            )
        if len(shown) >= SAMPLES * (2 if stage == "rm" else 1):
            break
    return shown


def sample(
    tokenizer: Any, title: str, prompt: list[int], answer: list[int], kinds: list[str]
) -> str:
    """One sequence. Args: kinds: CSS classes of each token of prompt and answer."""
    note = f"{title}: {len(prompt):,} tokens of the prompt" + (
        f", {len(answer):,} of the answer" if answer else ""
    )
    boxes = token_boxes(tokenizer, prompt, kinds[: len(prompt)]) + token_boxes(
        tokenizer, answer, kinds[len(prompt) :]
    )
    return f'<p class="note">{escape(note)}</p><div class="sample">{boxes}</div>'


def token_boxes(tokenizer: Any, ids: list[int], kinds: list[str]) -> str:
    """A box for each token, the middle of a long sequence left out. The bytes of one character may be several tokens: one box then."""
    boxes = []
    start = 0
    for end in range(1, len(ids) + 1):
        if SHOWN < end <= len(ids) - SHOWN:
            if end == SHOWN + 1:
                boxes.append(f'<span class="note"> … {len(ids) - 2 * SHOWN:,} tokens … </span>')
            start = end
            continue
        before = max(0, start - 6)  # some tokenizers decode a token by what is in front of it
        text = decode(tokenizer, ids[before:end])[len(decode(tokenizer, ids[before:start])) :]
        whole = not text.endswith("�") or end - start == 4
        if whole or end == len(ids) or kinds[end] != kinds[start]:
            numbers = " ".join(map(str, ids[start:end]))
            boxes.append(
                f'<span class="t {kinds[end - 1]}" title="{numbers}">{visible(text)}</span>'
            )
            start = end
    return "".join(boxes)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Escaped, with signs for line breaks and control characters."""
    signs = {code: chr(0x2400 + code) for code in range(32)} | {
        ord("\n"): "↵\n",
        ord("\t"): "→\t",
        127: "␡",
    }
    return escape(text.translate(signs)) or "∅"
