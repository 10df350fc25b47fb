"""The share of repeated n-grams of a text, against plain loops and numbers by hand."""

from __future__ import annotations

import pytest
import torch
from formulas import SEEDS

from rlhf.evaluation.statistics import repetition


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_repetition_equals_loops(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(
        0,
        2 + seed // 2,
        (int(torch.randint(5, 40, (1,), generator=generator)),),
        generator=generator,
    ).tolist()
    places = range(len(ids) - n + 1)
    stood_before = sum(any(ids[i : i + n] == ids[j : j + n] for j in range(i)) for i in places)
    assert repetition(ids, n) == pytest.approx(stood_before / len(places), abs=1e-12)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 1, 2, 3], 3) == 0.25  # 123, 231, 312, 123: three of four differ
    assert repetition([1, 2, 3, 1, 2, 3]) == 0.25  # trigrams unless told otherwise
    assert repetition([1, 2, 3, 4, 5, 6], 3) == 0.0
    assert repetition([1, 2, 1, 2, 1], 1) == pytest.approx(0.6)
    assert repetition([7] * 102, 3) == 0.99  # a loop: one of a hundred


def test_an_answer_shorter_than_an_n_gram_repeats_nothing() -> None:
    assert [repetition(ids, 3) for ids in ([], [1], [1, 1], [1, 1, 1])] == [0.0] * 4
