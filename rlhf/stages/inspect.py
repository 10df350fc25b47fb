"""Inspect the data as the stages will see them; train nothing; write run_dir/report.html.

Row counts and leakage cover all rows. Numbers of tokens are of a random sample of large tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf.base.log import log
from rlhf.config.choices import TrainOn
from rlhf.config.schema import Config, Data
from rlhf.config.stage_graph import prompts_per_rollout
from rlhf.data.inspection.leakage import leakage
from rlhf.data.inspection.marks import find_marks, verdicts_on_marks
from rlhf.data.inspection.measuring import (
    Effect,
    Inspection,
    Lengths,
    MeasuredSource,
    Measurement,
    longer_is_better,
    measure,
    share,
)
from rlhf.data.load import (
    few_held_out,
    load_data,
    summarize,
    table_of,
    why_no_rows,
    why_nothing_held_out,
)
from rlhf.data.reading import read_split
from rlhf.data.records import Dataset, Pair
from rlhf.data.sources import splits_of
from rlhf.data.splits import PARTS
from rlhf.data.tokenized import split_answers
from rlhf.evaluation.reference_answers import check_references, verdicts_on_references
from rlhf.models.loading import check_context, load_tokenizer
from rlhf.reporting.inspect_page import name_of, page
from rlhf.runs.directory import write_json

if TYPE_CHECKING:
    import datasets


class StageTable(NamedTuple):
    """The rows of a stage, or of its evaluation."""

    table: datasets.Dataset
    answers: list[str]  # columns with answers that the stage uses; ["text"] for plain text


def run(cfg: Config, run_dir: Path) -> Inspection:
    """Inspect the data; write run_dir/report.html and data.json.

    Raises: UserError that names the source and what is wrong with it.
    """
    # 1. load
    tokenizer = load_tokenizer(cfg.actor.path, cfg.data.template)
    data = load_data(cfg.data)
    log.info(summarize(data))
    write_json(run_dir / "data.json", data.report)

    # 2. measure the tables of the stages, and those of the sources
    lengths: dict[str, Lengths] = {}
    tables = stage_tables(data, cfg)
    stages: dict[str, Measurement] = {}
    for name, (table, answers) in tables.items():
        stages[name], lengths[name] = measure(tokenizer, table, answers, cfg.data)
    sources = reports_of_sources(data)
    on_marks = []
    for source, table in zip(sources, tables_of_sources(data, cfg.data)):
        answers = ["text"] if "text" in table.column_names else ["chosen", "rejected"]
        marks = find_marks(tokenizer, table, cfg.data.template)
        on_marks += verdicts_on_marks(name_of(source), marks)
        source["tokens"], lengths[name_of(source)] = measure(tokenizer, table, answers, cfg.data)
    shared, distinct = leakage(data)
    for name, count in distinct.items():
        if name in stages:
            stages[name]["distinct_prompts"] = count

    # 3. try the reward functions on the reference answers
    references = check_references(cfg, data, tokenizer)

    # 4. judge and write the page
    result = Inspection(
        verdicts=[],
        template=cfg.data.template.name,
        tokenizer=cfg.actor.path,
        sources=sources,
        stages=stages,
        leakage=shared,
        references=references,
    )
    result["verdicts"] = verdicts(result, data, cfg) + on_marks
    result["verdicts"] += verdicts_on_references(references)
    samples = {name: tables[name].table for name in ("sft", "rm", "ppo")}
    (run_dir / "report.html").write_text(
        page(result, lengths, samples, tokenizer, cfg), encoding="utf-8", errors="replace"
    )
    return result


def stage_tables(data: Dataset, cfg: Config) -> dict[str, StageTable]:
    """The tables of the stages and of their evaluations, by name."""
    every_answer = cfg.sft.train_on is TrainOn.all
    demonstrations = table_of(
        Pair(d.prompt, d.response, None, calls=d.calls) for d in data.eval_sft
    )
    tables = {
        "sft": StageTable(split_answers(data.sft) if every_answer else data.sft, ["chosen"]),
        "rm": StageTable(data.rm, ["chosen", "rejected"]),
        "ppo": StageTable(data.ppo, []),
        "eval sft": StageTable(demonstrations, ["chosen"]),
        "eval rm": StageTable(table_of(data.eval_rm), ["chosen", "rejected"]),
    }
    if data.texts is not None:
        tables["ppo texts"] = StageTable(data.texts, ["text"])
    return tables


def reports_of_sources(data: Dataset) -> list[MeasuredSource]:
    """The report of each source and split, with its share of the rows of each part."""
    totals = {part: sum(report.get(part, 0) for report in data.report) for part in PARTS}
    return [
        MeasuredSource(
            **report,
            share={part: report.get(part, 0) / total for part, total in totals.items() if total},
            same_answers=report["skipped"].get("chosen equals rejected", 0),
            duplicates=report["skipped"].get("duplicate row", 0),
        )
        for report in data.report
    ]


def tables_of_sources(data: Dataset, cfg: Data) -> Iterator[datasets.Dataset]:
    """The readable rows of each entry of data.report, from the cache that load_data filled."""
    import datasets

    if cfg.world:
        yield datasets.concatenate_datasets([data.sft, data.rm])
        return
    for name, source in cfg.sources.items():
        for part, split, _ in splits_of(name, source):
            yield read_split(name, part, split, cfg).table


# --- verdicts


def verdicts(result: Inspection, data: Dataset, cfg: Config) -> list[str]:
    """What to know or to fix before training, one line each; empty if there is no problem."""
    stages = {name: result["stages"][name] for name in ("sft", "rm", "ppo")}
    lines = [
        f"prompts in both {pair.replace(' & ', ' and ')}: {count:,}; there must be none, please"
        " report this bug"
        for pair, count in result["leakage"].items()
        if count
    ]
    lines += _too_few_rows(result["stages"], data, cfg)
    try:
        check_context(cfg.actor.path, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    except ValueError as error:
        lines.append(str(error))
    lines += _limits(stages, cfg.data)
    if same := stages["rm"].get("same_truncated"):
        lines.append(
            f"pairs of rm that are equal after truncation: {same:,}: raise"
            f" data.max_response_tokens={cfg.data.max_response_tokens}"
        )
    if bias := length_bias(stages["rm"]):
        lines.append(bias)
    for source in result["sources"]:
        lines += _skipped_rows(source)
        if unread := source.get("unread"):
            lines.append(
                f"columns of {name_of(source)} that nothing but reward functions reads: "
                f"{', '.join(unread)}"
            )
    return lines


def _too_few_rows(stages: dict[str, Measurement], data: Dataset, cfg: Config) -> list[str]:
    lines = []
    rl = cfg.rl
    rows_per_step = {
        "sft": ("sft.batch_size", cfg.sft.batch_size, cfg.sft.batch_size),
        "rm": ("rm.batch_size", cfg.rm.batch_size, cfg.rm.batch_size),
        "ppo": ("rl.batch_size", rl.batch_size, prompts_per_rollout(rl)),
    }
    for name, (key, batch_size, needed) in rows_per_step.items():
        numbers = stages[name]
        # the rows that the limits leave of the sample, scaled to all rows
        lost = share(numbers, "dropped") + share(numbers, "unwritten")
        rows = round(numbers["rows"] * (1 - lost))
        if not numbers["rows"] and not cfg.data.shares[PARTS.index(name)]:
            continue  # as it was asked for
        if not numbers["rows"]:
            lines.append(f"no rows for {name}: {why_no_rows(data, cfg.data, name)}")
        elif 0 < rows < needed:  # where the limits leave none, `_limits` reports it
            lines.append(
                f"{rows:,} rows for {name} are less than one batch: lower"
                f" {key}={batch_size}, or add data"
            )
    for name in ("sft", "rm"):
        if not stages[name]["rows"]:
            continue
        held_out = stages[f"eval {name}"]["rows"]
        if not held_out:
            reason = why_nothing_held_out(data, cfg.data, name)
            lines.append(f"no rows to evaluate {name} on: {reason}")
        elif few := few_held_out(held_out, cfg.data):
            lines.append(f"{name}: {few}")
    return lines


class Limit(NamedTuple):
    """When an effect of a limit is worth a verdict."""

    effect: Effect
    description: str
    column: str  # "prompts" or "answers"
    setting: str  # of `data`
    worth_telling: float  # share of the rows


LIMITS = [
    Limit("dropped", "rows skipped: prompt too long", "prompts", "max_prompt_tokens", 0.02),
    Limit("shortened", "prompts that lose their first turns", "prompts", "max_prompt_tokens", 0.1),
    Limit("truncated", "truncated answers, without EOS", "answers", "max_response_tokens", 0.02),
]


def _limits(stages: dict[str, Measurement], data: Data) -> list[str]:
    lines = []
    unwritten = {name: share(numbers, "unwritten") for name, numbers in stages.items()}
    if any(unwritten.values()):
        shares = [f"{part:.0%} of {name}" for name, part in unwritten.items() if part]
        lines.append(
            f"rows skipped: the chat template cannot write their messages of tools: "
            f"{', '.join(shares)}: choose a model with a template that can (actor.path)"
        )
    for limit in LIMITS:
        affected = {
            name: numbers
            for name, numbers in stages.items()
            if share(numbers, limit.effect) >= limit.worth_telling
        }
        if not affected:
            continue
        shares = [f"{share(n, limit.effect):.0%} of {name}" for name, n in affected.items()]
        needed = max(
            spread["p95"]
            for numbers in affected.values()
            for column, spread in numbers["tokens"].items()
            if (column == "prompt") == (limit.column == "prompts")
        )
        lines.append(
            f"{limit.description}: {', '.join(shares)}: raise"
            f" data.{limit.setting}={getattr(data, limit.setting)}; 95 % of the {limit.column} have"
            f" at most {needed:,} tokens"
        )
    return lines


def length_bias(numbers: Measurement) -> str:
    """A line when the number of tokens predicts many of the labels; "" when it may be chance."""
    if not numbers.get("pairs"):
        return ""
    accuracy = longer_is_better(numbers)
    # three standard errors: few pairs may look biased by chance
    if abs(accuracy - 0.5) < max(0.1, 1.5 / numbers["pairs"] ** 0.5):
        return ""
    if accuracy > 0.5:
        word, count = "longer", numbers["chosen_longer"]
    else:
        word, count = "shorter", numbers["chosen_shorter"]
    return (
        f"chosen answers are {word} in {count / numbers['pairs']:.0%} of the pairs: a judge that"
        f" only counts tokens has an accuracy of {max(accuracy, 1 - accuracy):.0%}; compare"
        " eval/accuracy of rm with that, and watch the length of the responses in PPO"
    )


def _skipped_rows(source: MeasuredSource) -> list[str]:
    """Why rows of a source are skipped, where that is worth a look."""
    name, skipped = name_of(source), source["skipped"]
    lines = []
    for kind, count in source.get("unreadable", {}).items():
        first = source["examples"][kind]
        lines.append(f"unreadable rows of {name}: {count:,}; the first one: {first}")
    if more := source.get("more_kinds"):
        lines.append(f"unreadable rows of {name}: {more:,} further kinds")
    if source["same_answers"]:
        lines.append(
            f"rows of {name} whose chosen and rejected answers are equal:"
            f" {source['same_answers']:,}; they are skipped"
        )
    total, rows = sum(skipped.values()), source["rows"] + source.get("further", 0)
    if rows and total > 0.2 * rows:
        reason, count = max(skipped.items(), key=lambda item: item[1])
        lines.append(
            f"{total / rows:.0%} of the rows of {name} are skipped; the main reason:"
            f" {reason} ({count:,})"
        )
    return lines
