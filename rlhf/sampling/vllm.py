"""Sample through a vLLM server: rollout.engine=vllm.

The server gets the policy's weights as safetensors in a folder that both can read, after each
update. Whether it computes with them is checked by log-probs of some tokens, before it samples.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.files import private_folder, remove
from rlhf.base.log import announced, log
from rlhf.config.choices import Device, Precision, RolloutEngine
from rlhf.config.schema import Config
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine
from rlhf.models.loading import full_state_dict
from rlhf.models.token_rows import output_layer
from rlhf.models.wrappers import Policy
from rlhf.runs.locks import try_lock
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm_server import LOG, ServerError, VllmServer, hold_url

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED_MEMORY = Path("/dev/shm")
CHECKED = 4  # prompts whose log-probs are compared
# Mean difference of log-probs from those of the training forward pass, nats: fp32 rounding is 1e-6,
# an update 1e-3 and more; in 16 bits a smaller difference does not show
LIMIT = {p: 1e-4 if p == Precision.fp32 else 0.05 for p in Precision}
LOCK = "lock"  # in a run's folder of weights, held until the run ends
NEW = 60.0  # seconds in which a folder's lock may not be there yet


class VllmSampler:
    """Samples responses from the policy that a training engine has now.

    Args: held: on the first rank, which writes the weights: what is released when the run ends.
    """

    def __init__(self, server: VllmServer, run_dir: Path, held: contextlib.ExitStack | None):
        self.server, self.run_dir, self.held = server, run_dir, held
        self.folder: Path | None = None  # of the weights
        self.model: Path | None = None  # the weights that the server has
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
        started once more with the same weights.

        Args: random: (B, R); the first number of a row is the seed of its response.
        Returns: tensors in host memory.
        Raises: UserError where the server fails again, or does not take the weights.
        """
        rows = [ids[mask > 0].tolist() for ids, mask in zip(prompts.ids, prompts.mask)]
        requests = [
            completion_request(ids, numbers, tokenizer.eos_token_id, sampling)
            for ids, numbers in zip(rows, random)
        ]
        self.bring_weights(actor, tokenizer, rows)
        answers: list[dict[str, Any]] = []
        problem = ""
        try:
            answers = self.server.complete(requests)
        except ServerError as error:
            problem = str(error)
        if problem := next(filter(None, collectives.all_gather_objects(problem)), ""):
            self.replace_server(problem, actor, rows)
            answers = self.server.complete(requests)
        return as_tensors(answers, random.shape, tokenizer.eos_token_id)

    def bring_weights(
        self,
        actor: Engine[Policy],
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Sequence[int]],
    ) -> None:
        """Give the server the policy's weights, unless it has them."""
        if self.steps == actor.global_steps:
            return
        weights, _ = full_state_dict(actor.module.hf)
        expected = self.expected_logprobs(actor, rows)
        if self.held is not None:
            if self.folder is None:
                size = sum(w.numel() * w.element_size() for w in weights.values())
                place = weights_folder(self.server.cfg, self.run_dir, size)
                self.folder = self.held.enter_context(place)
            before, self.model = self.model, self.folder / f"step-{actor.global_steps}"
            untie = self.server.is_own and self.server.cfg.deploy.device == Device.cpu
            with announced("writing the weights for vLLM"), watchdog.while_files_move():
                write_model(actor.module.hf, weights, tokenizer, self.model, untie)
            self.renew(expected)
            if before is not None and before != self.model:
                remove(before)
        self.steps = actor.global_steps
        self.share_url()

    def replace_server(
        self, problem: str, actor: Engine[Policy], rows: Sequence[Sequence[int]]
    ) -> None:
        """Start a server that has died while it sampled. Raises: UserError where it cannot be."""
        expected = self.expected_logprobs(actor, rows)
        if self.held is not None:
            self.restart(problem, expected)
        self.share_url()

    def renew(self, expected: list[tuple[Sequence[int], list[float]]]) -> None:
        """Let the server take the weights in `self.model`, and start it where it does not run."""
        assert self.model
        if self.server.is_own and self.server.process is None:
            self.server.start(self.model)
            self.check(expected)
            return
        try:
            self.server.load(self.model)
            self.check(expected)
        except ServerError as error:
            self.restart(str(error), expected)

    def restart(self, problem: str, expected: list[tuple[Sequence[int], list[float]]]) -> None:
        """Start a server that has died. Raises: UserError where it has not, or is not ours."""
        assert self.model
        if not self.server.is_own or self.server.is_healthy():
            raise UserError(problem)
        log.warning(f"the vLLM server has died and is started again: {problem}")
        self.server.start(self.model)
        self.check(expected)

    def share_url(self) -> None:
        """Tell all ranks where the server of the first one is; they wait while it starts."""
        collectives.barrier()
        self.server.url = collectives.all_gather_objects(self.server.url)[0]

    @torch.no_grad()
    def expected_logprobs(
        self, actor: Engine[Policy], rows: Sequence[Sequence[int]]
    ) -> list[tuple[Sequence[int], list[float]]]:
        """Some rows of tokens, and the log-prob of each token after the first as training has it.

        All ranks call this together.
        """
        found = []
        for ids in sorted(rows, key=len)[-CHECKED:]:
            tokens = torch.tensor([ids])
            targets = torch.ones_like(tokens, dtype=torch.bool)
            targets[:, 0] = False
            stats = actor(tokens, torch.ones_like(tokens), targets)
            found.append((ids, stats.logprobs[0, 1:].tolist()))
        return found

    def check(self, expected: list[tuple[Sequence[int], list[float]]]) -> None:
        """Compare the server's log-probs with those of training; reload the weights once.

        Raises: UserError where they differ all the same.
        """
        assert self.model
        limit = LIMIT[self.server.cfg.deploy.precision]
        for tries in (1, 2):
            gap = self.difference(expected)
            if gap <= limit:
                return
            if tries == 1:
                log.warning(
                    f"{self.server.key}: its log-probs differ by {gap:.2g} nats from those of the "
                    f"policy, more than {limit:g}: the weights are loaded once more"
                )
                self.server.load(self.model)
        raise UserError(
            f"{self.server.key}: the server computes with other weights than the policy's: its "
            f"log-probs differ by {gap:.2g} nats on average, allowed {limit:g}. It must read "
            f"{self.folder}, have --dtype as deploy.precision, and belong to this run alone; "
            "on a CPU it cannot renew tied embeddings unless the run starts it "
            "(rollout.vllm.command)"
        )

    def difference(self, expected: list[tuple[Sequence[int], list[float]]]) -> float:
        """Mean of abs(log-prob of the server - that of training), nats."""
        requests = [
            {"model": None, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
            for ids, _ in expected
        ]
        gaps = []
        for (ids, ours), answer in zip(expected, self.server.complete(requests)):
            theirs = answer["choices"][0]["prompt_logprobs"][1:]
            gaps += [
                abs(found[str(token)]["logprob"] - own)
                for token, found, own in zip(ids[1:], theirs, ours)
            ]
        return sum(gaps) / max(1, len(gaps))


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
    answers: Sequence[dict[str, Any]], shape: torch.Size, eos_id: int
) -> SampledResponses:
    """The answers as responses, padded with EOS to `shape` (B, R)."""
    ids = torch.full(shape, eos_id)
    mask, logprobs = torch.zeros(shape), torch.zeros(shape)
    for row, answer in enumerate(answers):
        choice = answer["choices"][0]
        tokens = choice["token_ids"]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        logprobs[row, : len(tokens)] = torch.tensor(choice["logprobs"]["token_logprobs"])
    return SampledResponses(ids, mask, logprobs)


def write_model(
    hf: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    untie: bool,
) -> None:
    """Write a model as vLLM loads it.

    Args:
        weights: all of them, an adapter merged (loading.full_state_dict).
        untie: give the output layer weights of its own: on a CPU vLLM packs a layer's weights, and
            packs those of a tied one only when it starts.
    """
    remove(folder)
    config = hf.config.get_text_config()
    tied, embeddings, output = (
        config.tie_word_embeddings,
        hf.get_input_embeddings(),
        output_layer(hf),
    )
    try:
        if untie and tied and output is not None:
            names = {id(module): name for name, module in hf.named_modules()}
            copied = weights[f"{names[id(embeddings)]}.weight"].clone()
            weights = weights | {f"{names[id(output)]}.weight": copied}
            config.tie_word_embeddings = False
        hf.save_pretrained(folder, state_dict=weights)
    finally:
        config.tie_word_embeddings = tied
    tokenizer.save_pretrained(folder)


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


@contextlib.contextmanager
def weights_folder(cfg: Config, run_dir: Path, size: int) -> Iterator[Path]:
    """A new folder for a run's weights, which is deleted at the end of this context.

    What killed runs have left beside it is deleted, too: it would fill the memory.

    Args: size: of the weights, bytes; there are two versions for a moment.
    """
    given = cfg.rollout.vllm.weights_dir
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2.5 * size
    base = Path(given or (SHARED_MEMORY if has_room else run_dir)).absolute()
    folder = base / f"rlhf-vllm-{os.getuid()}" / f"{run_dir.name}-{os.getpid()}"
    try:
        if given:  # the server may be another user's
            folder.parent.mkdir(parents=True, exist_ok=True)
        else:
            private_folder(folder.parent)
        remove_left_folders(folder.parent)
        folder.mkdir()
    except OSError as error:
        raise UserError(
            f"rollout.vllm.weights_dir={given or 'null'}: no weights can be written to {base} "
            f"({error.strerror or error}): give another folder that both can use"
        ) from None
    with try_lock(folder / LOCK):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left_folders(everyone: Path) -> None:
    """Delete the folders of runs that have ended without doing so."""
    for other in everyone.iterdir():
        with contextlib.suppress(OSError):  # another run deletes it, too
            if other.is_dir() and time.time() - other.stat().st_mtime > NEW:
                with try_lock(other / LOCK) as is_free:
                    if is_free:
                        shutil.rmtree(other, ignore_errors=True)
