"""Pages say what the files of a run say, in any state, and in a browser without a network."""

import dataclasses
import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from experiments import run, statistics, train
from experiments.config import TrackingConfig
from experiments.report import compare, episodes, groups, panels, report, source, workspace
from experiments.stop import Stop
from jmql import evaluate, p3o, settings
from jmql.settings import ConfigError
from tests import tiny

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
STEPS = (80, 160, 240)


def metrics(config: Any, rng: np.random.Generator, gain: float = 0.0) -> list[dict]:
    """Rows as a run writes them."""
    rows, tasks = [], config.tasks.held_out
    for steps in STEPS:
        for seed in range(config.seed, config.seed + config.seeds):
            before = rng.normal(-50, 5, tasks) + steps / 10 + gain
            after = before + rng.normal(2, 3, tasks)
            row = {"seed": seed, "env_steps": steps, "updates": steps - 80}
            row |= {"eval/return_pre": before.mean(), "eval/return_post": after.mean()}
            row |= {"tasks/return_pre": before.tolist(), "tasks/return_post": after.tolist()}
            row |= {"eval/return_post_p20": after.min(), "eval/return_step1": before.mean()}
            row |= {"adapt/ess": 0.4, "adapt/beta_zero_share": 0.2, "adapt/beta_p50": 0.7}
            row |= {"adapt/classifier_accuracy": 0.8, "adapt/classifier_calibration_error": 0.1}
            row |= {"collect/return": -60.0, "collect/blew_up": 0, "eval/blew_up": 0}
            row |= {"time/env_steps_per_second": 40.0, "time/compile_seconds": 3.0}
            rows.append(row | ({"train/critic_loss": 0.1} if steps > 80 else {}))
    return rows


def studies(config: Any, rng: np.random.Generator, tasks: int = 6) -> list[dict]:
    rows = []
    for way in ("as set", "weights of one"):
        for seed in range(config.seed, config.seed + config.seeds):
            row = {"seed": seed, "adapted": way, "env_steps": 240, "num_tasks": tasks}
            row |= {"task_seed": 0, "ranges": {}, "measured": {"adapt.episodes": 2}}
            for stage in ("pre", "shot1", "post"):
                row[f"tasks/return_{stage}"] = rng.normal(-20, 5, tasks).tolist()
            row["tasks/parameters"] = {"goal": rng.normal(size=(tasks, 2)).tolist()}
            row["train_tasks"] = {"goal": rng.normal(size=(4, 2)).tolist()}
            row["tasks/reuse"] = rng.dirichlet(np.ones(4), tasks).tolist()
            rows.append(row)
    return rows


def played(folder: Path, rng: np.random.Generator, tasks: int = 2, length: int = 30) -> None:
    """Bodies of two rods and a box that walk."""
    lead = (tasks, 2, length)
    np.savez(
        folder / "episodes.npz",
        alive=np.arange(length) < rng.integers(10, length, (tasks, 2, 1)),
        reward=rng.normal(size=lead),
        context=rng.normal(size=(*lead, 4)),
        place=rng.normal(size=(*lead, 2)).cumsum(axis=2) / 10,
        ends=rng.normal(size=(*lead, 2, 2, 3)),
        radius=np.full((*lead, 2), 0.1),
        corners=rng.normal(size=(*lead, 1, 8, 3)),
        frame=np.array(1),
        dt=np.array(0.05),
        env_steps=np.array(240),
        names=np.array([f"task <{i}>" for i in range(tasks)]),
        **{"task/goal": rng.normal(size=(tasks, 2))},
    )


def append(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def made(runs: Path, name: str, gain: float = 0.0, **values: Any) -> Path:
    """A run directory, of which only the numbers are made up."""
    config = dataclasses.replace(
        tiny.CONFIG, runs=str(runs), run_id=name, tracking=TrackingConfig(wandb="disabled")
    )
    config = settings.replaced(config, {"seeds": 2} | values)
    folder = run.create(tiny.build(config))
    rng = np.random.default_rng(config.seed)
    append(folder / "metrics.jsonl", metrics(config, rng, gain))
    append(folder / "evaluations.jsonl", studies(config, rng))
    played(folder, rng)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return made(tmp_path, "a")


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def charts(page: str) -> dict[str, list[dict]]:
    """The traces of each chart of a page, by its title."""
    found = re.findall(
        r'<div class="chart"[^>]*><script type="application/json">(.*?)</script>', page
    )
    figures = [json.loads(text) for text in found]
    return {x["layout"].get("title", {}).get("text", ""): x["data"] for x in figures}


def text(page: str) -> str:
    """What a page shows as words."""
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def named(traces: list[dict], name: str) -> dict:
    return next(trace for trace in traces if trace.get("name") == name)


def test_a_report_has_the_numbers_of_the_files(folder):
    page = report.write(folder).read_text()
    drawn, files = charts(page), rows(folder, "metrics.jsonl")
    curve = drawn["Return on held-out tasks over training"]
    for name, stage in (("before", "pre"), ("after", "post")):
        means = [
            np.mean([row[f"eval/return_{stage}"] for row in files if row["env_steps"] == steps])
            for steps in STEPS
        ]
        assert named(curve, name)["x"] == list(STEPS)
        np.testing.assert_allclose(named(curve, name)["y"], means, rtol=1e-12)
        assert f"{means[-1]:,.1f}" in text(page)
        # The band is of both seeds and all tasks.
        values = np.array([x[f"tasks/return_{stage}"] for x in files if x["env_steps"] == 240])
        band = next(x for x in curve if x.get("legendgroup") == name and x.get("fill"))
        ends = band["y"][2:4]
        expected = statistics.interval(values, statistics.mean)
        np.testing.assert_allclose(ends[::-1], expected, atol=0.3)
    gain = named(drawn["What adaptation adds"], "after minus before")
    np.testing.assert_allclose(
        np.array(gain["y"]) + named(curve, "before")["y"], named(curve, "after")["y"]
    )
    # Two seeds share the clock: 80 steps of each at 40 a second.
    minutes = [trace["x"] for trace in curve if trace.get("name") == "before"][1]
    np.testing.assert_allclose(minutes, [4 * i / 60 for i in (1, 2, 3)])

    last = [row["tasks/return_post"] for row in files if row["env_steps"] == 240]
    goals = np.load(folder / "tasks.npz")["held_out/goal"]
    after = [
        x for x in drawn["Held-out tasks of the run, at its last evaluation"] if x.get("text")
    ][1]
    np.testing.assert_allclose(after["marker"]["color"], np.mean(last, axis=0))
    np.testing.assert_allclose(after["x"], goals[:, 0])

    study = rows(folder, "evaluations.jsonl")
    for way in ("as set", "weights of one"):
        line = named(drawn["Return by shots of new data"], way)
        assert line["x"] == [0, 2, 4]  # two episodes a shot
        for value, stage in zip(line["y"], ("pre", "shot1", "post"), strict=True):
            values = [row[f"tasks/return_{stage}"] for row in study if row["adapted"] == way]
            expected = statistics.interquartile_mean(np.ravel(values))
            np.testing.assert_allclose(value, expected)
    shares = np.mean([x["tasks/reuse"] for x in study if x["adapted"] == "as set"], axis=0)
    (heat,) = drawn["Which training tasks are reused for which new ones"]
    new, old = (
        np.argsort(np.arctan2(*np.array(study[0][name]["goal"]).T[::-1]))
        for name in ("tasks/parameters", "train_tasks")
    )
    np.testing.assert_allclose(np.array(heat["z"], float), shares[np.ix_(new, old)], atol=1e-5)
    found = np.load(folder / "episodes.npz")
    for side, of in enumerate(("before", "after")):
        path = [x for x in drawn["Where the body goes"] if x.get("name") == "task <0>"][side]
        alive = found["alive"][0, side]
        assert path["x"] == found["place"][0, side, alive, 0].tolist(), of
    alive, values = found["alive"][:, 0], found["context"][:, 0]
    shown = named(drawn["Context over an episode"], "task <1>")
    assert len(shown["x"]) == alive[1].sum()
    middle = values[alive].mean(0)
    away = np.linalg.svd(values[alive] - middle, full_matrices=False)[2][:2]
    expected = (values[1, alive[1]] - middle) @ away.T
    np.testing.assert_allclose(np.abs(shown["x"]), np.abs(expected[:, 0]), rtol=1e-6)
    after = {
        steps: np.mean([x["eval/return_post"] for x in files if x["env_steps"] == steps])
        for steps in STEPS
    }
    for name, steps in (("untrained", 80), ("best", max(after, key=after.get)), ("last", 240)):
        assert re.search(rf"{name}\s+{steps}\s+\S+\s+\S+\s+{after[steps]:.1f}", text(page))
    assert "jmql train --task point_goal" in text(page)
    assert "--td3.learning-rate 0.01" in text(page)
    assert "finished: 240 steps" in text(page)
    assert "task <0>" not in page  # names are no markup


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "empty": "There is no evaluation yet",
        "torn": "160 of 240 steps",
        "damaged": "line 2 of metrics.jsonl is damaged and left out",
        "single": "80 of 240 steps",
        "failed": "The run has failed: train/q is not finite",
        "not finite": "finished: 240 steps",
        "no studies": "finished: 240 steps",
        "tasks are lost": "tasks.npz cannot be read",
        "a chart fails": "Context over an episode cannot be drawn: KeyError",
    }.items(),
)
def test_a_run_in_any_state_has_a_page(name, said, folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    nan = float("nan")
    match name:
        case "empty":
            path.unlink()
        case "torn":
            path.write_text("".join(lines[:4]) + lines[4][:50])
        case "damaged":
            path.write_text("".join([lines[0], "{\n", *lines[2:]]))
        case "single":
            path.write_text("".join(lines[:2]))
        case "failed":
            (folder / run.FAILED).write_text("train/q is not finite\n")
        case "not finite":
            study = [
                row | {"tasks/return_post": [nan] * 6, "tasks/reuse": [[nan] * 4] * 6}
                for row in rows(folder, "evaluations.jsonl")
            ]
            (folder / "evaluations.jsonl").write_text("")
            append(folder / "evaluations.jsonl", study)
        case "no studies":
            for file in ("evaluations.jsonl", "episodes.npz"):
                (folder / file).unlink()
        case "a chart fails":
            found = dict(np.load(folder / "episodes.npz"))
            del found["names"]
            np.savez(folder / "episodes.npz", **found)
        case "tasks are lost":
            (folder / "tasks.npz").write_bytes(b"x")
    page = report.write(folder).read_text()
    assert said in text(page)
    assert "NaN" not in "".join(re.findall(r'json">(.*?)</script>', page))
    charts(page)


def test_the_newest_study_alone_is_shown(folder):
    config, rng = run.read_config(folder), np.random.default_rng(5)
    new = studies(config, rng)[:2]  # as set, of two seeds, without the other way
    append(folder / "evaluations.jsonl", new)
    found = source.read(folder).studies
    assert found == new


def test_a_page_of_a_thousand_tasks_is_small(tmp_path):
    folder = made(tmp_path, "a", **{"tasks.held_out": 1000})
    config, rng = run.read_config(folder), np.random.default_rng(0)
    study = studies(config, rng, 1000)
    for row in study:
        row["train_tasks"] = {"goal": rng.normal(size=(1000, 2)).tolist()}
        row["tasks/reuse"] = rng.dirichlet(np.ones(1000), 1000).tolist()
    append(folder / "evaluations.jsonl", study)
    assert report.write(folder).stat().st_size < 10e6


def test_what_is_played_is_what_evaluation_plays(tmp_path):
    config = dataclasses.replace(
        tiny.CONFIG, runs=str(tmp_path), run_id="r", tracking=TrackingConfig(wandb="disabled")
    )
    config = settings.replaced(config, {"evaluate.episodes": 1})
    assert train.train([config], Stop()) == 0
    folder = tmp_path / "point_goal" / "r"
    record = json.loads((folder / "config.json").read_text())
    record["config"]["devices"] = 64  # of another machine
    (folder / "config.json").write_text(json.dumps(record))
    episodes.record(folder)
    found = np.load(folder / "episodes.npz")
    assert found["context"].shape == (3, 2, 200, 4)
    program = run.load(folder, config)
    state = jax.tree.map(lambda x: x[0], run.trained(folder, program))
    keys = jax.random.split(episodes.derive(state.key, "report"), 3)
    task = jax.tree.map(lambda x: x[1], program.held_out)
    draws = [episodes.derive(keys[1], name) for name in ("task", "adaptation")]
    earned = jax.jit(
        lambda: evaluate.evaluate_task(
            config, program.env, program.learner, state.agent, state.memory, task, *draws
        )[0]
    )()
    returns = found["reward"][1].sum(axis=1, where=found["alive"][1])
    expected = [earned["return_pre"], earned["return_post"]]
    np.testing.assert_allclose(returns, expected, rtol=1e-4)
    assert abs(returns[0] - returns[1]) > 1e-3  # adaptation does something


@pytest.fixture
def several(tmp_path) -> Path:
    """Two groups of two seeds, the second ten better at each step."""
    for name, tau, gain in (("slow", 0.005, 0.0), ("fast", 0.01, 10.0)):
        for seed in (0, 1):
            values = {"seed": seed, "seeds": 1, "td3.tau": tau}
            made(tmp_path, f"{name}-{seed}", gain, **values)
    return tmp_path / "point_goal"


def grouped(*paths: Path) -> tuple[list[groups.Group], list[str]]:
    return groups.grouped([source.read(path) for path in paths])


def test_groups_of_seeds_are_compared(several, tmp_path, capsys):
    files = [rows(several / f"slow-{seed}", "metrics.jsonl") for seed in (0, 1)]
    # One is still going: all are compared where it is.
    path = several / "fast-1" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    both, _ = grouped(*groups.folders([f"{several}/slow-*", f"{several}/fast-*"]))
    assert [group.name for group in both] == ["tau 0.005", "tau 0.01"]
    first, second = compare.lines(both, 160, 4.0, -30.0)
    at = np.array([file[1]["tasks/return_post"] for file in files])
    np.testing.assert_allclose(first.at_steps[0], statistics.interquartile_mean(at.ravel()))
    so_far = [np.mean([file[i]["tasks/return_post"] for file in files]) for i in (0, 1)]
    np.testing.assert_allclose(first.best, max(so_far))
    early = np.array([file[0]["tasks/return_post"] for file in files])
    expected = statistics.interquartile_mean(early.ravel())
    np.testing.assert_allclose(compare.lines(both, 160, 3.0, 0)[0].at_seconds[0], expected)
    np.testing.assert_allclose(second.at_steps[0], first.at_steps[0] + 10)
    assert second.improvement is not None
    assert second.improvement[0] > 0.8
    assert (first.seeds, first.steps, second.steps) == (2, 240, 160)
    assert first.seconds_to_target == 240 / 40
    assert compare.lines(both, 160, 1.0, 0)[0].at_seconds is None  # no evaluation yet
    assert "fewer than three seeds" in compare.cautions(both, 160)[0]
    assert compare.cautions(both, 160)[-1] == "compared at 160 steps, where tau 0.01 is"
    assert compare.lines(both, 160, 4.0, 1e9)[0].seconds_to_target is None

    out = tmp_path / "compare.html"
    compare.compare([str(several)], "", out, None)
    page = out.read_text()
    line = named(charts(page)["Return on held-out tasks over training"], "tau 0.005")
    means = np.mean([[np.mean(row["tasks/return_post"]) for row in file] for file in files], axis=0)
    np.testing.assert_allclose(line["y"], means)
    said = capsys.readouterr().out
    assert "2 groups, 160 steps" in said
    assert re.search(r"td3.tau\s+0.01\s+0.005", text(page))
    assert "discount" not in text(page)  # settings that differ, and only those


def test_runs_of_wandb_are_compared_as_those_on_disk(several, tmp_path, monkeypatch):
    """W&B's own interface is stood in for: what it is given, it returns."""

    def run_of(folder: Path) -> SimpleNamespace:
        history = rows(folder, "metrics.jsonl")
        flat = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in history]
        record = json.loads((folder / "config.json").read_text())
        name = f"point_goal-{folder.name}-s{history[0]['seed']}"
        scan = [{k: v for k, v in row.items() if k != "seed"} for row in flat]
        return SimpleNamespace(id=name, config=record, scan_history=lambda: scan, url="https://x")

    asked = []

    def runs(path: str, filters: dict) -> list[SimpleNamespace]:
        asked.append((path, filters))
        other = SimpleNamespace(id="a", config={}, scan_history=list, url="")
        return [*map(run_of, sorted(several.iterdir())), other]

    monkeypatch.setattr("wandb.Api", lambda: SimpleNamespace(runs=runs))
    compare.compare([], "me/jmql/g", tmp_path / "online.html", None)
    compare.compare([str(several)], "", tmp_path / "disk.html", None)
    assert asked == [("me/jmql", {"group": "g"})]
    title = "Return on held-out tasks over training"
    ours, theirs = (
        charts((tmp_path / f"{name}.html").read_text())[title] for name in ("disk", "online")
    )
    for name in ("tau 0.005", "tau 0.01"):
        np.testing.assert_allclose(named(ours, name)["y"], named(theirs, name)["y"])
    with pytest.raises(ConfigError, match="wandb is 'me'; it must be ENTITY/PROJECT"):
        compare.compare([], "me", tmp_path / "x.html", None)


def test_how_probable_it_is_to_be_better():
    ours, theirs = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 5.0]])
    assert compare.probability_of_improvement(ours, theirs)[0] == 0.5
    assert compare.probability_of_improvement(ours, ours - 5) == (1.0, (1.0, 1.0))
    assert compare.probability_of_improvement(ours, ours)[0] == 0.5


def test_what_does_not_compare_is_refused(several, tmp_path):
    with pytest.raises(ConfigError, match="nothing has no runs"):
        groups.folders([f"{tmp_path}/nothing"])
    made(tmp_path, "again", **{"seed": 0, "seeds": 1})
    with pytest.raises(ConfigError, match="are the same run of seed 0"):
        grouped(several / "slow-0", several / "again")
    other = made(tmp_path, "other", **{"tasks.seed": 1})
    with pytest.raises(ConfigError, match=r"has tasks.seed 1, and .* 0: their returns do not"):
        grouped(several / "slow-0", other)
    point = made(tmp_path, "sparse", **{"task": "point_sparse"})
    with pytest.raises(ConfigError, match=r"task 'point_sparse', and .* 'point_goal'"):
        grouped(several / "slow-0", point)
    shutil.copy(other / "tasks.npz", several / "slow-1" / "tasks.npz")
    with pytest.raises(ConfigError, match="has other held-out tasks"):
        grouped(several / "slow-0", several / "slow-1")
    (several / "slow-0" / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no run has an evaluation yet"):
        grouped(several / "slow-0")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one. CI installs it; elsewhere pages are looked at where there is one."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None and "CI" not in os.environ:
        pytest.skip("no Chromium here: `apt-get install chromium`, or Chrome")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as control:
        started = control.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 390)])
def test_pages_open_in_a_browser_without_a_network(browser, several, tmp_path, scheme, width):
    compare.compare([str(several)], "", tmp_path / "compare.html", None)
    for path in (report.write(several / "slow-0"), tmp_path / "compare.html"):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True
        )
        page, troubles = context.new_page(), []
        page.on("console", lambda message, to=troubles: to.append(message.text))
        page.on("pageerror", lambda error, to=troubles: to.append(str(error)))
        page.on("request", lambda request, to=troubles: to.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-drawn]", timeout=30_000)
        asked = [one for one in troubles if not one.startswith(("data:", "blob:"))]
        assert asked == [path.as_uri()]
        drawn = page.locator(".chart svg.main-svg").count()
        assert drawn >= page.locator(".chart").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        style = "getComputedStyle(document.body)"
        ink, paper = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        bright = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
        assert (bright[0] > bright[1]) == (scheme == "dark")
        label = page.locator(".chart .xtick text").first
        assert label.evaluate("x => getComputedStyle(x).fill") == ink
        if path.name == "report.html":
            before = page.locator("canvas").screenshot()
            page.locator(".replay button").click()
            page.wait_for_timeout(500)
            assert page.locator("canvas").screenshot() != before
        context.close()


@pytest.mark.parametrize("head", [False, True])
def test_training_shows_what_the_head_of_a_context_loses_where_there_is_one(head):
    config = SimpleNamespace(algorithm="mql", network=SimpleNamespace(task_head=head))
    figure = panels.health(SimpleNamespace(config=config, curve=lambda name: ([0, 1], [2.0, 1.0])))
    titles = [title.text for title in figure.layout.annotations]
    assert ("loss of the head that tells the task" in titles) == head
    assert len(figure.data) == len(titles) == 4 + head


def test_the_workspace_shows_what_runs_report(monkeypatch):
    view = workspace.build("me", "jmql")
    real = Path("experiments/results/tuned/ant_dir.jsonl").read_text().splitlines()[-1]
    reported = json.loads(real).keys() | {f"train/{name}" for name in p3o.no_steps().off}
    reported |= {"train/task_loss"}  # of `network.task_head`, see test_train
    panels = [panel for section in view.sections for panel in section.panels]
    for panel in panels:
        assert panel.x == "env_steps"
        if panel.metric_regex:
            assert any(re.fullmatch(panel.metric_regex, name) for name in reported)
        for name in panel.y:
            assert str(name) in reported
    text = json.dumps(view._to_model().model_dump(by_alias=True), default=str)
    assert '"grouping": [{"section": "run", "name": "group"}]' in text

    def refuse(**_: Any) -> None:
        raise ValueError("no key")

    monkeypatch.setattr("wandb.Api", refuse)
    with pytest.raises(ConfigError, match=r"no W&B account here \(no key\); valid:"):
        workspace.save("", "jmql")
