"""The page of stage=inspect: tables, histograms, and samples token by token."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from rlhf.config.choices import TrainOn
from rlhf.config.schema import Config
from rlhf.data import encoding
from rlhf.data.batches import first_loss_token
from rlhf.data.inspection.measuring import (
    Effect,
    Inspection,
    Lengths,
    MeasuredSource,
    Measurement,
    ReferenceCheck,
    longer_is_better,
    share,
)
from rlhf.data.records import SourceReport, Turn
from rlhf.data.splits import PARTS
from rlhf.reporting.html import Table, render

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SAMPLES = 3  # rows of a stage that are shown
SHOWN = 200  # tokens shown of each end of a long prompt or answer


class Histogram(NamedTuple):
    name: str
    note: str
    svg: Markup


class TokenBox(NamedTuple):
    """A token of a sample, or several that make one character; without ids, a note."""

    text: str
    ids: list[int]
    kinds: str  # CSS classes: context, loss, answer, scored, eos


class Sample(NamedTuple):
    """A row as the model sees it."""

    note: str
    prompt: list[TokenBox]
    answer: list[TokenBox]


def page(
    result: Inspection,
    lengths: dict[str, Lengths],
    tables: dict[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
) -> str:
    """The results as one HTML page, which needs no other file and runs no script.

    Args: lengths: by the name of a stage or source.  tables: of the stages with samples.
    """
    data = cfg.data
    measured = {**result["stages"], **{name_of(one): one["tokens"] for one in result["sources"]}}
    pairs = {name: numbers for name, numbers in measured.items() if numbers.get("pairs")}
    return render(
        "inspect.html",
        title="Data",
        sources=" + ".join(data.sources),
        settings=f"template {data.template.name}, tokenizer of {cfg.actor.path}, EOS"
        f" {tokenizer.eos_token}, at most {data.max_prompt_tokens:,} tokens of a prompt and"
        f" {data.max_response_tokens:,} of an answer",
        verdicts=result["verdicts"],
        source_table=Table(SOURCE_COLUMNS, [_source_cells(one) for one in result["sources"]]),
        skipped_table=Table(
            ["source", "reason", "rows", "the first one"],
            [row for source in result["sources"] for row in _skipped_cells(source)],
            ["reason", "the first one"],
        ),
        stage_table=Table(
            STAGE_COLUMNS, [_stage_cells(*item) for item in result["stages"].items()]
        ),
        leakage_table=Table(
            ["between", "prompts"],
            [
                [parts.replace(" & ", " and "), f"{count:,}"]
                for parts, count in result["leakage"].items()
            ],
        ),
        bias_table=Table(BIAS_COLUMNS, [_bias_cells(*item) for item in pairs.items()]),
        bias_note=_bias_note(result["stages"]["rm"]),
        reference_table=Table(
            REFERENCE_COLUMNS,
            [_reference_cells(one) for one in result["references"]],
            ["first prompt", "its answer"],
        ),
        histograms=[
            Histogram(
                name,
                _rows_note(numbers),
                histogram(lengths[name], data.max_prompt_tokens, data.max_response_tokens),
            )
            for name, numbers in measured.items()
            if numbers["tokens"]  # tools may leave no row
        ],
        samples_of_stages=[
            (name, samples(tokenizer, name, table, cfg)) for name, table in tables.items()
        ],
    )


def name_of(source: SourceReport) -> str:
    return f"{source['source']}/{source['split']}"


# --- tables

SOURCE_COLUMNS = ["source", "rows", "skipped", "chosen = rejected", "duplicates"]
SOURCE_COLUMNS += ["sft", "rm", "ppo", "held out"]
STAGE_COLUMNS = ["", "rows", "distinct prompts", "prompts", "chosen", "rejected"]
STAGE_COLUMNS += ["prompts dropped", "shortened", "answers truncated"]
REFERENCE_COLUMNS = ["reward", "reference answers", "below 1", "not applicable"]
REFERENCE_COLUMNS += ["score of the first below 1", "first prompt", "its answer"]
BIAS_COLUMNS = ["pairs of", "pairs", "chosen longer", "equal", "chosen shorter"]
BIAS_COLUMNS += ["mean difference, tokens", "equal after truncation"]


def _source_cells(source: MeasuredSource) -> list[str]:
    """Cells under SOURCE_COLUMNS; those of a stage with the share of its rows from this source."""
    counts = [
        source["rows"],
        sum(source["skipped"].values()),
        source["same_answers"],
        source["duplicates"],
    ]
    stages = [
        f"{source[part]:,} ({source['share'].get(part, 0):.0%})" if part in source else ""
        for part in PARTS
    ]
    return [name_of(source), *(f"{count:,}" for count in counts), *stages]


def _skipped_cells(source: MeasuredSource) -> list[list[str]]:
    """A row for each reason why rows are skipped, and for each kind of unreadable rows."""
    examples, kinds = source.get("examples", {}), source.get("unreadable", {})
    reasons = {
        reason: count for reason, count in source["skipped"].items() if reason != "unreadable"
    }
    counted = reasons | {f"unreadable: {kind}": count for kind, count in kinds.items()}
    if more := source.get("more_kinds"):
        named = sum(kinds.values())
        counted[f"unreadable: {more:,} further kinds"] = source["skipped"]["unreadable"] - named
    return [
        [
            name_of(source),
            reason,
            f"{count:,}",
            examples.get(reason.removeprefix("unreadable: "), ""),
        ]
        for reason, count in counted.items()
    ]


def _stage_cells(name: str, numbers: Measurement) -> list[str]:
    """Cells under STAGE_COLUMNS; numbers of a sample have a star. Texts are in column `chosen`."""
    columns = ["prompt", "text" if "text" in numbers["tokens"] else "chosen", "rejected"]
    tokens = [numbers["tokens"].get(column) for column in columns]
    cells = [
        f"{spread['median']:,} / {spread['p95']:,} / {spread['max']:,}" if spread else ""
        for spread in tokens
    ]
    effects: tuple[Effect, ...] = ("dropped", "shortened", "truncated")
    cells += [f"{share(numbers, effect):.1%}" if effect in numbers else "" for effect in effects]
    if numbers["measured"] < numbers["rows"]:
        cells = [cell and cell + "*" for cell in cells]
    distinct = f"{numbers['distinct_prompts']:,}" if "distinct_prompts" in numbers else ""
    return [name, f"{numbers['rows']:,}", distinct, *cells]


def _bias_cells(name: str, numbers: Measurement) -> list[str]:
    """Cells under BIAS_COLUMNS."""
    pairs, longer, shorter = (numbers[k] for k in ("pairs", "chosen_longer", "chosen_shorter"))
    shares = [f"{count / pairs:.1%}" for count in (longer, pairs - longer - shorter, shorter)]
    difference = f"{numbers['chosen_longer_by']:+.1f}"
    return [name, f"{pairs:,}", *shares, difference, f"{numbers['same_truncated']:,}"]


def _reference_cells(check: ReferenceCheck) -> list[str]:
    """Cells under REFERENCE_COLUMNS."""
    counts = [f"{check['rows']:,}", f"{check['failed']:,}", f"{check['not_applicable']:,}"]
    first = ["", "", ""]
    if "score" in check:
        first = [f"{check['score']:g}", check["prompt"], check["answer"]]
    return [check["reward"], *counts, *first]


def _bias_note(numbers: Measurement) -> str:
    """What the length of the chosen answers means for training, in a sentence."""
    if not numbers.get("pairs"):
        return "No pairs for the reward model."
    accuracy = longer_is_better(numbers)
    which = "longer" if accuracy > 0.5 else "shorter"
    return (
        f"“The {which} answer is the better one” is right on {max(accuracy, 1 - accuracy):.1%} of"
        " rm's pairs. The nearer to 50 %, the less a reward model can learn from length alone, and"
        " the less PPO is rewarded for it."
    )


def _rows_note(numbers: Measurement) -> str:
    sampled = numbers["measured"] < numbers["rows"]
    sample = f", a random sample of {numbers['measured']:,}" if sampled else ""
    return f"{numbers['rows']:,} rows{sample}"


# --- figures


def histogram(lengths: Lengths, max_prompt: int, max_response: int) -> Markup:
    """Lengths of prompts, and of answers, as an SVG element; the limits are dashed lines."""
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
            # a few very long texts would press all others into one bar
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
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


# --- samples


def samples(
    tokenizer: PreTrainedTokenizerBase, stage: str, table: datasets.Dataset, cfg: Config
) -> list[Sample]:
    """A few random rows of a stage as the model will see them; of a pair, two samples."""
    shown: list[Sample] = []
    wanted = SAMPLES * (2 if stage == "rm" else 1)
    for i in np.random.default_rng(cfg.data.seed).permutation(len(table))[:100].tolist():
        row = table[i]
        turns = [Turn(**turn) for turn in row["prompt"]]
        [prompt] = encoding.encode_prompts(tokenizer, [turns], cfg.data.max_prompt_tokens)
        if prompt is None:
            continue
        if stage == "ppo":
            kinds = ["context"] * len(prompt)
            shown.append(sample(tokenizer, "the policy answers this prompt", prompt, [], kinds))
        for name in {"sft": ["chosen"], "rm": ["chosen", "rejected"], "ppo": []}[stage]:
            calls = [row["calls"]] if name == "chosen" else None
            [answer] = encoding.encode_responses(
                tokenizer, [row[name]], cfg.data.max_response_tokens, [turns], calls
            )
            finished = answer[-1] == tokenizer.eos_token_id
            title = name if finished else f"{name}, truncated"
            kinds = _kinds(stage, prompt, answer, cfg)
            if finished:
                kinds[-1] += " eos"
            shown.append(sample(tokenizer, title, prompt, answer, kinds))
        if len(shown) >= wanted:
            break
    return shown


def _kinds(stage: str, prompt: list[int], answer: list[int], cfg: Config) -> list[str]:
    """What each token of prompt and answer is for the stage: CSS classes."""
    if stage == "sft":
        first = first_loss_token(prompt, cfg.sft.train_on is TrainOn.everything)
        return ["context"] * first + ["loss"] * (len(prompt) + len(answer) - first)
    kinds = ["context"] * len(prompt) + ["answer"] * len(answer)
    kinds[-1] += " scored"
    return kinds


def sample(
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    prompt: list[int],
    answer: list[int],
    kinds: list[str],
) -> Sample:
    """One sequence. Args: kinds: CSS classes of each token of prompt and answer."""
    note = f"{title}: {len(prompt):,} tokens of the prompt"
    if answer:
        note += f", {len(answer):,} of the answer"
    return Sample(
        note,
        list(token_boxes(tokenizer, prompt, kinds[: len(prompt)])),
        list(token_boxes(tokenizer, answer, kinds[len(prompt) :])),
    )


def token_boxes(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], kinds: list[str]
) -> Iterator[TokenBox]:
    """A box for each token; the middle of a long sequence is a note.

    The bytes of one character may be several tokens: they share a box.
    """
    start = 0
    for end in range(1, len(ids) + 1):
        if SHOWN < end <= len(ids) - SHOWN:
            if end == SHOWN + 1:
                yield TokenBox(f" … {len(ids) - 2 * SHOWN:,} tokens … ", [], "")
            start = end
            continue
        before = max(0, start - 6)  # some tokenizers decode a token by what is in front of it
        text = _decode(tokenizer, ids[before:end])[len(_decode(tokenizer, ids[before:start])) :]
        complete = not text.endswith("�") or end - start == 4
        if complete or end == len(ids) or kinds[end] != kinds[start]:
            yield TokenBox(_visible(text), ids[start:end], kinds[end - 1])
            start = end


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


SIGNS = {code: chr(0x2400 + code) for code in range(32)}
SIGNS |= {ord("\n"): "↵\n", ord("\t"): "→\t", 127: "␡"}


def _visible(text: str) -> str:
    """A text with signs for line breaks and control characters."""
    return text.translate(SIGNS) or "∅"
