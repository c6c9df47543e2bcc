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
from ipywidgets import Widget
from ipywidgets.embed import dependency_state
from load import content, growth, peak_mb
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tiny import WARM, finished_run
from typer.testing import CliRunner

from covidseg.atomic import write_whole
from covidseg.book.explore import Explorer, browse, explore
from covidseg.cli import app
from covidseg.data.scan import read_mask, read_scan
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


def write_scan(pixels: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    """Writes ``(slices, rows, columns)``."""
    nib.save(nib.Nifti1Image(pixels.transpose(2, 1, 0), affine), path)
    return path


def waiting_thread(end: threading.Event) -> None:
    threading.Thread(target=end.wait, daemon=True).start()


@pytest.mark.weekly
@pytest.mark.parametrize(("leak", "said"), [
    (lambda end: np.ones(1 << 17), "memory grew by "), (lambda end: open(os.devnull), "10 more files"),  # noqa: SIM115
    (waiting_thread, "10 more threads"), (lambda end: plt.figure(figsize=(0.1, 0.1)), "10 more figures")])
def test_what_leaks_is_caught(leak: Callable[[threading.Event], Any], said: str) -> None:
    kept, end = [], threading.Event()
    try:
        grown = growth(lambda: kept.append(leak(end)), 10, most_mb=5)
        assert any(line.startswith(said) for line in grown), grown
    finally:
        end.set()
        plt.close("all")
        for thing in kept:
            getattr(thing, "close", lambda: None)()


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
        path = write_scan(np.resize(large, (slices, 512, 512)), small.grid.affine, tmp_path / f"{slices}.nii.gz")
        needed.append(peak_mb(lambda path=path: predictor.predict_file(path, tmp_path / f"mask-{path.name}")))
        assert nib.load(tmp_path / f"mask-{path.name}").shape == (512, 512, slices)
    assert (needed[2] - needed[1]) * 2 ** 20 < BYTES_A_VOXEL * 60 * 512 * 512


@pytest.mark.weekly
def test_the_same_slices_over_and_over_get_the_same_masks(predictor: Predictor, tiny_phantom: Path,
                                                          tmp_path: Path) -> None:
    small = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    masks = []
    for slices in (200, 1000):
        pixels = np.resize(small.pixels, (slices, *small.pixels.shape[1:]))
        path = write_scan(pixels, small.grid.affine, tmp_path / f"{slices}.nii.gz")
        predictor.predict_file(path, tmp_path / f"mask-{slices}.nii.gz")
        masks.append(read_mask(tmp_path / f"mask-{slices}.nii.gz", like=read_scan(path)))
    assert masks[0].any()
    np.testing.assert_array_equal(masks[1][:190], masks[0][:190])


@pytest.mark.weekly
def test_predictions_in_one_process_leave_nothing_behind(run: Path, tiny_phantom: Path, tmp_path: Path) -> None:
    """As in a notebook that is run again and again: the nets are read anew each time."""
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    assert growth(lambda: load_predictor(run).predict_file(scan, tmp_path / "mask.nii.gz"), 30, 5, most_mb=6) == []


# --- many pictures -------------------------------------------------------------------------------------------------

MOST = 240_000  # bytes of two pictures of noise, 400 pixels wide, which compresses worst


def careless(level: float) -> Figure:
    """A picture as many people draw it: pyplot keeps it."""
    figure, axes = plt.subplots(figsize=(1, 1))
    axes.plot([0, level])
    return figure


def noise() -> Explorer:
    """A new explorer of two slices of noise."""
    images = np.random.default_rng(0).normal(-600, 300, (2, 64, 64))
    return browse(images, {"mask": images > 0}, name="noise")


def others() -> Explorer:
    """A new explorer of somebody's pictures."""
    return explore(careless, {"level": [0.1, 0.2]}, name="a line")


def page_size(make: Callable[[], Explorer]) -> int:
    return len(make().page())


def widget_size(make: Callable[[], Explorer]) -> int:
    """Bytes that a notebook keeps of a widget and all that it shows, after its slider was moved, pictures as base64.

    Widgets live until they are closed, for they may be on a page; another picture has to take the place of the first.
    """
    box: Any = make().live()
    before = len(json.dumps(dependency_state([box])))
    box.children[0].value = 0
    after = len(json.dumps(dependency_state([box])))
    assert after < 1.2 * before
    Widget.close_all()
    return after


@pytest.mark.weekly
@pytest.mark.parametrize(("size", "make", "rounds"), [
    (page_size, noise, 80), (widget_size, noise, 200), (page_size, others, 40), (widget_size, others, 40)])
def test_hundreds_of_pages_and_widgets_leave_nothing_behind(
        size: Callable[[Callable[[], Explorer]], int], make: Callable[[], Explorer], rounds: int) -> None:
    sizes: list[int] = []
    assert growth(lambda: sizes.append(size(make)), rounds, 5, most_mb=5) == []
    assert len(set(sizes)) == 1, "nothing is added to later ones"
    assert sizes[0] < MOST


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


def options(run: Path, scans: Path, out: Path) -> tuple[object, ...]:
    return "predict", "--run", run, scans, "-o", out, "--threshold", 0.3, "--probability"


@pytest.fixture(scope="module")
def sequential(run: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Masks, probabilities and table of the eight scans, predicted one after another."""
    out = tmp_path_factory.mktemp("sequential")
    command(*options(run, scans, out))
    found = content(out)
    assert len(found) == 2 * EIGHT + 1
    assert len(set(found.values())) > EIGHT, "results differ, so that a mix-up shows"
    return found


def at_once(each: list[tuple[Any, ...]]) -> list[int | None]:
    """Exit codes of the command with each tuple of arguments."""
    processes = [WARM.Process(target=command, args=arguments, daemon=True) for arguments in each]
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
    asked = [(*options(run, scans, out), "--part", f"{k + 1}/{EIGHT}") for k in range(EIGHT)]
    broken = ("predict", "--run", run, tmp_path / "none.nii", "-o", tmp_path)
    assert at_once([*asked, broken]) == [*[0] * EIGHT, 1], "one that fails is seen"
    command("merge", out)
    assert content(out) == sequential
    shutil.copyfile(out / "scan_1.nii.gz", out / "scan_0.nii.gz")
    assert content(out) != sequential, "a mix-up would show"


@pytest.mark.weekly
def test_eight_processes_that_do_the_same_do_no_harm(run: Path, scans: Path, sequential: dict[str, bytes],
                                                     tmp_path: Path) -> None:
    assert at_once([options(run, scans, tmp_path / "out")] * EIGHT) == [0] * EIGHT
    assert content(tmp_path / "out") == sequential


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
