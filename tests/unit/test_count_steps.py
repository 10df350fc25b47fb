"""The steps of a stage, and the rows at the end of an epoch that make no batch."""

from __future__ import annotations

import pytest

from rlhf.base.errors import UserError
from rlhf.data.batches import global_batches
from rlhf.training.setup import count_steps


@pytest.mark.parametrize(
    "rows, per_step, epochs, max_steps",
    [(64, 32, 2, None), (70, 32, 1, None), (70, 32, 3, None), (70, 32, 3, 6), (70, 32, 3, 5)],
)
def test_steps_are_the_whole_batches_of_all_epochs(
    rows: int, per_step: int, epochs: int, max_steps: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="rlhf"):
        steps = count_steps(range(rows), per_step, epochs, max_steps, "sft.batch_size")
    batches = list(global_batches(rows, per_step, epochs, seed=0))
    assert steps == min(len(batches), max_steps or len(batches))
    first = {row for batch in batches[: len(batches) // epochs] for row in batch}
    which = "they are not trained on" if epochs == 1 else "each epoch leaves out others"
    line = f"{rows - len(first)} of {rows} rows make no whole batch of {per_step}: {which}"
    named = rows % per_step != 0 and (max_steps is None or max_steps == 6)
    assert (line in caplog.text) == named
    assert ("no whole batch" in caplog.text) == named


def test_a_few_rows_left_of_many_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rlhf"):
        assert count_steps(range(3201), 32, 1, None, "sft.batch_size") == 100
    assert caplog.text == ""


def test_no_whole_batch_is_refused() -> None:
    with pytest.raises(UserError, match="sft.batch_size=32: there are only 31 rows"):
        count_steps(range(31), 32, 1, None, "sft.batch_size")
