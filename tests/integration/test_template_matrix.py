"""bench/templates.py: one cell of each kind, and all of them in make test-all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import templates
from helpers import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.choices import Template
from rlhf.data.encoding import encode_demonstrations
from rlhf.data.records import Demonstration, Turn
from rlhf.data.template import install_chat_template


def test_whole_words_are_equal_and_full_training_ends_responses(
    tmp_path: Path, one_process: None
) -> None:
    cell = templates.run_cell(tmp_path, "qwen3", "tokenizer", lora=False)
    assert cell.ids == "equal" and cell.ends > templates.ENOUGH["tokenizer"] and not cell.new
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run-qwen3-tokenizer-full" / "model")
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    assert "<think>\n\n</think>\n\nTwo." in tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.full
def test_responses_that_begin_inside_a_token_are_counted(tmp_path: Path, one_process: None) -> None:
    """Independently: the ids of the joined text against those of its two parts."""
    cell = templates.run_cell(tmp_path, "gpt2", "none", lora=False)
    tokenizer = templates.FAMILIES["gpt2"].build()
    crossing = 0
    for row in templates.rows():
        parts = [tokenizer(text).input_ids for text in (row["prompt"], row["response"])]
        crossing += tokenizer(row["prompt"] + row["response"]).input_ids != sum(parts, [])
    assert cell.ids == f"{crossing} of 64 cross" and 0 < crossing < 64
    assert cell.ends > 0.9


def test_a_tokenizer_without_a_template_is_refused_in_one_line(
    tmp_path: Path, one_process: None
) -> None:
    cell = templates.run_cell(tmp_path, "opt", "tokenizer", lora=True)
    assert cell.refused and cell.problem == (
        "actor.path=opt: it has no chat template, which data.template=tokenizer needs: choose "
        "data.template=hh, chatml, llama3 or none"
    )
    assert templates.text_of(cell, cell, problems := []) == "refused (1)"
    assert problems == [cell.problem]
    data = tmp_path / "rows.jsonl"
    command = [*templates.SETTINGS, f"data.sources.mine.path={data}", "data.template=tokenizer"]
    done = train(*command, f"actor.path={tmp_path / 'opt'}", "reward.path=none", cwd=tmp_path)
    said = [line for line in done.stderr.splitlines() if "has no chat template" in line]
    assert done.returncode != 0 and len(said) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.full)])
def test_lora_learns_new_end_tokens(tmp_path: Path, one_process: None, family: str) -> None:
    """In matrices of their own (llama) and in tied ones (gpt2); the saved model ends responses."""
    kind = templates.FAMILIES[family]
    cell = templates.run_cell(tmp_path, family, "chatml", lora=True)
    assert cell.ids == "equal" and cell.ends > templates.ENOUGH["chatml"]
    model = tmp_path / f"run-{family}-chatml-lora" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.eos_token == "<|im_end|>"
    config = json.loads((model / "adapter" / "adapter_config.json").read_text())
    # a pad token may be new too
    assert cell.new == len(tokenizer) - len(kind.build()) >= 2, config
    hf = AutoModelForCausalLM.from_pretrained(model)
    assert hf.config.tie_word_embeddings == kind.tied
    untrained = kind.build()
    install_chat_template(untrained, Template.chatml)
    row = Demonstration([Turn("user", "What is 9 plus 1?")], "It is 9.")
    [(prompt, response)] = encode_demonstrations(untrained, [row], 99, 99)
    ids = hf.generate(
        hf.dummy_inputs["input_ids"].new_tensor([[*prompt, *response[:-1]]]), max_new_tokens=1
    )
    assert ids[0, -1] == tokenizer.eos_token_id


# GPT-2's words: of the two line breaks in front of an answer, the second is apart
GPT2_WORDS = ("opt", "gpt2", "smollm2")


@pytest.mark.full
@pytest.mark.parametrize("family", templates.FAMILIES)
def test_all_templates(tmp_path: Path, one_process: None, family: str) -> None:
    for style in templates.STYLES:
        for lora in (False, True):
            cell = templates.run_cell(tmp_path, family, style, lora)
            refused = style == "tokenizer" and templates.FAMILIES[family].chat_template is None
            assert cell.refused == refused and bool(cell.problem) == refused, cell
            assert refused or lora or cell.ends > templates.ENOUGH[style], (style, cell)
            crosses = style == "none" or (style == "llama3" and family in GPT2_WORDS)
            assert refused or (cell.ids != "equal") == crosses, (style, cell)
