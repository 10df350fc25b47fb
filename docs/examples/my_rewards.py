"""Reward functions in TRL's convention: docs/rewards.md."""


def short(completions, **kwargs):
    """Minus the number of words, for every response."""
    return [-float(len(completion.split())) for completion in completions]


def ends_with_answer(completions, answer, **kwargs):
    """1 where a response ends with the row's column `answer`; None where a row has none."""
    return [
        None if truth is None else float(completion.strip().endswith(str(truth)))
        for completion, truth in zip(completions, answer)
    ]
