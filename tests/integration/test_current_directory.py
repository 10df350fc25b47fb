"""What lies in the current directory, or on PYTHONPATH, does not stand for the project's code or
its libraries; only the reward functions that are named come from there."""

from __future__ import annotations

from pathlib import Path

from helpers import SMALL, runs_in, summary, train

LIBRARIES = ("datasets", "peft", "torch", "transformers", "deepspeed", "json", "rlhf")


def test_files_named_like_libraries_are_not_run(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    for folder, names in ((here, LIBRARIES), (other, ("rlhf",))):
        for name in names:
            (folder / name).mkdir(parents=True)
            for file in (folder / f"{name}.py", folder / name / "__init__.py"):
                file.write_text("raise SystemExit('this is the wrong module')\n")
    # the user's own reward may have such a name, as it is the one that the configuration names
    (here / "torch.py").write_text("def long(completions):\n    return [1.0] * len(completions)\n")
    given = ["stage=grpo", "rl.actor=builtin:tiny", "rl.rewards.model=null", *SMALL]
    done = train(*given, "rl.rewards.mine.function=torch:long", cwd=here, PYTHONPATH=str(other))
    assert done.returncode == 0, done.stderr
    assert summary(runs_in(here)["grpo"][0])["metrics"]["eval/score"] == 1.0
