"""The data of all stages, as plain text records; templates and batches are next door."""

from __future__ import annotations

from rlhf.config import Data
from rlhf.data.records import Dataset


def load_data(cfg: Data) -> Dataset:
    """The records of all stages, from the sandbox or from the configured sources.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    if cfg.sandbox is not None:
        from rlhf.data.sandbox import build_world

        return build_world(cfg.sandbox, cfg.seed, cfg.eval_rows)
    from rlhf.data.sources import load_sources

    return load_sources(cfg)
