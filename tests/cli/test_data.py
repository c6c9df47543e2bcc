"""`covidseg data`: from a fake publisher's archives to a data folder, and the check of data folders."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from data_server import PUBLISHED, fill_registry, md5, nifti, volume, zipped
from faults.server import Server
from skimage.data import camera
from typer.testing import CliRunner, Result

from covidseg.cli import data as commands
from covidseg.cli.data import app
from covidseg.data import check as checking
from covidseg.data import layout as arranging
from covidseg.data import registry
from covidseg.data.fetch import DownloadSettings
from covidseg.data.folder import load_dataset
from covidseg.data.layout import has_lesion, lay_out, lay_out_mosmed
from covidseg.data.registry import entry, is_present, load_registry, resolve
from covidseg.data.scan import read_mask, read_scan, write_like
from covidseg.errors import DatasetError, DownloadError, InputFileError, OutputError


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


@pytest.fixture(autouse=True)
def _anatomy_counts_for_nothing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sets of random numbers do not look like chest CT; tests that are called after the anatomy do."""
    if "anatomy" not in request.node.name:
        monkeypatch.setattr(checking, "_check_anatomy", lambda scan: [])


def test_check_of_the_anatomy(tiny_phantom: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "set"))
    assert checking.check_folder(folder).all_faults() == []
    path = folder / "im" / "phantom_01.nii.gz"
    scan = read_scan(path)
    photograph = np.broadcast_to(camera()[::4, ::4], scan.pixels.shape)
    write_like(photograph, scan.grid, path)
    faults = checking.check_folder(folder).all_faults()
    assert len(faults) == 1
    assert re.search(r"phantom_01: .*(does not look like chest CT|too little air|no lung)", faults[0])


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


def test_get_arranges_a_stack(cache: Path, tmp_path: Path) -> None:
    assert run("get", "medseg1", "--yes", "--to", tmp_path / "mine").exception is None
    assert not cache.exists()
    dataset = load_dataset(tmp_path / "mine")
    assert [c.id for c in dataset.cases] == ["tr"]
    case = dataset.cases[0]
    assert case.labels == {0: 1, 1: 0, 2: 1, 3: 1, 4: 1}
    assert case.mask is not None
    assert read_mask(case.mask, like=read_scan(case.image)).any(axis=(1, 2)).tolist() == [1, 0, 1, 1, 1]
    assert not (tmp_path / "mine" / "downloads" / "val_im.nii.gz").exists()


def test_get_all_brings_the_optional_files(server: Server, cache: Path) -> None:
    assert run("get", "medseg1", "--yes").exception is None
    assert run("get", "medseg1", "--yes", "--all").exception is None
    assert (cache / "medseg1" / "downloads" / "val_im.nii.gz").exists()
    assert [c.id for c in load_dataset(cache / "medseg1").cases] == ["tr"]  # an extra file is no stack of the set
    assert len(server.asked) == 3  # what was there was not fetched again


def test_get_what_is_present_downloads_nothing(server: Server, cache: Path) -> None:
    run("get", "medseg2", "--yes")
    before = len(server.asked)
    assert "is present" in run("get", "medseg2").stdout  # nor does it ask for the licence again
    assert len(server.asked) == before


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


def test_changed_archive_is_noticed(server: Server, cache: Path) -> None:
    run("get", "medseg2", "--yes")
    for path in (cache / "medseg2" / "slice_labels.csv", cache / "medseg2" / "downloads" / "rp_im.zip"):
        path.unlink()
    image = volume(1, (1, 2))[0]
    server.add("rp_im.zip", zipped({f"{v}.nii.gz": nifti(image) for v in "123"}), etag='"two"')
    assert "first download" in fails(DownloadError, "get", "medseg2", "--yes")
    assert not is_present(cache / "medseg2")


def test_wrong_checksum_opens_nothing(server: Server, cache: Path) -> None:
    body = bytearray(server.pages["tr_im.nii.gz"].body)
    body[50] ^= 1
    server.pages["tr_im.nii.gz"].body = bytes(body)
    error = fails(DownloadError, "get", "medseg1", "--yes")
    assert md5(bytes(body)).split(":")[1] in error
    assert not (cache / "medseg1" / "tr_im.nii.gz").exists()


def test_other_scans_in_the_target_are_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "mine" / "im").mkdir(parents=True)
    (tmp_path / "mine" / "im" / "private.nii.gz").write_bytes(b"x")
    assert "private" in fails(DatasetError, "get", "medseg2", "--yes", "--to", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine" / "im").iterdir()] == ["private.nii.gz"]


def test_phantom_is_written_where_asked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from covidseg.data import phantom

    small = phantom.PhantomSettings(patients=2, slices=8, size=64, vessel_targets=20)
    write = phantom.write_phantom
    monkeypatch.setattr(phantom, "write_phantom", lambda folder, progress=False: write(folder, small,
                                                                                       progress=progress))
    assert run("get", "phantom", "--to", tmp_path / "ph").exception is None
    assert run("check", tmp_path / "ph").exception is None
    assert not cache.exists()


# ---- arranging --------------------------------------------------------------------------------------------------

def files(tmp_path: Path, **roles: dict[str, bytes]) -> dict[str, Path]:
    for role, members in roles.items():
        (tmp_path / f"{role}.zip").write_bytes(zipped(members))
    return {role: tmp_path / f"{role}.zip" for role in roles}


def test_lesion_rule_scales_with_area() -> None:
    mask = np.zeros((3, 512, 512), dtype=bool)
    mask[0, 0, :39] = mask[1, 0, :40] = True
    assert has_lesion(mask).tolist() == [False, True, False]
    small = np.zeros((3, 256, 256), dtype=bool)
    small[0, 0, :9] = small[1, 0, :10] = True
    assert has_lesion(small).tolist() == [False, True, False]
    assert not has_lesion(np.zeros((1, 8, 8), dtype=bool)).any()


def test_outline_with_another_header_takes_the_one_of_its_image(server: Server, tmp_path: Path) -> None:
    image, lung, mask = volume(1, (1,))
    moved = PUBLISHED.copy()
    moved[:3, 3] = 50
    found = files(tmp_path, image={"1.nii.gz": nifti(image)}, lung={"1.nii.gz": nifti(lung)},
                  mask={"1.nii.gz": nifti(mask, moved)})
    notes: list[str] = []
    lay_out(entry("medseg2"), found, tmp_path / "out", notes.append)
    case = load_dataset(tmp_path / "out").cases[0]
    assert case.mask is not None
    assert np.array_equal(read_mask(case.mask, like=read_scan(case.image)), mask > 0)
    assert len(notes) == 1
    assert "mask/1.nii.gz" in notes[0]


@pytest.mark.parametrize(("spoil", "kind", "complaint"), [
    (lambda f: f["mask"].pop("1.nii.gz"), DatasetError, "volumes 1 have an image or a mask but not both"),
    (lambda f: f["lung"].update({"2.nii.gz": b""}), DatasetError, "volumes 2 have an image or a lung"),
    (lambda f: f["mask"].update({"1.nii.gz": nifti(volume(1, (), slices=3)[2])}), DatasetError, "has shape"),
    (lambda f: f["mask"].update({"1.nii.gz": b"no scan"}), InputFileError, "cannot be read"),
    (lambda f: f["image"].update({"b/1.nii.gz": b"x"}), DownloadError, "two volumes 1"),
    (lambda f: f["mask"].update({"1.nii.gz": nifti(volume(1, ())[0], np.eye(4))}), InputFileError, "no mask"),
    (lambda f: f["image"].clear(), DatasetError, "holds no NIfTI"),
])
def test_archives_that_do_not_belong_together(spoil, kind: type[Exception], complaint: str, server: Server,
                                              tmp_path: Path) -> None:
    image, lung, mask = volume(1, (1,))
    members = {"image": {"1.nii.gz": nifti(image)}, "lung": {"1.nii.gz": nifti(lung)},
               "mask": {"1.nii.gz": nifti(mask)}}
    spoil(members)
    with pytest.raises(kind, match=complaint):
        lay_out(entry("medseg2"), files(tmp_path, **members), tmp_path / "out")
    assert not is_present(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".unpack-*"))


def test_header_that_promises_too_much(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, lung, mask = volume(1, (1,))
    monkeypatch.setattr(arranging, "MAX_VOXELS", 1000)
    found = files(tmp_path, image={"1.nii.gz": nifti(image)}, lung={"1.nii.gz": nifti(lung)},
                  mask={"1.nii.gz": nifti(mask)})
    with pytest.raises(InputFileError, match="claims to hold 16384 voxels"):
        lay_out(entry("medseg2"), found, tmp_path / "out")


def test_stack_stored_from_head_to_feet_keeps_published_numbers(server: Server, tmp_path: Path) -> None:
    image, _, mask = volume(1, (0,), slices=3)
    down = PUBLISHED @ np.diag((1, 1, -1, 1))
    for name, array in (("tr_im", image), ("tr_mask", mask)):
        (tmp_path / f"{name}.nii.gz").write_bytes(nifti(array, down))
    lay_out(entry("medseg1"), {"image": tmp_path / "tr_im.nii.gz", "mask": tmp_path / "tr_mask.nii.gz"},
            tmp_path / "out")
    table = (tmp_path / "out" / "tr_slices.csv").read_text()
    assert table == "position,medseg100_slice,has_lesion\n0,2,1\n1,1,0\n2,0,0\n"


def test_copy_where_links_are_impossible(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(arranging.os, "link", refuse)
    assert run("get", "medseg1", "--yes", "--to", tmp_path / "mine").exception is None
    assert (tmp_path / "mine" / "tr_im.nii.gz").stat().st_nlink == 1


def test_a_full_disk_leaves_no_half_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, array in zip(("tr_im", "tr_mask"), volume(1, (1,))[::2], strict=True):
        (tmp_path / f"{name}.nii.gz").write_bytes(nifti(array))
    found = {"image": tmp_path / "tr_im.nii.gz", "mask": tmp_path / "tr_mask.nii.gz"}
    lay_out(entry("medseg1"), found, tmp_path / "linked")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OutputError, match=r"tr_slices\.csv.*No space left"):
        lay_out(entry("medseg1"), found, tmp_path / "linked")
    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(OutputError, match=r"tr_im\.nii\.gz.*No space left"):
        lay_out(entry("medseg1"), found, tmp_path / "copied")
    assert list((tmp_path / "copied").iterdir()) == []


def test_target_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fails(OutputError, "get", "medseg2", "--yes", "--to", tmp_path / "file")


# ---- MosMedData, by hand ----------------------------------------------------------------------------------------

@pytest.fixture
def mosmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two normal studies and two others, of which the first has an outline."""
    monkeypatch.setattr(checking, "MOSMED_STUDIES", {"CT-0": 2, "CT-1": 2})
    monkeypatch.setattr(checking, "MOSMED_OUTLINED", range(3, 4))
    root = tmp_path / "mosmed"
    image, _, mask = volume(1, (1,))
    for number, grade in ((1, "CT-0"), (2, "CT-0"), (3, "CT-1"), (4, "CT-1")):
        path = root / "studies" / grade / f"study_{number:04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti(image))
    (root / "masks").mkdir()
    (root / "masks" / "study_0003_mask.nii.gz").write_bytes(nifti(mask))
    return root


def test_mosmed_explains_itself(cache: Path) -> None:
    result = run("get", "mosmed")
    assert result.exception is None
    assert str(cache / "mosmed" / "studies") in result.stdout
    assert "NonCommercial" in result.stdout
    assert not cache.exists()


def test_mosmed_is_checked_and_labelled(server: Server, mosmed: Path) -> None:
    assert run("check", mosmed).exception is None
    assert run("get", "mosmed", "--to", mosmed).exception is None
    cases = {c.id: c for c in load_dataset(mosmed).cases}
    assert sorted(cases) == ["study_0001", "study_0002", "study_0003"]  # study 4 has a grade only
    assert cases["study_0001"].labels == {0: 0, 1: 0, 2: 0, 3: 0}
    assert cases["study_0003"].labels == {0: 0, 1: 1, 2: 0, 3: 0}
    assert run("check", mosmed).exception is None


def test_incomplete_mosmed_is_listed_line_by_line(server: Server, mosmed: Path) -> None:
    (mosmed / "studies" / "CT-0" / "study_0002.nii.gz").rename(mosmed / "studies" / "CT-1" / "study_0001.nii.gz")
    (mosmed / "studies" / "CT-1" / "notes.nii.gz").write_bytes(b"")
    (mosmed / "masks" / "study_0003_mask.nii.gz").unlink()
    result = run("get", "mosmed", "--to", mosmed)
    assert isinstance(result.exception, DatasetError)
    for fault in ("studies/CT-0 holds 1 scans, the published set has 2", "studies/CT-1 holds 4 scans",
                  "study 0001 is there twice", "studies/CT-1/notes.nii.gz is not called",
                  "masks/study_0003_mask.nii.gz is missing"):
        assert f"fault: {fault}" in result.stdout
    assert not (mosmed / "im").exists()


def test_mosmed_outline_without_study(mosmed: Path, tmp_path: Path) -> None:
    (mosmed / "studies" / "CT-1" / "study_0003.nii.gz").unlink()
    assert "masks/study_0003_mask.nii.gz has no study" in checking.check_folder(mosmed).all_faults()
    with pytest.raises(DatasetError, match="outlines without a study: study_0003"):
        lay_out_mosmed(mosmed)
    (tmp_path / "empty" / "studies").mkdir(parents=True)
    with pytest.raises(DatasetError, match="neither"):
        lay_out_mosmed(tmp_path / "empty")
    with pytest.raises(DatasetError, match="no folder `studies`"):
        checking.check_mosmed(tmp_path)


def test_unit_and_anatomy_are_asked_of_mosmed_as_of_other_folders(mosmed: Path) -> None:
    assert not checking.check_mosmed(mosmed, "HU", anatomy=False).all_faults()
    faults = checking.check_folder(mosmed, "display", anatomy=False).all_faults()
    assert any("grey levels of a display window" in fault for fault in faults)
    assert any("lung" in fault or "chest CT" in fault for fault in checking.check_folder(mosmed).all_faults()), \
        "numbers by chance"


def test_mosmed_folder_that_cannot_be_written(mosmed: Path) -> None:
    (mosmed / "im").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        lay_out_mosmed(mosmed)


# ---- check ------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound data folder with one volume, `a`, that has a lesion in slices 1 and 2."""
    for kind, array in zip(("im", "lung", "mask"), volume(1, (1, 2)), strict=True):
        (tmp_path / "d" / kind).mkdir(parents=True)
        (tmp_path / "d" / kind / "a.nii.gz").write_bytes(nifti(array))
    (tmp_path / "d" / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,0\na,1,1\na,2,1\n")
    return tmp_path / "d"


def test_check_of_a_sound_folder(folder: Path) -> None:
    result = run("check", folder, "--json")
    assert result.exception is None
    report = json.loads(result.stdout)
    assert report["faults"] == []
    found = report["volumes"][0]
    assert (found["shape"], found["unit"]) == ([4, 64, 64], "HU")
    assert np.allclose(found["spacing"], (5, 0.7, 0.7))
    assert (found["lesion"], found["free"], found["unlabelled"]) == (2, 1, 1)
    assert found["lung"]
    assert found["mask"]
    assert "1 volumes of 1 patients, 2 slices with a lesion, 1 without" in run("check", folder).stdout


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda d: (d / "lung/a.nii.gz").write_bytes(nifti(volume(1, (), slices=3)[1])), "a: .*lung/a.nii.gz: has shape"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (1, 2))[2], np.eye(4))), "another affine"),
    (lambda d: (d / "lung/a.nii.gz").write_bytes(nifti(volume(1, ())[2])), "a: the lung mask is empty"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (0, 1, 2))[2])), "slices 0 are labelled free"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (1,))[2])), "slices 2 are labelled as having"),
    (lambda d: (d / "mask/b.nii.gz").write_bytes(b""), "mask/b.nii.gz belongs to no image"),
    (lambda d: (d / "im/a.nii.gz").write_bytes(nifti(volume(1, ())[0])[:500]), "a: .*cannot be read"),
    (lambda d: (d / "im/a.nii.gz").write_bytes(nifti(volume(1, ())[0] * 0)), "a: every voxel has the value 0"),
    (lambda d: (d / "slice_labels.csv").write_text("volume,slice,has_lesion\na,4,0\n"), "slices 4 are labelled, but"),
    (lambda d: (d / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,2\n"), "line 2"),
    (lambda d: (d / "slice_labels.csv").unlink(), "no such label table"),
])
def test_check_lists_every_fault(spoil, complaint: str, folder: Path) -> None:
    spoil(folder)
    result = run("check", folder)
    assert isinstance(result.exception, DatasetError)
    assert result.exception.exit_code == 4
    assert "1 fault found" in str(result.exception)
    shown = [line for line in result.stdout.splitlines() if line.startswith("fault: ")]
    assert len(shown) == 1
    assert re.search(complaint, shown[0])


def test_check_names_volumes_without_any_label(folder: Path) -> None:
    for kind in ("im", "lung", "mask"):
        (folder / kind / "b.nii.gz").write_bytes((folder / kind / "a.nii.gz").read_bytes())
    assert "1 fault found" in fails(DatasetError, "check", folder)
    assert "fault: b: no slice has a line in the label table" in run("check", folder).stdout


def test_check_counts_faults_of_all_volumes(folder: Path) -> None:
    (folder / "lung" / "a.nii.gz").write_bytes(nifti(volume(1, ())[2]))
    (folder / "mask" / "b.nii.gz").write_bytes(b"")
    assert "2 faults found" in fails(DatasetError, "check", folder)


def test_check_of_nothing(tmp_path: Path) -> None:
    assert "no such data folder" in fails(DatasetError, "check", tmp_path / "none")
    assert "holds no scans" in fails(DatasetError, "check", tmp_path)
