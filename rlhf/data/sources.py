"""Sources: files and the hub -> records on disk (prompt, chosen, rejected), cut into the parts of the stages, and mixed.

Nothing is held in memory but a few numbers per row. What is read is kept in the cache of the `datasets` library, under a key of
content, settings and the code that read it.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf.config.choices import BadRow, Format
from rlhf.config.schema import Data, Source
from rlhf.data import formats
from rlhf.data.records import Dataset, Demonstration, Pair, Turn
from rlhf.data.splits import EVAL, PARTS, PPO, RM, SFT, split_rows
from rlhf.runs.log import first_line, is_listening

BUILDERS = {
    ".jsonl": "text",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}  # a .jsonl line by line: one may be broken
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
    of_tables: list[dict[str, Any]] = []  # those of them that are cut into parts
    for name, source in cfg.sources.items():
        if Path(source.path).expanduser().is_file():  # a file has no splits
            source = dataclasses.replace(source, eval_split=None)
        for split, held_out in ((source.split, False), (source.eval_split, True)):
            if split is None:
                continue
            table, column, report = read(name, source, split, cfg)
            report = {"source": name, "split": split, **report}
            if table.column_names == ["text"]:
                if held_out:  # plain text is not evaluated on
                    continue
                texts.append(table)
            else:
                own_eval = np.full(len(table), source.eval_split is not None)
                weight = np.full(len(table), 1.0 if held_out else source.weight)
                sft_only = np.full(len(table), source.sft_only)
                origin = np.full(len(table), len(tables))
                more = {
                    "own_eval": own_eval,
                    "held_out": np.full(len(table), held_out),
                    "weight": weight,
                    "sft_only": sft_only,
                }
                columns.append(column | more | {"origin": origin})
                tables.append(table)
                of_tables.append(report)
            reports.append(report)
    if not tables:
        raise ValueError(
            f"data={'+'.join(cfg.sources)}: plain text only; add a source with questions and answers"
        )
    rows = {key: np.concatenate([column[key] for column in columns]) for key in columns[0]}
    parts, lost = split_rows(rows, cfg)
    for reason, index in [*lost.items(), *((PARTS[part], index) for part, index in parts.items())]:
        for report, count in zip(
            of_tables, np.bincount(rows["origin"][index], minlength=len(tables)).tolist()
        ):
            if reason in PARTS:
                report[reason] = count
            elif count:
                report["left_out"][reason] = count
    for report in of_tables:  # a row of weight 2 stands in its part twice
        report["copies"] = (
            sum(report[part] for part in PARTS) + sum(report["left_out"].values()) - report["rows"]
        )
    everything = datasets.concatenate_datasets(tables)
    held_out_rows = parts[EVAL][
        np.argsort(rows["key"][parts[EVAL]])
    ]  # sources mixed, the same ones in whatever order they came
    has_two = held_out_rows[rows["is_pair"][held_out_rows]]
    demonstrations = [pair_of(row) for row in everything.select(held_out_rows[: cfg.eval_rows])]
    return Dataset(
        sft=everything.select(parts[SFT]),
        rm=everything.select(parts[RM]),
        ppo=everything.select(parts[PPO]),
        eval_sft=[Demonstration(pair.prompt, pair.chosen) for pair in demonstrations],
        eval_rm=[
            dataclasses.replace(pair_of(row), source=of_tables[origin]["source"])
            for row, origin in zip(
                everything.select(has_two[: cfg.eval_rows]), rows["origin"][has_two]
            )
        ],
        eval_prompts=list({str(pair.prompt): pair.prompt for pair in demonstrations}.values()),
        texts=datasets.concatenate_datasets(texts) if texts else None,
        report=reports,
    )


def pair_of(row: dict[str, Any]) -> Pair:
    """A row of a table as an object."""
    return Pair([Turn(**turn) for turn in row["prompt"]], row["chosen"], row["rejected"])


def read(
    name: str, source: Source, split: str, cfg: Data
) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
    """A split of a source as a table of records, without the rows that are left out.

    Returns: the table; of each row its hashes `prompt` and `key`, and `is_pair`; and the report: rows, and how many were left out why.
    Raises: FileNotFoundError, ValueError naming the source, and line or row.
    """
    import datasets
    import pyarrow.compute as pc

    raw, by_line = open_source(name, source, split)
    if not len(raw):
        raise ValueError(f"data.sources.{name}: {source.path} ({split}) is empty")
    if source.rows is not None:
        raw = raw.select(range(min(source.rows, len(raw))))
    source = resolved(name, source, first_row(name, source, raw, by_line))
    text = source.format == Format.text
    strings = datasets.Value("string")
    features = (
        {"text": strings}
        if text
        else {"prompt": datasets.List({"role": strings, "text": strings}), "chosen": strings}
    )
    features |= {} if text else {"rejected": strings, "prompt_key": datasets.Value("uint64")}
    features |= {"problem": strings, "key": datasets.Value("uint64")}
    reading = str(
        (source.format, sorted(source.columns.items()), source.min_score_ratio, by_line, cfg.seed)
    )
    key = digest(
        raw._fingerprint, reading, Path(__file__).read_text(), Path(formats.__file__).read_text()
    )
    table = cached_map(raw, read_texts if text else read_rows, key, f"reading {name}", cfg.workers,
                   {"source": source, "by_line": by_line, "seed": cfg.seed}, datasets.Features(features))  # fmt: skip

    problems = table.data.column("problem")
    unreadable = pc.starts_with(problems, UNREADABLE)  # with a message of their own each
    counts = pc.value_counts(problems.filter(pc.invert(unreadable))).to_pylist()
    left_out = {count["values"]: count["counts"] for count in counts if count["values"]}
    report: dict[str, Any] = {"rows": len(table), "left_out": left_out}
    if bad := pc.sum(unreadable).as_py():
        first = pc.index(unreadable, True).as_py()
        what = problems[first].as_py().removeprefix(UNREADABLE)
        line = f"data.sources.{name}: {'line' if by_line else 'row'} {first + 1} of {source.path}: {what}"
        if cfg.on_bad_row == BadRow.refuse:
            raise ValueError(line)
        if bad == len(table):
            raise ValueError(f"{line} (nor can any other row be read)")
        left_out["cannot be read"] = bad
        report["first_unreadable"] = line
    fine = np.flatnonzero(pc.equal(problems, "").to_numpy(zero_copy_only=False))
    if not len(fine):
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ValueError(f"data.sources.{name}: no row of {source.path} ({split}) is left: {why}")

    def column(of: str) -> np.ndarray:
        return table.data.column(of).to_numpy()[fine]

    report["content"] = hashlib.sha256(column("key").tobytes()).hexdigest()[
        :16
    ]  # a run that goes on asks for the same

    if text:
        every = len(fine)
        fine = fine[np.sort(np.unique(column("key"), return_index=True)[1])]
        left_out |= {"the same text again": every - len(fine)} if len(fine) < every else {}
        report["texts"] = len(fine)
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


def first_row(name: str, source: Source, raw: Any, by_line: bool) -> dict[str, Any]:
    """A row to see the columns by. Raises: ValueError when none of the first lines is an object."""
    if not by_line:
        return dict.fromkeys(raw.column_names)
    problem = "line 1 is empty"
    for number, line in enumerate(raw.select(range(min(1000, len(raw)))), 1):
        try:
            return parse_line(line["text"])
        except formats.Skip:
            continue
        except ValueError as error:
            problem = f"line {number}: {error}" if problem == "line 1 is empty" else problem
    raise ValueError(
        f"data.sources.{name}: {source.path} has no line that is a JSON object {{...}}: {problem}"
    )


def read_rows(
    batch: dict[str, list[Any]], source: Source, by_line: bool, seed: int
) -> dict[str, Any]:
    """A batch of raw rows as records; `problem` is "" where a row is fine."""
    found: dict[str, list[Any]] = {
        key: [] for key in ("prompt", "chosen", "rejected", "prompt_key", "problem", "key")
    }
    for row in raw_rows(batch):
        pair, prompt_key, key, problem = Pair([], "", None), 0, 0, ""
        try:
            read = formats.read_row(parse_line(row["text"]) if by_line else row, source)
            # the same prompt is the same whatever its case and spaces
            prompt = "|".join(
                f"{turn.role}:{' '.join(turn.text.lower().split())}" for turn in read.prompt
            )
            prompt_key = number_of(f"{seed}|{prompt}")
            key = number_of(json.dumps([prompt, read.chosen, read.rejected], ensure_ascii=False))
            pair = read
        except formats.Skip as reason:
            problem = str(reason)
        except ValueError as error:  # also of texts that are no Unicode, "\\ud83d" alone
            problem = UNREADABLE + str(error)
        found["prompt"].append([{"role": turn.role, "text": turn.text} for turn in pair.prompt])
        found["chosen"].append(pair.chosen)
        found["rejected"].append(pair.rejected)
        found["prompt_key"].append(prompt_key)
        found["key"].append(key)
        found["problem"].append(problem)
    return found | {name: np.array(found[name], dtype=np.uint64) for name in ("prompt_key", "key")}


def read_texts(
    batch: dict[str, list[Any]], source: Source, by_line: bool, seed: int
) -> dict[str, Any]:
    """Likewise for plain text."""
    found: dict[str, list[Any]] = {"text": [], "problem": [], "key": []}
    for row in raw_rows(batch):
        text, key, problem = "", 0, ""
        try:
            read = formats.read_text(parse_line(row["text"]) if by_line else row, source)
            key = number_of(read)
            text = read
        except formats.Skip as reason:
            problem = str(reason)
        except ValueError as error:
            problem = UNREADABLE + str(error)
        found["text"].append(text)
        found["problem"].append(problem)
        found["key"].append(key)
    return found | {"key": np.array(found["key"], dtype=np.uint64)}


def raw_rows(batch: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values)) for values in zip(*batch.values())]


def parse_line(line: str) -> dict[str, Any]:
    """A line of a .jsonl file. Raises: Skip for an empty one, ValueError for what is no object."""
    line = line.removeprefix("\ufeff")  # some editors begin a file so
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
    """A hash, 64 bits. Raises: UnicodeEncodeError for half a character."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def open_source(name: str, source: Source, split: str) -> tuple[Any, bool]:
    """The rows of a file, a directory or the hub, as they are; and whether they are lines of a .jsonl file."""
    import datasets

    path, where = source.path, f"data.sources.{name}.path={source.path}"
    file = Path(path).expanduser()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    suffix = Path(path.removesuffix(".gz")).suffix
    if not file.exists() and suffix not in BUILDERS and path[:1] not in "/.~":
        return open_hub(name, source, split), False
    if file.is_dir():
        try:
            saved = datasets.load_from_disk(str(file))
        except Exception as error:
            raise ValueError(
                f"{where}: a directory must be one that save_to_disk has written ({first_line(error)})"
            ) from None
        splits = saved if isinstance(saved, datasets.DatasetDict) else {source.split: saved}
        if split not in splits:
            raise ValueError(
                f"data.sources.{name}: {path} has no split {split}, but {', '.join(splits)}"
            )
        return splits[split], False
    if not file.is_file():
        raise FileNotFoundError(f"{where}: no such file")
    if not file.stat().st_size:
        raise ValueError(f"{where}: the file is empty")
    if suffix not in BUILDERS:
        raise ValueError(
            f"{where}: give a file ending in {', '.join(BUILDERS)} (.gz too), a directory of save_to_disk, or a hub id"
        )
    show_progress(file.stat().st_size > 10**8)
    try:
        builder = "text" if suffix == ".json" and holds_lines(file) else BUILDERS[suffix]
        how = csv_as_text(file, source) if builder == "csv" else {}
        return datasets.load_dataset(
            builder, data_files=str(file), split="train", **how
        ), builder == "text"
    except Exception as error:  # the library wraps the causes in its own errors, or names none
        raise ValueError(f"{where}: {what_is_wrong(file, suffix, error)}") from None


def open_compressed(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def holds_lines(file: Path) -> bool:
    """Whether a .json file has an object in each line, as .jsonl files do."""
    with open_compressed(file) as lines:
        try:
            return isinstance(json.loads(lines.readline()), dict)
        except ValueError:
            return False


def what_is_wrong(file: Path, suffix: str, error: BaseException) -> str:
    """Why a file cannot be read: the line where it is no UTF-8 or no JSON, else what the library says."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, OSError):
        return first_line(error)
    if suffix != ".parquet":
        with open_compressed(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as problem:
                    return f"line {number} is not UTF-8: {problem}"
    if suffix == ".json":
        with open_compressed(file) as whole:
            try:
                json.load(whole)
            except ValueError as problem:
                return f"no JSON ({problem})"
    if "corresponds to no data" in str(error):
        return "it is empty"
    return first_line(error)


def csv_as_text(file: Path, source: Source) -> dict[str, Any]:
    """Arguments that keep a .csv file's fields as they are, "NA" and "42" too; nothing between two commas is null, scores are numbers."""
    import datasets
    import pandas

    scores = [source.columns.get(name, name) for name in ("score_a", "score_b")]
    columns = pandas.read_csv(file, nrows=0).columns
    features = {name: datasets.Value("float64" if name in scores else "string") for name in columns}
    return {"features": datasets.Features(features), "keep_default_na": False, "na_values": [""]}


def open_hub(name: str, source: Source, split: str) -> Any:
    """A split of a data set of the hub, or of the cache when the hub does not answer."""
    import datasets
    import huggingface_hub

    if (
        not datasets.config.HF_HUB_OFFLINE and not hub_answers()
    ):  # else the library would try for half a minute
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    show_progress(True)
    try:
        try:
            return datasets.load_dataset(source.path, source.config, split=split)
        except RuntimeError as error:  # a data set that is a program: the library runs none, but the hub has its rows as files
            if "scripts are no longer supported" not in str(error):
                raise
            return datasets.load_dataset(
                source.path, source.config, split=split, revision="refs/convert/parquet"
            )
    except Exception as error:
        text = first_line(error)
        if "nknown split" in text:
            raise ValueError(f"data.sources.{name}.split={split}: {text}") from None
        hint = (
            "no such file, not in the cache, and the hub does not answer"
            if datasets.config.HF_HUB_OFFLINE
            else "not to be had"
        )
        raise FileNotFoundError(f"data.sources.{name}.path={source.path}: {hint}: {text}") from None


def hub_answers() -> bool:
    """Whether the hub is there; where a proxy is set, whether that is."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    return is_listening(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def show_progress(wanted: bool) -> None:
    import datasets

    (datasets.enable_progress_bars if wanted else datasets.disable_progress_bars)()


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where what is computed from the data is kept, in the library's cache."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached_map(
    raw: Any,
    read: Any,
    key: str,
    what: str,
    workers: int | None,
    arguments: dict[str, Any],
    features: Any,
) -> Any:
    """`raw.map(read)` in several processes, kept in the library's cache under `key`: done once, and read from there afterwards."""
    from filelock import FileLock

    folder = cache_folder()
    show_progress(large := len(raw) > 20_000)
    processes = min(workers or min(os.cpu_count() or 1, 8), len(raw)) if large else None
    with FileLock(
        folder / f"{key}.lock"
    ):  # another process of this run, or another run, may be at it: then wait, and read
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
