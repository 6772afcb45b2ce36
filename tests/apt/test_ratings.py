"""The rated reviews: what the script reads out of an archive of that layout, and the grids that train on it."""

import csv
import io
import runpy
import tarfile
import zipfile
from pathlib import Path

import pytest

from apt.runs.experiment import cells, load_grid

EXAMPLES = Path(__file__).parents[2] / "examples"
SNIPPETS = {
    "movie": 'M1\t2.26666666667\tA "fine" film, café scenes and all.\r\nM2\t-1.0\tNeither here\u2028nor there.\r\n',
    "amazon": "1_1\t-1.05\tIt broke.\r\n",
}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for kind, text in SNIPPETS.items():
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    path = tmp_path / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_snippets_ratings_and_classes(archive: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "ratings.py"))
    script["main"](str(archive), str(tmp_path / "data" / "ratings.csv"))
    with (tmp_path / "data" / "ratings.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["text", "rating", "sentiment", "kind"],
            ['A "fine" film, café scenes and all.', "2.26666666667", "positive", "movie"],
            ["Neither here\u2028nor there.", "-1.0", "neutral", "movie"],
            ["It broke.", "-1.05", "negative", "amazon"],
        ]


def test_the_grids_are_a_number_and_three_classes() -> None:
    runs = {name: cells(load_grid(EXAMPLES / f"{name}_grid.yaml")) for name in ("ratings", "sentiment")}
    assert [cell.config.model.task for cell in runs["ratings"]] == ["regression"] * 6
    assert [(cell.config.model.task, cell.config.data.label_column) for cell in runs["sentiment"]] == [
        ("classification", "sentiment")
    ] * 6
    for grid in runs.values():
        assert [cell.name for cell in grid][:2] == ["lora-seed0", "apt-60-seed0"]
