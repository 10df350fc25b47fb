"""DeepSpeed-Chat's design choices that change the data flow, for comparison only: rl=dschat.

Its dropout in log-probs, train-mode log-probs and means of micro-batch means were switches here
too. They have no effect on whether training diverges (docs/ablation.md, measured at a30b0ce), so
they were removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.models.wrappers import without_eos

if TYPE_CHECKING:
    from rlhf.rl.experience import Experience


def guess_masks(experience: Experience, eos_id: int) -> None:
    """rl.dschat.pad_is_eos: masks guessed from ids, as if EOS were padding.

    EOS is then never in the loss, and a prompt's own EOS tokens are not attended to.
    """
    experience.prompt_mask = without_eos(experience.prompt_ids, experience.prompt_mask, eos_id)
    mask = experience.response_mask
    experience.loss_mask = without_eos(experience.response_ids, mask, eos_id)
