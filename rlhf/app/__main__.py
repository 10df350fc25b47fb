"""python -m rlhf.app: opens the page at http://127.0.0.1:7860."""

from __future__ import annotations

from pathlib import Path

from rlhf.app import page

if __name__ == "__main__":
    page.build([Path()]).launch(server_name="127.0.0.1", server_port=7860)
