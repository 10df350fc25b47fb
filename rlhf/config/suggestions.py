"""What a wrong key or option may mean: the closest match, names of earlier versions and of other
frameworks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from rlhf.config.keys import find_key, schema

DATA_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".gz")
MOST_GUESSES = 5  # keys or options that one wrong name may mean
SYNONYMS = {"reward": "rm", "rewardmodel": "rm"}  # stages, as others call them

# keys and groups that had another name in earlier versions, by the longest prefix that fits
OLD_RL_KEYS = {
    "critic_optim": "rl.critic",
    "critic_warmup": "rl.critic.warmup_rollouts",
    "value_clip": "rl.critic.value_clip",
    "lam": "rl.gae_lambda",
    "whiten_advantages": "rl.normalize",
    "normalize_std": "rl.normalize",
    "kl.place": "rl.kl.applied_to",
    "clip": "rl.clip_low",
    "loss_over": "rl.loss_aggregation",
}
OLD_RL_NODES = ("ppo", "rloo", "grpo", "online")
RENAMED = {
    "exp": "experiment_name",
    "deploy.gpus": "deploy.processes_per_node",
    "data.path": "data.sources.mine.path",  # never a name, but often typed
    "sft.train_on_prompt": "sft.train_on",
    **{f"{node}.{key}": new for node in OLD_RL_NODES for key, new in OLD_RL_KEYS.items()},
    **{node: "rl" for node in OLD_RL_NODES},
}
NOW = {  # what else has changed of a renamed key
    "rl.batch_size": ", which counts responses",
    "sft.train_on": "=everything in place of true, and sft.train_on=last in place of false",
}
# names that TRL, transformers, OpenRLHF, verl and DeepSpeed-Chat use
FOREIGN = {
    "learning_rate": "lr",
    "actor_learning_rate": "rl.lr",
    "critic_learning_rate": "rl.critic.lr",
    "lr_scheduler_type": "schedule",
    "num_warmup_steps": "warmup_steps",
    "num_train_epochs": "epochs",
    "total_epochs": "epochs",
    "warmup_steps_ratio": "warmup_ratio",
    "max_grad_norm": "grad_clip",
    "adam_epsilon": "adam_eps",
    "train_batch_size": "batch_size",
    "rollout_batch_size": "rl.batch_size",
    "model": "actor",
    "model_name": "actor",
    "policy": "actor",
    "reward_model": "reward",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "data_path": "data.sources.mine.path",
    "train_file": "data.sources.mine.path",
    "data_split": "data.shares",
    "test_size": "data.eval_share",
    "chat_template": "data.template",
    "algorithm": "pipeline",
    "reward_funcs": "rl.rewards",
    "output_dir": "root",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "rl.evaluation.every",
    "nproc_per_node": "deploy.processes_per_node",
    "dtype": "deploy.precision",
    "torch_dtype": "deploy.precision",
    "per_device_train_batch_size": "deploy.micro_batch",
    "micro_train_batch_size": "deploy.micro_batch",
    "per_device_eval_batch_size": "deploy.eval_micro_batch",
    "gradient_accumulation_steps": "deploy.micro_batch",
    "gradient_checkpointing": "deploy.activation_checkpointing",
    "bf16": "deploy.precision",
    "fp16": "deploy.precision",
    "gpus": "deploy.processes_per_node",
    "n_gpus_per_node": "deploy.processes_per_node",
    "num_gpus": "deploy.processes_per_node",
    "nnodes": "deploy.nodes",
    "init_kl_coef": "rl.kl.coef",
    "kl_loss_coef": "rl.kl.coef",
    "kl_target": "rl.kl.target",
    "kl_penalty": "rl.kl.estimator",
    "beta": "rl.kl.coef",
    "entropy_coeff": "rl.entropy_coef",
    "kl_coef": "rl.kl.coef",
    "cliprange": "rl.clip_low",
    "clip_ratio": "rl.clip_low",
    "epsilon": "rl.clip_low",
    "epsilon_high": "rl.clip_high",
    "cliprange_value": "rl.critic.value_clip",
    "lam": "rl.gae_lambda",
    "lambd": "rl.gae_lambda",
    "n_samples_per_prompt": "rl.responses_per_prompt",
    "num_generations": "rl.responses_per_prompt",
    "rollout_n": "rl.responses_per_prompt",
    "num_ppo_epochs": "rl.epochs",
    "ppo_epochs": "rl.epochs",
    "num_mini_batches": "rl.minibatches",
    "adv_estimator": "rl.advantage",
    "advantage_estimator": "rl.advantage",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_prompt_seq_len": "data.max_prompt_tokens",
    "max_answer_seq_len": "data.max_response_tokens",
    "max_length": "data.max_response_tokens",
    "max_seq_length": "data.max_response_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "response_length": "rollout.max_new_tokens",
    "model_name_or_path": "actor.path",
    "reward_model_path": "reward.path",
    "lora_r": "actor.lora.rank",
    "lora_rank": "actor.lora.rank",
    "lora_dim": "actor.lora.rank",
    "lora_dropout": "actor.lora.dropout",
    "target_modules": "actor.lora.targets",
    "lora_alpha": "actor.lora.alpha",
    "run_name": "experiment_name",
    "report_to": "wandb.mode",
    "random_seed": "seed",
}


def with_suggestion(key: str) -> str:
    """`key` with the closest match: "rl.lrr (did you mean rl.lr?)".

    Upper case and dashes do not matter. A name without its node gets all nodes that have it.
    """
    plain = key.lower().replace("-", "_")
    for guesses in (renamed, in_dictionary, ending, foreign, near):
        if guess := guesses(plain):
            return f"{key} (did you mean {guess}?)"
    nodes = [
        name for name in (plain.rpartition(".")[0], plain.partition(".")[0]) if name in schema()
    ]
    return f"{key} (see python train.py --help{''.join(f' {node}' for node in nodes[:1])})"


def in_dictionary(key: str) -> str | None:
    """The key inside a dictionary that is spelled a little otherwise: data.source.NAME.path."""
    first, _, rest = key.partition(".")
    node, _, inside = rest.partition(".")
    names = [name for name, one in schema().items() if one.is_dictionary and name.count(".") == 1]
    for name in difflib.get_close_matches(f"{first}.{node}", names, n=1, cutoff=0.8):
        if find_key(f"{name}.{inside}"):
            return f"{name}.{inside}"
    return None


def ending(key: str) -> str | None:
    """The keys of the schema that end with `key`: those in the fewest nodes, "sft.lr or rl.lr"."""
    names = [name for name in schema() if f".{name}".endswith(f".{key}") and "*" not in name]
    names.sort(key=lambda name: name.startswith("rl."))  # the stages in their order
    depth = min((name.count(".") for name in names), default=0)
    return any_of([name for name in names if name.count(".") == depth][:MOST_GUESSES])


def near(key: str) -> str | None:
    """The key that is spelled most alike: of the same node where there is one."""
    node, _, leaf = key.rpartition(".")
    if (found := find_key(node)) and found.is_node:
        inside = {
            name.rpartition(".")[2]: name
            for name in schema()
            if name.rpartition(".")[0] == found.name
        }
        guesses = difflib.get_close_matches(leaf, list(inside), n=1)
        return f"{node}.{guesses[0]}" if guesses else None
    leaves = sorted({name.rpartition(".")[2] for name in schema()} - {"*"})
    same_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=1.0 if node else 0.7)
    guesses = difflib.get_close_matches(key, list(schema()), n=1)
    return ending(same_leaf[0]) if same_leaf else next(iter(guesses), None)


def no_option(group: str, word: str, options: Sequence[str]) -> str:
    """The line about a word that is no option of a group: the closest one, or how to give a file
    or model of one's own."""
    line = f"{group}={word}: no such option"
    if group in ("actor", "reward") and "/" in word:
        return f"{line}; a path or hub id: {group}=custom {group}.path={word}"
    if group == "data" and ("/" in word or word.endswith(DATA_ENDINGS)):
        return f"{line}; a file or hub id: data=jsonl data.sources.mine.path={word}"
    more = "; a file of yours: --config-dir FOLDER" if group in ("experiment", "sweep") else ""
    return line + closest(word, options) + more


def closest(word: str, options: Sequence[str]) -> str:
    """The options most like a word, for a message; all of them where none is.

    Upper case, dashes and underscores do not matter.
    """
    plain = {squeezed(option): option for option in options}
    word = SYNONYMS.get(squeezed(word), squeezed(word))
    if word in plain:
        return f" (did you mean {plain[word]}?)"
    if len(word) > 2 and (parts := [option for name, option in plain.items() if word in name]):
        return f" (did you mean {any_of(parts[:MOST_GUESSES])}?)"
    near = difflib.get_close_matches(word, list(plain), n=1)
    return f" (did you mean {plain[near[0]]}?)" if near else f"; choose from {', '.join(options)}"


def squeezed(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def any_of(names: list[str]) -> str | None:
    """`a, b or c`; None of no names."""
    if not names:
        return None
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def renamed(key: str) -> str | None:
    """The present name of a key of an earlier version; None where it never had another one."""
    parts = key.split(".")
    for size in range(len(parts), 0, -1):
        if new := RENAMED.get(".".join(parts[:size])):
            name = ".".join([new, *parts[size:]])
            if not find_key(name):
                return foreign(name) or near(name) or longest_known(name)
            return name + NOW.get(name, "")
    return None


def longest_known(key: str) -> str:
    """The node of the schema that an unknown key would be in."""
    while not find_key(key):
        key = key.rpartition(".")[0]
    return key


def foreign(key: str) -> str | None:
    """Our name for a key that other frameworks use; None where it is not known."""
    *prefix, leaf = key.split(".")
    name = FOREIGN.get(leaf.lower())
    if name is None:
        return None
    if "." in name or find_key(name):
        return name
    mine = ".".join([*prefix, name])
    return mine if prefix and find_key(mine) else ending(name)
