"""Makes the pictures of the documents: docs/pictures/*.svg.

They are made of what they show: timelines of the descriptions beside them, the ladder of the table of backends, the house of
docs/architecture.md, plots of docs/benchmarks. ``tests/docs/test_pictures.py`` compares.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import plots
import structure
import timelines

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"


def pictures() -> dict[str, str]:
    """The text of every picture, by its file's name."""
    found = {f"{path.stem}.svg": timelines.draw(timelines.read(path.read_text())) for path in sorted(PICTURES.glob("*.txt"))}
    found["ladder.svg"] = structure.ladder()
    found["house.svg"] = structure.house((DOCS / "architecture.md").read_text())
    found |= {"latency.svg": plots.latency(), "ratio.svg": plots.ratio(), "norms.svg": plots.norms()}
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pictures().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=PICTURES, metavar="FOLDER", help="where they go (default: docs/pictures)"
    )
    main(parser.parse_args().folder)
