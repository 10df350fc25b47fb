"""What is said of files and rows that cannot be used, and of stages that get no rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl, row, rows
from helpers import command, composed
from prepared_data import config

from rlhf.base.commands import command_line, override_text
from rlhf.base.errors import UserError
from rlhf.config.choices import BadRow
from rlhf.config.schema import Config
from rlhf.data import load
from rlhf.data.load import summarize
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")

MANY = [json.dumps(record) for record in rows(*range(40))]


def written(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return path


def of_stage(stage: str, path: Path, *more: str) -> Config:
    return composed(f"stage={stage}", "data=jsonl", f"data.sources.mine.path='{path}'", *more)


def refusal(cfg: Config, run_dir: Path) -> str:
    with pytest.raises(UserError) as error:
        load.open_data(cfg, run_dir)
    return str(error.value)


def suggested(line: str) -> list[str]:
    """What the end of a line changes in the command."""
    return shlex.split(line.split(": the same command with ")[1])


# --- files


def test_a_byte_that_is_not_utf8_makes_its_line_unreadable_and_no_other(tmp_path: Path) -> None:
    bad = '{"prompt": "Wo?", "chosen": "Täglich", "rejected": "b"}'.encode("latin-1")
    kept = json.dumps(row(99)).replace("Yes", "\\ud83d\\ude00 \ufffd é").encode()
    file = written(tmp_path / "a.jsonl", [*MANY, bad, kept])
    (report,) = load_sources(config(mine=file)).report
    assert report["rows"] == 42 and report["skipped"] == {"unreadable": 1}
    where = f"data.sources.mine: line 41 of {file}: not UTF-8: save the file as UTF-8; if it is"
    assert report["first_unreadable"].startswith(where)
    with pytest.raises(UserError, match=f"^{re.escape(where)}"):
        load_sources(config(BadRow.refuse, mine=file))


@pytest.mark.parametrize("mark, name", [(",", ""), (";", "semicolons"), ("\t", "tabs")])
def test_a_csv_with_other_separators_is_read_and_they_are_named(
    tmp_path: Path, mark: str, name: str
) -> None:
    lines = [["prompt", "chosen", "rejected"], ['"What, ""x""\nor; y?"', '"a,\tb;"', "b"]]
    lines += [[f"{i}?", "yes", "no"] for i in range(40)]
    file = written(tmp_path / "a.csv", [mark.join(line) for line in lines])
    data = load_sources(config(mine=file))
    said = [f"  fields are separated by {name}, as in the header"] if name else []
    assert summarize(data).splitlines()[1:] == said and data.report[0]["rows"] == 41
    reference = jsonl(
        tmp_path / "a.jsonl",
        [
            {"prompt": 'What, "x"\nor; y?', "chosen": "a,\tb;", "rejected": "b"},
            *({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)),
        ],
    )
    (expected,) = load_sources(config(mine=reference)).report
    assert data.report[0]["content"] == expected["content"]


def test_every_kind_of_unreadable_row_is_named_with_its_first_one(tmp_path: Path) -> None:
    bad = ["{a", "[1]", '{"prompt": 7, "chosen": "a", "rejected": "b"}', "{b"]
    empty = json.dumps(row(50) | {"chosen": ""})
    file = written(tmp_path / "a.jsonl", [*MANY, *bad, empty])
    data = load_sources(config(mine=file))
    json_error = "not JSON (Expecting property name enclosed in double quotes, column 2)"
    assert summarize(data).splitlines()[1:] == [
        f"  2 unreadable, the first: line 41 of {file}: {json_error}",
        f"  1 unreadable: line 42 of {file}: JSON, but not an object {{...}}",
        f"  1 unreadable: line 43 of {file}: prompt is a number, not a string",
    ]
    assert data.report[0]["examples"]["empty answer"] == f"line 45 of {file}"


def test_many_kinds_are_counted(tmp_path: Path) -> None:
    bad = [json.dumps({"messages": [{"role": "r" * n, "content": "a"}]}) for n in range(1, 14)]
    good = [
        json.dumps(
            {"messages": [{"role": "user", "content": f"{n}"}, {"role": "gpt", "content": "a"}]}
        )
        for n in range(40)
    ]
    lines = summarize(
        load_sources(config(mine=written(tmp_path / "a.jsonl", good + bad)))
    ).splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 3 further kinds of unreadable rows"


def test_a_file_without_any_readable_row_names_all_kinds(tmp_path: Path) -> None:
    number = '{"prompt": 7, "chosen": "a", "rejected": "b"}'
    file = written(tmp_path / "a.jsonl", ["{a", number, number])
    with pytest.raises(UserError) as error:
        load_sources(config(mine=file))
    assert str(error.value).endswith(
        "(and no other row can be read: 2 rows prompt is a number, not a string; 1 row not JSON "
        "(Expecting property name enclosed in double quotes, column N))"
    )


def test_a_file_whose_rows_are_all_skipped_names_the_first_of_each_reason(tmp_path: Path) -> None:
    same, empty = row(1) | {"rejected": "Yes, 1."}, row(2) | {"chosen": ""}
    file = jsonl(tmp_path / "a.jsonl", [same, same, empty])
    reasons = (
        f"2 chosen equals rejected (the first is line 1 of {file}), "
        f"1 empty answer (the first is line 3 of {file})"
    )
    with pytest.raises(UserError, match=re.escape(f"are skipped: {reasons}") + "$"):
        load_sources(config(mine=file))


# --- stages without rows


def test_rows_with_one_prompt_cannot_be_divided(tmp_path: Path) -> None:
    same = [row(i) | {"prompt": "Why?"} for i in range(60)]
    file = jsonl(tmp_path / "same.jsonl", same)
    reason = (
        "all 60 rows have the same prompt, and a prompt belongs to one stage or to the evaluation:"
        " add rows with other prompts"
    )
    for stage in ("sft", "rm", "dpo", "ppo"):
        line = refusal(of_stage(stage, file), tmp_path)
        assert line in (
            f"data=mine: no rows for {stage}: {reason}",
            f"data=mine: no rows to evaluate {stage} on: {reason}",
        )


PROMPTS: list[Record] = [{"prompt": f"{i}?"} for i in range(60)]
ANSWERS: list[Record] = [{"prompt": f"{i}?", "response": "a"} for i in range(60)]


@pytest.mark.parametrize(
    "stage, records, lack, use",
    [
        ("sft", PROMPTS, "none of the 60 rows has an answer; prompts alone are for", "grpo"),
        ("rm", PROMPTS, "none of the 60 rows has a rejected answer; prompts alone are for", "grpo"),
        ("rm", ANSWERS, "none of the 60 rows has a rejected answer; SFT trains on its", "sft"),
        ("dpo", ANSWERS, "none of the 60 rows has a rejected answer; SFT trains on its", "sft"),
    ],
)
def test_a_file_for_another_stage_comes_with_the_change_that_uses_it(
    tmp_path: Path, stage: str, records: list[Record], lack: str, use: str
) -> None:
    file = jsonl(tmp_path / "my, own {x}.jsonl", records)
    line = refusal(of_stage(stage, file), tmp_path)
    assert line.startswith(f"data=mine: no rows for {stage}: {lack}") and "\n" not in line
    overrides = [arg for arg in suggested(line) if not arg.endswith("_RUN")]
    given = ["rl.actor=owner/policy", "rl.reward=owner/reward"] if use == "grpo" else []
    mine = ["data=jsonl", f"data.sources.mine.path='{file}'"]
    cfg = command(f"stage={stage}", *mine, *overrides, *given).cfg
    assert cfg.stage.runs == [use]
    data = load.open_data(cfg, tmp_path)
    assert len(data.ppo if use == "grpo" else data.sft) > 50


def test_few_prompts_may_leave_a_stage_nothing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "few.jsonl", [row(i) | {"prompt": f"{i % 2}?"} for i in range(30)])
    cfg = of_stage("ppo", file, "data.shares=[1,1,0]")
    assert refusal(cfg, tmp_path) == (
        "data=mine: no rows for ppo: of 30 rows with 2 prompts none falls to it with "
        "data.shares=[1, 1, 0]: add data, or give it all rows: 'data.shares=[0,0,1]'"
    )
    cfg = of_stage("rm", file, "data.shares=[0,1,0]")
    assert refusal(cfg, tmp_path) == (
        "data=mine: no rows to evaluate rm on: of 2 prompts none is held out with "
        "data.eval_share=0.05: raise it, for instance data.eval_share=0.2, or add data"
    )


@pytest.mark.parametrize(
    "path", ["plain.jsonl", "a b.jsonl", "a'b\"c.jsonl", "{x},[y].jsonl", "ä.jsonl"]
)
def test_a_suggested_command_means_what_it_says(path: str) -> None:
    source = f"data.sources.mine.path={override_text(path)}"
    line = command_line("train.py", "stage=sft", "data=jsonl", source)
    python, script, *overrides = shlex.split(line)
    assert python == "python" and Path(script).name == "train.py"
    cfg: Any = command(*overrides).cfg
    assert cfg.data.sources["mine"].path == path
