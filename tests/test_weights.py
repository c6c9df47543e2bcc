"""The nets that come with the package: whole, small, trained on what their card says, and of use on any scan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from covidseg.artifacts import load_arrays, load_net
from covidseg.cli import app
from covidseg.dataset import load_dataset
from covidseg.errors import ArtifactError
from covidseg.io import read_mask, read_scan
from covidseg.metrics import confusion, micro, read_truth
from covidseg.mil import PatchNet
from covidseg.predict import SHIPPED, load_predictor
from covidseg.records import read_records

FILES = {"run.json", "run.json.sha256", "MODEL_CARD.md", *(f"stages/{name}.safetensors{end}" for name in (
    "segmenter", "patches", "lung_net") for end in ("", ".sha256"))}


def card() -> str:
    return (SHIPPED / "MODEL_CARD.md").read_text(encoding="utf-8")


def report() -> dict:
    return json.loads((SHIPPED / "run.json").read_text(encoding="utf-8"))


def record() -> dict:
    """The recorded comparison on real CT."""
    return read_records("table1-medseg9-full")["table1-medseg9-full"]


def recorded() -> dict:
    """What the run whose nets these are reached in it."""
    found = [r for r in record()["results"] if (r["system"], r["seed"]) == ("extended", report()["seed"])]
    assert len(found) == 1
    return found[0]


def test_files_are_those_that_belong_there_and_small() -> None:
    there = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()}
    assert there == FILES
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8e6


def test_nothing_of_a_scan_is_in_them() -> None:
    shapes = [value.shape for path in SHIPPED.glob("stages/*.safetensors") for value in load_arrays(path)[0].values()]
    assert max(max(shape, default=1) for shape in shapes) <= 512, "weights only, nothing of the size of a picture"
    assert not any(len(shape) == 3 for shape in shapes)


def test_they_are_nets_of_their_settings() -> None:
    predictor = load_predictor()
    assert predictor.lung_net is not None
    patches, _ = load_arrays(SHIPPED / "stages/patches.safetensors")  # not needed to predict, but part of the method
    load_net(PatchNet(predictor.profile.mil), {name.removeprefix("net."): value for name, value in patches.items()})


def test_damage_is_found(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(SHIPPED, tmp_path / "weights"))
    load_predictor(copy)
    path = copy / "stages/segmenter.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_predictor(copy)


def test_they_are_those_of_a_recorded_run_on_free_data() -> None:
    run, whole = report(), record()
    assert {key: run[key] for key in ("data", "settings", "environment")} \
        == {key: whole[key] for key in ("data", "settings", "environment")}
    assert set(run["data"]) == {str(k) for k in range(1, 10)}, "the nine volumes of MedSeg 2, which are CC0"
    assert (run["settings"]["name"], run["settings"]["method"]) == ("full", "extended")


def test_the_card_quotes_the_recorded_figures() -> None:
    rows = {row["name"]: row for row in recorded()["rows"]}
    quoted = re.findall(r"^\| (Patch MIL|Segmenter) \| " + r" \| ".join([r"([\d.]+)"] * 6) + r" \|$", card(), re.M)
    assert {row[0] for row in quoted} == {"Patch MIL", "Segmenter"}
    for name, *figures in quoted:
        micro_, macro_ = rows[name]["micro"], rows[name]["macro"]
        expected = [micro_[f] for f in ("dice", "iou", "ppv", "sensitivity", "specificity")] + [macro_["dice"]]
        assert figures == [f"{value:.3f}" for value in expected]


@pytest.mark.parametrize("word", ["CC0", "not a medical device", "covidseg train", "Limits", "sha256", "13521509"])
def test_the_card_says_what_a_user_has_to_know(word: str) -> None:
    assert word.lower() in card().lower()


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / max(a.sum() + b.sum(), 1)


@pytest.fixture(scope="module")
def phantom_scan(tiny_phantom: Path) -> Path:
    return tiny_phantom / "im" / "phantom_01.nii.gz"


def predicted(scan: Path, out: Path, *options: str) -> np.ndarray:
    result = CliRunner().invoke(app, ["predict", str(scan), "-o", str(out), "--device", "cpu", *options])
    assert result.exit_code == 0, result.output
    return read_mask(out, like=read_scan(scan))


def test_predict_works_right_after_installation(phantom_scan: Path, tmp_path: Path) -> None:
    mask = predicted(phantom_scan, tmp_path / "mask.nii.gz")
    truth = read_mask(phantom_scan.parents[1] / "mask" / phantom_scan.name, like=read_scan(phantom_scan))
    assert dice(mask, truth) > 0.4, "nets that never saw a phantom still find its lesions"


def test_units_and_order_of_the_slices_hardly_matter(phantom_scan: Path, tmp_path: Path) -> None:
    image = nib.load(phantom_scan)
    hu = np.asarray(image.dataobj).astype(np.float32)
    window = (np.clip((hu + 1350) / 1500, 0, 1) * 255).round().astype(np.uint8)  # a lung window, as in pictures
    nib.save(nib.Nifti1Image(window, image.affine), tmp_path / "8bit.nii.gz")
    whole = predicted(phantom_scan, tmp_path / "whole.nii.gz")
    assert whole.any()
    assert dice(predicted(tmp_path / "8bit.nii.gz", tmp_path / "8bit_mask.nii.gz"), whole) > 0.85
    assert dice(predicted(phantom_scan, tmp_path / "stack.nii.gz", "--stack"), whole) > 0.85


@pytest.mark.realct
def test_real_slices_get_the_recorded_dice(realct: Path) -> None:
    data = load_dataset(realct / "medseg100")
    truth, = read_truth(data)
    predictor = load_predictor()
    mask = predictor.probabilities(truth.scan) >= predictor.profile.segmenter.threshold
    row = next(row for row in recorded()["rows"] if row["name"] == "Segmenter")
    assert micro(confusion(mask, truth.mask)).dice == pytest.approx(row["micro"]["dice"], abs=0.002)
