"""From records to token ids and tensors."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config.choices import Template
from rlhf.data import batches, encoding, template, tokenized
from rlhf.data.records import Demonstration, Pair, Turn
from rlhf.models.loading import load_tokenizer


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False).input_ids


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


CONVERSATIONS = [
    [user("How do I look after my rose?")],
    [user("Hi!"), assistant("Hello. What is it?"), user("My cat looks sad. What now?")],
    [user("Zwölf Boxkämpfer?\nYes: 12 – 5 = 7\t☃"), assistant(""), user("a")],
    [Turn("system", "Be brief."), user("What does my pan need?")],
]

# --- template


def test_a_prompt_reads_as_the_format_says() -> None:
    text = template.render_prompt(tokenizer(), CONVERSATIONS[1])
    assert text == (
        "\n\nHuman: Hi!\n\nAssistant: Hello. What is it?\n\nHuman: My cat looks sad. What "
        "now?\n\nAssistant:"
    )


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize(
    "answer", ["Water it.", "Happy to help! First, fill the bowl.", "日本 (x)", "Assistant: yes"]
)
def test_prompt_and_answer_are_the_tokens_of_the_whole_dialogue(
    turns: list[Turn], answer: str
) -> None:
    """Training uses what a chat program renders: no token crosses the boundary."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns] + [
        {"role": "assistant", "content": answer}
    ]
    whole = tokenizer().apply_chat_template(messages, tokenize=False)
    prompt = template.render_prompt(tokenizer(), turns)
    assert whole == prompt + " " + answer + tokenizer().eos_token
    [prompt_ids], [answer_ids] = (
        encoding.encode_prompts(tokenizer(), [turns], 500),
        encoding.encode_responses(tokenizer(), [answer], 500),
    )
    assert prompt_ids == encode(prompt)
    assert prompt_ids + answer_ids == encode(whole)
    assert prompt_ids + answer_ids == tokenizer().apply_chat_template(
        messages, tokenize=True, return_dict=False
    )


def test_a_template_starts_with_bos_only_where_the_tokenizer_adds_one() -> None:
    from tokenizers.processors import TemplateProcessing

    adding = load_tokenizer("builtin:tiny")
    adding._tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    template.install_chat_template(adding, Template.hh)
    [ids] = encoding.encode_prompts(adding, [[user("Hi")]], 500)
    assert ids.count(adding.bos_token_id) == 1 and ids[0] == adding.bos_token_id
    [plain] = encoding.encode_prompts(tokenizer(), [[user("Hi")]], 500)
    assert ids[1:] == plain


def test_answers_end_with_one_eos_unless_they_are_cut() -> None:
    """T1, D7."""
    eos = tokenizer().eos_token_id
    answer = "First, water it slowly. Next, add fresh soil."
    [ids] = encoding.encode_responses(tokenizer(), [answer], 500)
    assert ids[-1] == eos and ids.count(eos) == 1
    assert encoding.encode_responses(tokenizer(), [answer], len(ids)) == [ids]  # just fits
    assert encoding.encode_responses(tokenizer(), [answer], len(ids) - 1) == [ids[:-1]]
    assert encoding.encode_responses(tokenizer(), [answer], 3) == [ids[:3]]
    assert encoding.encode_responses(tokenizer(), [""], 500)[0][-1] == eos


def test_decoding_gives_the_answer_back() -> None:
    answers = ["Water it.", "Zwölf – ☃", " spaces around ", "    return x\n"]
    for answer, ids in zip(answers, encoding.encode_responses(tokenizer(), answers, 500)):
        assert encoding.decode_response(tokenizer(), ids) == answer.rstrip()


def test_encoding_nothing_gives_nothing() -> None:
    assert (
        encoding.encode_prompts(tokenizer(), [], 9)
        == encoding.encode_responses(tokenizer(), [], 9)
        == []
    )


def test_a_prompt_that_is_too_long_loses_its_first_turns_and_begins_with_a_user() -> None:
    turns = [user("one"), assistant("two"), user("three"), assistant("four"), user("five")]
    wanted = {
        first: encode(template.render_prompt(tokenizer(), turns[first:])) for first in (0, 2, 4)
    }
    for limit in range(len(wanted[4]), len(wanted[0]) + 1):
        [ids] = encoding.encode_prompts(tokenizer(), [turns], limit)
        first = next(i for i in (0, 2, 4) if len(wanted[i]) <= limit)  # as many turns as fit
        assert ids == wanted[first]
    assert encoding.encode_prompts(tokenizer(), [turns], len(wanted[4]) - 1) == [None]


def test_a_last_turn_that_is_too_long_alone_gives_none_and_leaves_the_others_in_place() -> None:
    short, long = [user("a")], [user("b " * 50)]
    encoded = encoding.encode_prompts(tokenizer(), [short, long, short], 20)
    assert encoded[1] is None and encoded[0] == encoded[2] is not None


def test_rows_with_a_prompt_that_is_too_long_are_left_out() -> None:
    short, long = [user("a")], [user("b " * 50)]
    rows = encoding.encode_demonstrations(
        tokenizer(), [Demonstration(long, "x"), Demonstration(short, "y")], 20, 20
    )
    assert [tokenizer().decode(prompt + answer) for prompt, answer in rows] == [
        "\n\nHuman: a\n\nAssistant: y</s>"
    ]
    pairs = encoding.encode_pairs(
        tokenizer(), [Pair(short, "x", "y"), Pair(long, "x", "y")], 20, 20
    )
    expected = [("\n\nHuman: a\n\nAssistant: x</s>", "\n\nHuman: a\n\nAssistant: y</s>")]
    assert [
        (tokenizer().decode(p + chosen), tokenizer().decode(p + rejected))
        for p, chosen, rejected in pairs
    ] == expected


def test_a_role_mark_inside_a_text_reads_as_a_turn() -> None:
    """As in the HH data themselves: the mark is what makes a turn, there is no way to escape it."""
    assert (
        encode(template.render_prompt(tokenizer(), [user("a\n\nHuman: b")])).count(
            encode(template.USER)[0]
        )
        == 2
    )


def test_the_role_words_alone_are_no_role_marks() -> None:
    marks = {encode(template.USER)[0], encode(template.ASSISTANT)[0]}
    assert not marks & set(encode(" Human: and Assistant: and\nHuman:"))


# --- batches


def test_padding_carries_masks_and_does_not_guess_them_from_ids() -> None:
    pad = 0
    rows = [[5, pad, 7], [pad], [1, 2, 3, pad]]  # real tokens that have the pad's id
    right, right_mask = batches.pad_right(rows, pad)
    assert right.tolist() == [[5, 0, 7, 0], [0, 0, 0, 0], [1, 2, 3, 0]]
    assert right_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    left, left_mask = batches.pad_left(rows, pad)
    assert left.tolist() == [[0, 5, 0, 7], [0, 0, 0, 0], [1, 2, 3, 0]]
    assert left_mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert right.dtype == left_mask.dtype == torch.int64


def test_rows_of_one_length_are_not_padded() -> None:
    """D11: a batch is as wide as its longest row, not as the limit."""
    for pad in (batches.pad_left, batches.pad_right):
        ids, mask = pad([[1, 2], [3, 4]], 9)
        assert ids.tolist() == [[1, 2], [3, 4]] and mask.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("n, size", [(12, 4), (13, 4), (7, 7), (3, 4), (10, 1)])
def test_an_epoch_has_every_row_once_and_leaves_the_incomplete_rest_out(n: int, size: int) -> None:
    per_epoch = n // size
    steps = list(batches.global_batches(n, size, 3, seed=1))
    assert len(steps) == 3 * per_epoch and all(len(step) == size for step in steps)
    for epoch in range(3):
        rows = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert len(set(rows)) == len(rows) == per_epoch * size and set(rows) <= set(range(n))


def test_the_order_differs_between_epochs_and_seeds_and_is_reproducible() -> None:
    """T17, D8."""

    def order(seed: int) -> list[list[int]]:
        return list(batches.global_batches(64, 64, 2, seed))

    first, second = order(1)
    assert first != second and first != sorted(first) and order(1) == [first, second]
    assert order(2)[0] not in (first, second)
    # more epochs go on where fewer end, so a longer run repeats a shorter one
    assert list(batches.global_batches(64, 64, 5, 1))[:2] == [first, second]


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_a_batch_without_gap_or_overlap(world_size: int, size: int) -> None:
    lengths = [(7 * i) % 31 + 1 for i in range(40)]
    batch = list(range(3, 35))
    random.Random(0).shuffle(batch)
    parts = [
        batches.micro_batches(batch, lengths, size, rank, world_size) for rank in range(world_size)
    ]
    assert sorted(row for part in parts for micro in part for row in micro) == sorted(batch)
    assert (
        len({len(part) for part in parts}) == 1
    )  # a collective operation in every micro-batch: nobody may wait for ever
    assert all(1 <= len(micro) <= size for part in parts for micro in part)
    for part in parts:
        mine = [lengths[row] for micro in part for row in micro]
        assert mine == sorted(mine)  # similar lengths together


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_micro_batches_are_filled_up_to_as_many_tokens_as_full_rows_have(
    world_size: int, size: int
) -> None:
    """32 rows of 1 to 31 tokens; room for `size` rows of 31, padding included."""
    lengths = [(7 * i) % 31 + 1 for i in range(40)]
    batch = list(range(3, 35))
    random.Random(0).shuffle(batch)
    parts = [
        batches.micro_batches(batch, lengths, size, rank, world_size, longest=31)
        for rank in range(world_size)
    ]
    assert sorted(row for part in parts for micro in part for row in micro) == sorted(batch)
    assert len({len(part) for part in parts}) == 1 and all(
        micro for part in parts for micro in part
    )
    for part in parts:
        assert all(len(micro) * max(lengths[row] for row in micro) <= size * 31 for micro in part)
        mine = [lengths[row] for micro in part for row in micro]
        assert mine == sorted(mine)
    by_number = batches.micro_batches(batch, lengths, size, 0, world_size)
    assert len(parts[0]) <= len(by_number)
    # fewer, but where all fit into one, and where what is left over from full ones needs one more
    assert (
        len(parts[0]) < len(by_number)
        or len(by_number) == 1
        or (world_size, size) in {(2, 8), (4, 3)}
    )


def test_a_process_with_fewer_micro_batches_halves_its_fullest() -> None:
    lengths = [1, 6, 1, 6, 1, 6, 1, 6]  # process 0 has the odd one out of each pair of neighbours
    assert batches.chunk_by_tokens([0, 2, 4, 6], lengths, 6) == [
        [0, 2, 4, 6]
    ] and batches.chunk_by_tokens([1, 3, 5, 7], lengths, 6) == [[1], [3], [5], [7]]
    one, other = (
        batches.micro_batches([0, 2, 1, 3], [2, 4, 3, 9], 1, rank, 2, longest=6)
        for rank in range(2)
    )
    assert one == [[0], [1]] and other == [[2], [3]]


def test_chunks_are_the_rows_in_order() -> None:
    assert batches.chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert batches.chunks([], 2) == []


def test_a_random_row_depends_on_its_key_and_not_on_its_batch() -> None:
    together = batches.uniforms("rollout", [7, 3, 11], 1, 2, 20)
    for i, key in enumerate([7, 3, 11]):
        assert torch.equal(batches.uniforms("rollout", [key], 1, 2, 20)[0], together[i])
    assert torch.equal(batches.uniforms("rollout", [11, 7], 1, 2, 20), together[[2, 0]])
    assert torch.equal(
        batches.uniforms("rollout", [7], 1, 2, 5)[0], together[0, :5]
    )  # a longer answer begins like a shorter one


def test_random_rows_differ_by_stream_seed_step_and_key() -> None:
    calls = [
        ("rollout", 7, 1, 2),
        ("evaluation", 7, 1, 2),
        ("rollout", 8, 1, 2),
        ("rollout", 7, 2, 2),
        ("rollout", 7, 1, 3),
        ("rollout", 1, 7, 2),
    ]
    calls += [
        ("rollout", 0, 0, 0),
        ("rollout", 0, 0, 1),
        ("rollout", 0, 1, 0),
        ("rollout", 1, 0, 0),
    ]
    rows = [
        batches.uniforms(stream, [key], seed, step, 8)[0].tolist()
        for stream, key, seed, step in calls
    ]
    assert len({row[0] for row in rows}) == len(rows)


def test_random_numbers_are_uniform_in_0_to_1() -> None:
    x = batches.uniforms("rollout", range(200), 1, 0, 100).flatten()
    assert x.dtype == torch.float64 and x.min() >= 0 and x.max() < 1
    counts = torch.histc(x, 10, 0, 1)
    assert (
        float(((counts - 2000) ** 2 / 2000).sum()) < 27.9
    )  # chi-square, 9 degrees of freedom, p = 0.001
    neighbours = torch.corrcoef(x.reshape(200, 100)[:, :2].T)[0, 1]
    assert abs(float(neighbours)) < 0.25


# --- plain text for the pretraining loss


@pytest.fixture
def texts_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tokenized.Rows[tuple[list[int], list[int]]]]:
    """Token ids of some texts, with a cache of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return lambda texts, max_tokens: tokenized.texts(
        tokenizer(), datasets.Dataset.from_dict({"text": texts}), max_tokens, 1
    )


TEXTS = [
    "Once upon a time there was a rose.",
    "Größe ☃",
    "The cat, the cat, and the cat again, all day long. " * 3,
]


def test_a_text_predicts_all_but_its_first_token(texts_of: Any) -> None:
    rows = texts_of(TEXTS, 500)
    assert [first + rest for first, rest in rows] == [encode(text) for text in TEXTS]
    assert all(len(first) == 1 and rest for first, rest in rows)
    assert list(rows.lengths) == [len(encode(text)) for text in TEXTS] and (
        rows.truncated,
        rows.skipped,
    ) == (0, 0)
    assert tokenizer().eos_token_id not in sum(
        (first + rest for first, rest in rows), []
    )  # nothing is put in that is not there
    assert texts_of(TEXTS, 500)[1] == rows[1]  # from the cache


def test_a_text_is_cut_at_the_limit_that_counts_its_first_token_too(texts_of: Any) -> None:
    whole = [encode(text) for text in TEXTS]
    for limit in (2, len(whole[0]) - 1, len(whole[0]), len(whole[0]) + 1):
        rows = texts_of(TEXTS, limit)
        assert [first + rest for first, rest in rows] == [ids[:limit] for ids in whole]
        assert list(rows.lengths) == [min(len(ids), limit) for ids in whole]
        assert rows.truncated == sum(len(ids) > limit for ids in whole) and rows.skipped == 0


def test_a_text_of_one_token_predicts_nothing_and_is_left_out(texts_of: Any) -> None:
    one = next(text for text in ("a", "e", ".", "x") if len(encode(text)) == 1)
    rows = texts_of([one, TEXTS[0], one, ""], 500)
    assert [first + rest for first, rest in rows] == [encode(TEXTS[0])] and rows.skipped == 3
    assert not len(texts_of([one, ""], 500))


def test_a_text_that_is_cut_to_one_token_is_left_out_too(texts_of: Any) -> None:
    """Its loss would be 0 / 0."""
    assert not len(texts_of(TEXTS, 1))
