"""What can be wrong with the server of rollout.engine=vllm, before anything is loaded."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator

from rlhf.base.urls import shown_url, wrong_address
from rlhf.config.choices import RolloutEngine
from rlhf.config.schema import Config

# options of the server that the run sets: it finds it by them, and no other machine does
OURS = {"--host", "--port", "--uds", "--model", "--served-model-name"}


def check_vllm(cfg: Config) -> Iterator[str]:
    """The server that samples with rollout.engine=vllm."""
    vllm = cfg.rollout.vllm
    given = [name for name in ("url", "command") if getattr(vllm, name) is not None]
    if cfg.rollout.engine != RolloutEngine.vllm:
        for name in given:
            value = shown_url(getattr(vllm, name))
            yield (
                f"rollout.vllm.{name}={value}: only with rollout.engine=vllm, not "
                f"{cfg.rollout.engine.name}"
            )
        return
    if len(given) != 1:
        how = "both are given" if given else "which server"
        yield (
            f"rollout.engine=vllm: {how}? Give rollout.vllm.url=http://HOST:PORT of one that runs, "
            'or rollout.vllm.command=".venv-vllm/bin/vllm serve", which starts one '
            "(docs/engines.md)"
        )
    if problem := wrong_address("rollout.vllm.url", vllm.url):
        yield problem
    if cfg.rl.dschat.greedy:
        yield "rollout.engine=vllm with rl.dschat.greedy=true: use rollout.engine=native"
    if vllm.command is not None:
        yield from check_vllm_command(cfg, vllm.command)


def check_vllm_command(cfg: Config, command: str) -> Iterator[str]:
    """What starts a server on this machine."""
    key = f"rollout.vllm.command={command}"
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield f"{key}: not a command ({error}); quote it as a shell needs it"
        return
    if "serve" not in words[1:]:
        yield f"{key}: give the program and serve, as .venv-vllm/bin/vllm serve"
    elif not shutil.which(words[0]):
        yield (
            f"{key}: there is no program {words[0]}; make setup-vllm installs one for CPUs, "
            "docs/engines.md says how to on a GPU"
        )
    if theirs := sorted(OURS & {word.partition("=")[0] for word in words}):
        yield f"{key}: leave out {theirs[0]}: the run chooses it"
    if cfg.deploy.nodes > 1:
        yield f"{key} with deploy.nodes={cfg.deploy.nodes}: start a server, and give its address"
