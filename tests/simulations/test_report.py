"""The report shows the run's own numbers: read again from the file, from the rendered tables, and from the drawn page."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corolla import cli, simulate
from corolla.client.local import Client
from corolla.server.folder import RunFolder
from corolla.simulations.report import gather, render, render_noise, write_figures, write_report
from corolla.simulations.report.gather import label_paths, place_modules
from tests.server.clients import nan
from tests.simulations.federation import tiny_config
from tests.simulations.measured import METHODS, REFUSAL, add_noise, noise

CLIENTS = ["client-000", "client-001", "client-002"]
REASON = "must be finite"


@pytest.fixture(scope="module")
def real(tiny_folder, tmp_path_factory):
    """A run of two rounds with aggregation.noise whose client-001 sends NaN in round one."""
    train = Client.train

    def train_badly(self, task):
        reply = train(self, task)
        if (self.client_id, task.order.round) != ("client-001", 1):
            return reply
        return replace(reply, adapter={module: nan(delta) for module, delta in reply.adapter.items()})

    out = tmp_path_factory.mktemp("runs") / "bad-reply"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "train", train_badly)
        simulate(tiny_config(tiny_folder, out, run={"alone": True}, aggregation={"noise": True}))
    return out


@pytest.fixture(scope="module")
def finished(real, tmp_path_factory):
    """The same run with made-up noise: more methods with larger numbers than two tiny rounds have."""
    out = tmp_path_factory.mktemp("finished") / "bad-reply"
    shutil.copytree(real, out)
    lines = RunFolder.open(out).lines()
    for line in lines:
        line.pop("noise", None)
    write_lines(out, lines)
    add_noise(out)
    return out


@pytest.fixture(scope="module")
def second(finished, tmp_path_factory):
    """Another run, as far as a report can tell: another method, other numbers."""
    out = tmp_path_factory.mktemp("other") / "padded"
    shutil.copytree(finished, out)
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace('method = "flora"', 'method = "zero-padding"'))
    lines = RunFolder.open(out).lines()
    for line in lines:
        line.pop("noise", None)
        for client in line["clients"].values():
            client.update({name: 1.5 * value for name, value in client.items() if "loss" in name})
    write_lines(out, lines)
    add_noise(out, seed=1)
    return out


def write_lines(run: Path, lines: list) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def document_of(page: Path) -> dict:
    """What a reader finds in the page's JSON."""
    text = page.read_text()
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_the_numbers_in_the_page_are_those_of_the_run(finished, second, tmp_path):
    document = document_of(write_report([finished, second], tmp_path / "new" / "report.html"))
    for run, folder in zip(document["runs"], (finished, second), strict=True):
        assert run["lines"] == RunFolder.open(folder).lines()
        assert run["comparison"] == json.loads((folder / "comparison.json").read_text())
        assert run["facts"] == json.loads((folder / "run.json").read_text())
        assert run["config"]["clients.ranks"] == [6, 4, 2]
    assert [run["label"] for run in document["runs"]] == ["bad-reply", "padded"]
    assert [run["method"] for run in document["runs"]] == ["flora", "zero-padding"]
    assert document["clients"] == CLIENTS
    assert document["methods"] == ["fedit", *METHODS]
    rounds = [line for line in document["runs"][0]["lines"] if line["kind"] == "round"]
    assert [list(line["quarantined"]) for line in rounds] == [["client-001"], []]
    assert REASON in rounds[0]["quarantined"]["client-001"]


def test_the_noise_that_a_run_measured_is_in_the_page(real, tmp_path):
    lines = document_of(write_report([real], tmp_path / "report.html"))["runs"][0]["lines"]
    assert lines == RunFolder.open(real).lines()
    first, second = [line["noise"] for line in lines if line["kind"] == "round"]
    assert first["share"].keys() == {"client-000", "client-002"}  # client-001 sent NaN
    assert second["share"].keys() == set(CLIENTS)
    assert first["init"] == "shared"
    assert first["methods"]["flora"]["relative_error"] < 1e-6 < first["methods"]["zero-padding"]["relative_error"]
    assert "averages clients of one rank" in first["methods"]["fedit"]["not_applicable"]


def test_every_setting_is_there_with_its_meaning(finished):
    document = gather([finished])
    config = RunFolder.open(finished).config().flat()
    assert set(config) == set(document["runs"][0]["config"]) == set(document["meanings"])
    assert document["meanings"]["run.rounds"] == "rounds of the whole run"
    assert document["runs"][0]["config"]["data.held_out"] is None


def test_a_run_of_another_version_is_read_as_it_is(finished, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    (old / "comparison.json").unlink()
    (old / "run.json").unlink()
    with (old / "config.toml").open("a") as file:
        file.write("[gone]\nsetting = 3\n")
    lines = [{k: v for k, v in line.items() if k not in ("noise", "refused")} for line in RunFolder.open(old).lines()]
    write_lines(old, lines)
    run = gather([old])["runs"][0]
    assert (run["config"]["gone.setting"], run["facts"], run["comparison"]) == (3, None, None)
    assert run["lines"] == lines


def test_a_number_that_json_lacks_is_named(finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    lines = RunFolder.open(copy).lines()
    lines[0]["mean"]["held_out_loss"] = float("nan")
    lines[1]["update"]["norm"] = float("-inf")
    write_lines(copy, lines)
    found = document_of(write_report([copy], tmp_path / "report.html"))["runs"][0]["lines"]
    assert (found[0]["mean"]["held_out_loss"], found[1]["update"]["norm"]) == ("NaN", "-Infinity")


def test_modules_are_placed_by_layer_and_by_the_shortest_name_that_tells_them_apart():
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.11.attn.c_attn", "lm_head"]
    assert place_modules(names) == {
        "h.0.attn.c_proj": {"layer": 0, "type": "attn.c_proj"},
        "h.0.mlp.c_proj": {"layer": 0, "type": "mlp.c_proj"},
        "h.11.attn.c_attn": {"layer": 11, "type": "c_attn"},
        "lm_head": {"layer": None, "type": "lm_head"},
    }


def test_runs_are_told_apart(tmp_path):
    assert label_paths([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]
    with pytest.raises(ValueError, match=r"different folders, got .*run 2 times"):
        label_paths([tmp_path / "run", tmp_path / "a/../run"])
    with pytest.raises(ValueError, match="at least one run's folder, got none"):
        gather([])
    with pytest.raises(FileNotFoundError, match=r"config\.toml"):
        gather([tmp_path])


def test_the_page_asks_for_nothing_from_outside(finished, second):
    text = render(gather([finished, second]))
    assert "default-src 'none'" in text
    assert not [word for word in ("https://", "@import", "url(", "src=") if word in text]
    assert text.replace("http://www.w3.org/2000/svg", "").count("http://") == 0


def test_figures_are_files_that_hold_something_and_come_out_the_same_twice(finished, tmp_path):
    files, again = (write_figures([finished], tmp_path / name) for name in ("a", "b"))
    names = {file.stem for file in files}
    assert {"held-out-loss", "train-loss", "exact-match-by-bytes", "noise", "energy", "share"} < names
    assert {"participation", "heat-zero-padding", "heat-top-8"} < names
    for file, twin in zip(files, again, strict=True):
        assert file.suffix == ".svg"
        assert file.stat().st_size > 4000
        assert file.read_bytes() == twin.read_bytes()


def test_figures_of_several_runs_are_of_their_means(finished, second, tmp_path):
    files = write_figures([finished, second], tmp_path)
    assert {"held-out-loss", "noise-bad-reply", "noise-padded", "participation-padded"} < {file.stem for file in files}


def test_a_name_cannot_leave_the_folder_of_figures_or_break_a_plot(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"top-8"', '"../../top"').replace("client-002", "$\\\\frac{$"))
    files = write_figures([run], tmp_path / "figures")
    assert {file.parent for file in files} == {tmp_path / "figures"}
    assert "heat-.._.._top.svg" in {file.name for file in files}


def report(*arguments: object):
    return CliRunner().invoke(cli.app, ["report", *(str(a) for a in arguments)], env={"COLUMNS": "160"})


def test_the_command_writes_the_page_and_the_figures(finished, tmp_path):
    done = report(finished, "--out", tmp_path / "r.html", "--figures", tmp_path / "f", "--format", "pdf")
    assert done.exit_code == 0, done.output
    assert document_of(tmp_path / "r.html")["runs"][0]["label"] == "bad-reply"
    figures = list((tmp_path / "f").glob("*.pdf"))
    assert len(figures) > 9
    assert all(file.read_bytes().startswith(b"%PDF-") and file.stat().st_size > 4000 for file in figures)
    assert "Usage" in report("--help").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--figures", "f", "--format", "png"], "one of pdf, svg, got png"), (["nowhere"], "nowhere without it")],
)
def test_mistakes_are_one_message(arguments, message, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = report(finished, *arguments)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_figures_without_matplotlib_say_how_to_get_it(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = report(finished, "--figures", tmp_path / "f", "--out", tmp_path / "r.html")
    assert done.exit_code == 1
    assert "pip install 'corolla[report]'" in done.output
    assert report(finished, "--out", tmp_path / "r.html").exit_code == 0


# In a browser.

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium, one for all tests; without it they are skipped."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium or chromedriver is not installed: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield Tab(chromium)
    chromium.quit()


class Tab:
    """A page in the browser, and what a reader does with it."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1280) -> None:
        """From the disk; every message of the console so far is forgotten."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get_log("browser")
        self.driver.get(page.as_uri())
        self.settle()

    def settle(self) -> None:
        """Waits until the page has drawn what it was last told."""
        frames = (
            "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
        )
        self.driver.execute_async_script(frames)

    def ask(self, script: str, *values):
        return self.driver.execute_script(f"return {script}", *values)

    def tick(self, name: str, value: str) -> None:
        """Clicks a box of the filter."""
        self.ask(
            "[...document.querySelectorAll('#filter input')]"
            ".find((box) => box.name === arguments[0] && box.value === arguments[1]).click()",
            name,
            value,
        )
        self.settle()

    def choose(self, name: str, value: str) -> None:
        """Takes an option of a control."""
        self.ask(
            "(([select, value]) => { select.value = value; select.dispatchEvent(new Event('change')); })"
            "([document.getElementById(arguments[0]), arguments[1]])",
            f"choose-{name}",
            value,
        )
        self.settle()

    def series(self, figure: str) -> set[str]:
        """The names of what is drawn."""
        return set(self.ask(f"[...document.querySelectorAll('#{figure} svg .mark')].map((m) => m.dataset.series)"))

    def table(self, figure: str) -> list[list]:
        """The data table under a plot: what a cell shows, or the number behind it."""
        rows = self.ask(
            f"[...document.querySelectorAll('#{figure} details tr')].map((row) => [...row.cells].map("
            "(cell) => cell.querySelector('data')?.value ?? cell.textContent))"
        )
        return [[number(cell) for cell in row] for row in rows]

    def problems(self) -> list:
        return self.driver.get_log("browser")


def number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    return write_report([finished], tmp_path_factory.mktemp("page") / "one.html")


@pytest.fixture(scope="module")
def page_of_two(finished, second, tmp_path_factory):
    return write_report([finished, second], tmp_path_factory.mktemp("page") / "two.html")


PLOTS = ["held_out_loss", "exact_match", "train_loss", "loss_before", "loss_after", "traffic", "noise", "energy"]
PLOTS += ["heat-0", "part-0", "share-0", "weight-0"]


@pytest.mark.parametrize("width", [1280, 380])
def test_every_plot_is_drawn_without_a_complaint_and_fits(width, browser, page):
    browser.open(page, width)
    for plot in PLOTS:
        assert browser.ask(f"document.querySelectorAll('#plot-{plot} svg .mark').length") > 0, plot
        assert len(browser.table(f"plot-{plot}")) > 1, plot
        box = browser.ask(f"document.querySelector('#plot-{plot} svg').getBoundingClientRect()")
        assert box["left"] >= 0 < box["height"], plot
        assert box["right"] <= width, plot
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.problems() == []
    assert (
        browser.ask("performance.getEntriesByType('resource').filter((r) => !r.name.startsWith('data:')).length") == 0
    )


def test_the_rendered_tables_hold_the_runs_numbers(browser, page, finished):
    lines = RunFolder.open(finished).lines()
    rounds = [line for line in lines if line["kind"] == "round"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    browser.open(page)
    assert browser.table("plot-held_out_loss") == [
        ["round", *CLIENTS, "mean"],
        *(
            [e["round"], *(e["clients"][c]["held_out_loss"] for c in CLIENTS), e["mean"]["held_out_loss"]]
            for e in evaluations
        ),
    ]
    trained = browser.table("plot-train_loss")
    assert trained[1][2] == "–"
    assert trained[2][1:4] == [rounds[1]["clients"][c]["train_loss"] for c in CLIENTS]
    sent = [sum(c.get("bytes_up", 0) + c.get("bytes_down", 0) for c in line["clients"].values()) for line in rounds]
    assert [row[2] for row in browser.table("plot-traffic")[1:]] == [0, sum(sent)]
    assert browser.table("plot-share-0")[1:] == [
        [line["round"], *(line["noise"]["share"].get(c, "–") for c in CLIENTS)] for line in rounds
    ]
    errors = rounds[-1]["noise"]["methods"]["zero-padding"]["modules"]
    shown = {row[0]: row[3] for row in browser.table("plot-heat-0")[1:]}
    assert shown == {module: "–" if value is None else value for module, value in errors.items()}


def test_what_was_measured_is_said_with_its_init_and_what_does_not_apply_with_its_reason(browser, page):
    browser.open(page)
    words = browser.ask("document.getElementById('noise').textContent")
    assert f"not applicable: {REFUSAL}" in words
    assert "A initialised shared" in words
    assert "flora’s clients" in words


def test_the_tables_of_a_measured_run_hold_its_noise(browser, real, tmp_path):
    rounds = [line for line in RunFolder.open(real).lines() if line["kind"] == "round"]
    browser.open(write_report([real], tmp_path / "report.html"))
    assert browser.table("plot-share-0")[1:] == [
        [line["round"], *(line["noise"]["share"].get(c, "–") for c in CLIENTS)] for line in rounds
    ]
    head, *rows = browser.table("plot-noise")
    column = next(i for i, name in enumerate(head) if "zero-padding" in str(name))
    assert [row[column] for row in rows] == [
        line["noise"]["methods"]["zero-padding"]["relative_error"] for line in rounds
    ]


def test_a_quarantined_reply_is_shown_with_its_reason(browser, page):
    browser.open(page)
    parts = browser.ask(
        "[...document.querySelectorAll('#plot-part-0 .mark')].map((m) => [m.dataset.series, m.dataset.part])"
    )
    assert [client for client, part in parts if part == "quarantined"] == ["client-001"]
    reasons = browser.ask("document.querySelector('#participation .reasons').textContent")
    assert REASON in reasons
    assert "client-001 in round 1" in reasons


def test_the_filter_takes_a_client_out_of_everything_drawn(browser, page, finished):
    browser.open(page)
    browser.tick("clients", "client-000")
    for plot in ("plot-held_out_loss", "plot-train_loss", "plot-part-0", "plot-weight-0", "plot-share-0"):
        assert "client-000" not in browser.series(plot), plot
        assert "client-002" in browser.series(plot), plot
    last = RunFolder.open(finished).lines()[-1]["clients"]
    weights = [last[c]["examples"] for c in CLIENTS[1:]]
    losses = [last[c]["held_out_loss"] for c in CLIENTS[1:]]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert browser.table("plot-held_out_loss")[-1][-1] == pytest.approx(mean)
    assert "2 of 3 clients" in browser.ask("document.getElementById('filter-state').textContent")
    for client in CLIENTS[1:]:
        browser.tick("clients", client)
    assert browser.ask("document.querySelectorAll('#learning svg').length") == 0
    for client in CLIENTS:
        browser.tick("clients", client)
    assert browser.series("plot-held_out_loss") == {*CLIENTS, "mean"}
    assert browser.problems() == []


def test_the_filter_takes_runs_and_methods_out(browser, page_of_two):
    browser.open(page_of_two)
    assert browser.series("plot-held_out_loss") == {"bad-reply", "padded"}
    assert browser.series("plot-traffic") == {"bad-reply", "padded", "front"}
    browser.tick("methods", "top-8")
    assert browser.series("plot-noise") == {
        f"{m}, {r}" for m in METHODS if m != "top-8" for r in ("bad-reply", "padded")
    }
    browser.tick("view", "each")
    assert "padded client-002" in browser.series("plot-train_loss")
    browser.tick("ways", "zero-padding")
    assert browser.series("plot-held_out_loss") == {*CLIENTS, "mean"}
    browser.tick("ways", "zero-padding")
    browser.tick("runs", "bad-reply")
    assert browser.ask("[...document.querySelectorAll('#facts td')][0].textContent") == "zero-padding"
    assert browser.ask("document.getElementById('plot-part-0')") is None
    browser.tick("runs", "padded")
    assert browser.ask("document.querySelectorAll('#main svg').length") == 0
    assert browser.problems() == []


def test_a_round_a_measure_and_a_module_can_be_chosen(browser, page, finished):
    found = next(line for line in RunFolder.open(finished).lines() if line.get("noise"))["noise"]
    module = "model.layers.1.self_attn.q_proj"
    browser.open(page)
    browser.choose("round", "1")
    browser.choose("heat", "effective_rank")
    shown = {row[0]: row[3] for row in browser.table("plot-heat-0")[1:]}
    assert shown == {name: figures["effective_rank"] for name, figures in found["modules"].items()}
    browser.choose("error", "cosine")
    assert browser.table("plot-noise")[1][1] == found["methods"]["zero-padding"]["cosine"]
    browser.choose("module", module)
    assert [row[1] for row in browser.table("plot-energy")[1:]] == list(found["modules"][module]["energy"].values())


def test_settings_can_be_found(browser, page_of_two):
    browser.open(page_of_two)
    names = "[...document.querySelectorAll('#config tbody th')].map((th) => th.textContent)"
    assert len(browser.ask(names)) > 50
    browser.ask("document.getElementById('config-differences').click()")
    browser.settle()
    assert browser.ask(names) == ["aggregation.method"]
    browser.ask("document.getElementById('config-differences').click()")
    browser.driver.find_element("id", "config-words").send_keys("train.learning")
    browser.settle()
    assert browser.ask(names) == ["train.learning_rate"]


def test_the_page_turns_dark_and_back(browser, page):
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.ask(paper)
    for expected in (True, False):
        browser.ask("document.getElementById('theme').click()")
        assert (browser.ask(paper) != light) == expected
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    browser.open(page)
    assert browser.ask(paper) != light
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_hostile_names_and_reasons_are_only_text(browser, finished, tmp_path):
    name, reason = "<img src=x onerror=window.hurt=1>", "</script><script>window.hurt=1</script><!--<script>"
    run = tmp_path / "<b>run"
    shutil.copytree(finished, run)
    text = (run / "metrics.jsonl").read_text().replace("client-001", name).replace(REASON, reason)
    (run / "metrics.jsonl").write_text(text.replace('"top-8"', json.dumps(reason)))
    browser.open(write_report([run], tmp_path / "report.html"), 380)
    assert browser.ask("window.hurt") is None
    assert browser.ask("document.querySelectorAll('img, b').length") == 0
    assert browser.ask("document.scripts.length") == 2
    assert name in browser.series("plot-held_out_loss")
    assert reason in browser.ask("document.querySelector('#participation .reasons').textContent")
    assert browser.ask("document.title") == "Corolla: <b>run"
    assert browser.ask("document.documentElement.scrollWidth") <= 380
    assert browser.problems() == []


def test_a_run_that_measured_nothing_says_how(browser, finished, tmp_path):
    run = tmp_path / "plain"
    shutil.copytree(finished, run)
    write_lines(run, [{k: v for k, v in line.items() if k != "noise"} for line in RunFolder.open(run).lines()])
    browser.open(write_report([run], tmp_path / "report.html"))
    for section in ("noise", "energy", "share"):
        assert "aggregation.noise = true" in browser.ask(f"document.getElementById('{section}').textContent")
    assert browser.problems() == []


def test_a_run_without_a_sound_round_is_shown_too(browser, finished, tmp_path):
    run = tmp_path / "failed"
    shutil.copytree(finished, run)
    line = next(line for line in RunFolder.open(run).lines() if line["kind"] == "round")
    sent = {"rank": 4, "bytes_down": 0, "dropped_start": 0.0}
    update = {"download_error": 0.0}
    failed = {"successful": False, "clients": {"client-000": sent}, "quarantined": {"client-000": "late"}}
    write_lines(run, [{**line, **failed, "update": update, "noise": None, "received_loss": None}])
    (run / "comparison.json").unlink()
    browser.open(write_report([run], tmp_path / "report.html"))
    assert "too few sound replies" in browser.ask("document.getElementById('certificates').textContent")
    write_lines(run, [])
    browser.open(write_report([run], tmp_path / "report.html"))
    assert browser.ask("document.querySelectorAll('#main svg').length") == 0
    assert browser.problems() == []


@pytest.mark.parametrize("width", [1280, 380])
def test_noise_alone_is_a_page_of_its_own(width, browser, tmp_path):
    measured = noise(CLIENTS, 30, 7)
    measured["methods"]["top-4"]["relative_error"] = None
    measured["methods"]["top-8"]["modules"]["lm_head"] = 0.5
    (tmp_path / "noise.html").write_text(render_noise(measured, "Noise of <folder>"))
    browser.open(tmp_path / "noise.html", width)
    for plot in ("plot-noise", "plot-heat-0", "plot-energy", "plot-share-0"):
        assert browser.ask(f"document.querySelectorAll('#{plot} svg .mark').length") > 0, plot
    assert dict(browser.table("plot-share-0")[1:]) == measured["share"]
    assert browser.series("plot-noise") == {"zero-padding", "flexlora", "top-8"}
    assert browser.ask("document.querySelector('h1').textContent") == "Noise of <folder>"
    assert browser.ask("document.getElementById('certificates')") is None
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.problems() == []


def test_another_score_and_the_servers_own_examples_are_drawn(browser, finished, second, tmp_path):
    """One run of a classifier with a server's held-out set, beside one of plain text, which has a loss alone."""
    runs = [tmp_path / "labels", tmp_path / "plain"]
    for run, source in zip(runs, (finished, second), strict=True):
        shutil.copytree(source, run)
        lines = RunFolder.open(run).lines()
        for found in [found for line in lines for found in [*line["clients"].values(), line.get("mean", {})]]:
            for name in [name for name in found if name.startswith("exact_match")]:
                value = found.pop(name)
                found |= {name.replace("exact_match", "accuracy"): value} if run is runs[0] else {}
        for line in (line for line in lines if line["kind"] == "evaluation"):
            line |= {"score": "accuracy", "server": {"held_out_loss": 2.0, "accuracy": 0.625}} if run is runs[0] else {}
        write_lines(run, lines)
    browser.open(write_report(runs[:1], tmp_path / "one.html"), 1280)
    for plot in ("held_out_loss", "accuracy", "traffic"):
        assert browser.ask(f"document.querySelectorAll('#plot-{plot} svg .mark').length") > 0, plot
    assert browser.ask("document.querySelectorAll('#plot-accuracy [data-series=server]').length") > 0
    facts = browser.ask("document.querySelector('#facts').textContent")
    assert "accuracy 62.5" in facts, facts
    assert "Exact match" not in browser.ask("document.body.textContent").split("{")[0]
    browser.open(write_report(runs[1:], tmp_path / "plain.html"), 1280)
    assert browser.ask("document.querySelectorAll('#plot-traffic svg .mark').length") > 0
    assert browser.ask("document.querySelector('#choose-outcome').value") == "held_out_loss"
    assert browser.problems() == []
