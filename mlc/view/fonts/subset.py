"""How the files of this folder were made: ``python -m mlc.view.fonts.subset FOLDER_OF_LIBERATION_SANS_2``.

Needs fonttools. The reserved name is changed, as the licence (OFL.txt) asks of a modified version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mlc.view.fonts import FAMILY

# Latin, Greek, and the signs that labels use.
RANGES = ((0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x2010, 0x2027), (0x2080, 0x2089), (0x2190, 0x2194),
          (0x2202, 0x2202), (0x2207, 0x2207), (0x2211, 0x2211), (0x221A, 0x221A), (0x2260, 0x2265))  # fmt: skip


def main(folder: Path) -> None:
    """Write both fonts and their widths into this folder."""
    here, widths = Path(__file__).parent, {}
    for weight in ("Regular", "Bold"):
        font = subset(folder / f"LiberationSans-{weight}.ttf", weight)
        font.save(here / f"{weight.lower()}.ttf")
        metrics, names = font["hmtx"], font.getBestCmap()
        widths[weight.lower()] = {chr(c): metrics[n][0] for c, n in sorted(names.items())}
    (here / "widths.json").write_text(json.dumps(widths, ensure_ascii=False, indent=0) + "\n", "utf-8")


def subset(path: Path, weight: str) -> Any:
    """The font with the characters above, without hints and kerning, under its own name."""
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    font = TTFont(path)
    options = Options(hinting=False, layout_features=[], name_IDs=[0, 1, 2, 3, 4, 5, 6, 13, 14], notdef_outline=True)
    maker = Subsetter(options)
    maker.populate(unicodes=[c for low, high in RANGES for c in range(low, high + 1)])
    maker.subset(font)
    for record in font["name"].names:
        new = {1: FAMILY, 3: f"{FAMILY} {weight}", 4: f"{FAMILY} {weight}", 6: f"mlcSans-{weight}"}.get(record.nameID)
        if new is not None:
            font["name"].setName(new, record.nameID, record.platformID, record.platEncID, record.langID)
    return font


if __name__ == "__main__":
    main(Path(sys.argv[1]))
