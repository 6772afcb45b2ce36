"""The page of a run and of a folder of runs: what stands on it, what is said of what is not there, what is refused."""

import base64
import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_records import METRICS, run_folder, short_run, whole_run

from apt.cli import main
from apt.files.whole import write_json
from apt.runs.report import report
from apt.runs.report.compare import baselines_of, comparisons
from apt.runs.report.records import load_run

ALL_PICTURES = {
    *("loss", "score", "sparsity", "budget", "kept_heads", "kept_neurons", "ranks", "hidden"),
    *("salience_heads", "salience_neurons", "step_time", "throughput", "memory"),
}


class Reader(HTMLParser):
    """What a browser would find: pictures with their words, addresses, tags, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += " " + data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that recorded everything."""
    return report(whole_run(tmp_path_factory.mktemp("whole") / "run"))


def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


def test_a_whole_run_has_every_picture_and_table(page: Path) -> None:
    files, found = list((page.parent / "report").iterdir()), read(page)
    assert {path.name for path in files} == {f"{name}.png" for name in ALL_PICTURES}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert len(found.images) == len(ALL_PICTURES)
    assert "Not recorded" not in found.text
    for words in ("accuracy on 2,000 sentences 0.8265", "sparsity reached 60.4%", "peak memory of training, MB 532"):
        assert words in found.text
    for words in ("Heads kept: 4 of 8", "Neurons kept: 64 of 128", "seed: 0", "version of torch 2.0", "7,100"):
        assert words in found.text
    alts = " ".join(image["alt"] or "" for image in found.images)
    for words in ("0.500 at step 2, 0.050 at step 20", "From 32 to 16 hidden", "at most 11", "7,000 at"):
        assert words in alts
    assert all(image["alt"] for image in found.images)


def test_the_page_asks_nobody_for_anything(page: Path) -> None:
    found = read(page)
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert not {"script", "link rel=stylesheet", "iframe", "object"} & set(found.tags)
    drawings = [base64.b64decode(str(image["src"]).partition(",")[2]).decode() for image in found.images]
    text = page.read_text(encoding="utf-8") + "".join(drawings)
    outside = [url for url in re.findall(r"https?://[^\s\"'<)]+", text) if not url.startswith(NAMES)]
    assert not outside
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


NAMES = ("http://www.w3.org/", "http://purl.org/dc/", "http://creativecommons.org/ns#")  # namespaces, which are names


def test_pictures_follow_the_colour_scheme(page: Path) -> None:
    for image in read(page).images:
        svg = base64.b64decode(str(image["src"]).partition(",")[2]).decode()
        assert "prefers-color-scheme:dark" in svg
        assert "currentColor" in svg
        assert "#0b0f14" not in svg
        ground = re.search(r'id="patch_1">(.*?)</g>', svg, re.DOTALL)
        assert ground
        assert "fill: none" in ground[1]


def test_the_same_records_the_same_page(page: Path) -> None:
    folder, first = page.parent, page.read_bytes()
    pictures = folder / "report"
    shutil.copy(pictures / "loss.png", pictures / "stale.png")  # of an older page
    (pictures / "mine.png").write_bytes(b"\x89PNG of somebody")
    assert report(folder).read_bytes() == first
    assert not (pictures / "stale.png").exists()
    assert (pictures / "mine.png").read_bytes() == b"\x89PNG of somebody"
    assert not list(folder.rglob("*.apt-lm"))


def test_a_link_in_the_place_of_the_pictures_is_not_followed(tmp_path: Path) -> None:
    folder = short_run(tmp_path / "run")
    album = tmp_path / "album"
    album.mkdir()
    (album / "mine.png").write_bytes(b"mine")
    (folder / "report").symlink_to(album)
    with pytest.raises(ValueError, match=r"report: .*report is a link, and nothing is written where it leads"):
        report(folder)
    assert [(path.name, path.read_bytes()) for path in album.iterdir()] == [("mine.png", b"mine")]


@pytest.mark.parametrize(
    ("entry", "value"),
    [("accuracy", None), ("sparsity", [1]), ("latency_shape", [1]), ("active_gates", 3), ("data", 3)],
)
def test_a_run_with_an_entry_that_means_nothing_is_left_out_by_name(
    entry: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "odd"):
        short_run(tmp_path / name)
    path = tmp_path / "odd" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {entry: value}), encoding="utf-8")
    assert report(tmp_path).exists()
    told = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert len(told) == 1
    assert f"{tmp_path / 'odd'} is corrupt (metrics.json: {entry} is " in told[0]


def test_what_a_terminal_would_obey_is_spelt_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A title that a model's name sets, in a table and in the name of a folder."""
    folder = short_run(tmp_path / "a\x1b]0;title\x07")
    path = folder / "metrics.json"
    told = json.loads(path.read_text(encoding="utf-8")) | {"method": "\x1b]0;title\x07", "sparsity": [1]}
    path.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValueError, match="corrupt"):
        report(folder)
    assert main(["report", str(folder)]) == 2
    path.write_text(json.dumps(told | {"sparsity": 0.5}), encoding="utf-8")
    report(folder)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert "\\x1b]0;title\\x07" in said.out
    assert "\\x1b]0;title\\x07" in said.err


def test_an_older_run_says_what_it_did_not_record(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", METRICS)
    page = read(report(folder))
    pictures = {path.stem for path in (folder / "report").iterdir()}
    assert pictures == {"sparsity", "kept_heads", "kept_cross_heads", "kept_neurons"}
    assert page.text.count("Not recorded: the run left no steps.jsonl") == 4
    assert "Not recorded: the run took no scores on its way" in page.text
    assert "Not recorded: no salience" in page.text
    assert "there is no config.yaml" in page.text


def test_a_run_that_pruned_nothing(tmp_path: Path) -> None:
    page = read(report(run_folder(tmp_path / "run", METRICS | {"method": "lora"}, events=0, timings=False)))
    assert page.text.count("Nothing was pruned.") == 2
    assert "No event: nothing was pruned" in page.text
    assert not page.images


def test_what_is_shown_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\"$[bold]"
    folder = short_run(tmp_path / "a & <b>", model=evil, data=evil, device=evil, method=evil)
    (folder / "config.yaml").write_text(json.dumps({"output_dir": evil}), encoding="utf-8")
    page = report(folder)
    assert "script" not in read(page).tags
    assert "b" not in read(page).tags
    assert evil in read(page).text
    overview = report(tmp_path)
    assert "script" not in read(overview).tags
    assert "a%20%26%20%3Cb%3E/report.html" in read(overview).addresses


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics.json", "{", "metrics.json: "),
        ("metrics.json", "[1]", "metrics.json: it holds no names"),
        ("metrics.json", '{"accuracy": "high"}', "metrics.json: accuracy is 'high'"),
        ("efficiency.json", '{"train_seconds": "long"}', "efficiency.json: train_seconds is 'long'"),
        ("steps.jsonl", '{"step": 1', "steps.jsonl: "),
        ("steps.jsonl", '{"loss": 1.0}', "steps.jsonl: a row without a step"),
        ("steps.jsonl", '{"step": 1, "loss": "low"}', "steps.jsonl: loss of step 1 is no number"),
        ("shapes.jsonl", '{"step": 1, "units": 3, "ranks": {}}', "shapes.jsonl: units of step 1 are no counts"),
        ("events.jsonl", '{"step": 1}', "events.jsonl: 'sparsity'"),
        ("event_timing.json", "{}", "event_timing.json: events is missing"),
        ("config.yaml", "a: [", "config.yaml: "),
    ],
)
def test_a_corrupt_record_is_one_line(
    name: str, line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole_run(tmp_path / "run")
    (folder / name).write_text(line + "\n", encoding="utf-8")
    assert main(["report", str(folder)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "is corrupt" in error
    assert words in error
    assert not (folder / "report.html").exists()


def grid(folder: Path) -> Path:
    """Full fine-tuning, LoRA under two seeds, and two pruned runs, one of a third seed."""
    plain: dict[str, Any] = {"sparsity": 0.0, "target_sparsity": 0.0}
    short_run(folder / "full", method="full", accuracy=0.9, train_seconds=100.0, latency_ms_small=200.0, **plain)
    short_run(folder / "lora0", method="lora", accuracy=0.8, train_seconds=50.0, latency_ms_small=300.0, **plain)
    whole_run(
        folder / "lora1", method="lora", accuracy=0.7, train_seconds=40.0, latency_ms_small=300.0, seed=1, **plain
    )
    short_run(folder / "apt0", accuracy=0.72, train_seconds=75.0, latency_ms_small=100.0)
    short_run(folder / "deep/apt2", accuracy=0.75, train_seconds=90.0, latency_ms_small=100.0, seed=2)
    return folder


def test_a_folder_of_runs_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = grid(tmp_path / "grid")
    write_json(folder / "late.partial/metrics.json", METRICS)  # still running
    found = read(report(folder))
    assert {"full/report.html", "lora0/report.html", "deep/apt2/report.html"} <= set(found.addresses)
    assert (folder / "deep/apt2/report.html").exists()
    assert (folder / "report/trade_off_1.png").exists()
    assert "5 finished runs" in found.text
    assert not any("late.partial" in address for address in found.addresses)
    assert "Ringed: full, lora0, lora1." in found.text
    out = " ".join(capsys.readouterr().out.split())
    assert "with LoRA as 1" in out
    runs = [load_run(folder / name, label=name) for name in ("apt0", "deep/apt2", "full", "lora0", "lora1")]
    table, full, lora = comparisons(runs)
    assert table.rows[0] == (
        *("1", "apt0", "apt", "60.4%", "0"),
        *("0.7200", "75.0", "532", "100.0", "320.0", "16.2"),
    )
    assert full.rows[0][4:6] == ("0.800", "0.750")
    assert lora.rows[0][4:8] == ("0.900", "1.500", "1.000", "0.333")  # the LoRA run of its own seed
    assert lora.rows[1][4:6] == ("1.000", "2.000")  # of seed 2 there is none: the mean of both
    assert baselines_of(runs[0], runs, "lora") == [runs[3]]


def test_other_data_is_no_baseline(tmp_path: Path) -> None:
    short_run(tmp_path / "grid/lora", method="lora", sparsity=0.0, data="other.csv")
    short_run(tmp_path / "grid/pruned_lora", method="lora")
    short_run(tmp_path / "grid/apt")
    found = read(report(tmp_path / "grid"))
    assert "There is no unpruned run" not in found.text  # the other's own
    runs = [load_run(path) for path in sorted((tmp_path / "grid").iterdir()) if path.is_dir() and path.name != "report"]
    assert [run.label for run in runs] == ["apt", "lora", "pruned_lora"]
    assert [row[1] for row in comparisons(runs)[1].rows] == ["lora"]
    assert len(list((tmp_path / "grid/report").iterdir())) == 2  # a picture for each data set


def test_a_corrupt_run_in_a_folder_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short_run(tmp_path / "good")
    (short_run(tmp_path / "bad") / "steps.jsonl").write_text("{", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 0
    assert "apt: left out: report: a record in" in capsys.readouterr().err
    assert "(steps.jsonl: " in read(tmp_path / "report.html").text
    assert not (tmp_path / "bad/report.html").exists()


def test_without_the_drawing_library_the_tables_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert main(["report", str(short_run(tmp_path / "run"))]) == 2
    printed = capsys.readouterr()
    assert "sparsity reached" in printed.out
    assert printed.err == "apt: error: report: the page needs matplotlib; pip install 'apt-lm[plots]'\n"


def test_a_write_that_fails_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = short_run(tmp_path / "run")
    before = report(folder).read_bytes()
    capsys.readouterr()

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["report", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.rglob("*.partial"))
