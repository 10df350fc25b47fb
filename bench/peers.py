"""The contestants that are not the product: transformers and TRL."""

from __future__ import annotations

import itertools
import math
import sys
from typing import TYPE_CHECKING, Any

from protocol import Spec, forced_lengths, read_batches, turns

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.utils import GenerateOutput


def transformers_generate(spec: Spec) -> None:
    """`generate` of transformers, by sampling from the full distribution."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM  # noqa: F401

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, f"transformers {transformers.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    hf = AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=dtype_of(spec)).eval()
    hf.to(spec["device"])
    hf.generation_config.eos_token_id = None
    for prompts in read_batches(spec):
        given = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(spec["device"])
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


def dtype_of(spec: Spec) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["precision"]]


def trl_settings(spec: Spec) -> dict[str, Any]:
    """What all of TRL's trainers are given."""
    return {
        "output_dir": spec["out"] + "/trl",
        "use_cpu": spec["device"] == "cpu",
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


class ForcedLengths:
    """A logits processor that ends each response with EOS after a given number of tokens."""

    def __init__(self, lengths: torch.Tensor, width: int, eos_id: int, pad_id: int):
        self.lengths, self.width, self.eos_id, self.pad_id = lengths, width, eos_id, pad_id

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, [self.eos_id, self.pad_id]] = -math.inf  # the trainer takes padding for an end
        last = self.lengths == ids.shape[1] - self.width + 1
        scores[last] = -math.inf
        scores[last, self.eos_id] = 0.0
        return scores


class CountingGenerate:
    """A model's `generate` that counts real tokens; for ppo-eos it forces the lengths."""

    def __init__(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: Spec, forced: bool
    ):
        self.generate, self.tokenizer = policy.generate, tokenizer
        self.longest, self.forced = spec["new"], forced
        self.calls, self.tokens = itertools.count(), 0

    def __call__(self, **arguments: Any) -> GenerateOutput:
        import torch
        from transformers import LogitsProcessorList

        rows, width = arguments["input_ids"].shape
        lengths = torch.from_numpy(forced_lengths(next(self.calls), rows, self.longest))
        lengths = lengths.to(arguments["input_ids"].device)
        eos_id, pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        if self.forced:
            processor = ForcedLengths(lengths, width, eos_id, pad_id)
            arguments["logits_processor"] = LogitsProcessorList([processor])
        generated = self.generate(**arguments)
        responses = generated.sequences[:, width:]
        # with an EOS, up to the first one; else all that was sampled
        real = responses.numel()
        if self.forced:
            real = int((responses == eos_id).int().argmax(1).add(1).sum())
        self.tokens = int(arguments["attention_mask"].sum() + real)
        return generated


def trl_ppo(spec: Spec) -> None:
    """One iteration of TRL's PPOTrainer.

    In bf16 all weights are bf16, as the trainer computes in the models' precision.
    """
    sys.path.insert(0, spec["trl_ppo"])
    import torch
    import transformers
    import trl  # type: ignore[import-not-found]
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, f"trl {trl.__version__}")
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    precision = {"dtype": dtype_of(spec)}
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(spec["policy"], **precision) for _ in range(2)
    )
    scorer = AutoModelForSequenceClassification
    reward, value = (
        scorer.from_pretrained(spec["reward"], num_labels=1, **precision) for _ in range(2)
    )
    forced = spec["work"] == "ppo-eos"
    generate = CountingGenerate(policy, tokenizer, spec, forced)
    policy.generate = generate

    class AtEnd(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn(lambda: {"tokens": generate.tokens})

    batches = read_batches(spec)
    settings = PPOConfig(
        **trl_settings(spec),
        total_episodes=len(batches) * spec["batch"],
        local_rollout_forward_batch_size=spec["batch"],
        num_mini_batches=1,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=spec["new"],
        stop_token="eos" if forced else None,
        missing_eos_penalty=None,
        kl_coef=0.1,
        temperature=1.0,
    )
    table = Dataset.from_list([{"input_ids": prompt} for prompt in itertools.chain(*batches)])
    models = (policy, reference, reward, table, value)
    trainer = PPOTrainer(settings, tokenizer, *models, callbacks=[AtEnd()])
    loader = torch.utils.data.DataLoader
    # the trainer's own data loader would shuffle
    trainer.dataloader = loader(table, spec["batch"], collate_fn=trainer.data_collator)
    trainer.train()


def tokenized(spec: Spec) -> list[dict[str, list[int]]]:
    """The rows of all batches, with the columns that TRL's SFTTrainer or RewardTrainer reads."""
    rows = itertools.chain(*read_batches(spec))
    if spec["work"] == "rm":
        return [{"chosen_ids": p + c, "rejected_ids": p + r} for p, c, r in rows]
    return [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in rows]


def trl_trainer(spec: Spec) -> None:
    """One optimizer step of TRL's SFTTrainer (loss on the responses only) or RewardTrainer.

    In bf16 weights stay fp32, TRL's default.
    """
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
    table = Dataset.from_list(tokenized(spec))
    settings = trl_settings(spec) | {
        "num_train_epochs": 1,
        "max_length": spec["max_length"],
        "train_sampling_strategy": "sequential",
    }
    trainer: Any
    if spec["work"] == "rm":
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
