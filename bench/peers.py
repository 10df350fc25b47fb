"""The contestants that are not the product: transformers and TRL."""

from __future__ import annotations

import itertools
import sys
from typing import Any

from protocol import Spec, forced_lengths, read_batches, turns


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
