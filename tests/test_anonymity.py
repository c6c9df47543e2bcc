"""What a scan's header says about a patient ends there: no file that is written holds a word of it.

Only shape, affine and spacing of the input may be in an output, on a terminal as well. File names and the names of
volumes in a label table are the user's own, and do appear in tables and reports.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicoms import write_series
from tiny import TINY, all_stages, quiet
from typer.testing import CliRunner

from covidseg.cli import app
from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.pipeline import Run, write_run

# Weights are random bytes, in which a short word turns up by chance; these are too long for that, and fit into the
# shortest field, intent_name, of 16 bytes.
NAME = "LINDGREN^MATILDA"
FIELDS = ("descrip", "db_name", "aux_file", "intent_name")
BROKEN = "broken.nii.gz"


def named(path: Path, target: Path) -> Path:
    """A scan with a patient's name in every field of the header that takes text, and in two extensions."""
    image = nib.load(path)
    for field in FIELDS:
        image.header[field] = NAME.encode()
    for code in ("comment", "afni"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension(code, f"{NAME} 1950-01-01, ward 7".encode()))
    nib.save(image, target)
    return target


def holding(folder: Path, name: str = NAME) -> list[str]:
    """Files that hold the name, also behind compression, in other letters and in two bytes a letter."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw += gzip.decompress(raw)
        if any(word.lower().encode(code) in raw.lower() for word in name.split("^") for code in ("ascii", "utf-16-le")):
            found.append(str(path.relative_to(folder)))
    return found


@pytest.fixture(scope="module")
def data(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom, with the name in all scans and masks."""
    root = tmp_path_factory.mktemp("named") / "data"
    for path in sorted(tiny_phantom.rglob("*.nii.gz")):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        named(path, root / path.parent.name / path.name)
    shutil.copy(tiny_phantom / "slice_labels.csv", root)
    return root


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    """A training on these scans."""
    trained = Run(load_dataset(data), TINY, 0, data.parent / "run", "cpu", quiet)
    write_run(all_stages(trained), "a test")
    return trained.folder


@pytest.fixture
def scans(data: Path, tmp_path: Path) -> Path:
    """Two of the scans, one of them cut off, uncompressed and compressed."""
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(data / "im" / "phantom_01.nii.gz", folder / "scan.nii.gz")
    (folder / BROKEN).write_bytes((folder / "scan.nii.gz").read_bytes()[:-2000])
    return folder


def command(*arguments: object) -> int:
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code


def test_the_name_is_found_where_it_is(data: Path, scans: Path, tmp_path: Path) -> None:
    """The check fires: on the inputs, which are compressed, and on results with a header that was copied."""
    assert holding(data) == sorted(str(path.relative_to(data)) for path in data.rglob("*.nii.gz"))
    assert len(holding(data)) >= 12
    image = nib.load(scans / "scan.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("copied.nii", "copied.nii.gz"):
        nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), out / name)
    (out / "report.json").write_text('{"patient": "Matilda Lindgren"}')
    (out / "wide.bin").write_bytes("lindgren^matilda".encode("utf-16-le"))
    (out / "clean.json").write_text('{"volume": "scan"}')
    assert holding(out) == ["copied.nii", "copied.nii.gz", "report.json", "wide.bin"]


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_writers(name: str, dtype: type, data: Path, tmp_path: Path) -> None:
    path = data / "im" / "phantom_00.nii.gz"
    scan = read_scan(path)
    write_like(scan.pixels.astype(dtype), scan.grid, tmp_path / name)
    assert holding(tmp_path) == []
    given, kept = nib.load(path), nib.load(tmp_path / name)
    assert kept.shape == given.shape
    np.testing.assert_allclose(kept.affine, given.affine)
    blank = nib.Nifti1Image(np.zeros(kept.shape, dtype), kept.affine).header
    for field in set(blank) - {"scl_slope", "scl_inter", "vox_offset"}:
        assert kept.header[field].tobytes() == blank[field].tobytes(), f"{field} is that of a header made anew"
    assert not kept.header.extensions


def test_commands(scans: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("lungs", scans, "-o", out) == 3, "one of the two is broken"
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["scan.nii.gz"]
    assert command("predict", "--run", run, scans, "-o", out, "--probability", "--preview", "--device", "cpu",
                   "--overwrite") == 3
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "part-1-of-1.csv", "predictions.csv", "scan.nii.gz", "scan_preview.html", "scan_probability.nii.gz"]
    page = (out / "scan_preview.html").read_text(encoding="utf-8")
    assert not [folder.name for folder in scans.parents if len(folder.name) > 4 and folder.name in page]
    assert "broken" in (out / "predictions.csv").read_text()
    assert holding(out) == []


def test_runs_and_exports(run: Path, tmp_path: Path) -> None:
    assert command("export", run, "-o", tmp_path / "nets") == 0
    assert len(list(run.rglob("*.safetensors"))) >= 10
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert holding(run) == holding(tmp_path) == []


@pytest.fixture
def series(tiny_phantom: Path, tmp_path: Path) -> Path:
    """A series of DICOM slices with the name in every tag that takes text, public, private or in a sequence."""
    scan = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    tags = dict.fromkeys(("PatientName", "PatientID", "InstitutionName", "SeriesDescription", "StudyDescription",
                          "AccessionNumber", "ConvolutionKernel", "BodyPartExamined", "StudyID"), NAME)
    tags["ImageType"] = ["ORIGINAL", "PRIMARY", "AXIAL", NAME]
    tags |= dict.fromkeys(("PatientBirthDate", "StudyDate", "StudyTime"), "19500101")
    inside = pydicom.Dataset()
    inside.PatientName = NAME
    files = write_series(tmp_path / "dicom", scan.pixels, (0, 0, 10), PixelSpacing=list(scan.spacing[1:]),
                         ReferencedPatientSequence=[inside], StudyInstanceUID="1.2.19500101.1",
                         SeriesInstanceUID="1.2.19500101.424242", **tags)
    assert len(holding(tmp_path / "dicom")) == len(files)
    return tmp_path / "dicom"


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # of pydicom, which knows that a name is no code
def test_dicom(series: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out, said = tmp_path / "out", ""

    def spoken(code: int, *arguments: object) -> None:
        nonlocal said
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert getattr(result.exception, "exit_code", result.exit_code) == code, result.output
        said += result.output + str(result.exception)
    predict = ("predict", "--run", run, series, "-o", out, "--device", "cpu", "--overwrite")
    spoken(0, "lungs", series, "-o", tmp_path / "lungs")
    spoken(0, *predict)
    spoken(0, "data", "series", series)
    first, second, *_ = sorted(series.iterdir())
    first.write_bytes(first.read_bytes()[:-10])   # a warning
    spoken(0, *predict)
    data = pydicom.dcmread(second)
    data.PixelData = bytes(len(data.PixelData))   # an error: two slices at the same place
    data.save_as(series / "other")
    spoken(3, *predict)
    spoken(3, *predict, "--series", "7")
    data.Modality, data.SeriesInstanceUID = NAME, "1.2.19500101.7"
    data.save_as(series / "mr")
    spoken(0, "data", "series", series)
    said += "".join(capfd.readouterr())           # of ITK itself
    assert "424242" in said, "what tells series apart is shown"
    assert "DICOM without a picture" in said
    assert "different slices" in said
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "output.txt").write_text(said)
    for name in (NAME, "19500101"):
        assert [holding(tmp_path / part, name) for part in ("out", "lungs", "said")] == [[], [], []]
