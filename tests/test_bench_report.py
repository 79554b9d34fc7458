"""The page of result files: in a browser, and what it says."""

import copy
import io
import json
import re
import shutil

import bench_samples as samples
import pytest
from PIL import Image

from fastgpt.benchmarks.figures import op_bars
from fastgpt.benchmarks.report import label_runs, render, write_report
from fastgpt.benchmarks.summary import best_peer, summarise
from fastgpt.benchmarks.units import digits, percent, quantity, times
from fastgpt.config import UserError

DESKTOP, PHONE = 1280, 390
WRONG = "wrong: its relative error is 0.31, allowed is 0.02"


def few(data, *ops, rows=None):
    """A file of kernels with the rows of these ops alone, and of them the first ``rows``: figures take time."""
    data["results"] = [row for row in data["results"] if row["op"] in ops][:rows]
    return data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of two commits' kernels, of training and of generation."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        few(samples.leave_out(samples.kernels(1), "gelu", "torch", WRONG), "gelu", "linear_cross_entropy"),
        few(samples.kernels(2, slowed={("gelu", "cpp"): 1.3}, commit="f" * 40), "gelu"),
        samples.scaling(),
        samples.generate(),
    ]
    paths = [samples.save(folder / f"{i}.json", data) for i, data in enumerate(runs)]
    return write_report(paths, folder / "page.html")


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, with its console kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("there is no chromium with its chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def show(browser, page, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def column(browser, table, index):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.cells[arguments[1]].textContent)",
        f"#{table}",
        index,
    )


def click(browser, table, index):
    browser.execute_script(
        "document.querySelectorAll(arguments[0] + ' thead button')[arguments[1]].click()", f"#{table}", index
    )


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_page_is_whole_readable_and_without_errors(browser, written, width):
    show(browser, written[0], width)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0, "it loads something"
    figures = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.checkVisibility(), i.alt,"
        " Number(i.getAttribute('width'))])"
    )
    assert len(figures) == len(written) - 1 > 10
    for complete, natural, shown, visible, alt, meant in figures:
        assert complete
        assert visible
        assert natural > shown
        assert len(alt) > 20
        assert shown > 0.85 * meant, "its letters become too small"
    # The page itself never scrolls sideways: what is too wide, a table, does so in a frame of its own.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('p,td,th,dd,li')].map(e => "
        "parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 13


def test_a_click_sorts_by_value_and_another_turns_it(browser, written):
    show(browser, written[0], DESKTOP)
    table = browser.execute_script(
        "return [...document.querySelectorAll('table')].find(t => t.tHead.textContent.includes('error')).id"
    )
    before = column(browser, table, 2)
    shown = [float(text.replace(",", "")) for text in before]
    assert shown != sorted(shown)
    click(browser, table, 2)
    assert [float(text.replace(",", "")) for text in column(browser, table, 2)] == sorted(shown)
    click(browser, table, 2)
    assert [float(text.replace(",", "")) for text in column(browser, table, 2)] == sorted(shown, reverse=True)
    sorted_by = f"return document.querySelectorAll('#{table} th')[2].getAttribute('aria-sort')"
    assert browser.execute_script(sorted_by) == "descending"
    # Only ours have a ratio to a peer: the others come last in either direction.
    for _ in range(2):
        click(browser, table, 7)
        ratios = column(browser, table, 7)
        empty = [i for i, text in enumerate(ratios) if not text]
        assert empty == list(range(len(ratios) - len(empty), len(ratios)))
        assert empty


def test_words_filter_the_rows(browser, written):
    show(browser, written[0], DESKTOP)
    table, count = browser.execute_script(
        "const input = document.querySelector('.filter input'); input.value = 'CPP gelu';"
        "input.dispatchEvent(new Event('input'));"
        "return [input.dataset.table, input.closest('.filter').querySelector('output').textContent]"
    )
    tasks = column(browser, table, 1)
    assert count.startswith(f"{len(tasks)} of ")
    assert tasks
    assert all(task.startswith("gelu") for task in tasks)
    assert set(column(browser, table, 0)) == {"cpp"}


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def text_of(page):
    return re.sub(r"<[^>]+>", " ", re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL))


def test_everything_is_in_the_one_file(written):
    page = written[0].read_text()
    assert re.findall(r'(?:src|href|srcset)="(?!data:|#)[^"]*"', page) == []
    assert re.findall(r"url\(|@import|https?://", page) == []
    for path in written[1:]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.getcolors(1 << 20)) > 3, f"{path} is empty"


def test_all_backends_appear_with_the_reason_why_one_is_not_timed(written):
    text = text_of(written[0].read_text())
    for name in ("reference", "torch", "cpp"):
        assert f"{name}: faster than every peer in" in text
    for name in ("triton", "cuda"):
        assert re.search(rf"{name}\s*: there is no GPU here", text)
    assert WRONG in text


def test_two_commits_are_compared(written):
    text = text_of(written[0].read_text())
    assert "Of 8 times of ours, 4 became slower and 0 faster" in text
    assert "4 rows are in the old file only." in text
    assert "First: Some CPU 7000, 012345678. Second: Some CPU 7000, fffffffff." in text


def test_two_machines_are_shown_side_by_side_without_a_verdict():
    gpu = samples.kernels(2, machine=samples.machine(gpu="Some GPU 9"), absent={})
    page, pictures = render([few(samples.kernels(1), "gelu", rows=1), few(gpu, "gelu", rows=1)])
    assert "These are two machines" in page
    assert "became slower" not in page
    assert [picture.name for picture in pictures].count("change") == 1
    assert "Some GPU 9, 80 GiB, driver 580.1" in text_of(page)


def test_a_run_that_is_not_valid_says_so_and_why():
    data = few(samples.kernels(valid=False, complete=False, problems=["copy changed by +20%"]), "gelu", rows=1)
    text = text_of(render([data])[0])
    assert "not valid" in text
    assert "not complete" in text
    assert "copy changed by +20%" in text


@pytest.mark.parametrize(("cores", "doubt"), [(0.05, False), (1.2, True)])
def test_a_busy_machine_is_called_so(cores, doubt):
    text = text_of(render([samples.about("kernels", others_cores=cores)])[0])
    assert f"took {cores:.2f} of 2 cores meanwhile" in text
    assert ("too much to rely on the times" in text) == doubt


@pytest.mark.parametrize("kind", ["kernels", "scaling", "generate", "test", "sanitize"])
def test_a_run_without_rows_or_ceilings_is_shown(kind):
    data = samples.about(kind, ceilings={"before": None, "after": None}, complete=False, valid=False)
    page, pictures = render([data])
    assert "not complete" in page
    assert pictures == []


def test_a_row_where_nobody_was_timed_is_shown():
    data = few(samples.kernels(), "gelu", rows=1)
    for name in (*samples.REACHED, *samples.PEERS):
        samples.leave_out(data, "gelu", name, WRONG)
    page, pictures = render([data])
    assert page.count(WRONG) == 5
    assert [picture.name for picture in pictures] == ["gelu-1"]


def test_text_from_a_file_cannot_become_html():
    machine = samples.machine(cpu="<script>alert(1)</script>")
    page, _ = render([samples.about("kernels", machine=machine, absent={"x": "<b>&"})])
    assert "<script>alert" not in page
    assert "&lt;b&gt;&amp;" in page


def test_left_out_and_growth_of_whole_models_are_shown():
    growth = {"sweep": "parameters", "competitor": "cpp", "mode": "eager", "dtype": "bf16", "points": 3}
    summary = {
        "left_out": {"gpt2, 8 x 256 tokens, bf16": {"reference, eager": "memory ends here"}},
        "growth": [{**growth, "ms_per_token": 0.93, "peak_memory_bytes": 0.71}],
    }
    data = samples.scaling(summary=summary)
    data["results"] = data["results"][:6]
    page, pictures = render([data])
    text = text_of(page)
    assert [picture.name for picture in pictures] == ["step-tiny"]
    assert "memory ends here" in text
    assert text.count("1.30x") == 4  # cpp's and torch's, eager and compiled
    assert "0.93" in text
    assert "0.71" in text


def test_labels_say_what_tells_runs_apart():
    one, other_day = samples.kernels(), samples.kernels(date="2026-02-03T04:05:06+00:00")
    other_commit, training = samples.kernels(commit="f" * 40 + "-dirty"), samples.scaling()
    labels = [run.label for run in label_runs([one, other_commit, other_day, training])]
    assert labels == [
        "Some CPU 7000, 012345678, 2026-01-02 03:04:05 UTC",
        "Some CPU 7000, fffffffff-dirty",
        "Some CPU 7000, 012345678, 2026-02-03 04:05:06 UTC",
        "Some CPU 7000",
    ]


def test_a_summary_is_of_the_best_peer():
    rows = few(samples.kernels(noise=0.0), "gelu")["results"]
    peers = {name: one["median_ms"] for name, one in rows[0]["competitors"].items() if not one["ours"]}
    assert best_peer(rows[0]) == min(peers, key=peers.get)
    lines = summarise(rows, ("op", "dtype"))
    assert [(line["backend"], line["dtype"]) for line in lines[:2]] == [("cpp", "fp32"), ("torch", "fp32")]
    of_cpp = [
        min(one["median_ms"] for one in row["competitors"].values() if not one["ours"])
        / row["competitors"]["cpp"]["median_ms"]
        for row in rows
        if row["dtype"] == "fp32"
    ]
    assert lines[0]["ratio"]["min"] == pytest.approx(min(of_cpp))
    assert lines[0]["ratio"]["max"] == pytest.approx(max(of_cpp))
    assert lines[0]["cases"] == 2


def test_a_figure_depends_on_the_times_and_is_drawn_alike_from_the_same():
    rows = few(samples.kernels(), "gelu")["results"][:1]
    other = copy.deepcopy(rows)
    other[0]["competitors"]["cpp"]["of_ceiling"] /= 2
    (one,), (again,), (changed,) = (op_bars("gelu", each) for each in (rows, rows, other))
    assert one.png == again.png != changed.png
    assert Image.open(io.BytesIO(one.png)).width > 1.5 * one.width


def test_an_op_of_many_bars_gets_several_figures():
    rows = few(samples.kernels(), "attention")["results"]
    figures = op_bars("attention", rows)
    assert [figure.name for figure in figures] == ["attention-1", "attention-2", "attention-3"]
    assert sum(figure.alt.count("fastest") for figure in figures) == len(rows)


@pytest.mark.parametrize(
    ("written_as", "meant"),
    [
        (digits(0.0123456), "0.0123"),
        (digits(0.9996), "1.00"),
        (digits(9.996), "10.0"),
        (digits(0.6), "0.600"),
        (digits(12.345), "12.3"),
        (digits(99.96), "100"),
        (digits(1234.4), "1,234"),
        (digits(0), "0"),
        (quantity(3.21e10, "B/s"), "32.1 GB/s"),
        (quantity(10_650_000, ""), "10.7M"),
        (quantity(12, "B"), "12.0 B"),
        (percent(0.456), "46%"),
        (percent(0.0123), "1.2%"),
        (percent(0.0001234), "0.012%"),
        (times(2.2), "2.20x"),
        (times(14.8), "14.8x"),
    ],
)
def test_figures_read_as_people_write_them(written_as, meant):
    assert written_as == meant


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_its_pictures(command, tmp_path):
    file = samples.save(tmp_path / "k.json", few(samples.kernels(), "gelu", rows=1))
    page = tmp_path / "new" / "page.html"
    code, out, err = command("bench", "report", file, "--out", page)
    assert (code, err) == (0, "")
    assert out == f"{page}\n{tmp_path / 'new' / 'page_figures'} (3 pictures)\n"
    assert (tmp_path / "new" / "page_figures" / "gelu-1.png").exists()


def test_pictures_of_the_page_before_do_not_stay(tmp_path):
    page, folder = tmp_path / "page.html", tmp_path / "page_figures"
    paths = [samples.save(tmp_path / f"{op}.json", few(samples.kernels(), op, rows=1)) for op in ("gelu", "layer_norm")]

    def write(path):
        return {picture.name for picture in write_report([path], page)[1:]}

    first = write(paths[0])
    for foreign in ("mine.png", "softmax-1.png"):
        (folder / foreign).touch()
    second = write(paths[1])
    assert "gelu-1.png" in first - second
    assert {path.name for path in folder.iterdir()} == second | {"mine.png", "softmax-1.png"}
    page.write_text('<title>mine</title><figure id="softmax-1">')
    write(paths[0])
    assert {path.name for path in folder.iterdir()} == first | second | {"mine.png", "softmax-1.png"}


def test_the_command_refuses_what_is_not_a_page(command, tmp_path):
    refused = command("bench", "report", tmp_path / "k.json", "--out", tmp_path / "page.pdf")
    assert refused == (2, "", f"fastgpt: --out: the page is HTML, so name it so: {tmp_path / 'page.html'}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "not a JSON file"),
        ("[]", "not a result of fastgpt's benchmarks"),
        ('{"schema": 1}', "its schema is 1"),
        ('{"schema": 2}', "it lacks"),
        (json.dumps(samples.about("speed")), "there is no kind of result 'speed'"),
        (json.dumps(samples.about("kernels", results=[{"op": "gelu"}])), "row 1 lacks case, part"),
    ],
)
def test_what_is_not_a_result_file_is_refused_in_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        write_report([path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_file_named_twice_is_refused(tmp_path):
    path = samples.save(tmp_path / "k.json", samples.kernels())
    with pytest.raises(UserError, match="a result file is named twice"):
        write_report([path, path], tmp_path / "page.html")
