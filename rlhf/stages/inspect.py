"""The dataset doctor: looks at the data as the stages will see them, trains nothing, and writes one page, run_dir/report.html.

Counts of rows and leakage are over all rows; whatever needs tokens is over a random sample where there are more than SAMPLE rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import layout
from rlhf.config import Config, Data
from rlhf.data import sources, template
from rlhf.data.load import load_data, summarize, table_of
from rlhf.data.packing import first_learnt
from rlhf.data.records import Dataset, Pair, Turn
from rlhf.models import check_context, load_tokenizer
from rlhf.track import log

SAMPLE = 20_000  # rows of a part that are tokenised, at most
SAMPLES = 3  # rows of a stage that are shown
SHOWN = 200  # tokens shown of each end of a long prompt or answer
NO_LIMIT = 10**9
Lengths = dict[str, np.ndarray]  # tokens of each prompt, chosen, rejected, before anything is cut


def run(cfg: Config, run_dir: Path) -> dict[str, Any]:
    """Look at the data; write run_dir/report.html and data.json. Returns what was found: verdicts, sources, stages, leakage.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    tokenizer = load_tokenizer(cfg.actor.path, cfg.data.template)
    data = load_data(cfg.data)
    log.info(summarize(data))
    layout.write_json(run_dir / "data.json", data.report)

    parts = parts_of(data)
    lengths: dict[str, Lengths] = {}
    stages: dict[str, Any] = {}
    for name, (table, answers) in parts.items():
        stages[name], lengths[name] = measure(tokenizer, table, answers, cfg.data)
    found_in_sources = []
    for entry, table in zip(of_sources(data), tables_of_sources(data, cfg.data)):
        name = name_of(entry)
        answers = ["text"] if "text" in table.column_names else ["chosen", "rejected"]
        entry["tokens"], lengths[name] = measure(tokenizer, table, answers, cfg.data)
        found_in_sources.append(entry)
    between, distinct = leakage(data)
    for name, count in distinct.items():
        if name in stages:
            stages[name]["distinct_prompts"] = count

    found: dict[str, Any] = {
        "template": cfg.data.template.name,
        "tokenizer": cfg.actor.path,
        "sources": found_in_sources,
        "stages": stages,
        "leakage": between,
    }
    found = {"verdicts": verdicts(found, cfg), **found}
    (run_dir / "report.html").write_text(page(found, lengths, parts, tokenizer, cfg), encoding="utf-8", errors="replace")
    return found


def parts_of(data: Dataset) -> dict[str, tuple[Any, list[str]]]:
    """The table of each stage and evaluation, and the columns with the answers that it uses."""
    demonstrations = table_of(Pair(d.prompt, d.response, None) for d in data.eval_sft)
    parts: dict[str, tuple[Any, list[str]]] = {
        "sft": (data.sft, ["chosen"]),
        "rm": (data.rm, ["chosen", "rejected"]),
        "ppo": (data.ppo, []),
        "eval sft": (demonstrations, ["chosen"]),
        "eval rm": (table_of(data.eval_rm), ["chosen", "rejected"]),
    }
    return parts | ({"ppo texts": (data.texts, ["text"])} if data.texts is not None else {})


def of_sources(data: Dataset) -> list[dict[str, Any]]:
    """What load_data reports of each source and split, with its share of the rows of each stage, and two reasons by name."""
    totals = {part: sum(report.get(part, 0) for report in data.report) for part in sources.PARTS}
    entries = []
    for report in data.report:
        share = {part: report.get(part, 0) / total for part, total in totals.items() if total}
        same = report["left_out"].get("the same answer twice", 0)
        entries.append({**report, "share": share, "same_answers": same, "duplicates": report["left_out"].get("the same row again", 0)})
    return entries


def tables_of_sources(data: Dataset, cfg: Data) -> Iterable[Any]:
    """The table of each entry of data.report: what of a source and split could be read. From the cache, since load_data was here."""
    import datasets

    if cfg.sandbox is not None:
        yield datasets.concatenate_datasets([data.sft, data.rm])
        return
    for report in data.report:
        source = cfg.sources[report["source"]]
        if Path(source.path).expanduser().is_file():
            source = dataclasses.replace(source, eval_split=None)  # as load_sources reads it, for the same key in the cache
        yield sources.read(report["source"], source, report["split"], cfg)[0]


# ---------------------------------------------------------------------------------------------------------------------- measuring


def measure(tokenizer: Any, table: Any, answers: list[str], cfg: Data) -> tuple[dict[str, Any], Lengths]:
    """Lengths in tokens of a table, what the limits do to it, and how the lengths of chosen and rejected differ.

    Args: answers: its columns with answers; null where a row has none. Or ["text"], for plain text.
    Returns: numbers of the rows `measured`, and the lengths behind them.
    """
    names = answers if answers == ["text"] else ["prompt", *answers]
    lists: dict[str, list[int]] = {name: [] for name in names}
    count = dict.fromkeys(("dropped", "shortened", "cut", "pairs", "alike", "chosen_longer", "chosen_shorter"), 0)
    difference = 0
    sample = table
    if len(table) > SAMPLE:
        sample = table.select(np.sort(np.random.default_rng(cfg.seed).choice(len(table), SAMPLE, replace=False)))
    for batch in sample.select_columns(names).iter(1000):
        if "text" in names:
            lists["text"] += [len(ids) for ids in tokenizer(batch["text"], add_special_tokens=False).input_ids]
            continue
        turns = [[Turn(**turn) for turn in prompt] for prompt in batch["prompt"]]
        prompts = [len(ids or []) for ids in template.encode_prompts(tokenizer, turns, NO_LIMIT)]
        lists["prompt"] += prompts
        long = [i for i, length in enumerate(prompts) if length > cfg.max_prompt_tokens]
        fitted = template.encode_prompts(tokenizer, [turns[i] for i in long], cfg.max_prompt_tokens)
        dropped = {i for i, ids in zip(long, fitted) if ids is None}
        count["dropped"] += len(dropped)
        count["shortened"] += len(long) - len(dropped)
        encoded = {name: encode_some(tokenizer, batch[name]) for name in answers}
        for name, column in encoded.items():
            lists[name] += [len(ids) for ids in column if ids is not None]
        for i, row in enumerate(zip(*encoded.values())):
            count["cut"] += i not in dropped and any(len(ids) > cfg.max_response_tokens for ids in row if ids is not None)
            if len(row) == 2 and row[0] is not None and row[1] is not None:
                chosen, rejected = row
                count["pairs"] += 1
                count["chosen_longer"] += len(chosen) > len(rejected)
                count["chosen_shorter"] += len(chosen) < len(rejected)
                count["alike"] += chosen[: cfg.max_response_tokens] == rejected[: cfg.max_response_tokens]
                difference += len(chosen) - len(rejected)
    lengths = {name: np.array(values, dtype=np.int64) for name, values in lists.items()}
    numbers: dict[str, Any] = {"rows": len(table), "measured": len(sample)}
    numbers["tokens"] = {name: spread(values) for name, values in lengths.items() if len(values)}
    if "text" not in names:
        numbers |= count if answers else {key: count[key] for key in ("dropped", "shortened")}
    if count["pairs"]:
        numbers["chosen_longer_by"] = difference / count["pairs"]  # mean, in tokens
    return numbers, lengths


def encode_some(tokenizer: Any, texts: Sequence[str | None]) -> list[list[int] | None]:
    """Token ids of whole answers, EOS included; None where there is none."""
    ids = iter(template.encode_responses(tokenizer, [text for text in texts if text is not None], NO_LIMIT))
    return [None if text is None else next(ids) for text in texts]


def spread(values: np.ndarray) -> dict[str, int]:
    """Median, 95th percentile and maximum; each is one of the values."""
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
    return {"median": int(median), "p95": int(p95), "max": int(values.max())}


def leakage(data: Dataset) -> tuple[dict[str, int], dict[str, int]]:
    """Prompts that two parts share, by "sft & rm" and so on: counted anew from the texts, and it must be 0. And the number of different
    prompts of each part. Two prompts are the same when they differ in case and spaces only."""
    evaluated = [d.prompt for d in data.eval_sft] + [p.prompt for p in data.eval_rm + data.eval_probe] + data.eval_prompts
    keys = {name: hashes_of(table) for name, table in (("sft", data.sft), ("rm", data.rm), ("ppo", data.ppo))}
    keys["eval"] = np.unique(np.array([hash_of((turn.role, turn.text) for turn in prompt) for prompt in evaluated], dtype=np.uint64))
    names = list(keys)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    shared = {f"{a} & {b}": len(np.intersect1d(keys[a], keys[b], assume_unique=True)) for a, b in pairs}
    return shared, {name: len(values) for name, values in keys.items()}


def hashes_of(table: Any) -> np.ndarray:
    """Hashes of the different prompts of a table, sorted: 8 bytes each, the texts are read in pieces."""
    pieces = [
        np.array([hash_of((turn["role"], turn["text"]) for turn in prompt) for prompt in batch["prompt"]], dtype=np.uint64)
        for batch in table.select_columns(["prompt"]).iter(1000)
    ]
    return np.unique(np.concatenate(pieces)) if pieces else np.array([], dtype=np.uint64)


def hash_of(turns: Iterable[tuple[str, str]]) -> int:
    text = "\0".join(f"{role}\1{' '.join(text.lower().split())}" for role, text in turns)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


# ----------------------------------------------------------------------------------------------------------------------- judging


def verdicts(found: dict[str, Any], cfg: Config) -> list[str]:
    """What a user should know before training, each in one line that says what to do; empty when there is nothing to worry about."""
    lines = []
    stages = {name: numbers for name, numbers in found["stages"].items() if name in ("sft", "rm", "ppo")}
    for pair, count in found["leakage"].items():
        if count:
            lines.append(f"prompts that stand both in {pair.replace(' & ', ' and in ')}: {count:,}; there must be none, please report this")
    for name, numbers in stages.items():
        batch_size = getattr(cfg, name).batch_size
        # what is left of the sample, scaled to all rows
        rows = int(numbers["rows"] * (1 - numbers["dropped"] / max(1, numbers["measured"])))
        if not numbers["rows"]:
            why = "no source has second answers, or they are" if name == "rm" else "the sources are"
            lines.append(f"no rows for {name}: {why} too small for data.shares")
        elif rows < batch_size:
            lines.append(f"{rows:,} rows for {name} are fewer than one batch: lower {name}.batch_size={batch_size}, or add data")
    for name in ("eval sft", "eval rm"):
        if not found["stages"][name]["rows"] and (name == "eval sft" or stages["rm"]["rows"]):
            lines.append(f"no rows to evaluate {name.split()[1]} on: raise data.eval_share={cfg.data.eval_share:g}, or add data")
    try:
        check_context(cfg.actor.path, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    except ValueError as error:
        lines.append(str(error))

    limits = [
        ("dropped", "prompt", "max_prompt_tokens", "have too long a prompt and are left out", 0.02),
        ("shortened", "prompt", "max_prompt_tokens", "have a prompt that loses its first turns", 0.1),
        ("cut", "answer", "max_response_tokens", "have an answer that is cut, and so without EOS", 0.02),
    ]
    for key, what, setting, happens, enough in limits:
        many = {name: numbers for name, numbers in stages.items() if share(numbers, key) >= enough}
        if many:
            needed = max(s["p95"] for n in many.values() for part, s in n["tokens"].items() if (part == "prompt") == (what == "prompt"))
            where = ", ".join(f"{share(numbers, key):.0%} of {name}" for name, numbers in many.items())
            limit = f"data.{setting}={getattr(cfg.data, setting)}"
            lines.append(f"rows that {happens}: {where}: raise {limit}; 95 % of the {what}s have up to {needed:,} tokens")
    if alike := stages["rm"]["alike"]:
        lines.append(f"pairs of rm that are the same answer twice, once they are cut: {alike:,}; raise data.max_response_tokens")
    if bias := length_bias(stages["rm"]):
        lines.append(bias)

    for entry in found["sources"]:
        name, rows, left_out = name_of(entry), entry["rows"], entry["left_out"]
        if "first_unreadable" in entry:
            lines.append(f"rows of {name} that cannot be read: {left_out['cannot be read']:,}, for instance {entry['first_unreadable']}")
        if entry["same_answers"]:
            lines.append(f"rows of {name} with the same answer as chosen and as rejected: {entry['same_answers']:,}; they are left out")
        if rows and sum(left_out.values()) > 0.2 * rows:
            reason, count = max(left_out.items(), key=lambda item: item[1])
            lines.append(f"{sum(left_out.values()) / rows:.0%} of the rows of {name} are left out, most of them for: {reason} ({count:,})")
    return lines


def share(numbers: dict[str, Any], key: str) -> float:
    return numbers.get(key, 0) / max(1, numbers["measured"])


def length_bias(numbers: dict[str, Any]) -> str:
    """A line when a judge that only counts tokens would guess many of the labels; "" otherwise, and where that may be chance."""
    if not numbers["pairs"]:
        return ""
    guessed = by_length(numbers)
    longer = guessed > 0.5
    # three standard errors: fewer pairs may look biased by chance
    if abs(guessed - 0.5) < max(0.1, 1.5 / numbers["pairs"] ** 0.5):
        return ""
    word, count = ("longer", numbers["chosen_longer"]) if longer else ("shorter", numbers["chosen_shorter"])
    meaning = f"a judge that only counts tokens is right on {max(guessed, 1 - guessed):.0%}; compare eval/accuracy of rm with that"
    watch = "and watch the length of the answers in PPO"
    return f"chosen answers are {word} in {count / numbers['pairs']:.0%} of the pairs: {meaning}, {watch}"


def by_length(numbers: dict[str, Any]) -> float:
    """Share of the pairs in which "the longer answer is the better one" gives the label; equal lengths count half."""
    equal = numbers["pairs"] - numbers["chosen_longer"] - numbers["chosen_shorter"]
    return (numbers["chosen_longer"] + equal / 2) / numbers["pairs"]


# ----------------------------------------------------------------------------------------------------------------------- the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h2 { margin-top: 2em; border-bottom: 1px solid #ddd; } h3 { margin: 1.5em 0 .3em; }
table { border-collapse: collapse; margin: .8em 0; font-size: 14px; } th, td { padding: .2em .8em; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; font-weight: 600; } td { text-align: right; white-space: nowrap; }
td:first-child { text-align: left; } td.text { text-align: left; white-space: normal; }
.fine { color: #1a7f37; } .warning { color: #9a3412; } .note { color: #666; font-size: 14px; } figure { margin: 0; }
svg { max-width: 100%; height: auto; }
.sample { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa;
          border: 1px solid #e4e4e4; padding: .6em; margin: .4em 0; max-height: 30em; overflow: auto; }
.t { border-left: 1px solid #999; padding: 1px 0; unicode-bidi: isolate; }
.given { background: #ececec; color: #555; } .learnt { background: #c8ecc8; } .answer { background: #d4e4fb; }
.eos { outline: 2px solid #e8590c; outline-offset: -1px; font-weight: 700; } .scored { border-bottom: 3px solid #1c4fa0; }
"""
LEGEND = """<p class="note">Each box is a token; hold the mouse over it for its id. <span class="sample" style="padding: 2px 6px">
<span class="t given">given</span> <span class="t learnt">learnt</span> <span class="t answer">answer of a pair</span>
<span class="t answer eos">EOS</span> <span class="t answer scored">scored here</span></span> An answer without EOS was cut.</p>"""


def page(found: dict[str, Any], lengths: dict[str, Lengths], parts: dict[str, Any], tokenizer: Any, cfg: Config) -> str:
    """All of it as one HTML page, which needs no other file and runs no code."""
    data = cfg.data
    settings = f"template {data.template.name}, tokenizer of {cfg.actor.path}, EOS {tokenizer.eos_token}, "
    settings += f"at most {data.max_prompt_tokens:,} tokens of a prompt and {data.max_response_tokens:,} of an answer"
    body = [f"<h1>Data: {escape(' + '.join(data.sources))}</h1>", f'<p class="note">{escape(settings)}</p>']
    body += [f'<p class="warning">&#9888; {escape(line)}</p>' for line in found["verdicts"]]
    if not found["verdicts"]:
        body.append('<p class="fine">&#10003; nothing to worry about</p>')

    body += ["<h2>Sources</h2>", html_table(SOURCES, [row_of_source(entry) for entry in found["sources"]])]
    reasons = [[name_of(entry), reason, f"{count:,}"] for entry in found["sources"] for reason, count in entry["left_out"].items()]
    if reasons:
        body += ["<h3>Left out</h3>", html_table(["source", "reason", "rows"], reasons)]
    body += ["<h2>Stages</h2>", html_table(PARTS, [row_of_part(name, numbers) for name, numbers in found["stages"].items()])]
    body.append('<p class="note">Tokens: median / 95 % / longest, before anything is cut. Of eval only what is evaluated on.</p>')

    body += ["<h2>The same prompt in two places</h2>"]
    shared = [[pair.replace(" & ", " and "), f"{count:,}"] for pair, count in found["leakage"].items()]
    body += ['<p class="note">Counted anew over all prompts; each must be 0.</p>', html_table(["between", "prompts"], shared)]

    measured = {**found["stages"], **{name_of(entry): entry["tokens"] for entry in found["sources"]}}
    biased = {name: numbers for name, numbers in measured.items() if numbers.get("pairs")}
    if biased:
        header = ["pairs of", "pairs", "chosen longer", "equal", "chosen shorter", "mean difference, tokens", "same once cut"]
        body += ["<h2>Length of chosen and rejected answers</h2>", html_table(header, [row_of_bias(*item) for item in biased.items()])]
        body.append(f'<p class="note">{escape(meaning_of_bias(found["stages"]["rm"]))}</p>')

    body.append("<h2>Lengths in tokens</h2>")
    for name, numbers in measured.items():
        if numbers["rows"]:
            note = f", a random sample of {numbers['measured']:,}" if numbers["measured"] < numbers["rows"] else ""
            body.append(f"<figure><h3>{escape(name)}</h3><p class='note'>{numbers['rows']:,} rows{note}</p>")
            body.append(histogram(lengths[name], data.max_prompt_tokens, data.max_response_tokens) + "</figure>")

    body += ["<h2>Samples</h2>", LEGEND]
    for name in ("sft", "rm", "ppo"):
        body.append(f"<h3>{name}</h3>")
        body += samples(tokenizer, name, parts[name][0], cfg) or ['<p class="note">no rows</p>']
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # should a text of the data slip through, it is not run
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>Data</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


SOURCES = ["source", "rows", "left out", "chosen = rejected", "duplicates", "sft", "rm", "ppo", "held out"]
PARTS = ["", "rows", "different prompts", "prompts", "chosen", "rejected", "prompts dropped", "shortened", "answers cut"]


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['source']}/{entry['split']}"


def row_of_source(entry: dict[str, Any]) -> list[str]:
    """Cells under SOURCES; a stage's with the share of its rows that come from here."""
    counts = [entry["rows"], sum(entry["left_out"].values()), entry["same_answers"], entry["duplicates"]]
    stages = [f"{entry[part]:,} ({entry['share'].get(part, 0):.0%})" if part in entry else "" for part in sources.PARTS]
    return [name_of(entry), *(f"{count:,}" for count in counts), *stages]


def row_of_part(name: str, numbers: dict[str, Any]) -> list[str]:
    """Cells under PARTS."""
    tokens = [" / ".join(f"{n:,}" for n in numbers["tokens"].get(key, {}).values()) for key in ("prompt", "chosen", "rejected")]
    if "text" in numbers["tokens"]:
        tokens[1] = " / ".join(f"{n:,}" for n in numbers["tokens"]["text"].values())
    limits = [f"{share(numbers, key):.1%}" if key in numbers else "" for key in ("dropped", "shortened", "cut")]
    sampled = "*" if numbers["measured"] < numbers["rows"] else ""
    distinct = f"{numbers['distinct_prompts']:,}" if "distinct_prompts" in numbers else ""
    return [name, f"{numbers['rows']:,}", distinct, *(text and text + sampled for text in tokens + limits)]


def row_of_bias(name: str, numbers: dict[str, Any]) -> list[str]:
    pairs, longer, shorter = (numbers[key] for key in ("pairs", "chosen_longer", "chosen_shorter"))
    shares = [f"{count / pairs:.1%}" for count in (longer, pairs - longer - shorter, shorter)]
    return [name, f"{pairs:,}", *shares, f"{numbers['chosen_longer_by']:+.1f}", f"{numbers['alike']:,}"]


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


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """Escapes all cells; those of the column "reason" are texts."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = [
        "".join(f"<td{' class=text' if column == 'reason' else ''}>{escape(cell)}</td>" for column, cell in zip(header, row))
        for row in rows
    ]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def histogram(lengths: Lengths, max_prompt: int, max_response: int) -> str:
    """Lengths of prompts, and of answers, as an SVG element. The limits are dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [("prompts", ["prompt"], max_prompt), ("answers", ["chosen", "rejected"], max_response), ("texts", ["text"], None)]
    panels = [panel for panel in panels if any(len(lengths.get(name, ())) for name in panel[1])]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 8}):
        figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 2.2), squeeze=False, layout="constrained")
        for axis, (title, names, limit) in zip(axes[0], panels):
            values = {name: lengths[name] for name in names if len(lengths.get(name, ()))}
            # a few very long ones would press all others into one bar
            top = max(10.0, *(1.1 * float(np.percentile(some, 99)) for some in values.values()))
            bins = np.linspace(0, top, 41)
            for color, (name, some) in zip(("#1c7ed6", "#e8590c"), values.items()):
                axis.hist(np.minimum(some, top), bins=bins, histtype="stepfilled", alpha=0.5, color=color, label=name)
            if limit is not None and limit <= top:
                axis.axvline(limit, color="#333", linestyle="--", linewidth=1, label=f"limit {limit:,}")
            longer = any(float(some.max()) > top for some in values.values())
            axis.set(title=title, xlabel="tokens (longer ones in the last bar)" if longer else "tokens", ylabel="rows", xlim=(0, top))
            axis.legend()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


# ----------------------------------------------------------------------------------------------------------------------- samples


def samples(tokenizer: Any, stage: str, table: Any, cfg: Config) -> list[str]:
    """A few random rows of a stage as the model will see them, token by token."""
    shown: list[str] = []
    for i in np.random.default_rng(cfg.data.seed).permutation(len(table))[:100].tolist():
        row = table[i]
        [prompt] = template.encode_prompts(tokenizer, [[Turn(**turn) for turn in row["prompt"]]], cfg.data.max_prompt_tokens)
        if prompt is None:
            continue
        if stage == "ppo":
            shown.append(sample(tokenizer, "the policy answers this prompt", prompt, [], ["given"] * len(prompt)))
        for name in {"sft": ["chosen"], "rm": ["chosen", "rejected"], "ppo": []}[stage]:
            [answer] = template.encode_responses(tokenizer, [row[name]], cfg.data.max_response_tokens)
            ended = answer[-1] == tokenizer.eos_token_id
            if stage == "sft":
                first = first_learnt(prompt, cfg.sft.train_on_prompt)
                kinds = ["learnt" if place >= first else "given" for place in range(len(prompt) + len(answer))]
            else:
                kinds = ["given"] * len(prompt) + ["answer"] * len(answer)
                kinds[-1] += " scored"
            kinds[-1] += " eos" * ended
            shown.append(sample(tokenizer, name + ("" if ended else ", cut"), prompt, answer, kinds))
        if len(shown) >= SAMPLES * (2 if stage == "rm" else 1):
            break
    return shown


def sample(tokenizer: Any, title: str, prompt: list[int], answer: list[int], kinds: list[str]) -> str:
    """One sequence. Args: kinds: CSS classes of each token of prompt and answer."""
    note = f"{title}: {len(prompt):,} tokens of the prompt" + (f", {len(answer):,} of the answer" if answer else "")
    boxes = token_boxes(tokenizer, prompt, kinds[: len(prompt)]) + token_boxes(tokenizer, answer, kinds[len(prompt) :])
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
            boxes.append(f'<span class="t {kinds[end - 1]}" title="{numbers}">{visible(text)}</span>')
            start = end
    return "".join(boxes)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def visible(text: str) -> str:
    """Escaped, with signs for line breaks and control characters."""
    signs = {code: chr(0x2400 + code) for code in range(32)} | {ord("\n"): "↵\n", ord("\t"): "→\t", 127: "␡"}
    return escape(text.translate(signs)) or "∅"
