"""The functions among a stage's rewards: as the configuration names them, and tried on real rows.

A pipeline tries them before its first stage (rlhf/rehearsal.py), and each process of a stage at its
start, before a model is loaded. No torch here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.base.log import log, plural
from rlhf.base.urls import shown_url
from rlhf.config.choices import OnError
from rlhf.config.schema import Config
from rlhf.config.stage_graph import function_sources, node_name
from rlhf.config.stage_nodes import RewardSource
from rlhf.data import encoding
from rlhf.data.records import Dataset, Prompt
from rlhf.rewards.batch import NOT_TRAINING, columns_of, make_batch, reference_in
from rlhf.rewards.functions import OF_THE_BATCH
from rlhf.rewards.process import ENDLESS, RewardProcess, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIED_ROWS = 4  # on which the functions are called before a model is loaded
TRUTHS = ("ground_truth", "reward_model", "answer")  # where functions.verl_arguments looks
SHORT_RESPONSE = "Yes."  # for prompts whose row has no answer
NO_LIMIT = 10**9  # tokens
REMOTE, JUDGE = "rlhf.rewards.remote:remote", "rlhf.rewards.judge:judge"


@contextlib.contextmanager
def running_functions(cfg: Config) -> Iterator[RewardProcess | None]:
    """The process of the functions among the sources, until the end of this context, where it ends
    with whatever they started; None where there are none.

    Raises: UserError naming the key, for one that cannot be imported or called.
    """
    node = node_name(cfg.stage.name)
    sources = function_sources(cfg, cfg.stage.name)
    specs = {name: spec_of(f"{node}.rewards.{name}", one) for name, one in sources.items()}
    process = RewardProcess(specs) if specs else None
    try:
        yield process
    finally:
        if process:
            process.close()


def spec_of(key: str, source: RewardSource) -> Spec:
    """A source as a python function: the user's, or ours that asks a server."""
    timeout, skip = source.timeout, source.on_error == OnError.skip
    if source.url:
        of_server = {"url": source.url, "timeout": timeout, **source.kwargs}
        return Spec(f"{key}.url={shown_url(source.url)}", REMOTE, of_server, ENDLESS, skip)
    if source.judge:
        endpoint = f"{key}.judge.endpoint={shown_url(source.judge.endpoint)}"
        of_judge = asdict(source.judge) | {"timeout": timeout} | source.kwargs
        del of_judge["pair_rubric"]  # of stage=eval's win rates
        return Spec(endpoint, JUDGE, of_judge, ENDLESS, skip)
    assert source.function is not None
    return Spec(f"{key}.function={source.function}", source.function, source.kwargs, timeout, skip)


def try_functions(
    process: RewardProcess | None, data: Dataset, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """Try the functions on held-out rows.

    Some rows of the data must have the columns that a function asks for. On at most TRIED_ROWS,
    spread over all held-out rows, the functions are called once, with the row's own answer as the
    response where it has one, else its reference.

    Args: tokenizer: of a policy, for the token ids of the responses.
    Returns: the number of rows on which the functions were called.
    Raises: UserError naming the key, and what is wrong.
    """
    prompts = data.eval_prompts
    if process is None or not prompts:
        return 0
    process.columns = column_names(data)
    check_columns(process, prompts)
    rows = prompts[:: -(-len(prompts) // TRIED_ROWS)]
    answers = {str(row.prompt): row.response for row in data.eval_sft}
    responses = [answers.get(str(row.turns)) or reference_in(row) or SHORT_RESPONSE for row in rows]
    ids = token_ids(responses, tokenizer)
    process.score(make_batch(rows, responses, ids, NOT_TRAINING, columns=process.columns))
    return len(rows)


def column_names(data: Dataset) -> set[str]:
    """The columns that any prompt of online RL or of the evaluation has."""
    names = {name for prompt in data.eval_prompts for name in columns_of(prompt)}
    if data.ppo:
        for part in data.ppo.select_columns(["columns"]).iter(1000):
            for row in part["columns"]:
                names.update(json.loads(row or "{}"))
    return names


def token_ids(
    responses: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """Token ids of responses that are not sampled, at least one for each.

    Without a tokenizer each word is a token; the same word has the same id.
    """
    if tokenizer is not None:
        return encoding.encode_responses(tokenizer, responses, NO_LIMIT)
    ids: dict[str, int] = {}
    return [[ids.setdefault(w, len(ids)) for w in text.split() or [""]] for text in responses]


def check_columns(process: RewardProcess, prompts: Sequence[Prompt]) -> None:
    """Compare the columns of the data with what the functions ask for.

    Raises: UserError for a parameter without a default value whose column no row of the data has.
    """
    rows = [columns_of(prompt) for prompt in prompts]
    names = process.columns
    for source, signature in process.signatures.items():
        key = process.specs[source].key
        for name in signature["columns"]:
            if name not in names:
                there = ", ".join(sorted(names)) or "none"
                raise UserError(
                    f"{key}: the function has a parameter {name}, and no row of online RL or of "
                    f"the evaluation has such a column (they have {there}): give it a default "
                    "value, or add the column to the data"
                )
            with_it = sum(name in row for row in rows)
            if with_it < len(rows):
                without = plural(len(rows) - with_it, "held-out row")
                log.info(f"{key}: {without} without a column {name}: the function gets None there")
        if signature["verl"] and not names & set(TRUTHS):
            raise UserError(
                f"{key}: a function of verl's kind compares with a ground truth, and the rows have "
                f"no column {', '.join(TRUTHS[:-1])} or {TRUTHS[-1]}: add one to the data"
            )
        check_names(key, signature, names)


def check_names(key: str, signature: dict[str, Any], names: set[str]) -> None:
    """Say which columns a function cannot get, as an argument of its own has their name."""
    hidden = sorted(names & set(OF_THE_BATCH))
    if hidden and (signature["all"] or set(hidden) & set(signature["parameters"])):
        log.info(
            f"{key}: the column {hidden[0]} is not given to the function, whose argument of this "
            "name is that of the responses; rename it in the data to use it"
        )
