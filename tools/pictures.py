"""Makes a data folder of CT slices that were published as pictures: ``python tools/pictures.py PICTURES TABLE OUT``.

TABLE is a CSV with the columns ``file``, ``study`` and ``has_lesion``; others are ignored. Each picture becomes a scan
of one slice, named as the file, whose patient is the study. Pictures show a patient as radiologists see a slice, and
grey levels of a display window; the size of their pixels is unknown, and 0.7 mm stands in its place.

``--even`` and ``--odd`` take only files with such a number after their last ``img``, so that settings can be chosen on
one half and figures taken on the other.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
from skimage.color import rgb2gray
from skimage.io import imread

from covidseg.data.folder import VOLUME_COLUMNS, load_dataset, read_table, write_table
from covidseg.data.nifti import Grid
from covidseg.data.scan import write_like
from covidseg.errors import CovidsegError, DatasetError

COLUMNS = ("file", "study", "has_lesion")
MM = 0.7


def read_picture(path: Path) -> np.ndarray:
    """Grey levels ``(rows, columns)`` uint8."""
    try:
        picture = np.asarray(imread(path))
    except (OSError, ValueError, SyntaxError) as error:  # the last one of a PNG that is damaged
        raise DatasetError(f"is no picture that can be read ({error})", path=path, remedy="Fetch it again") from error
    return picture if picture.ndim == 2 else (255 * rgb2gray(picture[..., :3])).round().astype(np.uint8)


def half_of(name: str) -> str:
    """``odd`` or ``even``, by the number after the last ``img`` of a file name."""
    numbers = re.findall(r"img(\d+)", name)
    if not numbers:
        raise DatasetError(f"{name} has no number after 'img'", remedy="Leave --odd and --even out")
    return "odd" if int(numbers[-1]) % 2 else "even"


def make_folder(pictures: Path, table: Path, out: Path, half: str | None = None) -> int:
    """Writes the data folder, and returns how many slices it holds. ``half`` takes only ``odd`` or ``even`` ones."""
    columns, lines = read_table(table)
    if missing := [column for column in COLUMNS if column not in columns]:
        raise DatasetError(f"lacks the column {', '.join(missing)}", path=table,
                           remedy=f"The first line must name {', '.join(COLUMNS)}")
    rows = [row for _, row in lines if half is None or half_of(row["file"]) == half]
    (out / "im").mkdir(parents=True, exist_ok=True)
    for row in rows:
        pixels = read_picture(pictures / row["file"])
        grid = Grid((pixels.shape[1], pixels.shape[0], 1), np.diag((-MM, -MM, 5.0, 1.0)))
        write_like(pixels[None], grid, out / "im" / f"{Path(row['file']).stem}.nii.gz")
    write_table(out / "slice_labels.csv", (*VOLUME_COLUMNS, "patient"),
                [(Path(row["file"]).stem, 0, row["has_lesion"], row["study"]) for row in rows])
    return load_dataset(out).labels()  # which refuses labels other than 0 and 1, and a name twice


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pictures", type=Path, help="folder of JPEG or PNG files")
    parser.add_argument("table", type=Path, help="CSV with the columns file, study and has_lesion")
    parser.add_argument("out", type=Path, help="data folder to write")
    halves = parser.add_mutually_exclusive_group()
    for half in ("odd", "even"):
        halves.add_argument(f"--{half}", dest="half", action="store_const", const=half)
    given = parser.parse_args(arguments)
    try:
        print(f"{make_folder(given.pictures, given.table, given.out, given.half)} slices in {given.out}")
    except CovidsegError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
