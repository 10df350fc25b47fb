"""Sources: files and the hub -> records on disk (prompt, chosen, rejected), cut into the parts of the stages, and mixed.

Nothing is held in memory but a few numbers per row. What is read is kept in the cache of the `datasets` library, under a key of
content, settings and the code that read it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rlhf.config import BadRow, Data, Format, Source
from rlhf.data import formats
from rlhf.data.records import Dataset, Demonstration, Pair, Turn

BUILDERS = {".jsonl": "text", ".json": "json", ".parquet": "parquet", ".csv": "csv"}  # a .jsonl line by line: one may be broken
SFT, RM, PPO, EVAL = range(4)  # the parts
PARTS = ("sft", "rm", "ppo", "eval")
UNREADABLE = "cannot be read: "


def load_sources(cfg: Data) -> Dataset:
    """Read all sources of `data.sources`, cut them into the stages' parts, and mix them.

    Which part a prompt belongs to is decided by a hash of its text, so it stands in one of them only, whatever the sources, their
    order and their versions. A source's own held-out split is evaluated on, where it has one; prompts of it are not trained on. The
    same row twice counts once. SFT learns the chosen answers.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    import datasets

    tables: list[Any] = []
    texts: list[Any] = []
    columns: list[dict[str, np.ndarray]] = []
    reports: list[dict[str, Any]] = []
    for name, source in cfg.sources.items():
        if Path(source.path).expanduser().is_file():  # a file has no splits
            source = dataclasses.replace(source, eval_split=None)
        for split, held_out in ((source.split, False), (source.eval_split, True)):
            if split is None:
                continue
            table, column, report = read(name, source, split, cfg)
            report = {"source": name, "split": split, **report}
            if "chosen" not in table.column_names:  # plain text
                texts.append(table)
            else:
                own_eval = np.full(len(table), source.eval_split is not None)
                weight = np.full(len(table), 1.0 if held_out else source.weight)
                sft_only = np.full(len(table), source.sft_only)
                origin = np.full(len(table), len(tables))
                more = {"own_eval": own_eval, "held_out": np.full(len(table), held_out), "weight": weight, "sft_only": sft_only}
                columns.append(column | more | {"origin": origin})
                tables.append(table)
            reports.append(report)
    if not tables:
        raise ValueError(f"data={'+'.join(cfg.sources)}: plain text only; add a source with questions and answers")
    rows = {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}
    parts, lost = divide(rows, cfg)
    of_tables = [report for report in reports if "chosen" in report["columns"]]
    for reason, index in [*lost.items(), *((PARTS[part], index) for part, index in parts.items())]:
        for report, count in zip(of_tables, np.bincount(rows["origin"][index], minlength=len(tables)).tolist()):
            if reason in PARTS:
                report[reason] = count
            elif count:
                report["left_out"][reason] = count
    everything = datasets.concatenate_datasets(tables)
    held_out_rows = parts[EVAL][np.argsort(rows["key"][parts[EVAL]])]  # sources mixed, the same ones in whatever order they came
    has_two = held_out_rows[rows["is_pair"][held_out_rows]]
    demonstrations = [pair_of(row) for row in everything.select(held_out_rows[: cfg.eval_rows])]
    return Dataset(
        sft=everything.select(parts[SFT]),
        rm=everything.select(parts[RM]),
        ppo=everything.select(parts[PPO]),
        eval_sft=[Demonstration(pair.prompt, pair.chosen) for pair in demonstrations],
        eval_rm=[pair_of(row) for row in everything.select(has_two[: cfg.eval_rows])],
        eval_prompts=list({str(pair.prompt): pair.prompt for pair in demonstrations}.values()),
        texts=datasets.concatenate_datasets(texts) if texts else None,
        report=reports,
    )


def divide(rows: dict[str, np.ndarray], cfg: Data) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """Which rows go into which part, and which into none.

    Args: rows: of each row `prompt` and `key` (hashes of the prompt, and of all of it), `is_pair`, `sft_only`, `own_eval` (its source
        has a held-out split of its own), `held_out` (it is of such a split), `weight`.
    Returns: row numbers by part, a row of weight 2 twice; row numbers by the reason why they are left out.
    """
    place = rows["prompt"] / 2.0**64  # uniform in [0, 1)
    share = cfg.eval_share
    within = np.where(place < share, place / share, (place - share) / (1 - share))
    a, b, c = cfg.shares
    part = np.select([within < a / (a + b + c), within < (a + b) / (a + b + c)], [SFT, RM], PPO)
    part[((place < share) & ~rows["own_eval"]) | rows["held_out"]] = EVAL

    lost: dict[str, np.ndarray] = {}
    kept = np.ones(len(part), dtype=bool)

    def leave_out(reason: str, which: np.ndarray) -> None:
        lost[reason] = np.flatnonzero(which & kept)
        kept[lost[reason]] = False

    leave_out("prompt is evaluated on", (part != EVAL) & np.isin(rows["prompt"], np.unique(rows["prompt"][part == EVAL])))
    seen_before = np.ones(len(part), dtype=bool)
    seen_before[np.unique(rows["key"], return_index=True)[1]] = False
    leave_out("the same row again", seen_before)
    sft_only = rows["sft_only"] & (part != EVAL)
    elsewhere = np.unique(rows["prompt"][kept & ~sft_only & ((part == RM) | (part == PPO))])
    leave_out("prompt of another stage", sft_only & (part != SFT) & np.isin(rows["prompt"], elsewhere))
    part[sft_only] = SFT
    leave_out("no second answer", (part == RM) & ~rows["is_pair"])
    first_with_prompt = np.zeros(len(part), dtype=bool)
    for_ppo = np.flatnonzero(kept & (part == PPO))
    first_with_prompt[for_ppo[np.unique(rows["prompt"][for_ppo], return_index=True)[1]]] = True
    leave_out("the same prompt again", (part == PPO) & ~first_with_prompt)

    fraction = (rows["key"] >> np.uint64(11)) / 2.0**53  # a part of the rows, the same one each time
    copies = np.floor(rows["weight"]) + (fraction < rows["weight"] % 1)
    copies[(part == EVAL) | (part == PPO)] = np.minimum(copies, 1)[(part == EVAL) | (part == PPO)]
    copies[part == EVAL] = 1
    chosen = {number: np.flatnonzero(kept & (part == number)) for number in (SFT, RM, PPO, EVAL)}
    return {number: np.repeat(index, copies[index].astype(np.int64)) for number, index in chosen.items()}, lost


def pair_of(row: dict[str, Any]) -> Pair:
    """A row of a table as an object."""
    return Pair([Turn(**turn) for turn in row["prompt"]], row["chosen"], row["rejected"])


# -------------------------------------------------------------------------------------------------------------------- one source


def read(name: str, source: Source, split: str, cfg: Data) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
    """A split of a source as a table of records, without the rows that are left out.

    Returns: the table; of each row its hashes `prompt` and `key`, and `is_pair`; and the report: rows, and how many were left out why.
    Raises: FileNotFoundError, ValueError naming the source, and line or row.
    """
    import datasets
    import pyarrow.compute as pc

    raw, by_line = open_source(name, source, split, cfg)
    if source.rows is not None:
        raw = raw.select(range(min(source.rows, len(raw))))
    source = resolved(name, source, first_row(raw, by_line))
    text = source.format == Format.text
    strings = datasets.Value("string")
    features = {"text": strings} if text else {"prompt": datasets.List({"role": strings, "text": strings}), "chosen": strings}
    features |= {"problem": strings} if text else {"rejected": strings, "prompt_key": datasets.Value("uint64"), "problem": strings}
    features |= {"key": datasets.Value("uint64")}
    key = digest(raw._fingerprint, repr(source), str(cfg.seed), Path(__file__).read_text(), Path(formats.__file__).read_text())
    table = mapped(raw, read_texts if text else read_rows, key, f"reading {name}", cfg.workers,
                   {"source": source, "by_line": by_line, "seed": cfg.seed}, datasets.Features(features))  # fmt: skip

    problems = table.data.column("problem")
    counts = {count["values"]: count["counts"] for count in pc.value_counts(problems).to_pylist()}
    left_out = {reason: count for reason, count in counts.items() if reason and not reason.startswith(UNREADABLE)}
    unreadable = {reason: count for reason, count in counts.items() if reason.startswith(UNREADABLE)}
    report: dict[str, Any] = {"rows": len(table), "left_out": left_out, "columns": ["text"] if text else ["prompt", "chosen"]}
    if unreadable:
        first = min(pc.index(problems, reason).as_py() for reason in unreadable)
        what = problems[first].as_py().removeprefix(UNREADABLE)
        line = f"data.sources.{name}: {'line' if by_line else 'row'} {first + by_line} of {source.path}: {what}"
        if cfg.on_bad_row == BadRow.refuse:
            raise ValueError(line)
        left_out["cannot be read"] = sum(unreadable.values())
        report["first_unreadable"] = line
        if left_out["cannot be read"] == len(table):
            raise ValueError(f"{line} (nor can any other row)")
    fine = np.flatnonzero(pc.equal(problems, "").to_numpy(zero_copy_only=False))
    if not len(fine):
        why = ", ".join(f"{count} x {reason}" for reason, count in left_out.items()) or "it is empty"
        raise ValueError(f"data.sources.{name}: no row of {source.path} ({split}) is left: {why}")

    def column(of: str) -> np.ndarray:
        return table.data.column(of).to_numpy()[fine]

    if text:
        return table.select_columns(["text"]).select(fine), {}, report
    is_pair = ~table.data.column("rejected").is_null().to_numpy()[fine] & (not source.sft_only)
    numbers = {"prompt": column("prompt_key"), "key": column("key"), "is_pair": is_pair}
    return table.select_columns(["prompt", "chosen", "rejected"]).select(fine), numbers, report


def resolved(name: str, source: Source, first: dict[str, Any]) -> Source:
    """The source with its format, found or checked by the columns of its first row. Raises: ValueError naming them."""
    columns = list(first)
    found = source.format or formats.detect_format([*columns, *source.columns])
    if found is None:
        known = "prompt, chosen, rejected; chosen, rejected; messages; instruction, output; prompt, response; text"
        raise ValueError(
            f"data.sources.{name}: {source.path} has the columns {', '.join(columns)}; give format and columns. Known: {known}"
        )
    source = dataclasses.replace(source, format=found)
    try:
        formats.check_columns(columns, source)
    except ValueError as error:
        raise ValueError(f"data.sources.{name}: {source.path}: {error}") from None
    return source


def first_row(raw: Any, by_line: bool) -> dict[str, Any]:
    """A row to see the columns by; {} where there is none."""
    if not by_line:
        return dict.fromkeys(raw.column_names)
    for line in raw.select(range(min(1000, len(raw)))):
        try:
            if isinstance(row := json.loads(line["text"]), dict):
                return row
        except ValueError:
            continue
    return {}


def read_rows(batch: dict[str, list[Any]], source: Source, by_line: bool, seed: int) -> dict[str, list[Any]]:
    """A batch of raw rows as records; `problem` is "" where a row is fine."""
    found: dict[str, list[Any]] = {key: [] for key in ("prompt", "chosen", "rejected", "prompt_key", "problem", "key")}
    for row in raw_rows(batch):
        pair, problem = Pair([], "", None), ""
        try:
            pair = formats.read_row(parse_line(row["text"]) if by_line else row, source)
        except formats.Skip as reason:
            problem = str(reason)
        except ValueError as error:
            problem = UNREADABLE + str(error)
        # the same prompt is the same whatever its case and spaces
        prompt = "|".join(f"{turn.role}:{' '.join(turn.text.lower().split())}" for turn in pair.prompt)
        found["prompt"].append([{"role": turn.role, "text": turn.text} for turn in pair.prompt])
        found["chosen"].append(pair.chosen)
        found["rejected"].append(pair.rejected)
        found["prompt_key"].append(number_of(f"{seed}|{prompt}"))
        found["key"].append(number_of(json.dumps([prompt, pair.chosen, pair.rejected])))
        found["problem"].append(problem)
    return found


def read_texts(batch: dict[str, list[Any]], source: Source, by_line: bool, seed: int) -> dict[str, list[Any]]:
    """Likewise for plain text."""
    found: dict[str, list[Any]] = {"text": [], "problem": [], "key": []}
    for row in raw_rows(batch):
        text, problem = "", ""
        try:
            text = formats.read_text(parse_line(row["text"]) if by_line else row, source)
        except formats.Skip as reason:
            problem = str(reason)
        except ValueError as error:
            problem = UNREADABLE + str(error)
        found["text"].append(text)
        found["problem"].append(problem)
        found["key"].append(number_of(text))
    return found


def raw_rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def parse_line(line: str) -> dict[str, Any]:
    """A line of a .jsonl file. Raises: Skip for an empty one, ValueError for what is no object."""
    if not line.strip():
        raise formats.Skip("empty line")
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("JSON, but no object {...}")
    return row


def number_of(text: str) -> int:
    """A hash, 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")


# -------------------------------------------------------------------------------------------------------------------- the library


def open_source(name: str, source: Source, split: str, cfg: Data) -> tuple[Any, bool]:
    """The rows of a file, a directory or the hub, as they are; and whether they are lines of a .jsonl file."""
    import datasets

    path, where = source.path, f"data.sources.{name}.path={source.path}"
    file = Path(path).expanduser()
    if not file.exists() and path[:1] not in "/.~":
        return open_hub(name, source, split), False
    if file.is_dir():
        try:
            saved = datasets.load_from_disk(str(file))
        except Exception as error:
            raise ValueError(f"{where}: a directory must be one that save_to_disk has written ({first_line(error)})") from None
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"data.sources.{name}: {path} has no split {split}, but {', '.join(saved)}")
            return saved[split], False
        return saved, False
    if not file.is_file():
        raise FileNotFoundError(f"{where}: no such file")
    if not file.stat().st_size:
        raise ValueError(f"{where}: the file is empty")
    builder = BUILDERS.get(Path(path.removesuffix(".gz")).suffix)
    if builder is None:
        raise ValueError(f"{where}: give a file ending in {', '.join(BUILDERS)} (.gz too), a directory of save_to_disk, or a hub id")
    try:
        return datasets.load_dataset(builder, data_files=str(file), split="train"), builder == "text"
    except Exception as error:  # the library wraps the causes in its own errors, or names none
        cause: BaseException = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__ or cause
        hint = "not UTF-8: " if isinstance(cause, UnicodeDecodeError) else ""
        raise ValueError(f"{where}: {hint}{first_line(cause) or 'it is empty'}") from None


def open_hub(name: str, source: Source, split: str) -> Any:
    """A split of a data set of the hub, or of the cache when the hub does not answer."""
    import datasets
    import huggingface_hub

    if not hub_answers():  # else the library would try for half a minute
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(source.path, source.config, split=split)
    except Exception as error:
        text = first_line(error)
        if "nknown split" in text:
            raise ValueError(f"data.sources.{name}.split={split}: {text}") from None
        hint = "no such file, and the hub does not answer, nor has the cache" if datasets.config.HF_HUB_OFFLINE else "not to be had:"
        raise FileNotFoundError(f"data.sources.{name}.path={source.path}: {hint} {text}") from None


def hub_answers() -> bool:
    """Whether somebody is there, within 2 s; where a proxy is set, whether that is."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    url = urlsplit(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname or "", url.port or (443 if url.scheme == "https" else 80)), timeout=2).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def mapped(raw: Any, read: Any, key: str, what: str, workers: int | None, arguments: dict[str, Any], features: Any) -> Any:
    """`raw.map(read)` in several processes, kept in the library's cache under `key`: done once, and read from there afterwards."""
    import datasets
    from filelock import FileLock

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    large = len(raw) > 20_000
    processes = min(workers or min(os.cpu_count() or 1, 8), len(raw)) if large else None
    (datasets.enable_progress_bars if large else datasets.disable_progress_bars)()
    with FileLock(folder / f"{key}.lock"):  # another process of this run, or another run, may be at it: then wait, and read
        return raw.map(
            read,
            batched=True,
            remove_columns=raw.column_names,
            features=features,
            fn_kwargs=arguments,
            num_proc=processes,
            cache_file_name=str(folder / f"{key}.arrow"),
            new_fingerprint=key,
            desc=what,
        )
