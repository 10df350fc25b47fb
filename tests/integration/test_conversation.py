"""Conversations with a policy: what it reads, where a response ends, and what is remembered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import Chat, conversation, generates, policy, quiet, save_policy

from rlhf.chat.policy import certain_text
from rlhf.config.choices import Template
from rlhf.data import encoding, template
from rlhf.data.records import Turn


def test_the_model_sees_what_it_was_trained_on(model: Path) -> None:
    one = policy(model)
    turns = [
        Turn("user", "Any advice about the fern?"),
        Turn("assistant", "Water it."),
        Turn("user", "Is that all?"),
    ]
    assert one.fit(turns, 8) == (turns, encoding.encode_prompts(one.tokenizer, [turns], 512)[0])


@pytest.mark.parametrize("style", [Template.chatml, Template.llama3], ids=lambda style: style.name)
def test_a_saved_model_is_talked_to_in_the_style_it_was_trained_with(
    tmp_path: Path, style: Template
) -> None:
    save_policy(tmp_path, 0, style)
    talk = conversation(tmp_path)
    (one,) = talk.policies
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Any advice?")]
    talk.histories = [turns[:2]]
    assert one.fit(turns, 8)[1] == encoding.encode_prompts(one.tokenizer, [turns], 512)[0]
    assert one.stops == [] and one.tokenizer.eos_token_id in one.ends

    response = "I see.\n\nHuman: is a word here."  # and no mark of a turn
    sampled = encoding.encode_responses(one.tokenizer, [response], 512)[0]
    one.model.generate = generates(sampled)
    shown: list[str] = []
    (reply,) = talk.ask("Any advice?", lambda i, piece: shown.append(piece))
    assert reply.text == "".join(shown) == response
    assert reply.finished and reply.ids == sampled


def test_a_response_that_continues_as_the_user_ends_there(model: Path) -> None:
    talk = conversation(model)
    (one,) = talk.policies
    text = " Water it.\n\nHuman: And then?"
    one.model.generate = generates(one.tokenizer(text, add_special_tokens=False).input_ids)
    (reply,) = talk.ask("Hello", quiet)
    assert reply.text == "Water it." and reply.finished
    assert reply.ids == encoding.encode_response(one.tokenizer, "Water it.", False)


def test_fifty_turns_do_not_overflow_and_are_cut_at_turns(model: Path) -> None:
    talk = conversation(model)
    (one,) = talk.policies
    for number in range(50):
        talk.ask(f"What does my violin need in week {number}?", quiet)
        turns, ids = one.fit([*talk.histories[0], Turn("user", "And now?")], 8)
        assert turns[0].role == "user" and turns[-1].text == "And now?"
        assert len(ids) + 8 <= 512
    assert len(turns) < 101, "something was dropped"
    with pytest.raises(ValueError, match="too long"):
        one.fit([Turn("user", "rose " * 600)], 8)


def test_the_system_turn_is_not_what_is_dropped(model: Path) -> None:
    (one,) = conversation(model).policies
    system, turns = Turn("system", "Be brief."), []
    for number in range(60):
        turns += [Turn("user", f"What in week {number}?"), Turn("assistant", "Water it.")]
    fitted, ids = one.fit([system, *turns, Turn("user", "And now?")], 8)
    assert fitted[0] == system and fitted[1].role == "user" and len(ids) + 8 <= 512
    assert 3 < len(fitted) < 122 and fitted[-1].text == "And now?"
    with pytest.raises(ValueError, match="too long"):
        one.fit([Turn("system", "rose " * 600), Turn("user", "Hi")], 8)


def test_a_stop_string_is_never_shown_not_even_in_part() -> None:
    text = "Water it.\n\nHuman: and then?"
    pieces = [certain_text(text[:n], [template.USER]) for n in range(len(text) + 1)]
    assert pieces[-1] == "Water it."
    assert all(later.startswith(sooner) for sooner, later in zip(pieces, pieces[1:]))
    assert all("Human" not in piece for piece in pieces)


def test_retry_is_another_draw_and_the_same_seed_gives_the_same_responses(model: Path) -> None:
    one, two = conversation(model), conversation(model)
    texts = [
        [
            talk.ask("Hello", quiet)[0].text,
            talk.retry(quiet)[0].text,
            talk.ask("And?", quiet)[0].text,
        ]
        for talk in (one, two)
    ]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert [turn.text for turn in one.histories[0]] == ["Hello", texts[0][1], "And?", texts[0][2]]


def test_what_is_stopped_is_remembered_as_far_as_it_was_shown(
    model: Path, other: Path, talk_to: Chat
) -> None:
    talk = conversation(model)
    (one,) = talk.policies
    part = one.tokenizer(" Water it", add_special_tokens=False).input_ids
    one.model.generate = generates(part, interrupt=True)
    assert talk.ask("Hello", quiet)[0] == talk.replies[0]
    assert talk.replies[0].stopped and not talk.replies[0].finished
    assert talk.histories[0][-1].text == "Water it"
    one.model.generate = generates([], interrupt=True)
    talk.ask("Again", quiet)
    remembered = talk.histories[0][-1].text
    assert remembered == "Water it", "an empty response is forgotten with its question"

    two = conversation(model, other)
    two.policies[0].model.generate = generates(part, interrupt=True)
    assert len(two.ask("Hello", quiet)) == 1, "the second policy has not responded"
    assert two.histories == [[], []]


def test_a_loaded_conversation_continues_as_if_it_had_not_stopped(
    model: Path, tmp_path: Path
) -> None:
    talk, later = conversation(model), conversation(model)
    talk.params.temperature = 0.5
    talk.ask("Hello\u2028\x1b[31m \udcff", quiet)
    talk.save(tmp_path / "a.json")
    talk.save(tmp_path / "a.json")  # over itself
    later.load(tmp_path / "a.json")
    assert (later.histories, later.params) == (talk.histories, talk.params)
    assert later.replies[0].text == talk.replies[0].text
    assert later.ask("And?", quiet)[0].ids == talk.ask("And?", quiet)[0].ids


GOOD: dict[str, Any] = {
    "conversations": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]],
    "params": {},
    "answered": 1,
}


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "No such file"),
        ("", "no saved conversation"),
        ("[" * 100_000, "no saved conversation"),
        ("[1, 2]", "no saved conversation"),
        (json.dumps(GOOD | {"answered": -1}), "no saved conversation"),
        (json.dumps(GOOD | {"params": {"heat": 1}}), "no parameter heat"),
        (json.dumps(GOOD | {"params": {"top_p": 7}}), "top_p=7: must be above 0"),
        (json.dumps(GOOD | {"params": {"seed": True}}), "seed=True: must be"),
        (json.dumps(GOOD | {"conversations": []}), "no saved conversation"),
        (json.dumps(GOOD | {"conversations": GOOD["conversations"] * 2}), "start with --compare"),
        (
            json.dumps(GOOD | {"conversations": [[{"role": "assistant", "content": "b"}]]}),
            "no saved conversation",
        ),
        (
            json.dumps(GOOD | {"conversations": [[{"role": "user", "content": 3}]]}),
            "no saved conversation",
        ),
        (json.dumps(GOOD).replace('"a"', json.dumps("rose " * 600)), "too long"),
    ],
)
def test_a_bad_file_changes_nothing(
    text: str | None, expected: str, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    talk = conversation(model)
    talk.ask("Hello", quiet)
    before = (talk.histories, talk.replies, talk.params, talk.answered)
    with pytest.raises(ValueError, match=f"cannot load {file}: .*{re.escape(expected)}") as raised:
        talk.load(file)
    assert before == (talk.histories, talk.replies, talk.params, talk.answered)
    assert "\n" not in str(raised.value)


def test_save_does_not_write_over_another_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for file in (tmp_path / "notes.txt", tmp_path, tmp_path / "no" / "a.json", Path("a\0b")):
        with pytest.raises(ValueError, match="cannot save to"):
            conversation(model).save(file)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_parameters_are_shown_set_and_used(model: Path, talk_to: Chat) -> None:
    lines = ["/params", "Hello", "/clear", "/params seed=3", "Hello"]
    lines += ["/params temperature=0 top-k=5", "/retry", "/retry"]
    output, params = talk_to("--path", model, lines=lines)
    first, again, greedy, greedy_again = output.splitlines()
    assert first == again and greedy == greedy_again
    assert "temperature=1.0 top_p=1.0 top_k=0 max_new_tokens=6 seed=3\n" in params
    assert "temperature=0.0 top_p=1.0 top_k=5 max_new_tokens=6 seed=3\n" in params
