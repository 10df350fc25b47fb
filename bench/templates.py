"""Tokenizers x templates: does SFT see what the template writes, and learn to end a response?

    python bench/templates.py [--sample | --cells N] [--out DIR]

For small tokenizers built as eight model families have them, and each data.template, it runs
stage=sft on a tiny random model of the family and 64 short rows, once with all weights and once
with LoRA of rank 8, in this process. A cell of the table has

    equal, or N of 64 cross   the ids of prompt + response are those of the tokenizer for the text
                              of apply_chat_template; or that many responses begin inside a token
    full, LoRA                eval/eos_probability: the end token's probability after whole
                              held-out responses
    refused (N)               the line of that number below the table
    new: N                    tokens that the model had not learned; LoRA trains their rows

It ends with 1 where full training ends responses with a probability below 0.9 (`none`: 0.8), or a
run fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizer_families
from driver import ROOT, prepare_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(ROOT))
# a template, and the least probability of the end token after full training: with `none` some
# prompts stop inside a word
ENOUGH = {"hh": 0.9, "chatml": 0.9, "llama3": 0.9, "tokenizer": 0.9, "none": 0.8}
STYLES = tuple(ENOUGH)
SETTINGS = [
    "stage=sft",
    "data=jsonl",
    "data.shares=[1,0,0]",
    "data.eval_share=0.1",
    "data.workers=1",
    "data.max_prompt_tokens=160",
    "data.max_response_tokens=48",
    "sft.batch_size=16",
    "sft.epochs=40",
    "sft.max_steps=120",
    "sft.lr=5e-3",
    "actor=custom",
    "reward=custom",
    "deploy.threads=1",
    "checkpoint.every_minutes=null",
    "wandb.mode=disabled",
]
LORA = ["actor.lora.rank=8", "sft.lr=1e-2"]

# --- chat templates of the shape that the families' chat models have

CHATML = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
ASK_CHATML = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SYSTEM = (  # stands there where the conversation has none
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
WITH_SYSTEM = SYSTEM + "{% for m in messages %}{{ " + CHATML + " }}{% endfor %}" + ASK_CHATML
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN3 = (  # answers behind the last question show their thoughts, or that there are none
    "{% set q = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set q.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > q.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ " + CHATML + " }}{% endif %}{% endfor %}" + ASK_CHATML
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# --- the families


@dataclass(frozen=True)
class Family:
    """A tokenizer, its chat template, and the configuration of a tiny model."""

    build: Callable[[], Any]
    chat_template: str | None
    config: str
    tied: bool  # the output layer is the embedding


FAMILIES = {
    "llama": Family(tokenizer_families.llama2, LLAMA2, "LlamaConfig", False),
    "llama3": Family(tokenizer_families.llama3, LLAMA3, "LlamaConfig", False),
    "qwen2": Family(tokenizer_families.qwen2, WITH_SYSTEM, "Qwen2Config", True),
    "qwen3": Family(tokenizer_families.qwen3, QWEN3, "Qwen3Config", False),
    "gemma": Family(tokenizer_families.gemma, GEMMA, "Gemma3TextConfig", True),
    "opt": Family(tokenizer_families.opt, None, "OPTConfig", True),
    "gpt2": Family(tokenizer_families.gpt2, None, "GPT2Config", True),
    "smollm2": Family(tokenizer_families.smollm2, WITH_SYSTEM, "LlamaConfig", True),
}
SHAPES: dict[str, dict[str, Any]] = {
    "OPTConfig": {"word_embed_proj_dim": 64, "ffn_dim": 128, "init_std": 0.2},
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    "Gemma3TextConfig": {"head_dim": 32, "sliding_window": 64},
}
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def save_base(family: str, directory: Path) -> None:
    """Write the tokenizer and a random model of a family."""
    import torch
    import transformers

    kind = FAMILIES[family]
    tokenizer = kind.build()
    tokenizer.chat_template = kind.chat_template
    tokenizer.save_pretrained(directory)
    config = getattr(transformers, kind.config)(
        **COMMON | SHAPES.get(kind.config, {}),
        vocab_size=len(tokenizer),
        tie_word_embeddings=kind.tied,
        pad_token_id=None,  # else that row is zero, though it may be a mark that models know
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def rows() -> list[dict[str, str]]:
    """64 prompts with short responses; one of eight continues a word."""
    kinds = [
        ("What is {} plus 1?", "It is {}."),
        ("Where is the dog of house {}?", "(in the garden, {})."),
        ("Who has café {}?", "Zwölf – ☃ 日本, {}."),
        ("List {} strings", "one {}\n\n  two\nthree."),
        ("How is winter number {}?", "It's long {}, don't worry."),
        ("Say fern {}:", "fern {}."),
        ("Is {} enough?", "A {} is enough."),
        ("In room {} an an", "swer {}."),
    ]
    return [
        {"prompt": prompt.format(i), "response": response.format(i)}
        for i in range(8)
        for prompt, response in kinds
    ]


# --- a cell


@dataclass(frozen=True)
class Cell:
    """What a run of one tokenizer, template and way of training has shown."""

    ids: str = ""  # equal, or how many responses begin inside a token
    ends: float = 0.0  # eval/eos_probability
    new: int = 0  # tokens whose rows LoRA trains
    problem: str = ""  # the line of a refusal, or of a failure
    refused: bool = False


def run_cell(folder: Path, family: str, style: str, lora: bool) -> Cell:
    """Run stage=sft in this process, which has a process group.

    Args: folder: for bases, data and runs.
    """
    import torch

    from rlhf.base.errors import UserError
    from rlhf.config.loading import load_config
    from rlhf.worker import run_stage

    base, data = folder / family, folder / "rows.jsonl"
    if not base.exists():
        save_base(family, base)
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    run_dir = folder / f"run-{family}-{style}-{'lora' if lora else 'full'}"
    given = [f"actor.path={base}", f"reward.path={base}", f"data.sources.mine.path={data}"]
    given += [f"data.template={style}", f"root={folder}", *(LORA if lora else [])]
    try:
        prepare_run(run_dir, SETTINGS + given)
        cfg = load_config(run_dir / "config.yaml")
        torch.manual_seed(cfg.seed)
        ends = run_stage(cfg, run_dir)["eval/eos_probability"]
        return Cell(compare_ids(run_dir / "model"), ends, new_rows(run_dir / "model"))
    except (UserError, SystemExit) as error:
        return Cell(problem=str(error).replace(str(base), family), refused=True)


def compare_ids(model: Path) -> str:
    """Compare the rows' ids with what transformers makes of them with the saved tokenizer."""
    from transformers import AutoTokenizer

    from rlhf.data.records import Turn
    from rlhf.data.template_check import is_same

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    all_rows = rows()
    crossing = sum(
        not is_same(tokenizer, [Turn("user", row["prompt"])], Turn("assistant", row["response"]))
        for row in all_rows
    )
    return f"{crossing} of {len(all_rows)} cross" if crossing else "equal"


def new_rows(model: Path) -> int:
    """The number of tokens whose rows the adapter of a saved model has."""
    file = model / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    ids = settings.get("trainable_token_indices") or []
    return len(next(iter(ids.values())) if isinstance(ids, dict) else ids)


# --- the table


def table(results: dict[tuple[str, str], tuple[Cell, Cell]]) -> str:
    """A row per tokenizer, a column per template; then the lines of what was refused."""
    problems: list[str] = []
    lines = ["| tokenizer | " + " | ".join(f"`{style}`" for style in STYLES) + " |"]
    lines.append("|---|" + "---|" * len(STYLES))
    for family in dict.fromkeys(family for family, _ in results):
        cells = []
        for style in STYLES:
            pair = results.get((family, style))
            cells.append("" if pair is None else text_of(*pair, problems))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{n}. `{line}`" for n, line in enumerate(problems, 1))])


def text_of(full: Cell, lora: Cell, problems: list[str]) -> str:
    """Full training and LoRA as one cell. Args: problems: lines so far; a new one is added."""
    for cell in (full, lora):
        if cell.problem:
            if cell.problem not in problems:
                problems.append(cell.problem)
            word = "refused" if cell.refused else "failed"
            return f"{word} ({problems.index(cell.problem) + 1})"
    ids = full.ids if full.ids == lora.ids else f"{full.ids}, with LoRA {lora.ids}"
    new = f", new: {lora.new}" if lora.new else ""
    return f"{ids}; {full.ends:.2f}, {lora.ends:.2f}{new}"


def begin() -> None:
    """Make this process a group of one, as a worker is."""
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    from rlhf.worker import prepare_environment

    prepare_environment()
    import torch
    from transformers.utils import logging as transformers_logging

    from rlhf.distributed.engine import init_distributed

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    init_distributed()


def main() -> int:
    """Exit code 1 where a run failed, or full training does not end responses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, metavar="N", help="the first N cells only")
    parser.add_argument("--sample", action="store_true", help="one template for each tokenizer")
    parser.add_argument("--out", type=Path, help="a new folder for bases, data and runs")
    args = parser.parse_args()
    begin()
    out = args.out or Path(tempfile.mkdtemp(prefix="bench-templates-"))
    out.mkdir(parents=True, exist_ok=True)
    cells = [(family, style) for family in FAMILIES for style in STYLES]
    if args.sample:
        cells = [(family, STYLES[3 * i % len(STYLES)]) for i, family in enumerate(FAMILIES)]
    results = {}
    for family, style in cells[: args.cells]:
        started = time.time()
        one = functools.partial(run_cell, out.resolve(), family, style)
        results[family, style] = full, lora = one(lora=False), one(lora=True)
        took = f"{time.time() - started:.1f} s"
        print(f"{family} {style}: {text_of(full, lora, [])}, {took}", file=sys.stderr, flush=True)
    print(table(results))
    wrong = [
        full.ends < ENOUGH[style] if not full.problem else not full.refused
        for (_, style), (full, _) in results.items()
    ]
    return int(any(wrong))


if __name__ == "__main__":
    sys.exit(main())
