"""Bad inputs: odd, huge and hostile values and files, and the words of the line that each gets."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Build = Callable[[], object]  # makes files in the current folder


class BadInput(NamedTuple):
    """A command with something wrong in it, which ends with exit code 2 and one line."""

    name: str
    arguments: list[str]
    words: list[str]  # that the line has
    build: Build | None = None
    # train: train.py.  data: its data alone, as a stage reads them.  load: /load FILE of chat.py.
    # report: python -m rlhf.report
    program: str = "train"
    full: bool = False  # like another one: only in the full matrices


class BadRow(NamedTuple):
    """A file that is read, but for one row, which is counted as unreadable with these words."""

    name: str
    file: str
    words: str
    build: Build


# --- files


def write(name: str, content: str | bytes) -> Build:
    data = content if isinstance(content, bytes) else content.encode()

    def build() -> None:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    return build


def pipe(name: str) -> Build:
    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(name)

    return build


def link(name: str, target: str) -> Build:
    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, name)

    return build


def folder(name: str) -> Build:
    return lambda: Path(name).mkdir(parents=True)


def a_socket(name: str) -> Build:
    return lambda: socket.socket(socket.AF_UNIX).bind(name)


def sparse(name: str, size: int) -> Build:
    """A file of NULs that takes no room."""

    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        os.truncate(name, size)

    return build


def packed(name: str, size: int) -> Build:
    """A .gz file that unpacks to `size` bytes: copies of one packed MiB are a valid file too."""
    return write(name, gzip.compress(b"a" * 2**20, 9) * (size // 2**20))


def parquet(name: str, rows: int, text: str) -> Build:
    def build() -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"prompt": [text * 2**20], "chosen": ["b"]})
        options = {"use_dictionary": False, "compression": "zstd"}
        with pyarrow.parquet.ParquetWriter(name, table.schema, **options) as file:
            for _ in range(rows):
                file.write_table(table)

    return build


def both(*builds: Build) -> Build:
    return lambda: [build() for build in builds]


def pairs(count: int = 20) -> str:
    """Lines of a file that is fine."""
    rows = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def pair(**values: str) -> str:
    """A line of JSON with these values, which are JSON."""
    values = {"prompt": '"Why?"', "chosen": '"So."', "rejected": '"No."'} | values
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}\n"


MIB = 2**20
DEEP = 100_000  # brackets
TABLE = "prompt,chosen,rejected\n" + "".join(f"{i}?,yes,no\n" for i in range(20))
CONFIG = '{"architectures": ["OPTForCausalLM"], "model_type": "opt"}'
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi")
)


# --- values of keys


def value(name: str, argument: str, *words: str) -> BadInput:
    """A wrong value: the line names it, and says what is wrong."""
    return BadInput(name, [argument], [argument, *words])


VALUES = [
    value("negative rate", "sft.lr=-1.0", "must be above 0"),
    value("text for a number", "sft.lr=fast", "must be a number"),
    value("nan", "sft.lr=nan", "must be a"),
    value("infinity", "rl.kl.horizon=inf", "must be a finite number, above 0"),
    value("infinite weight decay", "sft.weight_decay=inf", "must be a finite number"),
    BadInput("nan in a list", ["rm.betas=[0.9,nan]"], ["rm.betas=", "a finite number"]),
    value("nan without a range", "rollout.top_p=nan", "must be"),
    value("no value", "sft.lr=", "has no value; give a number"),
    value("null", "sft.lr=null", "cannot be null"),
    value("a list", "sft.lr=[1,2]", "must be one value"),
    BadInput("an object", ["sft.lr={a: 1}"], ["sft.lr=", "must be a number"]),
    value("a sweep without -m", "sft.lr=1,2", "add -m"),
    value("a fraction", "sft.batch_size=1.5", "must be a whole number"),
    value("zero", "deploy.micro_batch=0", "must be above 0"),
    value("a word for true", "plan=maybe", "plan=maybe"),
    value("no such precision", "deploy.precision=fp8", "one of"),
    BadInput("shares of nothing", ["data.shares=[0,0,0]"], ["data.shares=", "not all 0"]),
    BadInput("two shares", ["data.shares=[1,2]"], ["data.shares=", "three parts"]),
    value("a name that leaves the folder", "experiment_name=../x", "plain name"),
    BadInput("an empty name", ["experiment_name=''"], ["experiment_name=: has no value"]),
    value("demonstrations", "data.sandbox.demonstrations=1000000000000", "at most 1,000,000"),
    value("pairs", "data.sandbox.pairs=1000000000000", "at most 1,000,000"),
    value("batch", "sft.batch_size=100000000000000000000", "at most 1,000,000"),
    value("later batch", "rl.batch_size=100000000000000000000", "at most 1,000,000"),
    BadInput(
        "a later batch of more prompts than there are",
        ["rl.batch_size=1000000"],
        ["rl.batch_size=1000000: a step of ppo needs 1,000,000 prompts, there are 1,"],
    ),
    value("passes", "sft.epochs=1000000000", "at most 100,000"),
    value("passes over prompts", "rl.prompt_epochs=1000000000", "at most 100,000"),
    value("tokens", "rollout.max_new_tokens=1000000000", "at most 2,000,000"),
    value("tokens of prompts", "data.max_prompt_tokens=1000000000", "at most 2,000,000"),
    value("steps", "rl.max_steps=100000000000", "at most 2,147,483,647"),
    value("seed", "seed=100000000000000000000", "at most 2,147,483,647"),
    value("negative seed", "seed=-1", "at least 0"),
    value("threads", "deploy.threads=1000000", "give at most"),
    value("processes", "deploy.processes_per_node=1000000", "at most 1024"),
    value("nodes", "deploy.nodes=1000000", "at most 10,000"),
    value("workers", "data.workers=1000000", "at most 1024"),
    value("responses", "eval.samples=1000000000", "at most 100,000"),
    value("rank", "actor.lora.rank=1000000000", "at most 65,536"),
    value("length of a row", "data.max_row_mb=1000000", "at most 1024"),
    value("weight of a reward", "rl.rewards.model.weight=1000000000.0", "at most 1,000,000"),
    BadInput(
        "weight of a source",
        ["data=jsonl", "data.sources.mine.path=a.jsonl", "data.sources.mine.weight=1e9"],
        ["data.sources.mine.weight=1000000000.0", "at most 1000"],
        write("a.jsonl", pairs()),
    ),
    BadInput("unknown key", ["sft.lrr=1"], ["sft.lrr", "did you mean sft.lr?"]),
    BadInput("unknown option", ["stage=pppo"], ["stage=pppo", "did you mean"]),
    BadInput("no key", ["=1"], ["=1"]),
    BadInput("a key alone", ["sft.lr"], ["sft.lr", "KEY=VALUE"]),
    BadInput("a dash", ["--sft.lr=1"], ["--sft.lr=1", "no dashes"]),
    BadInput("an open bracket", ["data=[a"], ["data=[a"]),
    BadInput("many brackets", ["sft.betas=" + "[" * 3000 + "]" * 3000], ["sft.betas"]),
    BadInput("long text", ["stage=" + "x" * 100_000], ["characters)"]),
    BadInput("an escape code", ["stage=\x1b[31mred"], ["cannot read 'stage="]),
    BadInput("no such variable", ["sft.lr=${oc.env:NOT_SET_AT_ALL}"], ["NOT_SET_AT_ALL"]),
    BadInput("a loop", ["sft.lr=${rm.lr}", "rm.lr=${sft.lr}"], ["lr"]),
]

# --- option files

OPTIONS = ["--config-dir", "mine", "experiment=mine"]
FILE = "mine/experiment/mine.yaml"
OPTION_FILES = [
    BadInput("no folder", ["--config-dir", "nowhere"], ["nowhere: no such folder"]),
    BadInput("a file as folder", ["--config-dir", "mine"], ["no such folder"], write("mine", "")),
    BadInput("options in a pipe", OPTIONS, [FILE, "this is a pipe"], pipe(FILE)),
    BadInput("endless options", OPTIONS, [FILE, "this is a device"], link(FILE, "/dev/zero")),
    BadInput("large options", OPTIONS, [FILE, "MiB"], sparse(FILE, 40 * MIB)),
    BadInput("a model in a pipe", OPTIONS[:2], ["this is a pipe"], pipe("mine/model/mine.yaml")),
    BadInput("options without sense", OPTIONS, ["option file"], write(FILE, "a: [b\nc: {")),
    BadInput("binary options", OPTIONS, ["option file"], write(FILE, b"\0\xff\xfe")),
    BadInput("options as a list", OPTIONS, ["it has no keys"], write(FILE, "[1, 2]")),
    BadInput(
        "unknown key in options",
        OPTIONS,
        ["experiment/mine", "'lrr' not in 'Sft'"],
        write(FILE, "# @package _global_\nsft: {lrr: 1}"),
    ),
    BadInput("aliases of aliases", OPTIONS, ["mine.yaml"], write(FILE, BOMB)),
    BadInput("very deep options", OPTIONS, ["nested too deeply"], write(FILE, "a: " + "[" * DEEP)),
    BadInput("deep options", OPTIONS, ["option file"], write(FILE, "a: " + "[" * 3000)),
]

# --- models


def model(name: str, path: str, *words: str, build: Build | None = None) -> BadInput:
    arguments = ["stage=sft", "actor=custom", f"actor.path={path}"]
    return BadInput(name, arguments, ["actor.path=", *words], build)


HUB = "https://huggingface.co/facebook/opt-125m"
MODELS = [
    model("empty model path", "", "has no value"),
    model("blank model path", "' '", "no path"),
    model("a page of the hub", HUB, "give the hub id: actor.path=facebook/opt-125m"),
    model("a page elsewhere", "https://example.org/model.bin", "an address on the web"),
    model("no hub id", "a//b", "actor.path=a//b"),
    model("a device as model", "/dev/zero", "this is a device"),
    model("a pipe as model", "./m", "this is a pipe", build=pipe("m")),
    model("a file as model", "./m", "this is a file", build=write("m", "")),
    model("no model", "./nowhere", "no model there"),
    model("an empty folder as model", "./m", "no model there", build=folder("m")),
    model("configuration in a pipe", "./m", "a pipe", build=pipe("m/config.json")),
    model("endless config", "./m", "a device", build=link("m/config.json", "/dev/zero")),
    model("config is no JSON", "./m", "no JSON", build=write("m/config.json", "{")),
    model("config is a list", "./m", "not the configuration", build=write("m/config.json", "[]")),
    model("deep config", "./m", "nested", build=write("m/config.json", "[" * DEEP)),
    model("config in Latin-1", "./m", "no JSON", build=write("m/config.json", b'{"a": "\xe9"}')),
    model(
        "torn weights",
        "./m",
        "torn",
        build=both(write("m/config.json", CONFIG), write("m/model.safetensors", b"\xff" * 50)),
    ),
    model(
        "weights that Git LFS has not fetched",
        "./m",
        "git lfs pull",
        build=both(
            write("m/config.json", CONFIG),
            write("m/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        ),
    ),
    model("no such built-in model", "builtin:none", "no such built-in model"),
    BadInput(
        "a device as trained policy",
        ["stage=ppo", "rl.actor=/dev/zero"],
        ["rl.actor=/dev/zero", "a device"],
    ),
    BadInput(
        "a page as reward model",
        ["stage=rm", "reward=custom", f"reward.path={HUB}"],
        ["reward.path=", "the hub id"],
    ),
]

# --- functions, rubrics, prompts, outputs

FUNCTION = "rl.rewards.mine.function="
JUDGE = [
    "rl.rewards.mine.judge.endpoint=http://127.0.0.1:9/v1",
    "rl.rewards.mine.judge.model=m",
]


def rubric(name: str, build: Build | None, words: str) -> BadInput:
    arguments = ["stage=ppo", *JUDGE, "rl.rewards.mine.judge.rubric=r.txt"]
    return BadInput(name, arguments, ["rl.rewards.mine.judge.rubric=r.txt", words], build)


def prompts(name: str, build: Build | None, words: str) -> BadInput:
    return BadInput(name, ["stage=eval", "eval.prompts=[p.txt]"], ["eval.prompts", words], build)


OTHER_FILES = [
    BadInput("no module", [FUNCTION + "nowhere:f"], [FUNCTION + "nowhere:f", "no module"]),
    BadInput("no file of a function", [FUNCTION + "a.py:f"], ["there is no file"]),
    BadInput("no function", [FUNCTION + "a.py:f"], ["there is no f"], write("a.py", "g = 1")),
    BadInput("a function in a pipe", [FUNCTION + "a.py:f"], ["there is no file"], pipe("a.py")),
    BadInput("no address of a server", ["rl.rewards.mine.url=nowhere"], ["http://"]),
    rubric("no rubric", None, "there is no file"),
    rubric("a rubric in a pipe", pipe("r.txt"), "a pipe"),
    rubric("an endless rubric", link("r.txt", "/dev/zero"), "a device"),
    rubric("a folder as rubric", folder("r.txt"), "a folder"),
    rubric("a large rubric", sparse("r.txt", 40 * MIB), "MiB"),
    prompts("no prompts", None, "no file"),
    prompts("prompts in a pipe", pipe("p.txt"), "a pipe"),
    prompts("endless prompts", link("p.txt", "/dev/zero"), "a device"),
    prompts("a folder as prompts", folder("p.txt"), "a folder"),
    prompts("large prompts", sparse("p.txt", 40 * MIB), "MiB"),
    prompts("prompts in Latin-1", write("p.txt", b"caf\xe9"), "cannot be read"),
    prompts("a socket as prompts", a_socket("p.txt"), "a socket"),
    BadInput(
        "responses to a device",
        ["stage=eval", "eval.save_responses=/dev/full"],
        ["/dev/full", "a device"],
    ),
    BadInput(
        "responses to a folder", ["stage=eval", "eval.save_responses=o"], ["a folder"], folder("o")
    ),
    BadInput(
        "responses to nowhere", ["stage=eval", "eval.save_responses=no/o.jsonl"], ["no folder"]
    ),
    BadInput(
        "hosts in a pipe",
        ["deploy=multi_node", "deploy.hostfile=h"],
        ["deploy.hostfile=h", "a pipe"],
        pipe("h"),
    ),
    BadInput("a page to a device", ["--out", "/dev/full"], ["--out", "a device"], program="report"),
    BadInput("a page to a folder", ["--out", "."], ["--out", "a folder"], program="report"),
    BadInput("a page to nowhere", ["--out", "no/r.html"], ["--out", "no folder"], program="report"),
    BadInput("conversation in a pipe", ["c"], ["cannot load c", "a pipe"], pipe("c"), "load"),
    BadInput("endless conversation", ["/dev/zero"], ["/dev/zero", "a device"], None, "load"),
    BadInput("a folder as conversation", ["."], ["a folder"], None, "load"),
    BadInput("large conversation", ["c"], ["MiB"], sparse("c", 300 * MIB), "load"),
    BadInput("deep conversation", ["c"], ["no saved conversation"], write("c", "[" * DEEP), "load"),
    BadInput("conversation in Latin-1", ["c"], ["cannot load c"], write("c", b"\xe9"), "load"),
]

# --- data


def data(name: str, file: str, *words: str, build: Build | None = None, more: str = "") -> BadInput:
    arguments = ["data=jsonl", f"data.sources.mine.path={file}", *more.split()]
    return BadInput(name, arguments, ["data.sources.mine", *words], build, "data")


REFUSE = "data.on_bad_row=refuse"
DATA = [
    data("no data", "a.jsonl", "no such file in"),
    data("data elsewhere", "https://example.org/a.jsonl", "an address on the web"),
    data("data on a page of the hub", "https://huggingface.co/datasets/a/b", "the hub id: a/b"),
    data("data in a pipe", "a.jsonl", "this is a pipe", build=pipe("a.jsonl")),
    data("endless data", "/dev/zero", "this is a device"),
    data(
        "a link to endless data", "a.jsonl", "this is a device", build=link("a.jsonl", "/dev/zero")
    ),
    data("a socket as data", "a.jsonl", "this is a socket", build=a_socket("a.jsonl")),
    data("an empty folder as data", "d", "the folder is empty", build=folder("d")),
    data("a folder with a pipe", "d", "no file ends in", build=pipe("d/a.jsonl")),
    data("an unknown ending", "a.xlsx", "give a file ending in", build=write("a.xlsx", "a")),
    data("an empty file", "a.jsonl", "the file is empty", build=write("a.jsonl", "")),
    data("no JSON at all", "a.jsonl", "line 1 of a.jsonl", build=write("a.jsonl", "hello\n")),
    data(
        "a long line",
        "a.jsonl",
        "line 21 has 200.0 MiB",
        "data.max_row_mb=16",
        build=both(
            write("a.jsonl", pairs()), lambda: os.truncate("a.jsonl", len(pairs()) + 200 * MIB)
        ),
    ),
    data(
        "a long line of a table",
        "a.csv",
        "line 22 has",
        "data.max_row_mb=16",
        build=both(write("a.csv", TABLE), lambda: os.truncate("a.csv", len(TABLE) + 40 * MIB)),
    ),
    data(
        "a long field",
        "a.csv",
        "a field has more than data.max_row_mb=1 MiB",
        build=write("a.csv", TABLE + 'a,"' + "yes\n" * MIB),
        more="data.max_row_mb=1",
    ),
    data(
        "a list that is too large",
        "a.json",
        "more than 1 GiB",
        build=both(write("a.json", "[" + " " * 200), lambda: os.truncate("a.json", 2**30 + 1)),
    ),
    data("a gzip bomb", "a.jsonl.gz", "unpacks to more than", build=packed("a.jsonl.gz", 2**30)),
    data("a packed table", "a.csv.gz", "unpacks to more than", build=packed("a.csv.gz", 2**30)),
    data("a packed list", "a.json.gz", "unpacks to more than", build=packed("a.json.gz", 2**30)),
    data(
        "a parquet bomb", "a.parquet", "unpacks to more than", build=parquet("a.parquet", 300, "a")
    ),
    data(
        "a cut .gz",
        "a.jsonl.gz",
        "end",
        build=write("a.jsonl.gz", gzip.compress(pairs().encode())[:60]),
    ),
    data("no .gz", "a.jsonl.gz", "gzipped", build=write("a.jsonl.gz", pairs())),
    data(
        "packed twice",
        "a.jsonl.gz",
        "compressed twice",
        build=write("a.jsonl.gz", gzip.compress(gzip.compress(pairs().encode()))),
    ),
    data(
        "gzip without .gz",
        "a.jsonl",
        "a gzip file",
        build=write("a.jsonl", gzip.compress(pairs().encode())),
    ),
    data("zip", "a.jsonl", "a zip file", build=write("a.jsonl", b"PK\x03\x04" + b"a" * 100)),
    data("no parquet", "a.parquet", "a.parquet", build=write("a.parquet", "PAR1 not really")),
    data("UTF-16", "a.jsonl", "UTF-16", build=write("a.jsonl", pairs().encode("utf-16"))),
    data(
        "a list in Latin-1",
        "a.json",
        "line 1 is not UTF-8",
        build=write("a.json", b'[{"prompt": "\xe9"}]'),
    ),
    data(
        "a header in Latin-1",
        "a.csv",
        "line 1 is not UTF-8",
        build=write("a.csv", b"prompt,caf\xe9\na,b\n"),
    ),
    data(
        "a deep list",
        "a.json",
        "nested too deeply",
        build=write("a.json", '[{"prompt": ' + "[" * DEEP),
    ),
    data(
        "a long number in a list",
        "a.json",
        "4,300 digits",
        build=write("a.json", '[{"prompt": ' + "1" * 5000 + "}]"),
    ),
    data(
        "a ragged table",
        "a.csv",
        "line 2 has 3 fields",
        build=write("a.csv", "prompt,chosen\na,b,c\n"),
    ),
    data(
        "a ragged table with semicolons",
        "a.csv",
        "line 2 has 3 fields, and the header has 2",
        build=write("a.csv", "prompt;chosen\na;b;c\n"),
    ),
    data(
        "a table with one column",
        "a.csv",
        "has the columns prompt|chosen",
        build=write("a.csv", "prompt|chosen\na|b\n"),
    ),
    data(
        "an open quote",
        "a.csv",
        "a quote is not closed",
        build=write("a.csv", 'prompt,chosen\n"a,b\n'),
    ),
    data(
        "a column twice",
        "a.csv",
        "the column prompt is there twice",
        build=write("a.csv", "prompt,prompt\na,b\n"),
    ),
    data("unknown columns", "a.jsonl", "has the columns x", build=write("a.jsonl", '{"x": 1}\n')),
    data(
        "all rows are skipped",
        "a.jsonl",
        "are skipped: 3 chosen equals rejected",
        build=write("a.jsonl", pair(rejected='"So."') * 3),
    ),
    data(
        "no row can be read",
        "a.jsonl",
        "no other row can be read",
        build=write("a.jsonl", pair(prompt="7") * 3),
    ),
    data(
        "one deep row",
        "a.jsonl",
        "line 21 of a.jsonl",
        "nested too deeply",
        build=write("a.jsonl", pairs() + "[" * DEEP),
        more=REFUSE,
    ),
    data(
        "one large number",
        "a.jsonl",
        "line 21 of a.jsonl",
        "chosen is too large for a number",
        build=write("a.jsonl", pairs() + pair(chosen="1" + "0" * 400)),
        more=REFUSE,
    ),
    data(
        "one byte in a table",
        "a.csv",
        "row 21 of a.csv",
        "not UTF-8",
        build=write("a.csv", TABLE.encode() + b"\xe9?,yes,no\n"),
        more=REFUSE,
    ),
    data(
        "one byte in a line",
        "a.jsonl",
        "line 21 of a.jsonl",
        "not UTF-8",
        build=write("a.jsonl", pairs().encode() + b"\xff\n"),
        more=REFUSE,
    ),
    data(
        "a role of 3 million characters",
        "a.jsonl",
        "unknown role",
        "characters)",
        build=write(
            "a.jsonl",
            pairs() + pair(prompt=json.dumps([{"role": "\x1b[2J" * 750_000, "content": "a"}])),
        ),
        more=REFUSE,
    ),
]

# each of these takes another way than its neighbours, or is cheap; the rest is for `make test-all`
QUICK = {
    "nan",
    "infinity",
    "no value",
    "a sweep without -m",
    "demonstrations",
    "later batch",
    "tokens",
    "seed",
    "threads",
    "processes",
    "weight of a source",
    "unknown key",
    "unknown option",
    "a key alone",
    "an open bracket",
    "many brackets",
    "an escape code",
    "no such variable",
    "a loop",
    "blank model path",
    "a page of the hub",
    "a device as model",
    "a pipe as model",
    "configuration in a pipe",
    "endless config",
    "deep config",
    "torn weights",
    "no function",
    "a rubric in a pipe",
    "endless prompts",
    "large prompts",
    "a socket as prompts",
    "responses to a device",
    "hosts in a pipe",
}
BAD_INPUTS = [
    one._replace(full=one.program == "train" and one.name not in QUICK)
    for one in (*VALUES, *MODELS, *OTHER_FILES)
]
BAD_INPUTS += [*OPTION_FILES, *DATA]

BAD_ROWS = [
    BadRow("deep", "a.jsonl", "nested too deeply", write("a.jsonl", pairs() + "[" * DEEP)),
    BadRow(
        "rather deep",
        "a.jsonl",
        "nested too deeply",
        write("a.jsonl", pairs() + pair(x="[" * 500 + "]" * 500)),
    ),
    BadRow(
        "large number",
        "a.jsonl",
        "too large",
        write("a.jsonl", pairs() + pair(chosen="1" + "0" * 400)),
    ),
    BadRow(
        "long number",
        "a.jsonl",
        "4,300 digits",
        write("a.jsonl", pairs() + pair(chosen="1" * 5000)),
    ),
    BadRow(
        "byte of a line", "a.jsonl", "not UTF-8", write("a.jsonl", pairs().encode() + b"\xff\n")
    ),
    BadRow(
        "byte of a table", "a.csv", "not UTF-8", write("a.csv", TABLE.encode() + b"\xe9?,yes,no\n")
    ),
    BadRow(
        "half a pair", "a.jsonl", "surrogate", write("a.jsonl", pairs() + pair(chosen='"\\ud83d"'))
    ),
    BadRow("key twice", "a.jsonl", "there twice", write("a.jsonl", pairs() + pair(x='1, "x": 2'))),
    BadRow(
        "long role",
        "a.jsonl",
        "characters)",
        write(
            "a.jsonl",
            pairs() + pair(prompt=json.dumps([{"role": "\x1b[2J" * 750_000, "content": "a"}])),
        ),
    ),
]
