"""What bench/run.py starts, each in a process of its own: it sets up, then works one sample at a time when it is told to.

A contestant's side of the talk, a line of JSON each way: "ready"; the driver answers "go", it works, and says the seconds and what it has
counted; and so on, until the driver says "stop" and it says its peak of memory. What libraries print goes to its log.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]
Turn = Callable[[Callable[[], dict[str, Any]]], None]
MARK = "\n\nAssistant:"  # ends the prompt
MiB = 2**20


def main(name: str, file: str) -> None:
    """Be the contestant `name` with the settings in `file`."""
    spec: Spec = json.loads(Path(file).read_text())
    spec["voice"] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ROLES[name](spec)


def say(spec: Spec, **what: Any) -> None:
    spec["voice"].write(json.dumps(what) + "\n")


def turns(spec: Spec, peer: str) -> Turn:
    """To be called after the imports and before any model. Returns what a contestant calls at the end of each piece of work: it reports
    (the first time that it is ready), and waits. Its argument says what was counted, and is not timed."""
    begin, state = memory("VmRSS"), {"started": 0.0}

    def turn(counted: Callable[[], dict[str, Any]]) -> None:
        seconds = time.perf_counter() - state["started"]
        found = counted()  # also that of getting ready: some count on from there
        say(spec, seconds=seconds, **found) if state["started"] else say(spec, ready=peer)
        if sys.stdin.readline().strip() != "go":
            say(spec, peak_mib=(memory("VmHWM") - begin) / MiB, imports_mib=begin / MiB)
            os._exit(0)
        state["started"] = time.perf_counter()

    return turn


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def read_batches(spec: Spec) -> list[list[Any]]:
    return json.loads(Path(spec["batches"]).read_text())


def forced_lengths(number: int, rows: int, longest: int) -> np.ndarray:
    """Tokens of the answers of PPO's iteration `number`, EOS included, uniform from 8 to `longest`; the same for all contestants."""
    return np.random.default_rng([number]).integers(min(8, longest), longest + 1, rows)


# ------------------------------------------------------------------------------------------------------------ models, data, machine


def assets(spec: Spec) -> None:
    """Writes into spec["out"] the tokenizer, policy and reward model that all contestants load, their batches of token ids, and the pairs
    that the product evaluates on; says the policy's shape."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    out, pairs = Path(spec["out"]), read_pairs(spec["pairs"])
    (out / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:2000]))
    tokenizer = own_tokenizer(spec["model"]) if spec["model"] else train_tokenizer(pairs)
    shapes = {}
    for name, vocabulary in spec["policies"].items():
        hf: Any = random_policy(vocabulary or len(tokenizer))
        if spec["model"]:
            hf = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
            if hf.get_input_embeddings().num_embeddings != len(tokenizer):
                hf.resize_token_embeddings(len(tokenizer))  # spare rows would stand behind EOS
        for settings in (hf.config, hf.generation_config):
            settings.pad_token_id, settings.eos_token_id, settings.bos_token_id = (
                tokenizer.pad_token_id,
                tokenizer.eos_token_id,
                None,
            )
        hf.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        shapes[name] = shape_of(hf)
    batches = make_batches(spec, tokenizer, pairs)
    (out / "batches.json").write_text(json.dumps(batches))
    with torch.no_grad():  # the product's answers end by a random number alone, see `product`
        first = batches[0][0]
        ids = torch.tensor([first if isinstance(first[0], int) else first[0] + first[1]])
        ends = float(
            hf.eval()(input_ids=ids).logits.double().softmax(-1)[..., tokenizer.eos_token_id].max()
        )
    assert tokenizer.eos_token_id == hf.get_input_embeddings().num_embeddings - 1 or any(
        spec["policies"].values()
    )
    assert ends < 1e-3, f"p(EOS) is {ends:.2g} somewhere: answers would end where they should not"
    if "policy" in spec["policies"]:
        scorer = AutoModelForSequenceClassification.from_pretrained(
            out / "policy", num_labels=1, dtype=torch.float32
        )
        torch.nn.init.normal_(scorer.score.weight, std=(scorer.score.weight.shape[1] + 1) ** -0.5)
        scorer.save_pretrained(out / "reward")
        tokenizer.save_pretrained(out / "reward")
    say(spec, shapes=shapes, p_eos=ends)


def read_pairs(file: str) -> list[dict[str, str]]:
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file) as lines:
        return [{key: row[key] for key in ("chosen", "rejected")} for row in map(json.loads, lines)]


def train_tokenizer(pairs: list[dict[str, str]], size: int = 8192) -> Any:
    """Byte-level BPE, with EOS as its last id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=["<pad>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator((pair["chosen"] for pair in pairs[:20_000]), how)
    bpe.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>")


def own_tokenizer(model: str) -> Any:
    """That of a model, with its last token as EOS and, where it has no other padding, the one before as that."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 2)
    return tokenizer


def random_policy(vocabulary: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "word_embed_proj_dim": 256,
        "num_hidden_layers": 4,
        "ffn_dim": 1024,
    }
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 1024, "vocab_size": vocabulary}
    return OPTForCausalLM(OPTConfig(**shape, dropout=0.0, attention_dropout=0.0))


def shape_of(hf: Any) -> dict[str, int]:
    """Numbers for `needed_flops`. `body`: weights that multiply each token, which those of embeddings and head do not."""
    config = hf.config
    outside = {
        id(module.weight) for module in (hf.get_input_embeddings(), hf.get_output_embeddings())
    }
    outside |= {id(p) for name, p in hf.named_parameters() if "embed" in name or "wpe" in name}
    body = sum(p.numel() for p in hf.parameters() if p.dim() == 2 and id(p) not in outside)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "body": body,
        "attention": config.num_hidden_layers * config.num_attention_heads * width,
        "head": hf.get_output_embeddings().weight.numel(),
        "parameters": sum(p.numel() for p in hf.parameters()),
    }


def make_batches(spec: Spec, tokenizer: Any, pairs: list[dict[str, str]]) -> list[list[Any]]:
    """Token ids, the same for all contestants: for ppo and generate of prompts; for sft [prompt, answer]; for rm [prompt, chosen,
    rejected]. The pairs begin anew where there are too few."""
    size, longest, eos = spec["batch"], spec["max_length"], tokenizer.eos_token_id
    random.Random(0).shuffle(pairs)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def rows() -> Iterator[Any]:
        for pair in pairs:
            cut = pair["chosen"].rfind(MARK) + len(MARK)
            prompt = ids(pair["chosen"][:cut])
            if spec["work"] in ("generate", "ppo", "ppo-eos", "processes"):
                if len(prompt) >= 16:
                    yield prompt[-spec["prompt"] :]
                continue
            if pair["rejected"][:cut] != pair["chosen"][:cut]:
                continue
            answers = [
                (ids(pair[key][cut:]) + [eos])[: longest // 2] for key in ("chosen", "rejected")
            ]
            prompt = prompt[-(longest - max(map(len, answers))) :]
            yield [prompt, *answers] if spec["work"] == "rm" else [prompt, answers[0]]

    stream = itertools.cycle(rows())
    return [list(itertools.islice(stream, size)) for _ in range(spec["batches_needed"])]


def limits(spec: Spec) -> None:
    """Says what this machine can do with so many threads: the rate of matrix products of the best of several shapes, GFLOP/s, in fp32 and
    bf16; and of reading memory, GB/s. Medians, as everything else."""
    import torch

    torch.set_num_threads(spec["threads"])

    def typical(work: Callable[[], Any]) -> float:
        """Seconds of a repetition."""
        times: list[float] = []
        end = time.perf_counter() + 1.5
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        for m, k, n in ((1024, 1024, 1024), (2048, 256, 1024), (2048, 768, 3072)):
            a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            rates.append(
                2e-9 * m * k * n / typical(lambda a=a, b=b: torch.nn.functional.linear(a, b))
            )  # type: ignore[misc]
        found[name] = max(rates)
    numbers = torch.ones(2**27)
    found["read"] = 4e-9 * numbers.numel() / typical(numbers.sum)
    say(spec, **found)


# ------------------------------------------------------------------------------------------------------------------ the product


class Rows(list):
    """Rows of token ids as rlhf.data.tokenized gives them; counts the tokens of those that were taken."""

    def __init__(self, rows: list[Any], tokens: Callable[[Any], int], lengths: list[int]):
        super().__init__(rows)
        self.tokens, self.lengths, self.taken = tokens, lengths, 0

    def __getitem__(self, i: Any) -> Any:
        row = super().__getitem__(i)
        self.taken += self.tokens(row)
        return row

    def __str__(self) -> str:
        return f"{len(self)} rows"


def product(spec: Spec) -> None:
    """A stage of the product as its worker runs it, with the batches of this benchmark. What is replaced: the rows, the end of a step,
    and the random numbers of the answers' lengths. EOS is the last id, and the sampler inverts the cumulative distribution: so the
    largest number below 1 gives EOS, and no number below 0.999 does, as EOS is not that likely."""
    from rlhf import worker

    worker.prepare_environment()
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        OPTForCausalLM,
    )

    from rlhf.config.loading import load_config
    from rlhf.data import tokenized
    from rlhf.data.batches import global_batches
    from rlhf.data.records import Turn as Said
    from rlhf.stages import (
        rl,
        sft,  # noqa: F401
    )
    from rlhf.training import checkpoint  # noqa: F401

    run_dir = Path(spec["run_dir"])
    cfg = load_config(run_dir / "config.yaml")
    flat = list(itertools.chain(*read_batches(spec)))
    if cfg.stage.name == "ppo":
        flat = [([Said("user", "")], prompt) for prompt in flat]
    order = list(
        itertools.chain(*global_batches(len(flat), spec["batch"], 1, cfg.seed))
    )  # the stage takes rows in this one
    placed = [row for _, row in sorted(zip(order, flat), key=lambda pair: pair[0])]
    tokens: dict[str, Callable[[Any], int]] = {
        "ppo": lambda row: len(row[1]),
        "sft": lambda row: len(row[0]) + len(row[1]),
        "rm": lambda row: 2 * len(row[0]) + len(row[1]) + len(row[2]),
    }
    longest = [
        len(row[1]) if cfg.stage.name == "ppo" else len(row[0]) + max(map(len, row[1:]))
        for row in placed
    ]
    rows = Rows(placed, tokens[cfg.stage.name], longest)
    for name in ("prompts", "pairs", "demonstrations"):
        setattr(tokenized, name, lambda *_, **__: rows)

    drawn = rl.uniforms

    def draws(stream: str, keys: Any, seed: int, step: int, n: int) -> Any:
        numbers = drawn(stream, keys, seed, step, n) * 0.999
        if spec["work"] == "ppo-eos":
            numbers[
                torch.arange(len(keys)), torch.from_numpy(forced_lengths(step, len(keys), n)) - 1
            ] = float(np.nextafter(1.0, 0.0))
        return numbers

    rl.uniforms = draws
    turn = turns(spec, "product")

    def counted() -> dict[str, Any]:
        logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        found = {"tokens": rows.taken}
        rows.taken = 0
        if cfg.stage.name == "ppo":
            found["tokens"] += round(logged["tokens/response_mean"] * spec["batch"])
            found |= {"rollout": logged["timing_s/rollout"], "update": logged["timing_s/update"]}
        return found

    def after(_: Any, step: int) -> None:
        turn(counted)

    checkpoint.Checkpoints.after = after  # type: ignore[method-assign, assignment]
    worker.main(run_dir)


def product_generate(spec: Spec) -> None:
    """The product's sampling loop alone."""
    from rlhf import worker

    worker.prepare_environment()
    import torch
    from transformers import AutoModelForCausalLM, OPTForCausalLM  # noqa: F401

    from rlhf.config.choices import Precision
    from rlhf.data.batches import pad_left, uniforms
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.sampling.sampler import sample
    from rlhf.sampling.token_choice import Sampling

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, "product")
    tokenizer = load_tokenizer(spec["policy"])
    policy = load_policy(spec["policy"], tokenizer, Precision[spec["precision"]]).eval()
    for step, prompts in enumerate(read_batches(spec)):
        draws = (
            uniforms("rollout", range(len(prompts)), 1, step, spec["new"]) * 0.999
        )  # no EOS, as in `product`
        ids, mask = pad_left(prompts, tokenizer.pad_token_id, torch.device("cpu"))
        answers = sample(policy, ids, mask, draws, tokenizer.eos_token_id, Sampling())[1]
        turn(lambda mask=mask, answers=answers: {"tokens": int(mask.sum() + answers.sum())})  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------------------- its peers


def transformers_generate(spec: Spec) -> None:
    """`generate` of transformers, by sampling from the full distribution."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM  # noqa: F401

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, f"transformers {transformers.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    hf = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=dtype_of(spec)).eval()
    hf.generation_config.eos_token_id = None
    for prompts in read_batches(spec):
        given = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        ids = hf.generate(
            **given,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=spec["new"],
            pad_token_id=tokenizer.pad_token_id,
        )
        new = ids.numel() - given["input_ids"].numel()
        turn(lambda given=given, new=new: {"tokens": int(given["attention_mask"].sum()) + new})  # type: ignore[misc]


def dtype_of(spec: Spec) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["precision"]]


def trl_settings(spec: Spec) -> dict[str, Any]:
    """What all of TRL's trainers are given."""
    return {
        "output_dir": spec["out"] + "/trl",
        "use_cpu": True,
        "bf16": spec["precision"] == "bf16",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }


def trl_ppo(spec: Spec) -> None:
    """One iteration of TRL's PPOTrainer. In bf16 all weights are, as the trainer computes in that of the models."""
    sys.path.insert(0, spec["trl_ppo"])
    import torch
    import transformers
    import trl  # type: ignore[import-not-found]
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LogitsProcessorList,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, f"trl {trl.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=dtype_of(spec)) for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            spec["reward"], num_labels=1, dtype=dtype_of(spec)
        )
        for _ in "rv"
    )
    ends = spec["work"] == "ppo-eos"
    calls, seen, generate = itertools.count(), {"tokens": 0}, policy.generate

    def counting_generate(**given: Any) -> Any:
        width, rows = given["input_ids"].shape[1], len(given["input_ids"])
        lengths = torch.from_numpy(forced_lengths(next(calls), rows, spec["new"]))

        def force(ids: Any, scores: Any) -> Any:
            scores[
                :, [tokenizer.eos_token_id, tokenizer.pad_token_id]
            ] = -torch.inf  # the trainer takes any padding for an end
            last = lengths == ids.shape[1] - width + 1
            scores[last] = -torch.inf
            scores[last, tokenizer.eos_token_id] = 0.0
            return scores

        found = generate(
            **given, **({"logits_processor": LogitsProcessorList([force])} if ends else {})
        )
        answers = found.sequences[:, width:]
        # with an EOS, up to the first one; else all that was sampled
        real = (
            (answers == tokenizer.eos_token_id).int().argmax(1).add(1).sum()
            if ends
            else answers.numel()
        )
        seen["tokens"] = int(given["attention_mask"].sum() + real)
        return found

    policy.generate = counting_generate

    class AtEnd(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn(lambda: dict(seen))

    batches = read_batches(spec)
    settings = PPOConfig(
        **trl_settings(spec),
        total_episodes=len(batches) * spec["batch"],
        local_rollout_forward_batch_size=spec["batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=spec["new"],
        stop_token="eos" if ends else None,
        missing_eos_penalty=None,
        kl_coef=0.1,
        temperature=1.0,
    )
    table = Dataset.from_list([{"input_ids": prompt} for prompt in itertools.chain(*batches)])
    trainer = PPOTrainer(
        settings, tokenizer, policy, reference, reward, table, value, callbacks=[AtEnd()]
    )
    # the trainer's own would shuffle
    trainer.dataloader = torch.utils.data.DataLoader(
        table, spec["batch"], collate_fn=trainer.data_collator
    )
    trainer.train()


def trl_trainer(spec: Spec) -> None:
    """One optimizer step of TRL's SFTTrainer (loss on the answers only) or RewardTrainer. In bf16 weights stay fp32, TRL's default."""
    sys.path.insert(0, spec["trl"])
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        OPTForCausalLM,
    )
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, f"trl {trl.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"])
    rows = list(itertools.chain(*read_batches(spec)))
    settings = trl_settings(spec) | {
        "num_train_epochs": 1,
        "max_length": spec["max_length"],
        "train_sampling_strategy": "sequential",
    }
    trainer: Any
    if spec["work"] == "rm":
        table = Dataset.from_list(
            [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows]
        )
        scorer = AutoModelForSequenceClassification.from_pretrained(
            spec["reward"], num_labels=1, dtype=torch.float32
        )
        trainer = RewardTrainer(
            model=scorer,
            args=RewardConfig(**settings),
            processing_class=tokenizer,
            train_dataset=table,
        )
    else:
        table = Dataset.from_list(
            [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in rows]
        )
        policy = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32)
        args = SFTConfig(**settings, completion_only_loss=True, shuffle_dataset=False)
        trainer = SFTTrainer(
            model=policy, args=args, processing_class=tokenizer, train_dataset=table
        )
    before = {"tokens": 0}

    def counted() -> dict[str, Any]:
        total = int(trainer._total_train_tokens)
        now, before["tokens"] = total - before["tokens"], total
        return {"tokens": now}

    class AtEnd(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn(counted)

    trainer.add_callback(AtEnd())
    trainer.train()


ROLES: dict[str, Callable[[Spec], None]] = {
    role.__name__: role
    for role in (
        assets,
        limits,
        product,
        product_generate,
        transformers_generate,
        trl_ppo,
        trl_trainer,
    )
}
