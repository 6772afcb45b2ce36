"""Film and product reviews with mean ratings, out of the source archive of vadersentiment 0.5 (MIT), as one csv file.

``pip download --no-deps --no-binary :all: --dest runs/data vadersentiment==0.5``, then
``python examples/ratings.py runs/data/vaderSentiment-0.5.zip runs/data/ratings.csv``; ``make ratings`` does both.

Twenty people rated each snippet from -4 to 4 (Hutto and Gilbert, ICWSM 2014). Columns: text, rating (their mean),
sentiment ("neutral" within 1 of 0, else "negative" or "positive") and kind ("movie" or "amazon").
"""

import csv
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

INSIDE = "additional_resources/hutto_ICWSM_2014.tar.gz"  # of the archive
KINDS = ("movie", "amazon")
NEUTRAL = 1.0  # of the rating, on either side of 0
HEADER = ("text", "rating", "sentiment", "kind")


def rows(archive: Path) -> Iterator[tuple[str, str, str, str]]:
    """Text, rating, sentiment and kind of each snippet, in the order of the files."""
    with zipfile.ZipFile(archive) as outer:
        name = next(name for name in outer.namelist() if name.endswith(INSIDE))
        with outer.open(name) as file, tarfile.open(fileobj=file, mode="r:gz") as inner:
            for kind in KINDS:
                member = inner.extractfile(f"hutto_ICWSM_2014/{kind}ReviewSnippets_GroundTruth.txt")
                assert member is not None
                for line in member.read().decode("utf-8").split("\r\n"):
                    if line:
                        _, rating, text = line.split("\t")
                        yield text, rating, sentiment(float(rating)), kind


def sentiment(rating: float) -> str:
    """The class of a mean rating."""
    if abs(rating) <= NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def main(archive: str, output: str) -> None:
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows(rows(Path(archive)))
    os.replace(partial, path)


if __name__ == "__main__":
    main(*sys.argv[1:3])
