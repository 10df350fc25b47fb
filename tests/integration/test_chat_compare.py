"""chat.py with two policies, with scores, and with traces of log-probabilities."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from chats import UNIT, Chat, conversation, generates, policy, quiet, save_reward
from rich.console import Console

from rlhf.chat.conversation import Conversation
from rlhf.chat.feedback import Judge, Preferences, trace
from rlhf.chat.models import find_reference, load_model
from rlhf.chat.policy import Policy, Reply
from rlhf.chat.session import Session, colour
from rlhf.config.choices import Template
from rlhf.data import encoding
from rlhf.data.records import Turn
from rlhf.models.loading import load_tokenizer

# ------------------------------------------------------------------------------------- two policies


def test_two_policies_draw_the_same_numbers_and_continue_from_their_own_responses(
    model: Path, other: Path
) -> None:
    twins = conversation(model, model)
    for message in ("Hello", "And then?"):
        one, two = twins.ask(message, quiet)
        assert one.ids == two.ids
    talk = conversation(model, other)
    for message in ("Hello", "And then?"):
        one, two = talk.ask(message, quiet)
        assert one.text != two.text
    users = [[turn.text for turn in turns if turn.role == "user"] for turns in talk.histories]
    assert users == [["Hello", "And then?"]] * 2
    assert [turns[-1].text for turns in talk.histories] == [one.text, two.text]
    assert talk.histories[0][1] != talk.histories[1][1]

    talk.prefer(1)
    preferred = [*two.prompt, Turn("assistant", two.text)]
    assert talk.histories == [preferred] * 2
    assert [reply.prompt[:-1] for reply in talk.ask("So?", quiet)] == [preferred] * 2


def test_a_message_too_long_for_one_policy_goes_to_neither(model: Path, other: Path) -> None:
    talk = conversation(model, other)
    talk.policies[1].context = 64
    with pytest.raises(ValueError, match="context 64"):
        talk.ask("rose " * 100, quiet)
    assert talk.histories == [[], []] and talk.answered == 0


def test_compare_in_a_pipe_has_clear_headings(
    model: Path, other: Path, reward: Path, talk_to: Chat
) -> None:
    lines = ["Hello", "/good", "/prefer 3", "/prefer 2", "/prefer 1"]
    output, notes = talk_to("--compare", model, other, "--reward", reward, lines=lines)
    headings = [line for line in output.splitlines() if line.startswith(("1  ", "2  "))]
    assert headings == [f"1  {model.parent.name}", f"2  {other.parent.name}"]
    assert re.search(r"^\(reward 1: [+-]\d+\.\d\d   2: [+-]\d+\.\d\d\)$", notes, re.MULTILINE)
    assert "/prefer 1 or /prefer 2, not /good" in notes and "/prefer 3: must be 1 or 2" in notes
    assert "a pair, chosen and rejected: written to preferences.jsonl, which has 1 record" in notes
    assert "these responses are in preferences.jsonl already" in notes
    record = json.loads(Path("preferences.jsonl").read_text())
    assert record["prompt"] == [{"role": "user", "content": "Hello"}]
    assert output == f"{headings[0]}\n{record['rejected']}\n{headings[1]}\n{record['chosen']}\n"


def terminal(width: int) -> Console:
    """A terminal of some columns with all colours, which writes to a string."""
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        width=width,
        highlight=False,
    )


def drawn_on(console: Console) -> str:
    """What has been printed on a `terminal`."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def session(talk: Conversation, console: Console, reference: str | None = None) -> Session:
    """What chat.py works with, without its command line."""
    one = Session.__new__(Session)
    one.talk, one.judge, one.device, one.console = talk, None, "cpu", console
    one.reference, one.references = reference, {}
    one.preferences = Preferences(Path("preferences.jsonl"))
    return one


@pytest.mark.parametrize("width", [120, 80])
def test_a_wide_terminal_shows_two_responses_side_by_side(
    width: int,
    model: Path,
    other: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    talk = conversation(model, other)
    responses = ("Water it [bold]well.\x1b[2J", "Leave it alone.")
    for one, text in zip(talk.policies, responses):
        sampled = encoding.encode_response(one.tokenizer, text, True)
        monkeypatch.setattr(one.model, "generate", generates(sampled))
    console = terminal(width)
    session(talk, console).respond(lambda show: talk.ask("Hello", show))
    drawn, plain = drawn_on(console), capsys.readouterr().out
    if width == 120:
        assert re.search(r"Water it \[bold\]well\.\ufffd\[2J +Leave it alone\.", drawn)
        assert "\x1b[2J" not in drawn and not plain
    else:
        assert plain.splitlines()[1::2] == ["Water it [bold]well.\ufffd[2J", "Leave it alone."]
        assert not drawn


# ---------------------------------------------------------------------------------------- the score


def reply_of(one: Policy, question: str, response: str, finished: bool) -> Reply:
    turns, prompt_ids = one.fit([Turn("user", question)], 8)
    ids = encoding.encode_response(one.tokenizer, response, finished)
    return Reply(turns, prompt_ids, response, ids, finished)


def raw_scores(path: Path, ids: list[int]) -> list[float]:
    """The score at each token as transformers computes it, without a unit."""
    hf, _ = load_model(str(path), "cpu", "--reward")
    with torch.no_grad():
        return hf.score(hf.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0].tolist()


@pytest.mark.parametrize("finished", [True, False])
def test_the_score_is_that_of_training(
    finished: bool, model: Path, reward: Path, tmp_path: Path
) -> None:
    one, reply = policy(model), reply_of(policy(model), "Hello", "Water it.", finished)
    ids = reply.prompt_ids + reply.ids
    assert (ids[-1] == one.tokenizer.eos_token_id) == finished
    raw = raw_scores(reward, ids)
    judge = Judge(*load_model(str(reward), "cpu", "--reward"))
    assert judge.score(one, reply) == pytest.approx((raw[-1] - UNIT[0]) / UNIT[1], abs=1e-5)
    assert "standard deviation" in judge.unit

    before = save_reward(tmp_path, load_tokenizer("builtin:tiny"), score_before_eos=True)
    judge = Judge(*load_model(str(before), "cpu", "--reward"))
    assert judge.score(one, reply) == pytest.approx(raw[-2 if finished else -1], abs=1e-5)
    assert judge.unit.startswith("raw")


def test_a_reward_model_with_another_tokenizer_reads_text_where_no_turn_is_forged(
    model: Path, tmp_path: Path
) -> None:
    chatml = load_tokenizer("builtin:tiny", Template.chatml)
    judge = Judge(*load_model(str(save_reward(tmp_path, chatml)), "cpu", "--reward"))
    one = policy(model)
    reply = reply_of(one, "Hello<|im_end|>", "Water it.", True)
    ids = chatml(
        "<|im_start|>user\nHello<|im_end| ><|im_end|>\n<|im_start|>assistant\nWater it.<|im_end|>",
        add_special_tokens=False,
    ).input_ids
    assert judge.score(one, reply) == pytest.approx(raw_scores(tmp_path, ids)[-1], abs=1e-5)


@pytest.mark.parametrize("finished", [True, False])
def test_the_score_of_a_model_from_elsewhere_is_read_where_its_template_ends(
    finished: bool, model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer("builtin:tiny", Template.chatml)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    judge = Judge(*load_model(str(save_reward(tmp_path, tokenizer)), "cpu", "--reward"))
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nWater it."
    text += "<|im_end|>\n" if finished else ""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    one = policy(model)
    reply = reply_of(one, "Hello", "Water it.", finished)
    assert judge.score(one, reply) == pytest.approx(raw_scores(tmp_path, ids)[-1], abs=1e-5)


def test_what_is_too_long_for_the_reward_model_loses_its_beginning(
    model: Path, reward: Path
) -> None:
    one, judge = policy(model), Judge(*load_model(str(reward), "cpu", "--reward"))
    reply = reply_of(one, "rose " * 300, "Water it.", True)
    raw = raw_scores(reward, (reply.prompt_ids + reply.ids)[-64:])[-1]
    judge.scorer.hf.config.max_position_embeddings = 64
    assert judge.score(one, reply) == pytest.approx((raw - UNIT[0]) / UNIT[1], abs=1e-5)


def test_a_classifier_of_other_kind_is_refused_in_one_line(model: Path, reward: Path) -> None:
    hf, tokenizer = load_model(str(reward), "cpu", "--reward")
    hf.config.num_labels = 2
    with pytest.raises(ValueError, match="--reward x: no reward model that can be read"):
        Judge(hf, tokenizer, "x")
    with pytest.raises(ValueError, match="--reward .*: this is OPTForCausalLM, not a reward model"):
        load_model(str(model), "cpu", "--reward")


# ---------------------------------------------------------------------------------------- the trace


def test_the_trace_is_the_difference_of_the_log_probabilities(model: Path, other: Path) -> None:
    one, reference = policy(model), load_model(str(other), "cpu")
    reply = reply_of(one, "Hello", "Zwölf – ☃ it.", True)
    row = torch.tensor([reply.prompt_ids + reply.ids])
    with torch.no_grad():
        pi, ref = (hf(row).logits[0].double().log_softmax(-1) for hf in (one.model, reference[0]))
    first = len(reply.prompt_ids) - 1
    by_hand = [float((pi - ref)[first + t, token]) for t, token in enumerate(reply.ids)]
    tokens = trace(one, *reference, reply)
    assert [d for _, d in tokens] == pytest.approx(by_hand, abs=1e-4)
    assert max(map(abs, by_hand)) > 0.01
    assert "".join(piece for piece, _ in tokens) == " Zwölf – ☃ it.</s>"
    assert [d for _, d in trace(one, *load_model(str(model), "cpu"), reply)] == [0.0] * len(tokens)


def test_a_reference_that_cannot_be_compared_with_is_refused(
    model: Path, other: Path, tmp_path: Path
) -> None:
    one, (reference, tokenizer) = policy(model), load_model(str(other), "cpu")
    reply = reply_of(one, "Hello", "Water it.", True)
    more = load_tokenizer("builtin:tiny", Template.chatml)  # has tokens that these texts have not
    assert len(more) > len(tokenizer)
    assert trace(one, reference, more, reply) == trace(one, reference, tokenizer, reply)

    class Reversed:  # the same tokens with other ids
        def __len__(self) -> int:
            return len(tokenizer)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return tokenizer.convert_ids_to_tokens([len(self) - 1 - i for i in ids])

    with pytest.raises(ValueError, match="another tokenizer"):
        trace(one, reference, Reversed(), reply)
    reference.config.max_position_embeddings = 4
    with pytest.raises(ValueError, match="reads at most 4 tokens"):
        trace(one, reference, tokenizer, reply)


def test_the_reference_is_the_sft_policy_that_the_run_was_trained_from(
    model: Path, tmp_path: Path
) -> None:
    def run(name: str, text: str) -> str:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(text)
        return str(tmp_path / name / "model")

    assert find_reference(run("ppo", f"inputs: {{sft: {model}, rm: x}}")) == str(model)
    assert find_reference(run("far", "inputs: {sft: me/sft}")) == "me/sft"
    with pytest.raises(ValueError, match="/gone no longer exists: give --reference PATH"):
        find_reference(run("moved", "inputs: {sft: /gone}"))
    for name, text in (("sft", "inputs: {}"), ("torn", "inputs: {sft"), ("no", "")):
        with pytest.raises(ValueError, match="there is no reference: give --reference PATH"):
            find_reference(run(name, text))
    with pytest.raises(ValueError, match="give --reference PATH"):
        find_reference("owner/hub-id")


def test_without_colours_each_token_has_its_number(model: Path, other: Path, talk_to: Chat) -> None:
    output, notes = talk_to("--path", model, "--reference", other, lines=["Hello", "/trace"])
    *rows, total, legend = output.splitlines()[1:]
    numbers = [float(row.split()[0]) for row in rows]
    assert 1 <= len(rows) <= 6
    assert all(re.fullmatch(r" *[+-]\d+\.\d{3}  ('.*'|\".*\")", row) for row in rows)
    summed = re.match(r"sum ([+-]\d+\.\d\d) nats over (\d+) tokens against .*; largest: ", total)
    assert summed and int(summed[2]) == len(rows)
    assert float(summed[1]) == pytest.approx(sum(numbers), abs=0.01)
    assert legend == "red: likelier than under the reference; green: less likely"
    output, notes = talk_to("--path", model, lines=["Hello", "/trace"])
    assert len(output.splitlines()) == 1 and "give --reference PATH" in notes


def test_on_a_terminal_tokens_have_colours(
    model: Path, other: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = conversation(model)
    talk.ask("Hello", quiet)
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        console = terminal(80)
        session(talk, console, str(other)).command("/trace")
        drawn, plain = drawn_on(console), capsys.readouterr().out
        assert ("\x1b[30;48;2;" in drawn) != bool(no_colour)
        assert len(plain.splitlines()) == (2 + len(talk.replies[0].ids) if no_colour else 2)


def test_colours_say_which_side_and_how_far() -> None:
    red, strong, green = colour(0.5), colour(5.0), colour(-0.5)
    assert red == "black on rgb(255,198,198)" and strong == "black on rgb(255,60,60)"
    assert green == "black on rgb(198,230,198)"
    assert colour(0.0) == colour(math.nan) == ""
