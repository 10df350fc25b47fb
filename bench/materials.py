"""Models, tokenizer and batches of the contestants, and what the machine can do."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import Spec, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = "\n\nAssistant:"  # ends the prompt


def assets(spec: Spec) -> None:
    """Write what all contestants load into spec["out"], and report the shapes of the policies.

    These are tokenizer, policy, reward model, batches of token ids, and the pairs that the product
    evaluates on.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    out, pairs = Path(spec["out"]), read_pairs(spec["pairs"])
    (out / "pairs.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs[:2000]), encoding="utf-8"
    )
    tokenizer = tokenizer_of(spec["model"]) if spec["model"] else train_tokenizer(pairs)
    shapes = {}
    for name, vocabulary in spec["policies"].items():
        hf: Any = random_policy(vocabulary or len(tokenizer), spec["shape"])
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
    (out / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
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
    with gzip.open(file, "rt") if file.endswith(".gz") else open(file, encoding="utf-8") as lines:
        return [{key: row[key] for key in ("chosen", "rejected")} for row in map(json.loads, lines)]


def train_tokenizer(pairs: list[dict[str, str]], size: int = 8192) -> PreTrainedTokenizerBase:
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


def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, with its last token as EOS.

    Where it has no other padding token, the token before the last is that.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 2)
    return tokenizer


def random_policy(vocabulary: int, size: str) -> PreTrainedModel:
    """An OPT. Args: size: small, of 5 million weights; large, of 310 million for a GPU."""
    from transformers import OPTConfig, OPTForCausalLM

    width, layers, heads = {"small": (256, 4, 4), "large": (1024, 24, 16)}[size]
    shape: dict[str, Any] = {
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * width,
    }
    shape |= {"num_attention_heads": heads, "max_position_embeddings": 1024}
    shape |= {"vocab_size": vocabulary}
    return OPTForCausalLM(OPTConfig(**shape, dropout=0.0, attention_dropout=0.0))


def shape_of(hf: PreTrainedModel) -> dict[str, int]:
    """Numbers for `needed_flops`.

    `body` counts the weights that multiply each token: all but those of embeddings and head.
    """
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


def make_batches(
    spec: Spec, tokenizer: PreTrainedTokenizerBase, pairs: list[dict[str, str]]
) -> list[list[Any]]:
    """Token ids, the same for all contestants.

    Returns: batches of rows. A row is a prompt for ppo and generate, [prompt, answer] for sft, and
        [prompt, chosen, rejected] for rm. The pairs repeat where there are too few.
    """
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
    """Report what the device can do (a CPU with spec["threads"] threads), as medians.

    The best rate of matrix products of several shapes in GFLOP/s, in fp32 and in bf16; and the rate
    of reading memory in GB/s.
    """
    import torch
    from accelerator import synchronize

    torch.set_num_threads(spec["threads"])
    device = torch.device(spec["device"])
    shapes = [(1024, 1024, 1024), (2048, 256, 1024), (2048, 768, 3072)]
    if device.type == "cuda":
        shapes += [(8192, 8192, 8192)]

    def typical(work: Callable[[], Any]) -> float:
        """Seconds of a repetition."""
        times: list[float] = []
        end = time.perf_counter() + 1.5
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        for m, k, n in shapes:
            a, b = (torch.randn(rows, k, device=device).to(dtype) for rows in (m, n))
            seconds = typical(functools.partial(torch.nn.functional.linear, a, b))
            rates.append(2e-9 * m * k * n / seconds)
        found[name] = max(rates)
    numbers = torch.ones(2**27, device=device)
    found["read"] = 4e-9 * numbers.numel() / typical(numbers.sum)
    say(spec, **found)
