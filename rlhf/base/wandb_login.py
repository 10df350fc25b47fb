"""Whether a run can report to the W&B server.

No torch here. wandb is imported when it is needed: that takes a second.
"""

from __future__ import annotations

import os

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, is_listening


def check_online() -> None:
    """Check before training that wandb.mode=online can work.

    Raises: UserError where there is no key, or the server does not answer within 2 s.
    """
    import wandb

    base_url = wandb.setup().settings.base_url
    wandb.teardown()  # its service; each run has its own
    if problem := wandb_problem(base_url):
        raise UserError(f"wandb.mode=online: {problem}, or set wandb.mode=auto")


def wandb_problem(base_url: str) -> str:
    """Why a run cannot report to a W&B server, and the fix; empty where it can. Takes at most 2 s.

    A key is looked for where wandb looks: in the environment, and in netrc.
    """
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    key = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
    try:
        key = key or wbauth.read_netrc_auth(host=base_url)
    except AuthenticationError as error:
        return f"the key for {base_url} in netrc cannot be used ({first_line(error)}): log in again"
    if not key:
        return f"there is no key for {base_url}: log in with `wandb login` or set WANDB_API_KEY"
    if not is_listening(base_url):
        return f"{base_url} does not answer: check the network and WANDB_BASE_URL"
    return ""
