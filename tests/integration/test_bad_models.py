"""A model directory that does not fit its configuration is refused at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import save_base
from helpers import SMALL, train

from rlhf.models.loading import load_tokenizer


@pytest.mark.parametrize("zero", [0, pytest.param(3, marks=pytest.mark.full)])
def test_layers_that_the_configuration_does_not_have_stop_the_run(
    tmp_path: Path, zero: int
) -> None:
    """With ZeRO 3 transformers reports missing weights only."""
    save_base(tmp_path / "model", "llama")
    load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    options = ["actor=custom", f"actor.path={tmp_path / 'model'}", f"deploy.zero_stage={zero}"]
    done = train("stage=sft", *options, *SMALL, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "has 9 weights that the model does not know: model.layers.1." in line
