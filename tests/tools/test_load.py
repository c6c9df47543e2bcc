"""Under load: large volumes, hundreds of pictures with sliders, eight predictions at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from load import content, growth, peak_mb
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tiny import WARM, finished_run
from typer.testing import CliRunner

from covidseg.atomic import write_whole
from covidseg.book.explore import Explorer, browse, explore
from covidseg.cli import app
from covidseg.data.scan import read_scan
from covidseg.predict import Predictor, load_predictor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no /proc to ask")
EIGHT = 8           # programs or threads at the same time
BYTES_A_VOXEL = 8  # that predicting may need beside the program; 4 to 6 measured, and a copy of floats takes 4 more


@pytest.fixture(scope="module")
def run(tiny_phantom: Path) -> Path:
    return finished_run(tiny_phantom).folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load_predictor(run)


def repeated(scan: Path, slices: int, target: Path) -> Path:
    """A scan of many slices: those of a small one, over and over."""
    small = read_scan(scan)
    pixels = np.resize(small.pixels, (slices, *small.pixels.shape[1:]))
    nib.save(nib.Nifti1Image(pixels.transpose(2, 1, 0), small.grid.affine), target)
    return target


# --- the helpers show what they are for ----------------------------------------------------------------------------

def leak_memory(kept: list[Any]) -> None:
    kept.append(np.ones(1 << 17))  # a megabyte


def leak_file(kept: list[Any]) -> None:
    kept.append(open(os.devnull))  # noqa: SIM115


def leak_thread(kept: list[Any]) -> None:
    kept.append(threading.Event())
    threading.Thread(target=kept[-1].wait, daemon=True).start()


def leak_figure(kept: list[Any]) -> None:
    plt.figure(figsize=(0.1, 0.1))


@pytest.mark.weekly
@pytest.mark.parametrize(("leak", "said"), [(leak_memory, "memory grew by "), (leak_file, "10 more files"),
                                            (leak_thread, "10 more threads"), (leak_figure, "10 more figures")])
def test_what_leaks_is_caught(leak: Callable[[list[Any]], None], said: str) -> None:
    kept: list[Any] = []
    try:
        grown = growth(lambda: leak(kept), 10, most_mb=5)
        assert any(line.startswith(said) for line in grown), grown
    finally:
        for thing in kept:
            for end in ("close", "set"):
                getattr(thing, end, lambda: None)()
        plt.close("all")


@pytest.mark.weekly
def test_what_does_not_leak_passes() -> None:
    def work() -> None:
        np.ones(1 << 20)
        with open(os.devnull) as stream:
            stream.read()
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        plt.close(plt.figure())
    assert growth(work, 10, most_mb=5) == []


@pytest.mark.weekly
def test_a_peak_counts_although_it_is_gone() -> None:
    assert 30 < peak_mb(lambda: np.ones(4 << 20)) < 40
    assert peak_mb(lambda: None) < 2


# --- many slices ---------------------------------------------------------------------------------------------------

@pytest.mark.weekly
def test_memory_grows_by_a_few_bytes_a_voxel(predictor: Predictor, tiny_phantom: Path, tmp_path: Path) -> None:
    """Two of the scan, one each of lung and lesion mask, and what the lungs need on their grid: no copy of floats.

    Of 600 slices of 512 x 512, `make bench` measures that they need less than 2 GB in all.
    """
    small = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    large = small.pixels.repeat(4, axis=1).repeat(4, axis=2)                       # 512 x 512
    needed = []
    for slices in (20, 20, 80):  # caches fill in the first
        path = tmp_path / f"{slices}.nii.gz"
        nib.save(nib.Nifti1Image(np.resize(large, (slices, 512, 512)).transpose(2, 1, 0), small.grid.affine), path)
        needed.append(peak_mb(lambda path=path: predictor.predict_file(path, tmp_path / f"mask-{path.name}")))
        assert np.asarray(nib.load(tmp_path / f"mask-{path.name}").dataobj).shape == (512, 512, slices)
    assert (needed[2] - needed[1]) * 2 ** 20 < BYTES_A_VOXEL * 60 * 512 * 512


@pytest.mark.weekly
def test_the_same_slices_over_and_over_get_the_same_masks(predictor: Predictor, tiny_phantom: Path,
                                                          tmp_path: Path) -> None:
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    masks = []
    for slices in (200, 1000):
        path = repeated(scan, slices, tmp_path / f"{slices}.nii.gz")
        predictor.predict_file(path, tmp_path / f"mask-{slices}.nii.gz")
        masks.append(np.asarray(nib.load(tmp_path / f"mask-{slices}.nii.gz").dataobj))
        assert masks[-1].shape == nib.load(path).shape
    assert masks[0].any()
    np.testing.assert_array_equal(masks[1][..., :190], masks[0][..., :190])


@pytest.mark.weekly
def test_predictions_in_one_process_leave_nothing_behind(run: Path, tiny_phantom: Path, tmp_path: Path) -> None:
    """As in a notebook that is run again and again: the nets are read anew each time."""
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    assert growth(lambda: load_predictor(run).predict_file(scan, tmp_path / "mask.nii.gz"), 30, 5, most_mb=6) == []


# --- many pictures -------------------------------------------------------------------------------------------------

KILOBYTES = 120  # of one picture of noise, 400 pixels wide, which compresses worst


def volume() -> np.ndarray:
    """Two slices of noise."""
    return np.random.default_rng(0).normal(-600, 300, (2, 64, 64))


def careless(level: float) -> Figure:
    """A picture as many people draw it: pyplot keeps it."""
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, level])
    return figure


def pictures() -> Explorer:
    """A new explorer of the package's pictures."""
    images = volume()
    return browse(images, {"mask": images > 0}, name="noise")


def careless_pictures() -> Explorer:
    """A new explorer of somebody's pictures."""
    return explore(careless, {"level": [0.1, 0.2]}, name="a line")


def state_size(widget: Any) -> int:
    """Bytes that a notebook keeps of a widget and all that it shows, pictures as base64."""
    from ipywidgets.embed import dependency_state

    return len(json.dumps(dependency_state([widget])))


@pytest.mark.weekly
@pytest.mark.parametrize(("make", "rounds"), [(pictures, 80), (careless_pictures, 40)])
def test_many_pages_with_sliders_leave_nothing_behind(make: Callable[[], Explorer], rounds: int) -> None:
    sizes: list[int] = []
    assert growth(lambda: sizes.append(len(make().page())), rounds, 5, most_mb=5) == []
    assert len(set(sizes)) == 1, "nothing is added to later ones"
    assert sizes[0] < 2 * KILOBYTES * 1000


@pytest.mark.weekly
@pytest.mark.parametrize(("make", "rounds"), [(pictures, 200), (careless_pictures, 40)])
def test_hundreds_of_notebooks_with_widgets(make: Callable[[], Explorer], rounds: int) -> None:
    """Widgets live until they are closed, for they may be on a page; each needs no more than its one picture."""
    import ipywidgets

    sizes: list[int] = []

    def notebook() -> None:
        box = make().live()
        before = state_size(box)
        box.children[0].value = 0  # moves the slider
        sizes.append(state_size(box))
        assert sizes[-1] < 1.2 * before, "another picture takes the place of the first"
        ipywidgets.Widget.close_all()
    assert growth(notebook, rounds, 5, most_mb=5) == []
    assert len(set(sizes)) == 1, "nothing is added to later ones"
    assert sizes[0] < 2 * KILOBYTES * 1000


@pytest.mark.weekly
def test_widgets_that_are_not_closed_are_caught() -> None:
    """That is what would show if an explorer kept what it made."""
    import ipywidgets

    kept: list[Explorer] = []

    def notebook() -> None:
        kept.append(browse(np.zeros((2, 1000, 1000)), name="large"))
        kept[-1].live()
    try:
        assert growth(notebook, 8, 2, most_mb=5)
    finally:
        ipywidgets.Widget.close_all()


# --- at the same time ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def scans(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight scans, all different."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(EIGHT):
        source = nib.load(tiny_phantom / "im" / f"phantom_{number % 4:02}.nii.gz")
        pixels = np.asarray(source.dataobj) + np.int16(3 * number)
        nib.save(nib.Nifti1Image(pixels, source.affine), folder / f"scan_{number}.nii.gz")
    return folder


def command(*arguments: object) -> None:
    """``covidseg``; says what went wrong if anything did."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def sequential(run: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Masks, probabilities and table of the eight scans, predicted one after another."""
    out = tmp_path_factory.mktemp("sequential")
    command("predict", "--run", run, scans, "-o", out, "--threshold", 0.3, "--probability")
    found = content(out)
    assert len(found) == 2 * EIGHT + 1
    assert len(set(found.values())) > EIGHT, "results differ, so that a mix-up shows"
    return found


def at_once(work: Callable[..., None], each: list[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of one process for each tuple of arguments."""
    processes = [WARM.Process(target=work, args=arguments, daemon=True) for arguments in each]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.weekly
def test_eight_processes_predict_parts(run: Path, scans: Path, sequential: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("predict", "--run", run, scans, "-o", out, "--threshold", 0.3, "--probability")
    assert at_once(command, [(*options, "--part", f"{k + 1}/{EIGHT}") for k in range(EIGHT)]) == [0] * EIGHT
    command("merge", out)
    assert content(out) == sequential
    shutil.copyfile(out / "scan_1.nii.gz", out / "scan_0.nii.gz")
    assert content(out) != sequential, "a mix-up would show"


@pytest.mark.weekly
def test_eight_processes_that_do_the_same_do_no_harm(run: Path, scans: Path, sequential: dict[str, bytes],
                                                     tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("predict", "--run", run, scans, "-o", out, "--threshold", 0.3, "--probability")
    assert at_once(command, [options] * EIGHT) == [0] * EIGHT
    assert content(out) == sequential


def test_eight_threads_share_one_predictor(run: Path, scans: Path, sequential: dict[str, bytes],
                                           tmp_path: Path) -> None:
    predictor, ready = load_predictor(run), threading.Barrier(EIGHT)

    def predict(path: Path) -> None:
        ready.wait(60)  # so that all ask for the nets at the same moment
        predictor.predict_file(path, tmp_path / path.name, 0.3,
                               tmp_path / f"{path.name.removesuffix('.nii.gz')}_probability.nii.gz")
    with ThreadPoolExecutor(EIGHT) as pool:
        list(pool.map(predict, sorted(scans.iterdir())))
    assert content(tmp_path) == {name: raw for name, raw in sequential.items() if name != "predictions.csv"}


@pytest.mark.weekly
def test_a_process_that_fails_is_seen(run: Path, tmp_path: Path) -> None:
    broken = ("predict", "--run", run, tmp_path / "none.nii", "-o", tmp_path)
    assert at_once(command, [("--version",), broken]) == [0, 1]


def test_files_of_many_threads_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    """The mask of permissions belongs to the whole program: nobody may change it, not even for a moment."""
    (tmp_path / "ordinary").touch()
    wanted = (tmp_path / "ordinary").stat().st_mode

    def write(number: int) -> None:
        for again in range(50):
            write_whole(tmp_path / f"{number}-{again}", lambda temporary: temporary.write_bytes(b"x"))
    with ThreadPoolExecutor(EIGHT) as pool:
        list(pool.map(write, range(EIGHT)))
    (tmp_path / "later").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {wanted}
    assert len(list(tmp_path.iterdir())) == 50 * EIGHT + 2
