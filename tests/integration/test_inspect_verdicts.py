"""stage=inspect: lines about tools, rendered prompts, and rows that no stage can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_files import jsonl
from dialogues import own
from helpers import composed

from rlhf.data import load, tokenized
from rlhf.stages import inspect

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_CALLS = CHATML.replace(
    " + m.content + '<|im_end|>\n' }}",
    " + m.content }}{% for call in m.tool_calls %}{{ '<call>' + call.function.name }}{% endfor %}"
    "{{ '<|im_end|>\n' }}",
)


def config_for(path: Path, *more: str) -> Any:
    limits = ["data.max_prompt_tokens=10", "data.max_response_tokens=8", "data.eval_share=0.2"]
    return composed(
        "stage=inspect", "data=jsonl", f"data.sources.mine.path='{path}'", *limits, *more
    )


def test_tools_that_the_template_cannot_write_are_counted(tmp_path: Path) -> None:
    """They are no prompts of 0 tokens, and no reason to raise a limit."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w"}}]}
    asked = [[{"role": "user", "content": f"Weather {n}?"}] for n in range(80)]
    answer = {"role": "assistant", "content": "Sunny."}
    back = {"role": "tool", "content": "sun"}
    talks = [talk + ([call, back] if n % 2 else []) for n, talk in enumerate(asked)]
    rows = [{"messages": [*talk, answer]} for talk in talks]
    path = tmp_path / "talks.jsonl"
    jsonl(path, rows)
    own(tmp_path / "own", CHATML)
    cfg = config_for(path, "data.template=tokenizer", f"actor.path={tmp_path / 'own'}")
    cfg.data.max_prompt_tokens = 99
    result = inspect.run(cfg, tmp_path)
    table = load.load_data(cfg.data).sft
    tools = sum(len(prompt) > 1 for prompt in table["prompt"])
    measured = result["stages"]["sft"]
    assert measured["unwritten"] == tools and 0 < tools < len(table)
    assert measured["dropped"] == 0 and measured["tokens"]["prompt"]["median"] > 5
    [line] = [line for line in result["verdicts"] if "messages of tools" in line]
    assert line.startswith(
        "rows skipped: the chat template cannot write their messages of tools: "
        f"{tools / len(table):.0%} of sft, "
    )


def test_few_held_out_rows_are_named(tmp_path: Path) -> None:
    for rows, few in ((20, True), (300, False)):
        path = tmp_path / f"{rows}.jsonl"
        jsonl(path, [{"prompt": f"{i}?", "chosen": "Yes", "rejected": "No"} for i in range(rows)])
        said = inspect.run(config_for(path), tmp_path)["verdicts"]
        lines = [line for line in said if "what is measured on so few is mostly chance" in line]
        assert len(lines) == 2 * few, "of sft and rm"


def test_calls_are_measured_as_they_are_trained_on(tmp_path: Path) -> None:
    call = {"function": {"name": "weather", "arguments": "{}"}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Weather {n}?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        }
        for n in range(40)
    ]
    path = tmp_path / "talks.jsonl"
    jsonl(path, rows)
    tokenizer = own(tmp_path / "own", WITH_CALLS)
    cfg = config_for(path, "data.template=tokenizer", f"actor.path={tmp_path / 'own'}")
    data = load.load_data(cfg.data)
    [(_, ids)] = tokenized.demonstrations(tokenizer, data.sft.select([0]), 99, 99)
    assert "<call>weather" in tokenizer.decode(ids)
    result = inspect.run(cfg, tmp_path)
    for name in ("sft", "eval sft"):
        spread = result["stages"][name]["tokens"]["chosen"]
        assert spread == {"median": len(ids), "p95": len(ids), "max": len(ids)}


def test_prompts_alone_get_no_advice_about_sft(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    jsonl(path, [{"prompt": f"q {n}"} for n in range(60)])
    lines = inspect.run(config_for(path), tmp_path)["verdicts"]
    assert not [line for line in lines if "evaluate sft" in line]


def test_a_limit_that_drops_all_rows_is_the_only_thing_said(tmp_path: Path) -> None:
    long = "word " * 50
    rows = [{"prompt": f"{long}{n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    path = tmp_path / "long.jsonl"
    jsonl(path, rows)
    lines = inspect.run(config_for(path), tmp_path)["verdicts"]
    assert not [line for line in lines if "one batch" in line]
    [line] = [line for line in lines if "prompt too long" in line]
    assert "100% of sft, 100% of rm, 100% of ppo: raise data.max_prompt_tokens=10" in line


def test_rendered_prompts_belong_to_raw_text(tmp_path: Path) -> None:
    rendered = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"prompt": rendered.format(n), "chosen": "a</s>b", "rejected": "c"} for n in range(20)]
    path = tmp_path / "rendered.jsonl"
    jsonl(path, rows)
    [line] = [x for x in inspect.run(config_for(path), tmp_path)["verdicts"] if "rendered" in x]
    assert line == (
        "prompts of mine/train that are rendered already: 20, such as <|im_start|> in "
        "'<|im_start|>user\\n0<|im_end|>\\n<|i': give the messages instead, which data.template "
        "renders, or choose data.template=none"
    )
    raw = inspect.run(config_for(path, "data.template=none"), tmp_path)["verdicts"]
    assert not [line for line in raw if "rendered" in line]
    [line] = [line for line in raw if "special tokens" in line]
    assert ": 20, such as </s> in 'a</s>b'" in line, "answers are still looked at"


def test_every_answer_is_counted_where_sft_trains_on_it(tmp_path: Path) -> None:
    roles = ["user", "assistant"] * 3
    said = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]
    file = tmp_path / "talks.jsonl"
    jsonl(file, [{"messages": [{"role": "user", "content": f"{n}?"}, *said[1:]]} for n in range(9)])
    rows = []
    for train_on in ("last", "all"):
        cfg = config_for(file, f"sft.train_on={train_on}", "data.shares=[1,0,0]")
        cfg.data.max_prompt_tokens = 99
        rows.append(inspect.run(cfg, tmp_path)["stages"]["sft"]["rows"])
    assert rows[1] == 3 * rows[0] > 0
