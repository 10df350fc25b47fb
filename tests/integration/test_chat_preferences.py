"""Preferences that are marked in chat.py, written to a file, and trained on."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from chats import Chat, save_policy
from format_rows import read_row
from helpers import command, composed, runs_in, some, train

from rlhf.chat.advice import ENOUGH, Start, advice
from rlhf.chat.feedback import Preferences
from rlhf.chat.policy import Reply
from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.load import load_data, open_data
from rlhf.data.records import Pair, Turn
from rlhf.data.sources import pair_of


@pytest.fixture
def preferences(tmp_path: Path) -> Preferences:
    return Preferences(tmp_path / "preferences.jsonl")


def records(preferences: Preferences) -> list[tuple[str, str | None]]:
    return [
        (row["chosen"], row.get("rejected"))
        for row in map(json.loads, preferences.file.read_text().splitlines())
    ]


THINGS = ["fern", "rose", "dog", "cat", "violin", "bicycle", "pond", "oak", "kettle", "knife"]
START = Start("outputs/sft-mine", Template.hh)


def response(text: str, question: str = "Hello") -> Reply:
    return Reply([Turn("user", question)], [], text)


def test_a_pair_is_written_as_soon_as_there_are_two_and_once(preferences: Preferences) -> None:
    assert "a good response is missing" in preferences.mark(response("A"), False, START)
    assert not preferences.file.exists()
    line = preferences.mark(response("B"), True, START)
    assert line == (
        f"a pair, chosen and rejected: written to {preferences.file}, which has 1 record\n"
        "to train on it, pairs to 9 more prompts are needed: so far 1 of at least 10"
    )
    for text, good in (("A", False), ("B", True), ("B", False), ("A", True)):
        already = "is in .* already, as a (good|bad) one; /retry gives another"
        with pytest.raises(ValueError, match=already):
            preferences.mark(response(text), good, START)
    preferences.mark(response("B", "Other question"), False, START)
    preferences.mark(response("C"), True, START)
    assert records(preferences) == [("B", "A"), ("C", "A")]


def test_a_good_response_alone_is_written_for_sft(preferences: Preferences) -> None:
    line = preferences.mark(response("A"), True, START)
    assert "only SFT trains on it" in line and "good responses to 9 more prompts" in line
    assert records(preferences) == [("A", None)]
    assert "which has 2 records" in preferences.mark(response("B"), False, START)
    assert records(preferences) == [("A", None), ("A", "B")]


def test_a_mark_that_is_not_written_can_be_changed(preferences: Preferences) -> None:
    preferences.mark(response("A"), False, START)
    preferences.mark(response("A"), True, START)
    assert records(preferences) == [("A", None)]


def test_two_responses_that_are_the_same_are_no_preference(preferences: Preferences) -> None:
    with pytest.raises(ValueError, match="the same"):
        preferences.prefer(response("A"), response("A"), START)
    assert "written to" in preferences.prefer(response("A"), response("B"), START)
    for chosen, rejected in (("A", "B"), ("B", "A")):
        with pytest.raises(ValueError, match="already"):
            preferences.prefer(response(chosen), response(rejected), START)
    assert records(preferences) == [("A", "B")]


def test_records_are_appended_as_complete_lines(preferences: Preferences, tmp_path: Path) -> None:
    preferences.file.write_text('{"prompt": "torn')  # another program was killed
    assert "which has 2 records" in preferences.mark(response("A\n\x9b\u2028"), True, START)
    torn, line = preferences.file.read_bytes().splitlines()
    assert torn == b'{"prompt": "torn'
    assert json.loads(line)["chosen"] == "A\n\x9b\u2028" and line.isascii()
    unwritable = Preferences(tmp_path / "no" / "such.jsonl")
    with pytest.raises(ValueError, match="cannot write to .*such.jsonl: No such file or directory"):
        unwritable.mark(response("A"), True, START)
    (tmp_path / "no").mkdir()
    line_for_user = unwritable.mark(response("A"), True, START)
    assert "which has 1 record" in line_for_user, "the failed write does not count"


def test_a_full_disk_leaves_the_file_as_it_was(
    preferences: Preferences, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferences.mark(response("A"), True, START)
    before = preferences.file.read_bytes()

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:
            return super().write(data[:5])

    monkeypatch.setattr(
        "rlhf.chat.feedback.open", lambda path, mode, buffering: Full(path, "a+"), raising=False
    )
    with pytest.raises(ValueError, match="no room on the disk"):
        preferences.mark(response("B"), True, START)
    assert preferences.file.read_bytes() == before


def pairs_in(file: Path, prompts: int, start: Start = START) -> str:
    """Write a pair for each prompt. Returns: the advice after the last one."""
    preferences = Preferences(file)
    for i in range(prompts):
        question = f"How do I look after my {THINGS[i % 10]}, part {i}?"
        yes, no = response(f"Water it, {i}.", question), response("No.", question)
        line = preferences.prefer(yes, no, start)
    return line.splitlines()[-1]


def suggested(line: str) -> list[str]:
    """The overrides of the suggested command."""
    python, script, *overrides = shlex.split(line.removeprefix("train on it:  "))
    assert python == "python" and Path(script).name == "train.py"
    return overrides


def test_a_path_of_any_letters_is_quoted_for_the_command(tmp_path: Path) -> None:
    start = Start("my runs/{a}, b", Template.chatml)
    overrides = suggested(pairs_in(tmp_path / "my, own.jsonl", ENOUGH, start))
    assert f'data.sources.mine.path="{tmp_path}/my, own.jsonl"' in overrides
    assert 'dpo.actor="my runs/{a}, b"' in overrides and "data.template=chatml" in overrides
    raw = Start("outputs/raw", Template.none)
    assert pairs_in(tmp_path / "raw.jsonl", ENOUGH, raw).startswith(
        "no stage can train outputs/raw"
    )


@pytest.mark.parametrize("prompts", some([ENOUGH, 11, 12, 13, 14, 15, 40], every=6))
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_the_suggested_command_has_rows_to_train_and_to_evaluate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int, stage: str
) -> None:
    """Whatever the hashes of the prompts: the file of each case has others."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "preferences.jsonl"
    pairs_in(file, prompts)
    start = Start("owner/model", Template.hh)
    cfg = command(*suggested(advice(file, stage, start))).cfg  # type: ignore[arg-type]
    model = cfg.reward if stage == "rm" else cfg.actor
    assert cfg.stage.runs == [stage] and model.path == "owner/model"
    assert stage != "dpo" or cfg.dpo.actor == "owner/model"
    data = open_data(cfg, tmp_path)
    trained = data.sft if stage == "sft" else data.rm
    batch_size = getattr(cfg, stage).batch_size
    assert len(trained) >= batch_size >= len(trained) / 2 - 1 or batch_size == 16
    assert len(data.eval_sft if stage == "sft" else data.eval_rm) >= 1


def test_many_marks_of_one_prompt_are_one_prompt(tmp_path: Path) -> None:
    preferences = Preferences(tmp_path / "a.jsonl")
    for i in range(30):
        line = preferences.prefer(response(f"yes {i}"), response(f"no {i}"), START)
    assert line.endswith("pairs to 9 more prompts are needed: so far 1 of at least 10")


@pytest.mark.full
def test_the_suggested_command_trains_the_policy_of_the_conversation(
    talk_to: Chat, tmp_path: Path
) -> None:
    """Of a policy with another template, in a folder with a space in its name."""
    policy = save_policy(tmp_path / "my policy", 0, Template.chatml)
    lines = [
        line
        for i in range(ENOUGH + 2)
        for line in (f"My {THINGS[i % 10]} {i}?", "/bad", "/retry", "/good", "/clear")
    ]
    _, said = talk_to("--path", policy, lines=lines)
    advised = [line for line in said.splitlines() if line.startswith("train on it:  ")]
    assert advised, said
    short = ["rollout.max_new_tokens=8", "data.max_response_tokens=16", "wandb.mode=disabled"]
    done = train(*suggested(advised[-1]), *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["dpo"]
    assert (run / "model" / "model.safetensors").exists()
    assert json.loads((run / "parents.json").read_text())["sft"].startswith("my policy:")


def test_a_record_is_read_back_as_it_was_meant(preferences: Preferences) -> None:
    """A pair as it is read back is the pair as it was meant, marks of turns and all."""
    preferences.mark(response("A", "\n\nHuman: x <|im_end|>".strip()), False, START)
    preferences.mark(response("B", "\n\nHuman: x <|im_end|>".strip()), True, START)
    row = json.loads(preferences.file.read_text())
    assert read_row(row, Source(path="x", format=Format.prompt_chosen_rejected)) == Pair(
        [Turn("user", "Human: x <|im_end|>")], "B", "A"
    )


def test_the_loop_closes(
    model: Path, other: Path, talk_to: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is preferred in a conversation is what data=jsonl reads."""
    import datasets

    questions = [f"How do I look after my {thing}?" for thing in THINGS]
    lines = [
        line
        for question in questions
        for line in (question, "/prefer 2", "And then?", "/prefer 1", "/clear")
    ]
    talk_to("--compare", model, other, lines=lines)
    talk_to("--path", model, lines=["Hello", "/good", "/retry", "/bad"])
    rows = [json.loads(line) for line in Path("preferences.jsonl").read_text().splitlines()]
    assert len(rows) == 22

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cfg = composed(
        "data=jsonl", "data.sources.mine.path=preferences.jsonl", "data.eval_share=0.2"
    ).data
    assert cfg.sources["mine"] == Source(path="preferences.jsonl") and cfg.sandbox is None
    data = load_data(cfg)
    (report,) = data.report
    reasons = {"no rejected answer", "duplicate prompt"}
    assert report["rows"] == 22 and not set(report["skipped"]) - reasons
    evaluated = [(pair.prompt, pair.chosen, pair.rejected) for pair in data.eval_rm]
    read = [(pair.prompt, pair.chosen, pair.rejected) for pair in map(pair_of, data.rm)] + evaluated
    assert len(data.rm) > 0 and len(evaluated) > 0
    written = [
        ([Turn(m["role"], m["content"]) for m in row["prompt"]], row["chosen"], row.get("rejected"))
        for row in rows
    ]
    assert all(pair in written and pair[2] for pair in read)
    second_messages = [prompt for prompt, *_ in read if len(prompt) == 3]
    assert second_messages, "a prompt holds the first message and its response too"
