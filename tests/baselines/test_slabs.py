"""Slabs: which slices belong together, their labels, and the common frame of a volume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from covidseg.baselines.slabs import SlabSettings, aligned, aligned_set, frame, make_slabs, move, volumes, windows
from covidseg.errors import DatasetError
from covidseg.preprocess import Crops, WeakSet

pytestmark = pytest.mark.nets

# Volume a: 10 slices, ill from number 6 on; volume b of the same patient: every 4th slice, ill first; c: healthy.
NAMES = [f"a:{k}" for k in range(10)] + [f"b:{4 * k}" for k in range(7)] + [f"c:1:{k}" for k in range(5)]
LABELS = [0] * 6 + [1] * 4 + [1] * 2 + [0] * 5 + [0] * 5
PATIENTS = ["p"] * 17 + ["q"] * 5


def weak(names: list[str] = NAMES, labels: list[int] = LABELS, patients: list[str] = PATIENTS,
         order: np.ndarray | None = None) -> WeakSet:
    order = np.arange(len(names)) if order is None else order
    images = np.random.default_rng(0).random((len(names), 8, 8)).astype(np.float32)
    boxes = np.tile([0, 0, 8, 8], (len(names), 1))
    return WeakSet(Crops(images, np.ones_like(images, bool), boxes), np.array(labels)[order],
                   np.array(patients)[order], np.array(names)[order])


def test_windows_reach_everything_and_end_with_the_last() -> None:
    assert windows(7, 3, 2).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert windows(8, 3, 2).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [5, 6, 7]]
    assert windows(3, 3, 1).tolist() == [[0, 1, 2]]
    assert windows(2, 4, 2).tolist() == [[0, 1, 1, 1]]
    assert windows(0, 4, 2).shape == (0, 4)
    for count in range(1, 30):
        for depth in range(1, 7):
            for step in range(1, depth + 1):
                reached = windows(count, depth, step)
                assert set(reached.ravel().tolist()) == set(range(count))
                assert (np.diff(reached, axis=1) >= 0).all()


@pytest.mark.parametrize("shuffled", [False, True])
def test_slabs_hold_consecutive_slices_of_one_volume_and_their_label(shuffled: bool) -> None:
    order = np.random.default_rng(1).permutation(len(NAMES)) if shuffled else None
    data = weak(order=order)
    slabs = make_slabs(data, SlabSettings(depth=3, step=1))
    volume, number = volumes(data.names)
    assert len(slabs) == 8 + 5 + 3
    assert set(volume) == {"a", "b", "c:1"}, "names may hold colons"
    for members, label, patient in zip(slabs.members, slabs.labels, slabs.patients, strict=True):
        assert len(set(volume[members])) == 1, "never two volumes, although a and b are one patient's"
        step = 4 if volume[members[0]] == "b" else 1
        assert np.diff(number[members]).tolist() == [step, step]
        assert label == int(data.labels[members].any())
        assert set(data.patients[members]) == {patient}


def test_a_slab_never_crosses_a_gap() -> None:
    names = [f"a:{k}" for k in (0, 1, 2, 3, 20, 21, 22)]
    data = weak(names, [0, 0, 0, 0, 1, 1, 1], ["p"] * 7)
    slabs = make_slabs(data, SlabSettings(depth=3, step=1))
    assert slabs.members.tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6]]
    joined = make_slabs(data, SlabSettings(depth=3, step=1, gap=50))
    assert [2, 3, 4] in joined.members.tolist()


def test_a_short_run_repeats_its_last_slice() -> None:
    slabs = make_slabs(weak(["a:0", "a:1", "b:5"], [0, 0, 1], ["p", "p", "q"]), SlabSettings(depth=3, step=1))
    assert slabs.members.tolist() == [[0, 1, 1], [2, 2, 2]]
    assert slabs.labels.tolist() == [0, 1]


@pytest.mark.parametrize(("labels", "what"), [([0, 0, 0, 0], "has a lesion"), ([0, 1, 0, 1], "free of lesions")])
def test_a_missing_class_is_named(labels: list[int], what: str) -> None:
    with pytest.raises(DatasetError, match=what):
        make_slabs(weak([f"a:{k}" for k in range(4)], labels, ["p"] * 4), SlabSettings(depth=3, step=1))


def test_the_frame_is_the_square_around_all_boxes() -> None:
    boxes = np.array([[10, 20, 30, 30], [5, 25, 20, 20], [12, 0, 40, 40]])
    top, left, height, width = frame(boxes)
    assert height == width == 50
    assert top <= 5
    assert left <= 0
    assert top + height >= 52
    assert left + width >= 50
    assert frame(boxes[:1]).tolist() == [10, 20, 30, 30]
    high = np.array([[10, 20, 15, 30], [5, 25, 20, 40]])  # pixels twice as high as wide
    assert frame(high).tolist() == [4, 20, 22, 45]


def test_moving_cuts_out_what_lies_in_the_new_box() -> None:
    whole = torch.arange(144.0).reshape(1, 12, 12)
    box = np.array([[20, 30, 12, 12]])
    inner = move(whole, box, np.array([22, 33, 6, 6]), 6)
    torch.testing.assert_close(inner[0], whole[0, 2:8, 3:9], atol=1e-3, rtol=0)
    wide = move(whole, box, np.array([17, 27, 18, 18]), 18, beyond="zeros")[0]
    torch.testing.assert_close(wide[3:15, 3:15], whole[0], atol=1e-3, rtol=0)
    assert wide[:2].abs().max() == 0
    assert move(whole, box, np.array([17, 27, 18, 18]), 18)[0, 17, 17] == pytest.approx(143, abs=1e-3)


def spot_in_each_crop() -> Crops:
    """The same spot of the slice, rows 30 to 33, columns 40 to 43, seen in crops of different place and size."""
    boxes = np.array([[10, 20, 40, 40], [20, 30, 40, 40], [0, 0, 80, 80]])
    images = np.zeros((3, 40, 40), np.float32)
    images[0, 20:24, 20:24] = images[1, 10:14, 10:14] = images[2, 15:17, 20:22] = 1
    return Crops(images, images > 0, boxes)


def test_a_common_frame_lays_neighbours_on_each_other() -> None:
    crops = spot_in_each_crop()
    picture, lung = aligned(crops, frame(crops.boxes), 80)
    for one, mask in zip(picture, lung, strict=True):
        rows, columns = np.nonzero(one.numpy() > 0.6)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 33, 40, 43)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert mask[31, 41] == 1
    apart = crops.images.astype(bool)
    assert not (apart[0] & apart[1]).any(), "in the crops themselves the spot lies elsewhere each time"


def test_each_volume_has_a_frame_of_its_own() -> None:
    crops = spot_in_each_crop()
    data = WeakSet(crops, np.array([0, 1, 1]), np.array(["p"] * 3), np.array(["a:0", "a:1", "b:0"]))
    pictures = aligned_set(data, 40)[0]
    torch.testing.assert_close(pictures[2], torch.from_numpy(crops.images[2]), atol=1e-5, rtol=0)
    both = pictures[:2].numpy() > 0.5
    assert (both[0] == both[1]).all()
