"""Where several rewards make the score, each is in the table and in the curves."""

from __future__ import annotations

from rlhf.reporting.tables import result_rows
from rlhf.runs.stage_views import ONLINE_RL


def test_the_table_has_a_row_for_each_reward() -> None:
    metrics = {
        "eval/score": 1.5,
        "eval/score_before": 0.5,
        "eval/score/right": 1.0,
        "eval/score/right_before": 0.25,
        "eval/score/short": 0.5,
        "eval/score/short_before": 0.25,
        "eval/kl": 2.0,
    }
    assert result_rows("grpo", metrics) == [
        ("score", "0.50", "1.50"),
        ("  right", "0.25", "1.00"),
        ("  short", "0.25", "0.50"),
        ("KL, nats per response", "", "2.00"),
    ]


def test_the_curves_have_them_where_there_are_several() -> None:
    [panel] = [panel for panel in ONLINE_RL.panels if panel.title == "Each reward"]
    one = {"reward/right/mean", "reward/right/std", "reward/gold/mean", "objective/scores"}
    assert panel.drawn(one) == []
    assert panel.drawn({*one, "reward/a b/mean"}) == ["reward/a b/mean", "reward/right/mean"]
