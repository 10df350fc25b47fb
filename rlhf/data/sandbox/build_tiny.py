"""Build the tokenizer and the configuration of the built-in tiny model.

    python -m rlhf.data.sandbox.build_tiny [DIRECTORY]

The tokenizer is a byte-level BPE trained on the sandbox's text: its words are single tokens, and
any other text works byte by byte. The configuration is that of a small OPT. There are no weights:
a built-in model starts from random ones, drawn from `seed`.
"""

from __future__ import annotations

import sys
from pathlib import Path

MAX_VOCABULARY = 1024  # the words of the sandbox need fewer
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def build(directory: Path) -> None:
    """Write the tokenizer's files and config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import OPTConfig, PreTrainedTokenizerFast

    from rlhf.config.schema import Sandbox
    from rlhf.data import template
    from rlhf.data.sandbox.world import build_world

    sizes = Sandbox(demonstrations=4000, pairs=1, label_noise=0.1)
    world = build_world(sizes, seed=0, held_out_prompts=1)
    texts = [f" {text}" for d in world.sft for text in (d.prompt[0].text, d.response)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=MAX_VOCABULARY,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([template.USER, template.ASSISTANT])  # a role is one token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=512
    )
    tokenizer.save_pretrained(directory)
    OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=256,
        max_position_embeddings=512,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        # with the usual 0.02 a model of this size does not learn to copy words from the prompt
        init_std=0.06,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["OPTForCausalLM"],
    ).save_pretrained(directory)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "assets" / "tiny")
