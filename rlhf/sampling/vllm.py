"""Sample through a vLLM server: rollout.engine=vllm.

The server gets the policy's weights as safetensors in a folder that both can read, after each
update. Whether it computes with them is checked by log-probs of some tokens, before it samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rlhf.base import watchdog
from rlhf.base.checksums import hash_files
from rlhf.base.errors import UserError
from rlhf.base.files import remove
from rlhf.base.log import announced, log
from rlhf.config.choices import Device, Precision, RolloutEngine
from rlhf.config.schema import Config
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine
from rlhf.models.loading import full_state_dict
from rlhf.models.wrappers import Policy
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm_server import LOG, ServerError, VllmServer, hold_url
from rlhf.sampling.vllm_weights import weights_folder, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_PROMPTS = 4  # whose log-probs are compared
CHECKED_TOKENS = 256  # of each; the server makes logits of all of them at once
# Mean difference of log-probs from those of the training forward pass, nats: fp32 rounding is 1e-6,
# an update 1e-3 and more; in 16 bits smaller differences are rounding
LIMIT = {p: 1e-4 if p == Precision.fp32 else 0.05 for p in Precision}


class CheckedPrompt(NamedTuple):
    """Tokens, and the log-prob of each token after the first by the training forward pass."""

    ids: list[int]
    logprobs: list[float]


class VllmSampler:
    """Samples responses from the policy that a training engine has now.

    Args: held: on the first rank, which writes the weights: what is released when the run ends.
    """

    def __init__(self, server: VllmServer, run_dir: Path, held: contextlib.ExitStack | None):
        self.server, self.run_dir, self.held = server, run_dir, held
        self.folder: Path | None = None  # of the weights
        self.model: Path | None = None  # the weights that the server has
        self.hashes: dict[str, str] = {}  # of their files
        self.steps = -1  # optimizer steps that these weights have seen; -1: none yet

    def sample(
        self,
        actor: Engine[Policy],
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        random: Tensor,
        sampling: Sampling,
    ) -> SampledResponses:
        """Sample responses from the distribution that `sampler.sample` samples from.

        All ranks call this together, each with prompts of its own. Where the server dies, it is
        started once more with the same weights. One that others can reach (rollout.vllm.url) must
        have the policy's weights before and after.

        Args: random: (B, R); the first number of a row is the seed of its response.
        Returns: tensors in host memory.
        Raises: UserError where the server fails again, or has other weights.
        """
        rows = [ids[mask > 0].tolist() for ids, mask in zip(prompts.ids, prompts.mask)]
        requests = [
            completion_request(ids, numbers, tokenizer.eos_token_id, sampling)
            for ids, numbers in zip(rows, random)
        ]
        checked = self.bring_weights(actor, tokenizer, rows)
        choices: list[dict[str, Any]] = []
        problem = ""
        try:
            choices = self.server.complete(requests)
        except ServerError as error:
            problem = str(error)
        collectives.barrier()  # another rank's responses may take longer
        if problem := next(filter(None, collectives.all_gather_objects(problem)), ""):
            self.replace_server(problem, actor, rows)
            choices = self.server.complete(requests)
        if self.held is not None and not self.server.is_own:
            self.check(checked, is_final=True)
        return as_tensors(choices, random.shape, tokenizer.eos_token_id)

    def bring_weights(
        self,
        actor: Engine[Policy],
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[list[int]],
    ) -> list[CheckedPrompt]:
        """Give the server the policy's weights, unless it has them. Returns: what was compared."""
        is_new = self.steps != actor.global_steps
        if not is_new and self.server.is_own:
            return []
        checked = self.checked_prompts(actor, rows)
        if is_new:
            weights, _ = full_state_dict(actor.module.hf)
            if self.held is not None:
                self.write_weights(actor, weights, tokenizer)
                self.renew(checked)
        elif self.held is not None:
            self.check(checked)
        self.steps = actor.global_steps
        self.share_url()
        return checked

    def write_weights(
        self, actor: Engine[Policy], weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write the policy of now beside the one that the server has."""
        assert self.held is not None
        if self.folder is None:
            size = sum(w.numel() * w.element_size() for w in weights.values())
            place = weights_folder(self.server.cfg, self.run_dir, size)
            self.folder = self.held.enter_context(place)
        self.model = self.folder / f"step-{actor.global_steps}"
        untie = self.server.is_own and self.server.cfg.deploy.device == Device.cpu
        with announced("writing the weights for vLLM"), watchdog.while_files_move():
            write_model(actor.module.hf, weights, tokenizer, self.model, untie)

    def renew(self, checked: list[CheckedPrompt]) -> None:
        """Let the server take the weights in `self.model`, and start it where it does not run."""
        assert self.model and self.folder
        files = sorted(file.name for file in self.model.glob("*.safetensors"))
        before, self.hashes = self.hashes, hash_files(self.model, files)
        try:
            if self.server.is_own and self.server.process is None:
                self.server.start(self.model)
                self.check(checked)
            else:
                is_other = before not in ({}, self.hashes)
                old = self.server_logprobs(checked) if is_other else []
                self.server.load(self.model)
                self.check(checked, old)
        except ServerError as error:
            self.restart(str(error), checked)
        for other in self.folder.glob("step-*"):
            if other != self.model:
                remove(other)

    def replace_server(
        self, problem: str, actor: Engine[Policy], rows: Sequence[list[int]]
    ) -> None:
        """Start a server that has died while it sampled. Raises: UserError where it cannot be."""
        checked = self.checked_prompts(actor, rows)
        if self.held is not None:
            self.restart(problem, checked)
        self.share_url()

    def restart(self, problem: str, checked: list[CheckedPrompt]) -> None:
        """Start a server that has died. Raises: UserError where it has not, or is not ours."""
        assert self.model
        if not self.server.is_own or self.server.is_healthy():
            raise UserError(problem)
        log.warning(f"the vLLM server has died and is started again: {problem}")
        self.server.start(self.model)
        self.check(checked)

    def share_url(self) -> None:
        """Tell all ranks where the server of the first one is; they wait while it starts."""
        collectives.barrier()
        self.server.url = collectives.all_gather_objects(self.server.url)[0]

    @torch.no_grad()
    def checked_prompts(
        self, actor: Engine[Policy], rows: Sequence[list[int]]
    ) -> list[CheckedPrompt]:
        """The longest prompts of the first rank, with the log-probs of their tokens.

        All ranks call this together: with partitioned weights they compute together.
        """
        different = sorted({tuple(ids[:CHECKED_TOKENS]) for ids in rows}, key=len)
        found = []
        for ids in collectives.all_gather_objects(different[-CHECKED_PROMPTS:])[0]:
            ids = ids if len(ids) > 1 else 2 * ids  # the first token has no log-prob
            tokens = torch.tensor([ids])
            targets = torch.ones_like(tokens, dtype=torch.bool)
            targets[:, 0] = False
            stats = actor(tokens, torch.ones_like(tokens), targets)
            found.append(CheckedPrompt(list(ids), stats.logprobs[0, 1:].tolist()))
        return found

    def check(
        self,
        checked: list[CheckedPrompt],
        old: list[list[float]] | None = None,
        is_final: bool = False,
    ) -> None:
        """Compare the server's log-probs with those of training; reload the weights once.

        Args:
            old: of the server with the weights of before, which were others; the same to the last
                digit are of these weights, also where rounding hides the difference.
            is_final: do not reload.
        Raises: UserError where the weights are others.
        """
        assert self.model
        limit = LIMIT[self.server.cfg.deploy.precision]
        for may_reload in (not is_final, False):
            now = self.server_logprobs(checked)
            gap = mean_difference(now, checked)
            if gap <= limit and now != old:
                return
            how = f"its log-probs differ by {gap:.2g} nats on average from the policy's"
            how = how if gap > limit else "its log-probs did not change with the weights"
            if not may_reload:
                break
            log.warning(f"{self.server.key}: {how}, and the weights are loaded once more")
            self.server.load(self.model)
        raise UserError(
            f"{self.server.key}: the server computes with other weights than the policy's: {how}, "
            f"allowed {limit:g}. It must read {self.folder}, have --dtype as deploy.precision, and "
            "belong to this run alone; on a CPU it cannot renew tied embeddings unless the run "
            "starts it (rollout.vllm.command)"
        )

    def server_logprobs(self, checked: list[CheckedPrompt]) -> list[list[float]]:
        """The server's log-probs of the same tokens. Raises: ServerError."""
        requests = [
            {"prompt": one.ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
            for one in checked
        ]
        return [
            [found[str(token)]["logprob"] for token, found in zip(one.ids[1:], tokens[1:])]
            for one, choice in zip(checked, self.server.complete(requests))
            for tokens in [choice["prompt_logprobs"]]
        ]


def mean_difference(logprobs: list[list[float]], checked: list[CheckedPrompt]) -> float:
    """Mean of abs(log-prob of the server - that of training), nats."""
    gaps = [
        abs(theirs - ours)
        for row, one in zip(logprobs, checked)
        for theirs, ours in zip(row, one.logprobs)
    ]
    return sum(gaps) / len(gaps)


def completion_request(
    ids: list[int], random: Tensor, eos_id: int, sampling: Sampling
) -> dict[str, Any]:
    """The request for one response. Its random numbers belong to the response, as ours do."""
    return {
        "prompt": ids,
        "max_tokens": len(random),
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": int(2**31 * float(random[0])),
        # the model's own list of end tokens may be longer than ours
        "ignore_eos": True,
        "stop_token_ids": [eos_id],
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def as_tensors(
    choices: Sequence[dict[str, Any]], shape: torch.Size, eos_id: int
) -> SampledResponses:
    """The server's choices as responses, padded with EOS to `shape` (B, R)."""
    ids = torch.full(shape, eos_id)
    mask, logprobs = torch.zeros(shape), torch.zeros(shape)
    for row, choice in enumerate(choices):
        tokens = choice["token_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        logprobs[row, : len(tokens)] = torch.tensor(choice["logprobs"]["token_logprobs"])
    return SampledResponses(ids, mask, logprobs)


def engine_without_server(cfg: Config) -> RolloutEngine:
    """What samples in other stages than online RL, which have no server."""
    if cfg.rollout.engine != RolloutEngine.vllm:
        return cfg.rollout.engine
    log.info("rollout.engine=vllm is for online RL: this stage samples with native")
    return RolloutEngine.native


@contextlib.contextmanager
def running_sampler(cfg: Config, run_dir: Path) -> Iterator[VllmSampler | None]:
    """What samples with rollout.engine=vllm, until the end of this context; None with others.

    Raises: UserError for a server that cannot be used, or that another run uses.
    """
    if cfg.rollout.engine != RolloutEngine.vllm:
        yield None
        return
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    server = VllmServer(cfg, run_dir / LOG, longest)
    if collectives.rank() != 0:
        yield VllmSampler(server, run_dir, None)
        return
    with contextlib.ExitStack() as held:
        if not server.is_own:
            held.enter_context(hold_url(server.url))
            server.check()
        held.callback(server.stop)
        yield VllmSampler(server, run_dir, held)
