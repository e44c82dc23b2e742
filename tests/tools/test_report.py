"""The report: a page that is complete in one file, opened in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.tools.report_runs import clock, size
from tests.support import folders

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars")  # as on a phone, they take no room

# The page in a frame of a given width, and what a reader's browser makes of it.
FRAME = """<!doctype html><iframe id="page" width="{width}" height="800" srcdoc="{page}"></iframe>
<pre id="seen"></pre><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(d => {{ d.open = true; }});
  const images = [...page.images], table = page.querySelector("table.runs");
  document.getElementById("seen").textContent = JSON.stringify({{
    rows: [...table.querySelectorAll("tr.single, tbody:not(.several) tr")].map(
      row => [...row.cells].map(c => c.innerText.trim())),
    groups: [...table.querySelectorAll("tbody.several tr:first-child")].map(
      row => [...row.cells].map(c => c.innerText.trim())),
    closed: [...table.querySelectorAll("tr.single")].map(row => row.offsetHeight > 0),
    opened: [...table.querySelectorAll(".opens")].map(box => (box.click(),
      [...box.closest("tbody").rows].every(row => row.offsetHeight > 0))),
    head: [...table.tHead.rows[0].cells].map(c => c.textContent.trim()),
    images: images.map(i => [i.dataset.figure, i.complete && i.naturalWidth > 0]),
    fetched: view.performance.getEntriesByType("resource").map(r => r.name.slice(0, 80))
      .filter(name => !name.startsWith("data:")),
    scripts: page.scripts.length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    text: page.body.innerText}});
}});</script>"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    data_dir = tmp_path / "results"
    run = folders.ours(data_dir, "central", "tiny")
    folders.save_steps(run)
    for seed in (0, 1):
        run = folders.ours(data_dir, "fed_avg", "tiny", local_updates=8, seed=seed)
        folders.save_steps(run / "server", seed)
    folders.study(data_dir, local_updates=1)
    torn = folders.ours(data_dir, "fed_fisher", "tiny")
    (torn / "training_history.json").write_text("[{")
    return data_dir


def seen_by_browser(page: Path, width: int, tmp_path: Path) -> dict[str, Any]:
    frame = tmp_path / f"frame_{width}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))),
                     encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / f'profile_{width}'}", "--dump-dom",
         frame.as_uri()], capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, pytest.param(390, marks=pytest.mark.slow)])
def test_page_in_a_browser(data_dir: Path, tmp_path: Path, width: int) -> None:
    assert cli.main(["report", "--data_dir", str(data_dir)]) == 0
    seen = seen_by_browser(data_dir / "report.html", width, tmp_path)
    rows = {row[0].replace("\n", ""): dict(zip(seen["head"], row, strict=True))
            for row in seen["rows"]}
    groups = [dict(zip(seen["head"], row, strict=True)) for row in seen["groups"]]
    assert set(rows) == {"central_config_tiny_seed_0", "federated_config_tiny_lu_8_seed_0",
                         "federated_config_tiny_lu_8_seed_1",
                         "federated_config_pure_ssm_1_layer_lu_1_seed_0"}
    row = rows["federated_config_tiny_lu_8_seed_1"]
    last = folders.perplexity_at(folders.STEPS[-1] * 8, 1, 1)
    assert (row["final perplexity"], row["method"], row["seed"]) == (f"{last:,.2f}", "FedAvg", "1")
    assert (row["local updates"], row["tokens"]) == ("8", f"{90 * 4 * 8 * 4 * 256:,}")
    assert (row["wall-clock"], row["bytes"], row["devices"]) == ("0:00:45", "90 kB", "5 × x86_64")
    (group,) = groups
    ends = [folders.perplexity_at(folders.STEPS[-1] * 8, seed, 1) for seed in (0, 1)]
    assert (group["run"], group["seed"], group["method"]) == ("2 runs", "0, 1", "FedAvg")
    assert group["final perplexity"] == (
        f"{statistics.mean(ends):,.2f} ± {statistics.stdev(ends):,.2f}")
    assert (group["tokens"], group["wall-clock"]) == (row["tokens"], row["wall-clock"])
    assert sorted(seen["closed"]) == [False, False, True, True], "seeds are shown when asked for"
    assert seen["opened"] == [True]
    assert "(inferred)" in rows["federated_config_pure_ssm_1_layer_lu_1_seed_0"]["tokens"]

    names = [name for name, _ in seen["images"]]
    assert names[0] == "0_all_runs"
    assert {"1_central_vs_fed_tiny", "3_method_comparison_tiny"} <= set(names)
    assert names.count("perplexity") == 4
    for figure in ("how in_proj changed", "largest singular values", "all singular values"):
        assert names.count(figure) == 3
    assert all(loaded for _, loaded in seen["images"])
    assert seen["fetched"] == []
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    assert "<b>Once & again</b> 90" in seen["text"], "sample text is text, not markup"
    assert "num_clients" in seen["text"]
    assert "fed_fisher_config_tiny_lu_1_seed_0: training_history.json is damaged" in seen["text"]


def test_page_names_nothing_outside_itself(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "page.html"
    assert cli.main(["report", "--data-dir", str(data_dir), "--out", str(out),
                     "--skip-deltas"]) == 0
    text = out.read_text(encoding="utf-8")
    addresses = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert "@import" not in text
    assert "singular values" not in text


def test_settings_that_differ_are_in_the_table(tmp_path: Path) -> None:
    both: list[dict[str, Any]] = [{"lr": 0.001, "sync": "round"}, {"lr": 0.002, "sync": "epoch"}]
    for number, settings in enumerate(both):
        folders.ours(tmp_path, name=f"run {number}", **settings)
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="differs">(.*?)</span>', page) == [
        "lr=0.001, sync=round", "lr=0.002, sync=epoch"]
    assert 'class="several"' not in page


def test_the_lowest_is_that_of_runs_on_the_same_text(tmp_path: Path) -> None:
    for name, gain, dataset in (("slow", 1.0, "pydocs"), ("fast", 2.0, "pydocs"),
                                ("toy", 9.0, "notes.txt")):
        folders.ours(tmp_path, name=name, gain=gain, dataset=dataset, lr=0.001 * gain)
    assert cli.main(["report", "--data_dir", str(tmp_path), "--skip_deltas"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<a href="#run-\d">(\w+)</a>.*?class="number( lowest)?"', page, re.DOTALL)
    assert rows == [("toy", ""), ("fast", " lowest"), ("slow", "")]
    assert '<td class="text">notes.txt, bpe:400</td>' in page


def test_a_runs_own_part_has_its_prompt_and_what_it_changed(tmp_path: Path) -> None:
    run = folders.ours(tmp_path, "fed_fisher", lr=0.25, sync="round")
    history = json.loads((run / "training_history.json").read_text())
    folders.write(run / "training_history.json",
                  [record | {"prompt": "<i>Two", "generated": " and two</i>"}
                   for record in history])
    assert cli.main(["report", "--data_dir", str(tmp_path), "--skip_deltas"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<span class="prompt">&lt;i&gt;Two</span> and two&lt;/i&gt;</blockquote>' in page
    changed, folded = page.split('<details class="defaults">')
    assert ('<th scope="row">lr</th><td>0.25</td>' in changed) > ("lr</th>" in folded)
    assert ('<th scope="row">sync</th><td>round</td>' in folded) > ("sync</th>" in changed)


def test_runs_without_curves_are_told_in_words(tmp_path: Path) -> None:
    for method in ("fed_avg", "fed_fisher"):
        folders.ours(tmp_path, method, steps=(1, 90))
    assert cli.main(["report", "--data_dir", str(tmp_path), "--skip_deltas"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'data-figure="(.*?)"', page) == ["0_all_runs"]
    end = f"{folders.perplexity_at(90, 0, 1):,.2f} at step 90"
    assert page.count(end) == 2
    assert "Figure 3_method_comparison_tiny: needs runs that were evaluated in between" in page


def test_a_folder_without_runs_gives_no_report(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 1
    assert "found 0 runs" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_durations_and_sizes_are_formatted() -> None:
    assert (clock(3725.4), clock(59.6), clock(float("nan"))) == ("1:02:05", "0:01:00", "")
    assert (size(999), size(63e6), size(float("nan"))) == ("999 B", "63 MB", "")
