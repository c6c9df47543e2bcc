"""Targets: label tables and splits. What is accepted has to keep the promises of :mod:`covidseg.data.splits`."""

from __future__ import annotations

from pathlib import Path

from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.splits import PARTS, Split, apply_split, read_split
from covidseg.errors import DatasetError

LABELS = "volume,slice,has_lesion,patient\na,0,0,p1\na,2,1,p1\nb,1,0,p2\n"
STACK = "position,has_lesion,medseg100_slice\n0,1,5\n1,0,3\n2,1,0\n"
VOLUMES = "volume,patient,split\na,p1,train\nb,p2,test\n"
SLICES = "slice,split\n0,train\n3,test\n5,val\n7,left_out\n"
OF_VOLUMES = Split("v", {"a": "train", "b": "test"}, {"a": "p1", "b": "p2"}, {})
OF_SLICES = Split("s", {}, {}, {0: "train", 1: "test", 3: "test", 5: "val"})


def label_seeds() -> list[bytes]:
    """Tables of both layouts, with and without what is optional."""
    texts = (LABELS, STACK, "volume,slice,has_lesion\na,0,1\nb,0,0\n", "position,has_lesion\n0,1\n1,0\n",
             "has_lesion,slice,volume\n1,0,a\n0,1,b\n", '"volume","slice","has_lesion"\r\n"a","0","1"\r\n')
    return [text.encode() for text in texts]


def split_seeds() -> list[bytes]:
    """Splits by volumes and by slices."""
    return [VOLUMES.encode(), SLICES.encode(), b"split,volume,patient\ntrain,a,p\ntrain,b,p\n", b"split,slice\nval,3\n"]


def make_folders(folder: Path, labels: bytes, stack: bytes) -> tuple[Path, Path]:
    """A folder of volumes a and b, and one of a stack, with these tables; scans are empty, loading opens none."""
    for name in ("volumes/im/a.nii.gz", "volumes/im/b.nii.gz", "stack/s_im.nii.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "volumes/slice_labels.csv").write_bytes(labels)
    (folder / "stack/s_slices.csv").write_bytes(stack)
    return folder / "volumes", folder / "stack"


def _loaded(root: Path) -> Dataset | None:
    """A data folder, None if it was refused; its labels are slice numbers and 0 or 1."""
    try:
        data = load_dataset(root)
    except DatasetError:
        return None
    for case in data.cases:
        assert isinstance(case.patient, str), "a patient without a name"
        assert case.patient, "a patient without a name"
        assert all(type(k) is int and k >= 0 and label in (0, 1) for k, label in case.labels.items()), "odd labels"
    return data


def read_labels(data: bytes, folder: Path) -> None:
    """Reads a label table of volumes and of a stack, and applies a split to what is accepted."""
    for root, split in zip(make_folders(folder, data, data), (OF_VOLUMES, OF_SLICES), strict=True):
        found = _loaded(root)
        if found is not None:
            _apply(found, split)


def _apply(data: Dataset, split: Split) -> None:
    """All parts of a split: no patient stands on two sides."""
    side: dict[str, str] = {}
    for part in PARTS:
        try:
            reduced = apply_split(data, split, part)
        except DatasetError:
            continue
        for case in reduced.cases:
            if part != "left_out" and not split.slices:
                assert side.setdefault(case.patient, part) == part, "a patient on two sides"


def read_splits(data: bytes, folder: Path) -> None:
    """Reads a split and applies it to volumes and to a stack."""
    path = folder / "own.csv"
    path.write_bytes(data)
    split = read_split(path)
    assert bool(split.volumes) != bool(split.slices), "a split of volumes and of slices, or of nothing"
    assert all(isinstance(name, str) and name for name in (*split.volumes, *split.patients.values())), "odd names"
    assert all(type(k) is int and k >= 0 for k in split.slices), "odd slice numbers"
    assert set(split.volumes.values()) | set(split.slices.values()) <= set(PARTS), "odd parts"
    for root in make_folders(folder, LABELS.encode(), STACK.encode()):
        _apply(load_dataset(root), split)
