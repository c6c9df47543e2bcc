"""`covidseg data`: from a fake publisher's archives to a data folder, and what the check prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_server import fill_registry, nifti, volume
from faults.server import Server
from typer.testing import CliRunner, Result

from covidseg.cli import data as commands
from covidseg.cli.data import app
from covidseg.data import phantom, registry
from covidseg.data.fetch import DownloadSettings
from covidseg.data.folder import load_dataset
from covidseg.data.registry import entry, is_present, load_registry, resolve
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import DatasetError, DownloadError, OutputError


def run(*args: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], input=text)


def fails(kind: type[Exception], *args: object, text: str | None = None) -> str:
    """Runs a command that has to end with this very error; the error's text."""
    error = run(*args, text=text).exception
    assert type(error) is kind
    return str(error)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A publisher with small sets, and a register that names them."""
    running = Server()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "licences").symlink_to(registry.data_root() / "licences")
    fill_registry(running, tmp_path / "data" / "registry.toml")
    monkeypatch.setattr(registry, "data_root", lambda: tmp_path / "data")
    monkeypatch.setenv("COVIDSEG_DATA", str(tmp_path / "cache"))
    yield running
    running.close()


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_list_shows_names_and_states(cache: Path) -> None:
    shown = run("list").stdout
    for name in load_registry():
        assert name in shown
    assert "present" in shown
    (cache / "medseg1" / "downloads").mkdir(parents=True)
    (cache / "medseg1" / "downloads" / "tr_im.nii.gz.part").write_bytes(b"half")
    assert commands.state(entry("medseg1")) == "partly downloaded"
    assert commands.state(entry("medseg2")) == "not present"
    assert commands.state(entry("phantom")) == "made when needed"
    run("get", "medseg2", "--yes")
    assert commands.state(entry("medseg2")) == "present"


def test_info_shows_source_licence_and_checksums(cache: Path) -> None:
    shown = run("info", "medseg2").stdout
    for part in ("https://doi.org/10.0/x", "CC0", "rp_lung_msk.zip", "no checksum is published", "Somebody, 2021."):
        assert part in shown
    assert "md5:" in run("info", "medseg1").stdout
    run("get", "medseg2", "--yes")
    assert "seen at the first download" in run("info", "medseg2").stdout
    assert "no data set 'nonsense'" in fails(DatasetError, "info", "nonsense")


def test_get_arranges_volumes(cache: Path) -> None:
    result = run("get", "medseg2", "--yes")
    assert result.exception is None
    assert "no checksum is published for rp_im.zip" in result.stdout
    assert "not a medical device" in result.stdout
    dataset = load_dataset(resolve("medseg2"))
    assert {c.id: c.patient for c in dataset.cases} == {"1": "1", "2": "2", "3": "2"}
    assert [c.labels for c in dataset.cases] == [{0: 0, 1: 1, 2: 1, 3: 0}, {0: 1, 1: 0, 2: 0, 3: 0},
                                                 {0: 0, 1: 0, 2: 0, 3: 1}]
    for case, (seed, where) in zip(dataset.cases, ((1, (1, 2)), (2, (0,)), (3, (3,))), strict=True):
        image, lung, mask = volume(seed, where)
        scan = read_scan(case.image)
        assert np.array_equal(scan.pixels, image)
        assert case.lung is not None
        assert case.mask is not None
        assert np.array_equal(read_mask(case.lung, like=scan), lung > 0)
        assert np.array_equal(read_mask(case.mask, like=scan), mask > 0)
    kept = sorted(p.name for p in (cache / "medseg2").iterdir())
    assert kept == ["downloads", "im", "lung", "mask", "slice_labels.csv", "source.json"]
    assert json.loads((cache / "medseg2" / "source.json").read_text())["files"]["rp_im.zip"].startswith("nothing")
    assert sorted(p.name for p in cache.iterdir()) == ["medseg2"]


def test_get_arranges_a_stack(server: Server, cache: Path, tmp_path: Path) -> None:
    mine, options = tmp_path / "mine", ("--yes", "--to", tmp_path / "mine")
    assert run("get", "medseg1", *options).exception is None
    assert not cache.exists()
    case, = load_dataset(mine).cases
    assert (case.id, case.labels) == ("tr", {0: 1, 1: 0, 2: 1, 3: 1, 4: 1})
    assert case.mask is not None
    assert read_mask(case.mask, like=read_scan(case.image)).any(axis=(1, 2)).tolist() == [1, 0, 1, 1, 1]
    assert not (mine / "downloads" / "val_im.nii.gz").exists()
    assert run("get", "medseg1", *options, "--all").exception is None
    assert (mine / "downloads" / "val_im.nii.gz").exists()
    assert [c.id for c in load_dataset(mine).cases] == ["tr"]  # an extra file is no stack of the set
    assert "is present" in run("get", "medseg1", "--to", mine).stdout  # nor does it ask for the licence again
    assert len(server.asked) == 3, "what was there was not fetched again"


def test_licence_has_to_be_accepted(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no terminal" in fails(DownloadError, "get", "medseg2")
    monkeypatch.setattr(commands, "_interactive", lambda: True)
    assert "not accepted, nothing was downloaded" in fails(DownloadError, "get", "medseg2", text="n\n")
    assert server.asked == []
    assert not cache.exists()
    result = run("get", "medseg2", text="y\n")
    assert result.exception is None
    assert result.stdout.index("public domain") < result.stdout.index("Do you accept")
    assert is_present(cache / "medseg2")


def test_interrupted_get_continues(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(DownloadSettings, retries=1, backoff=0, spare=0, chunk=50)
    monkeypatch.setattr("covidseg.data.fetch.DownloadSettings", quick)
    page = server.pages["rp_msk.zip"]
    page.drops = [100, 0]
    assert "broke off after 100 bytes" in fails(DownloadError, "get", "medseg2", "--yes")
    assert not is_present(cache / "medseg2")
    assert run("get", "medseg2", "--yes").exception is None
    assert ("rp_msk.zip", "bytes=100-", 206) in server.asked
    assert is_present(cache / "medseg2")


def test_targets_in_use_are_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine" / "im").mkdir(parents=True)
    (tmp_path / "mine" / "im" / "private.nii.gz").write_bytes(b"x")
    assert "private" in fails(DatasetError, "get", "medseg2", "--yes", "--to", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine" / "im").iterdir()] == ["private.nii.gz"]
    (tmp_path / "file").write_text("in the way")
    fails(OutputError, "get", "medseg2", "--yes", "--to", tmp_path / "file")


def test_phantom_is_written_where_asked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = phantom.PhantomSettings(patients=2, slices=8, size=64, vessel_targets=20)
    monkeypatch.setattr(phantom, "write_phantom", partial(phantom.write_phantom, settings=small))
    assert run("get", "phantom", "--to", tmp_path / "ph").exception is None
    assert len(load_dataset(tmp_path / "ph").cases) == 2
    assert not cache.exists()


def test_mosmed_explains_itself_and_is_checked_and_labelled(cache: Path, tiny_phantom: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    explained = run("get", "mosmed").stdout
    assert str(cache / "mosmed" / "studies") in explained
    assert "NonCommercial" in explained
    assert not cache.exists()
    monkeypatch.setattr("covidseg.data.check.MOSMED_STUDIES", {"CT-0": 1, "CT-1": 1})
    monkeypatch.setattr("covidseg.data.check.MOSMED_OUTLINED", range(2, 3))
    mosmed = tmp_path / "mosmed"
    for source, target in (("im/phantom_00", "studies/CT-0/study_0001"), ("im/phantom_01", "studies/CT-1/study_0002"),
                           ("mask/phantom_01", "masks/study_0002_mask")):
        (path := mosmed / f"{target}.nii.gz").parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_phantom / f"{source}.nii.gz", path)
    assert run("get", "mosmed", "--to", mosmed).exception is None
    assert [c.id for c in load_dataset(mosmed).cases] == ["study_0001", "study_0002"]
    (mosmed / "masks" / "study_0002_mask.nii.gz").unlink()
    shutil.rmtree(mosmed / "im")
    result = run("get", "mosmed", "--to", mosmed)
    assert isinstance(result.exception, DatasetError)
    assert "fault: masks/study_0002_mask.nii.gz is missing" in result.stdout
    assert not (mosmed / "im").exists()


def test_check_prints_a_table_or_json_and_names_every_fault(tiny_phantom: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_phantom, tmp_path / "set")
    result = run("check", folder, "--json")
    assert result.exception is None
    report = json.loads(result.stdout)
    assert report["faults"] == []
    assert [(v["id"], v["shape"], v["unit"]) for v in report["volumes"]] == [
        (f"phantom_{i:02d}", [10, 128, 128], "HU") for i in range(4)]
    lesion = sum(v["lesion"] for v in report["volumes"])
    summary = f"4 volumes of 4 patients, {lesion} slices with a lesion, {40 - lesion} without"
    assert summary in run("check", folder).stdout
    (folder / "mask" / "b.nii.gz").write_bytes(b"")
    result = run("check", folder)
    assert isinstance(result.exception, DatasetError)
    assert "1 fault found" in str(result.exception)
    assert "fault: mask/b.nii.gz belongs to no image" in result.stdout


def test_check_prints_names_whole_and_as_they_are(tiny_phantom: Path, tmp_path: Path) -> None:
    """Brackets are markup to the console, colons pictures, and a long name is cut where there is no room for it."""
    names = {"phantom_00": "sub-0001_ses-baseline_acquisition-chest [axial]_part-1", "phantom_01": "chest :lungs:"}
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "set"))
    table = (folder / "slice_labels.csv").read_text().replace(",phantom_02\n", ",[/b]\n")
    for old, new in names.items():
        for part in ("im", "lung", "mask"):
            (folder / part / f"{old}.nii.gz").rename(folder / part / f"{new}.nii.gz")
        table = table.replace(old, new)
    (folder / "slice_labels.csv").write_text(table)
    shown = run("check", folder)
    assert shown.exception is None
    for name in (*names.values(), "[/b]"):
        assert name in shown.stdout


def test_check_tells_of_scans_to_be_looked_at(tiny_phantom: Path, tmp_path: Path) -> None:
    """They are no faults: the exit code is that of a folder without any."""
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "set"))
    image = nib.load(folder / "im" / "phantom_01.nii.gz")
    image.header["pixdim"][3] *= 0.75
    nib.save(image, folder / "im" / "phantom_01.nii.gz")
    result = run("check", folder)
    assert result.exception is None
    assert "warning: phantom_01: its sform says voxels of" in result.stdout
    assert any("its sform says" in text for text in json.loads(run("check", folder, "--json").stdout)["warnings"])


def test_check_can_let_the_anatomy_pass_but_not_the_unit(tmp_path: Path) -> None:
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "a.nii.gz").write_bytes(nifti(volume(1, ())[0]))
    (tmp_path / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,0\n")
    assert "1 fault" in fails(DatasetError, "check", tmp_path)
    assert run("check", tmp_path, "--unchecked").exception is None
    assert "1 fault" in fails(DatasetError, "check", tmp_path, "--unchecked", "--unit", "display")
