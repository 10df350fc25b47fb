"""The page of the report, in a real browser where one is installed, and the pictures of a run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from app_browser import CHROMIUM, FLAGS
from helpers import TRAIN, Demo
from markupsafe import escape
from written_runs import HOSTILE, ppo_rows, write_run, write_stage, write_sweep

from rlhf.reporting import curves, report_page, tables
from rlhf.runs.finding import find_runs


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


def test_the_page_holds_everything_and_escapes_what_models_say(sweep: Path) -> None:
    page = report_page.page(find_runs([sweep]), f"Sweep {HOSTILE}", sweep)
    assert HOSTILE not in page and "&lt;/script&gt;" in page
    assert "https://" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL), (
        "it needs no other file"
    )
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for word in (
        "Curves",
        "Reward against KL",
        "Settings that differ",
        "Responses to the same held-out prompts",
        "Lineage",
        "it is broken",
        "Best of 3 settings by gold reward: kl.coef=0.05",
        "Entropy, nats per token",
        "Clip fraction",
        "Explained variance",
        "finished</dt><dd>2026-01-02 04:05",
        "python train.py stage=ppo",
        "0123456789abcdef",
        "sandbox/train (builtin:sandbox): 60 rows (sft 12, rm 24)",
        "tiny (builtin:tiny)",
    ):
        assert word in text, word
    links = re.findall(r'href="([^#"]+)"', text)
    assert len(links) > 9 * 4 and all((sweep / unquote(link)).exists() for link in links)
    assert page.count("plotly.js v") == 1, "the library once"
    assert [*curves.smooth([1.0, 2.0, 6.0, 3.0], 3)] == [1.5, 3.0, 11 / 3, 4.5]
    assert [*curves.smooth([1.0, 5.0], 1)] == [1.0, 5.0]


def test_a_real_pipeline_shows_its_lineage(demo: Demo, tmp_path: Path) -> None:
    found = find_runs([demo.root])
    assert [run.stage for run in found] == ["sft", "rm", "ppo"] and all(
        run.status == "finished" for run in found
    )
    page = report_page.page(found, "demo", tmp_path)
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    made = json.loads((demo.ppo / "env.json").read_text())
    assert made["command"].startswith(f"python {TRAIN} ") and made["folder"] == str(demo.root)
    assert f"<dd>{escape(made['command'])}</dd>" in text and made["started"] in text
    assert f"{demo.sft.name} (eval/perplexity" in text and f"{demo.rm.name} (eval/accuracy" in text
    tables.print_comparison(found)


def browse(file: Path, *flags: str) -> str:
    """What a browser makes of a page: its elements after all scripts have run."""
    assert CHROMIUM
    profile = f"--user-data-dir={file.parent / 'profile'}"
    command = [CHROMIUM, *FLAGS, "--virtual-time-budget=8000", profile, *flags, f"file://{file}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_the_page(sweep: Path, tmp_path: Path) -> None:
    from matplotlib import image

    file = report_page.write_page(find_runs([sweep]), sweep / "report.html", "Sweep study")
    picture = tmp_path / "page.png"
    dom = browse(file, "--dump-dom")
    assert dom.count('class="scatterlayer') >= 10 and "<title>Sweep study</title>" in dom, (
        "nine panels and the frontier are drawn"
    )
    browse(file, "--window-size=1500,2600", f"--screenshot={picture}")
    pixels = image.imread(picture)
    blue = (abs(pixels[..., :3] - [0.0, 0.447, 0.698]).sum(-1) < 0.15).sum()
    assert pixels.shape[:2] == (2600, 1500) and blue > 500, "lines in the first run's colour"


# The page in a frame as wide as a phone; what its controls do is written into the outer page.
ON_A_PHONE = """<body><iframe src="report.html" width="390" height="3000"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument;
  const set = (selector, change) => {
    const one = page.querySelector(selector);
    change(one);
    one.dispatchEvent(new Event("change"));
  };
  const state = () => {
    const data = page.querySelector(".js-plotly-plot").data;
    return data.map(t => [t.meta.kind, t.meta.setting, t.visible, t.y.slice(0, 2)]);
  };
  const seen = { width: page.documentElement.scrollWidth, first: state() };
  set(".seeds", box => { box.checked = true; });
  set(".window", list => { list.value = 3; });
  set(".setting", box => { box.checked = false; });
  seen.then = state();
  document.querySelector("pre").textContent = JSON.stringify(seen);
}, 1500);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_on_a_phone_nothing_is_cut_off_and_the_controls_work(sweep: Path) -> None:
    report_page.write_page(find_runs([sweep]), sweep / "report.html", "Sweep study")
    outer = sweep / "phone.html"
    outer.write_text(ON_A_PHONE)
    dom = browse(outer, "--dump-dom", "--allow-file-access-from-files")
    (text,) = re.findall(r"<pre>(.*?)</pre>", dom)
    seen = json.loads(text)
    assert 300 < seen["width"] <= 390, "the page does not scroll to the side"
    kinds = [kind for kind, *_ in seen["first"]]
    assert kinds == ["band", "band", "mean", "seed", "seed", "seed"] * 3
    assert [shown is False for *_, shown, _ in seen["first"]] == [k == "seed" for k in kinds]
    for (_, setting, shown, y), (*_, raw) in zip(seen["then"], seen["first"]):
        assert shown == (setting > 0), "the first setting is hidden, single seeds are shown"
        slope = raw[1] - raw[0]  # the score rises evenly from 0
        assert y == pytest.approx([slope / 2, slope], abs=1e-4), "running mean over 3"


def test_the_pictures_of_a_run_are_grids_of_panels_that_fit_a_readme(tmp_path: Path) -> None:
    from matplotlib import image

    def size(run: Path, name: str) -> tuple[int, int]:
        height, width = image.imread(run / name).shape[:2]
        return width, height

    run = write_run(tmp_path, *(f"rl.critic.{key}=0.5" for key in ("final_lr", "grad_clip")))
    final = json.loads((run / "summary.json").read_text())["metrics"] | {"eval/score_before": 0.0}
    curves.plot_run(run, "ppo", final)
    width, height = size(run, "curves.png")
    assert 1000 <= width <= 1300 and 700 <= height <= 1000, "nine panels, three in a row"
    width, height = size(run, "frontier.png")
    assert 1000 <= width <= 1300 and 300 <= height <= 600, "gold reward and score, side by side"
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("val", "loss/v", "reward"))}
        for row in ppo_rows(1.0, 3)
    ]
    plain = write_stage(tmp_path, "rloo", [], rows, None)
    final = {f"eval/{name}": 1.0 for name in ("kl", "score", "score_before")}
    curves.plot_run(plain, "rloo", final)
    width, height = size(plain, "curves.png")
    assert 1000 <= width <= 1300 and 500 <= height <= 700, "six panels: no critic, no gold reward"
