"""The process of the models: what it streams and measures, who shares it, and when it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chats import policy as load
from chats import save_policy, save_reward
from helpers import REPO, composed

from rlhf.app.model_process import held_out
from rlhf.app.models import Models
from rlhf.app.talk import Talk, params_of, settings_of
from rlhf.app.token_view import answer_html, colour
from rlhf.base.errors import UserError
from rlhf.chat.feedback import Judge, trace
from rlhf.chat.models import load_model
from rlhf.chat.policy import Params, Reply
from rlhf.config.loading import save_config
from rlhf.data.records import Turn
from rlhf.models.loading import load_tokenizer

TURNS = [Turn("system", "Be brief."), Turn("user", "How do I look after my rose?")]
SHORT = Params(max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two policies and a reward model."""
    root = tmp_path_factory.mktemp("app")
    save_policy(root / "first", 0)
    save_policy(root / "second", 1)
    save_reward(root / "reward", load_tokenizer("builtin:tiny"), score_mean=0.25, score_std=2.0)
    return root


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    shared = Models("cpu")
    yield shared
    shared.close()


def ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_until_ended(pid: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_response_is_streamed_scored_and_compared_as_chat_py_does(
    models: Models, folder: Path
) -> None:
    path, other, reward = (str(folder / name) for name in ("first", "second", "reward"))
    request = models.answer(path, TURNS, SHORT, [reward], other)
    pieces = [text for kind, text in request if kind == "piece"]
    answer = request.answer
    assert len(pieces) > 1 and "".join(pieces) == answer.text

    policy = load(folder / "first")
    kept, ids = policy.fit(TURNS, SHORT.max_new_tokens)
    reply = Reply(kept, ids)
    policy.respond(reply, SHORT, SHORT.seed, lambda piece: None)
    assert answer.text == reply.text and answer.finished == reply.finished
    assert answer.tokens == trace(policy, *load_model(other, "cpu"), reply)
    assert any(abs(difference) > 0.01 for _, difference in answer.tokens)
    judge = Judge(*load_model(reward, "cpu", "--reward"), reward)
    assert answer.rewards == [(reward, judge.score(policy, reply))]
    assert answer.reference == other and not answer.notes


def test_two_browsers_at_once_share_the_models(models: Models, folder: Path) -> None:
    def ask(seed: int) -> str:
        return models.answer(str(folder / "first"), TURNS, Params(seed=seed)).answer.text

    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(ask, [1, 2, 3] * 2))
    assert together[:3] == together[3:] and len(set(together)) == 3
    assert together == [ask(seed) for seed in [1, 2, 3] * 2]
    assert models.loaded().count(str(folder / "first")) == 1


def test_a_response_can_be_stopped_in_the_middle(models: Models, folder: Path) -> None:
    request = models.answer(str(folder / "first"), TURNS, Params(max_new_tokens=400), [], "")
    for kind, _ in request:
        if kind == "piece":
            request.stop()
    whole = models.answer(str(folder / "first"), TURNS, Params(max_new_tokens=400)).answer
    assert request.answer.stopped and not whole.stopped
    assert whole.text.startswith(request.answer.text)
    assert 0 < len(request.answer.text) < len(whole.text)


def test_what_cannot_be_loaded_is_a_line(models: Models, folder: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        _ = models.answer("/no/such/run", TURNS, SHORT).answer
    answer = models.answer(
        str(folder / "first"), TURNS, SHORT, [str(folder / "second")], "auto"
    ).answer
    assert answer.text and not answer.rewards and not answer.tokens
    no_reward, no_reference = answer.notes
    assert no_reward.startswith("reward model ") and "it gives no scores" in no_reward
    assert "there is no reference: choose one" in no_reference
    with pytest.raises(UserError, match="is no run, so no data belong to it"):
        models.held_out(str(folder / "first"))


def test_the_data_of_a_run_are_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in a file of the same name beside the page."""
    project, run = tmp_path / "project", tmp_path / "project" / "outputs" / "sft-1"
    run.mkdir(parents=True)
    for folder, word in ((project, "right"), (tmp_path, "wrong")):
        lines = [json.dumps({"prompt": f"{word} {i}", "response": "a"}) for i in range(40)]
        (folder / "pairs.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(project)
    save_config(
        composed("stage=sft", "data=jsonl", "data.sources.mine.path=pairs.jsonl"),
        run / "config.yaml",
    )
    (run / "env.json").write_text(json.dumps({"folder": str(project)}))
    monkeypatch.chdir(tmp_path)
    prompts = held_out(str(run))
    assert prompts and all(turns[-1][1].startswith("right") for turns in prompts)


def test_it_has_one_thread_and_a_low_priority(models: Models, folder: Path) -> None:
    assert models.start_of(str(folder / "first")).template.name == "hh"
    pid = models.pid
    assert pid is not None
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=1" in environment
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(own + 10, 19)


@pytest.mark.full
def test_it_outlives_the_thread_that_started_it_and_frees_what_is_idle(folder: Path) -> None:
    models, texts = Models("cpu", idle=1.0), []

    def ask() -> None:
        texts.append(models.answer(str(folder / "first"), TURNS, SHORT).answer.text)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    pid = models.pid
    assert pid is not None
    time.sleep(0.3)
    assert models.pid == pid
    wait_until_ended(pid)
    assert models.pid is None
    ask()  # starts it again
    assert texts[0] == texts[1]
    models.close()


@pytest.mark.full
def test_a_killed_process_is_a_line_and_the_next_request_starts_another(folder: Path) -> None:
    models = Models("cpu")
    request = models.answer(str(folder / "first"), TURNS, Params(max_new_tokens=400))
    assert models.pid is not None
    os.kill(models.pid, 9)
    with pytest.raises(UserError, match=r"has ended \(signal SIGKILL: was the memory full\?\)"):
        _ = request.answer
    assert models.answer(str(folder / "first"), TURNS, SHORT).answer.text
    models.close()


@pytest.mark.full
def test_it_ends_with_the_page_however_that_ends(folder: Path) -> None:
    code = (
        "import sys, time\nfrom rlhf.app.models import Models\n"
        "from rlhf.chat.policy import Params\n"
        "from rlhf.data.records import Turn\nmodels = Models('cpu')\n"
        "models.answer(sys.argv[1], [Turn('user', 'Hi')], Params(max_new_tokens=4)).answer\n"
        "print(models.pid, flush=True)\ntime.sleep(600)"
    )
    page = subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "first")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    assert page.stdout is not None
    pid = int(page.stdout.readline())
    assert not ended(pid)
    page.kill()
    page.wait()
    wait_until_ended(pid)


# ------------------------------------------------------------------------------- conversations


def test_policies_share_messages_and_continue_from_their_own_responses(
    models: Models, folder: Path
) -> None:
    paths = [str(folder / "first"), str(folder / "second")]
    settings = settings_of(paths, [], "", "Be brief.", SHORT)
    talk = Talk()
    shown: dict[int, str] = {}
    for message in ("One?", "Two?"):
        shown |= {i: text for i, text in talk.ask(models, message, settings) if i >= 0}
    last = talk.exchanges[1].answers
    assert [one.text for one in last if one] == [shown[0], shown[1]]
    assert shown[0] != shown[1]
    for i in range(2):
        first = talk.exchanges[0].answers[i]
        assert first is not None
        assert [(turn.role, turn.text) for turn in talk.turns(i, "Be brief.")] == [
            ("system", "Be brief."),
            ("user", "One?"),
            ("assistant", first.text),
            ("user", "Two?"),
        ]
    assert talk.undo(1) == "Two?" and len(talk.exchanges) == 1
    list(talk.ask(models, "Two?", settings))
    again = talk.exchanges[1].answers[0]
    assert again and again.text != shown[0]  # the next random numbers
    with pytest.raises(UserError, match="no such message"):
        talk.undo(5)


def test_a_failed_message_is_forgotten_and_typos_of_parameters_are_named(models: Models) -> None:
    talk = Talk()
    with pytest.raises(UserError, match="no such directory"):
        list(talk.ask(models, "Hi", settings_of(["/no/such"], [], "", "", SHORT)))
    assert not talk.exchanges and not talk.busy
    with pytest.raises(UserError, match="top_p=2: must be above 0, at most 1"):
        params_of(temperature=1.0, top_p=2.0)
    with pytest.raises(UserError, match="at most 4 policies"):
        settings_of(list("abcde"), [], "", "", SHORT)


def test_tokens_are_escaped_and_coloured(models: Models, folder: Path) -> None:
    answer = models.answer(str(folder / "first"), TURNS, SHORT).answer
    answer.tokens = [("<b>", 3.0), ("&\x1b", -1.5), ("", 0.0), ("ok", float("nan"))]
    answer.rewards, answer.reference = [("<i>", 0.5)], "<u>"
    page = str(answer_html(1, answer))
    assert "&lt;b&gt;" in page and "&amp;\ufffd" in page and "reward +0.50 (&lt;i&gt;)" in page
    assert not any(tag in page for tag in ("<b>&", "<i>", "<u>", "\x1b"))
    assert 'title="+3.000 nats"' in page and 'title="-1.500 nats"' in page
    assert colour(3.0) == colour(9.0) == "background:rgba(220,38,38,0.65)"
    assert colour(-1.5).startswith("background:rgba(22,163,74,0.3")
    assert colour(0.01) == colour(float("nan")) == ""
