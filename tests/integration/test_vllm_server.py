"""rollout.engine=vllm with a real server, which `make setup-vllm` installs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import REPO, SMALL, VLLM, composed, metrics, runs_in
from scipy import stats

from rlhf.base.errors import UserError
from rlhf.config.choices import Precision
from rlhf.data.batches import pad_left, uniforms
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy
from rlhf.sampling import vllm, vllm_server
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}: make setup-vllm installs it"),
]
COMMAND = f'rollout.vllm.command="{VLLM} serve --enforce-eager"'
ENGINE = ["rollout.engine=vllm", COMMAND]
EOS = 2
PROMPTS = [[5, 6, 7], [8, 9], [*range(20, 34)], [300]]
GREEDY = Sampling(greedy=True)


def batch_of(prompts: list[list[int]]) -> PromptBatch:
    return PromptBatch(*pad_left(prompts, 0))


@pytest.fixture(scope="module")
def actor(one_process: None, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    load = partial(load_policy, "builtin:tiny", tokenizer, Precision.fp32)
    run_dir = tmp_path_factory.mktemp("actor")
    engine = build_engine(load, composed("stage=ppo"), "actor", run_dir)
    engine.eval()
    return engine


@pytest.fixture(scope="module")
def sampler(
    one_process: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[vllm.VllmSampler]:
    """A server, which is started when it samples for the first time."""
    run_dir = tmp_path_factory.mktemp("run")
    with vllm.running_sampler(composed("stage=ppo", *ENGINE), run_dir) as sampler:
        assert sampler
        yield sampler
        keeper = sampler.server.process
        assert sampler.folder and sampler.folder.exists() and keeper
    assert keeper.exit_code() is not None and not sampler.folder.exists()


Ask = Callable[..., SampledResponses]


@pytest.fixture
def ask(sampler: vllm.VllmSampler, actor: Any, tokenizer: Any) -> Ask:
    """Sample with the server."""

    def responses(prompts: list[list[int]], noise: Any, how: Sampling) -> SampledResponses:
        return sampler.sample(actor, tokenizer, batch_of(prompts), noise, how)

    return responses


def noise_of(rows: int, tokens: int = 12) -> torch.Tensor:
    return uniforms("x", range(rows), 0, 0, tokens)


def change_weights(actor: Any, seed: int) -> None:
    """As an update does, only more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in actor.module.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    actor.global_steps += 1


def assert_greedy_as_native(ask: Ask, actor: Any) -> None:
    expected = sample(actor.module, batch_of(PROMPTS), noise_of(4), EOS, GREEDY)
    found = ask(PROMPTS, noise_of(4), GREEDY)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.mask, expected.mask)


def test_the_likeliest_tokens_are_those_of_the_native_loop(ask: Ask, actor: Any) -> None:
    assert_greedy_as_native(ask, actor)


def test_samples_follow_the_policys_distribution(ask: Ask, actor: Any) -> None:
    """The first tokens of many responses against pi at the sampling temperature."""
    n, how = 2000, Sampling(temperature=0.7)
    found = ask([[5, 6, 7]] * n, noise_of(n, 2), how)
    logits = actor.module.hf(torch.tensor([[5, 6, 7]])).logits[0, -1].float() / 0.7
    p = logits.softmax(0)
    counts = torch.bincount(found.ids[:, 0], minlength=len(p)).double()
    order = p.argsort(descending=True)
    groups = torch.tensor_split(order, 40)  # each has enough responses
    observed = [float(counts[g].sum()) for g in groups]
    expected = [float(p[g].detach().sum()) * n for g in groups]
    assert stats.chisquare(observed, [e * n / sum(expected) for e in expected]).pvalue > 1e-3
    own = p.log()[found.ids[:, 0]]
    torch.testing.assert_close(found.logprobs[:, 0], own, atol=1e-4, rtol=1e-4)


def test_a_response_does_not_depend_on_those_beside_it(ask: Ask) -> None:
    noise = noise_of(4)
    together = ask(PROMPTS, noise, Sampling())
    alone = ask(PROMPTS[2:3], noise[2:3], Sampling())
    assert torch.equal(alone.ids[0], together.ids[2])
    assert torch.equal(ask(PROMPTS, noise, Sampling()).ids, together.ids)


def test_it_samples_from_the_weights_of_now(
    ask: Ask, actor: Any, sampler: vllm.VllmSampler
) -> None:
    for seed in (1, 2):
        change_weights(actor, seed)
        assert_greedy_as_native(ask, actor)
        assert sampler.folder
        kept = [path.name for path in sampler.folder.iterdir() if path.is_dir()]
        assert kept == [f"step-{actor.global_steps}"]


def test_old_weights_are_noticed(
    ask: Ask, actor: Any, sampler: vllm.VllmSampler, caplog: Any, monkeypatch: Any
) -> None:
    """A server that does not load what it is told, also when it is told again."""
    change_weights(actor, 3)
    with monkeypatch.context() as patch:
        patch.setattr(sampler.server, "load", lambda model: None)
        with pytest.raises(UserError, match="computes with other weights than the policy's"):
            ask(PROMPTS, noise_of(4), GREEDY)
    assert caplog.text.count("the weights are loaded once more") == 1
    assert_greedy_as_native(ask, actor)  # loads them now


def test_old_weights_are_noticed_where_rounding_hides_the_difference(
    ask: Ask, actor: Any, sampler: vllm.VllmSampler, monkeypatch: Any
) -> None:
    """As in 16 bits: the server's log-probs are still the same to the last digit."""
    ask(PROMPTS, noise_of(4), GREEDY)
    change_weights(actor, 7)
    with monkeypatch.context() as patch:
        patch.setitem(vllm.LIMIT, Precision.fp32, 100.0)
        patch.setattr(sampler.server, "load", lambda model: None)
        with pytest.raises(UserError, match="its log-probs did not change with the weights"):
            ask(PROMPTS, noise_of(4), GREEDY)
    assert_greedy_as_native(ask, actor)


def test_copies_of_a_prompt_are_compared_once_and_short_ones_too(
    sampler: vllm.VllmSampler, actor: Any
) -> None:
    rows = [[5, 6, 7]] * 8 + [[8]] * 8 + [[9, 8]]
    checked = sampler.checked_prompts(actor, rows)
    assert [one.ids for one in checked] == [[8, 8], [9, 8], [5, 6, 7]]
    assert [len(one.logprobs) for one in checked] == [1, 1, 2]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have, in that order."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        listing = ["pgrep", "-P", str(waiting.pop(0))]
        done = subprocess.run(listing, capture_output=True, text=True, check=False)
        children = [int(child) for child in done.stdout.split()]
        waiting += children
        found += children
    return found


def processes_of(sampler: vllm.VllmSampler) -> list[int]:
    """The program that the server's keeper has started, and what that has started."""
    assert sampler.server.process
    return descendants(sampler.server.process.keeper.pid)


@pytest.mark.parametrize("victim", ["front", "engine"])
def test_a_server_that_dies_is_started_again_with_the_weights_of_now(
    ask: Ask, actor: Any, sampler: vllm.VllmSampler, caplog: Any, victim: str
) -> None:
    expected = ask(PROMPTS, noise_of(4), Sampling())
    change_weights(actor, 6)
    changed = ask(PROMPTS, noise_of(4), Sampling())
    assert not torch.equal(changed.ids, expected.ids)
    program, *rest = processes_of(sampler)
    os.kill(program if victim == "front" else rest[-1], signal.SIGKILL)
    again = ask(PROMPTS, noise_of(4), Sampling())
    assert torch.equal(again.ids, changed.ids)
    assert "the vLLM server has died and is started again" in caplog.text


def test_a_slow_server_is_waited_for_and_said(
    ask: Ask, sampler: vllm.VllmSampler, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(vllm_server, "REPORT_EVERY", 0.5)
    expected = ask(PROMPTS, noise_of(4), Sampling())
    stopped = processes_of(sampler)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(3, lambda: [os.kill(pid, signal.SIGCONT) for pid in stopped])
    timer.start()
    with caplog.at_level("INFO", "rlhf"):
        assert torch.equal(ask(PROMPTS, noise_of(4), Sampling()).ids, expected.ids)
    timer.join()
    assert "the vLLM server has answered 0 of 4 requests after" in caplog.text


def test_a_server_by_its_address(
    actor: Any, tokenizer: Any, sampler: vllm.VllmSampler, tmp_path: Path, ask: Ask
) -> None:
    """One that somebody else has started, here the one of the other tests."""
    ask(PROMPTS, noise_of(4), GREEDY)
    url = sampler.server.url
    cfg = composed(
        *("stage=ppo", "rollout.engine=vllm", f"rollout.vllm.url={url}"),
        *("data.max_prompt_tokens=100", "rollout.max_new_tokens=12"),
        f"rollout.vllm.weights_dir={tmp_path}",
    )
    with pytest.raises(UserError, match="start it with --max-model-len 9128"):
        too_long = composed(*ENGINE[:1], f"rollout.vllm.url={url}", "rollout.max_new_tokens=9000")
        too_long.data.max_prompt_tokens = 128
        with vllm.running_sampler(too_long, tmp_path):
            pass
    with vllm.running_sampler(cfg, tmp_path) as by_url:
        assert by_url
        by_url.model, by_url.steps = sampler.model, actor.global_steps
        batch = batch_of(PROMPTS)
        by_url.sample(actor, tokenizer, batch, noise_of(4), GREEDY)
        change_weights(actor, 8)  # as if another program had given the server other weights
        by_url.steps = actor.global_steps
        with pytest.raises(UserError, match="belong to this run alone"):
            by_url.sample(actor, tokenizer, batch, noise_of(4), GREEDY)
        with (
            pytest.raises(UserError, match="another run uses this server"),
            vllm.running_sampler(cfg, tmp_path),
        ):
            pass
    assert by_url.server.is_healthy(), "a server of somebody else goes on"


def test_a_server_that_is_stopped_leaves_nothing_in_shared_memory(
    ask: Ask, sampler: vllm.VllmSampler
) -> None:
    """Where it runs on a CPU it has some 200 MB there. The next test starts another one."""
    before = set(os.listdir("/dev/shm"))
    sampler.model = sampler.server.stop()
    sampler.steps = -1
    ask(PROMPTS, noise_of(4), GREEDY)
    made = set(os.listdir("/dev/shm")) - before
    sampler.model = sampler.server.stop()
    sampler.steps = -1
    assert made and not made & set(os.listdir("/dev/shm"))


def test_a_tied_output_layer_that_a_cpu_does_not_renew_is_noticed(
    ask: Ask, actor: Any, sampler: vllm.VllmSampler, monkeypatch: Any
) -> None:
    """Else `write_model` need not untie it: then remove that. It leaves a server that is wrong, so
    it is the last one that uses it."""
    write = vllm.write_model
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "write_model", lambda *args: write(*args[:-1], False))
        change_weights(actor, 4)
        sampler.model = sampler.server.stop()  # so that it starts with a tied layer
        assert_greedy_as_native(ask, actor)
        change_weights(actor, 5)
        with pytest.raises(UserError, match="on a CPU it cannot renew tied embeddings"):
            ask(PROMPTS, noise_of(4), GREEDY)


def test_a_server_that_cannot_start_is_one_line(actor: Any, tokenizer: Any, tmp_path: Path) -> None:
    command = f'rollout.vllm.command="{VLLM} serve --no-such-option"'
    cfg = composed("stage=ppo", "rollout.engine=vllm", command)
    with (
        vllm.running_sampler(cfg, tmp_path) as sampler,
        pytest.raises(UserError, match=r"ended with exit code 2: .*no-such-option.*vllm\.log"),
    ):
        assert sampler
        sampler.sample(actor, tokenizer, batch_of(PROMPTS), noise_of(4), GREEDY)


# --------------------------------------------------------------------------------- whole runs

RUN = [
    "pipeline=grpo",
    *SMALL,
    "rl.max_steps=3",
    "rl.lr=1e-3",
    "rl.responses_per_prompt=4",
    "deploy.micro_batch=4",
]
MEASURED = ["objective/scores", "objective/kl", "tokens/response_mean", "policy/grad_norm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(root: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *args, *ENGINE],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "RANK"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def plain(root: Path) -> tuple[Path, str]:
    """A run with two processes, and what it printed."""
    done = start(root, *RUN, "deploy.processes_per_node=2")
    said, _ = done.communicate(timeout=900)
    assert done.returncode == 0, said
    (run,) = runs_in(root)["grpo"]
    return run, said


def test_a_run_with_two_processes(plain: tuple[Path, str]) -> None:
    run, said = plain
    rows = [row for row in metrics(run) if "sampler/ratio_max" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["sampler/ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert row["sampler/capped"] == 0 and row["val/sampler_logp_diff"] < 1e-4
    assert said.count("starting the vLLM server") == 1


def test_a_run_goes_on_where_its_server_is_killed(plain: tuple[Path, str], tmp_path: Path) -> None:
    """With the same result: a response's seed is its own."""
    (tmp_path / "outputs").symlink_to(plain[0].parent)  # the SFT run and the reward model
    moved = plain[0].rename(tmp_path / "plain")
    process = start(tmp_path, *RUN, "deploy.processes_per_node=2")
    log = plain[0] / "metrics.jsonl"
    end = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    for pid in descendants(process.pid):
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if str(VLLM).encode() in program[:2]:
            os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "the vLLM server has died and is started again" in said
    for ours, theirs in zip(metrics(plain[0]), metrics(moved)):
        for name in MEASURED:
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-3, abs=1e-5), name


def test_an_adapter_and_partitioned_weights(root: Path, plain: tuple[Path, str]) -> None:
    adapter = ["actor.lora.rank=4", "deploy.zero_stage=3", "deploy.processes_per_node=2"]
    done = start(root, *RUN, *adapter)
    said, _ = done.communicate(timeout=900)
    assert done.returncode == 0, said
    (run,) = set((root / "outputs").glob("grpo-*lora*"))
    rows = [row for row in metrics(run) if "sampler/ratio_max" in row]
    assert [row["sampler/ratio_max"] == pytest.approx(1, abs=1e-3) for row in rows] == [True] * 3
    assert json.loads((run / "result.json").read_text())["metrics"]
