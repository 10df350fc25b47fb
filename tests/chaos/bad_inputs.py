"""Bad inputs: odd, huge and hostile values and files, and the words of the line that each gets."""

from __future__ import annotations

from bad_data import DATA
from bad_files import (
    BOMB,
    CONFIG,
    DEEP,
    MIB,
    BadInput,
    Build,
    a_socket,
    both,
    folder,
    link,
    pairs,
    pipe,
    sparse,
    write,
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

# each of these takes another way than its neighbours, or is cheap; the rest is for `make test-all`
QUICK = {
    "nan",
    "no value",
    "a sweep without -m",
    "later batch",
    "weight of a source",
    "unknown key",
    "a key alone",
    "an open bracket",
    "many brackets",
    "an escape code",
    "a loop",
    "blank model path",
    "a pipe as model",
    "configuration in a pipe",
    "torn weights",
    "no function",
    "a rubric in a pipe",
    "endless prompts",
    "responses to a device",
}
BAD_INPUTS = [
    one._replace(full=one.program == "train" and one.name not in QUICK)
    for one in (*VALUES, *MODELS, *OTHER_FILES)
]
BAD_INPUTS += OPTION_FILES
BAD_INPUTS += [one._replace(full=bool(number % 3)) for number, one in enumerate(DATA)]
