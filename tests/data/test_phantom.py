"""The phantom: deterministic, believable, labelled without contradiction, and as hard as it is meant to be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import mannwhitneyu
from skimage.filters import threshold_otsu

from covidseg.data.folder import load_dataset
from covidseg.data.phantom import (
    LOOKALIKES,
    PhantomPatient,
    PhantomSettings,
    is_healthy,
    make_patient,
    patient,
    write_phantom,
)
from covidseg.data.phantom import lesions as lesions_module
from covidseg.data.phantom.anatomy import make_chest, make_frame, smooth_noise
from covidseg.data.phantom.lesions import CONSOLIDATION, CRAZY_PAVING, GROUND_GLASS, MIN_LESION_AREA_MM2
from covidseg.data.phantom.vessels import MURRAY, draw_tubes, grow_tree
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import DatasetError, OutputError, SettingsError

SMALL = PhantomSettings(patients=3, slices=12, size=96, seed=5)
KINDS = (GROUND_GLASS, CONSOLIDATION, CRAZY_PAVING)


@pytest.fixture(scope="module")
def patients() -> list[PhantomPatient]:
    """The default set, as the course uses it."""
    return [make_patient(PhantomSettings(), index) for index in range(PhantomSettings().patients)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "small", SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def otsu_dice(patients: list[PhantomPatient]) -> list[float]:
    """Dice of an intensity threshold inside the true lungs, for each positive slice."""
    scores = []
    for p in patients:
        for k in np.flatnonzero(p.labels()):
            found = p.lung[k] & (p.hu[k] > threshold_otsu(p.hu[k][p.lung[k]]))
            scores.append(2 * (found & p.mask[k]).sum() / (found.sum() + p.mask[k].sum()))
    return scores


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    return mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic / (labels.sum() * (1 - labels).sum())


# --- how hard it is ---------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_intensity_alone_does_not_decide(patients):
    scores = otsu_dice(patients)
    assert 0.45 < np.mean(scores) < 0.57
    labels = np.concatenate([p.labels() for p in patients])
    means = np.array([p.hu[k][p.lung[k]].mean() for p in patients for k in range(len(p.hu))])
    assert auc(means, labels) < 0.85
    # The truth itself would score 1: the measuring is not what keeps the figures low.
    assert auc(np.concatenate([p.mask.sum(axis=(1, 2)) for p in patients]), labels) == 1


@pytest.mark.slow
def test_knobs_turn_the_difficulty():
    easy = PhantomSettings(patients=1, faint_share=0, ground_glass_hu=(-480, -460), lookalike_rate=0,
                           vessel_targets=60, reader_wobble=0.0, edge_mm=(0.5, 1.0), crazy_paving_hu=(-480, -460))
    hard = replace(easy, faint_share=1, lookalike_rate=1, vessel_targets=900)
    easy_dice, hard_dice = (np.mean(otsu_dice([make_patient(settings, 0)])) for settings in (easy, hard))
    assert easy_dice > 0.7
    assert hard_dice < easy_dice - 0.2


@pytest.mark.slow
def test_share_and_densities_of_kinds_and_lung(patients):
    def cores(kind: int) -> np.ndarray:
        """Mean HU of the connected lesions of one kind, without their soft edges."""
        means = []
        for p in patients:
            parts, number = ndimage.label(ndimage.binary_erosion(p.kind == kind, np.ones((1, 3, 3)), iterations=2))
            sizes = np.bincount(parts.ravel())
            means += [np.median(p.hu[parts == n]) for n in range(1, number + 1) if sizes[n] >= 12]
        assert len(means) > 10
        return np.array(means)

    share = [p.mask[k].sum() / p.lung[k].sum() for p in patients for k in np.flatnonzero(p.labels())]
    assert 0.12 < np.mean(share) < 0.22
    count = np.array([sum((p.kind == kind).sum() for p in patients) for kind in KINDS])
    assert count.argmax() == 0  # ground glass is the most frequent
    assert (count > 0.05 * count.sum()).all()
    glass, solid, crazy = cores(GROUND_GLASS), cores(CONSOLIDATION), cores(CRAZY_PAVING)
    assert np.quantile(glass, 0.05) > -760
    assert np.quantile(glass, 0.95) < -400
    assert np.mean(glass < -690) > 0.05  # some are faint
    assert np.quantile(solid, 0.1) > -300
    assert np.quantile(solid, 0.95) < 80
    assert -680 < np.median(crazy) < -400
    for p in patients:
        healthy_lung = np.median(p.hu[p.lung & ~p.mask])
        assert -900 < healthy_lung < -680
        assert np.median(p.hu[:, :8, :8]) < -950  # air around the patient
        assert p.hu.max() > 400  # bone


@pytest.mark.slow
def test_lesions_prefer_the_back_and_the_pleura(patients):
    shares: list[list[float]] = []
    for p in patients:
        if p.healthy:
            continue
        positive = p.labels() == 1
        lung, mask = p.lung[positive], p.mask[positive]
        middle = np.array([np.median(np.nonzero(slice_)[0]) for slice_ in lung])
        back = np.arange(lung.shape[1])[None, :, None] > middle[:, None, None]
        near = np.array([ndimage.distance_transform_edt(s) for s in lung]) * p.spacing[1] < 15
        shares += [[(a & b).sum() / a.sum() for a in (mask, lung)] for b in (back, near)]
    behind, rim = np.mean(shares[::2], axis=0), np.mean(shares[1::2], axis=0)  # (of the lesions, of the lungs)
    assert behind[0] > 1.2 * behind[1]
    assert rim[0] > 1.1 * rim[1]


# --- labels and truth -------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_truth_does_not_contradict_itself(patients):
    for p in patients:
        assert p.hu.dtype == np.int16
        assert p.hu.shape == p.lung.shape == p.mask.shape == p.kind.shape == (24, 256, 256)
        assert not (p.mask & ~p.lung).any()
        assert ((p.kind > 0) == p.mask).all()
        area = p.mask.sum(axis=(1, 2)) * p.spacing[1] * p.spacing[2]
        assert ((area == 0) | (area >= MIN_LESION_AREA_MM2)).all()  # no slice is neither ill nor well
        assert (p.labels() == (area > 0)).all()
        assert p.lung.any(axis=(1, 2)).all()
        assert p.healthy or 3 <= p.labels().sum() <= 0.8 * len(p.hu)  # some slices of every patient are free
    healthy = [p for p in patients if p.healthy]
    assert len(healthy) == 4
    assert not any(p.mask.any() for p in healthy)
    assert 0.25 < np.concatenate([p.labels() for p in patients]).mean() < 0.55


@pytest.mark.slow
def test_lookalikes_lie_in_lesion_free_slices(patients):
    found = {kind: 0 for kind in LOOKALIKES}
    for p in patients:
        assert p.lookalikes == tuple(sorted(p.lookalike_slices))
        for kind, slices in p.lookalike_slices.items():
            found[kind] += int((p.labels()[list(slices)] == 0).sum())
    assert min(found.values()) >= 5, found
    # They are in the image, not only in the record: the back of the lungs is denser than their front.
    contrast = []
    for p in patients:
        for k in p.lookalike_slices.get("dependent_density", ()):
            if p.labels()[k] == 0:
                depth = np.cumsum(p.lung[k, ::-1], axis=0)[::-1] * p.spacing[1]
                lower = p.lung[k] & (np.arange(256)[:, None] > np.nonzero(p.lung[k])[0].mean())
                contrast.append(np.median(p.hu[k][lower & (depth < 8)]) - np.median(p.hu[k][lower & (depth > 40)]))
    assert np.median(contrast) > 60


def test_no_speck_is_left_in_the_image(monkeypatch):
    """A lesion too small to count leaves no trace: with an unreachable least area the image is that of no lesion."""
    frame = make_frame(np.random.default_rng(1), 12, 96, 0.5)
    chest = make_chest(np.random.default_rng(2), frame)
    tissue = np.full(frame.shape, -850, dtype=np.float32)
    with_lesions = lesions_module.add_lesions(np.random.default_rng(3), SMALL, frame, chest, tissue)
    assert with_lesions.mask.any()
    assert (with_lesions.tissue > -800).any()
    free = ~with_lesions.mask.any(axis=(1, 2))
    assert free.any()
    assert (with_lesions.tissue[free] == -850).all()
    monkeypatch.setattr(lesions_module, "MIN_LESION_AREA_MM2", 1e9)
    without = lesions_module.add_lesions(np.random.default_rng(3), SMALL, frame, chest, tissue)
    assert not without.mask.any()
    assert (without.tissue == -850).all()


@pytest.mark.parametrize(("share", "healthy"), [(0.0, 0), (1 / 3, 4), (0.5, 6), (1.0, 12)])
def test_healthy_share(share, healthy):
    settings = PhantomSettings(healthy_share=share)
    assert sum(is_healthy(settings, index) for index in range(12)) == healthy


# --- determinism and files --------------------------------------------------------------------------------------

def test_same_settings_same_patient():
    first, again = make_patient(SMALL, 1), make_patient(SMALL, 1)
    for name in ("hu", "lung", "mask", "kind"):
        assert getattr(first, name).tobytes() == getattr(again, name).tobytes()
    assert (first.spacing, first.lookalike_slices) == (again.spacing, again.lookalike_slices)
    assert not np.array_equal(first.hu, make_patient(SMALL, 0).hu)
    assert not np.array_equal(first.hu, make_patient(replace(SMALL, seed=6), 1).hu)
    # A patient does not depend on how many others there are.
    assert np.array_equal(first.hu, make_patient(replace(SMALL, patients=2), 1).hu)


def test_layout(folder):
    data = load_dataset(folder)
    assert [case.id for case in data.cases] == ["phantom_00", "phantom_01", "phantom_02"]
    for index, case in enumerate(data.cases):
        truth = make_patient(SMALL, index)
        scan = read_scan(case.image)
        assert (scan.unit, scan.pixels.dtype) == ("HU", np.int16)
        assert np.array_equal(scan.pixels, truth.hu)  # upright again after the affine has been applied
        assert np.allclose(scan.spacing, truth.spacing)
        assert (np.diag(scan.grid.affine)[:2] < 0).all()
        mask = read_mask(case.mask, like=scan)
        assert np.array_equal(mask, truth.mask)
        assert np.array_equal(read_mask(case.lung, like=scan), truth.lung)
        assert np.array_equal(read_scan(folder / "kind" / case.image.name).pixels, truth.kind)
        assert case.patient == case.id
        assert case.labels == {k: int(mask[k].any()) for k in range(SMALL.slices)}


def test_upright_anatomy(folder):
    """Spine at the bottom, heart on the right of the picture, trachea at the head end."""
    pixels = read_scan(folder / "im" / "phantom_00.nii.gz").pixels
    lung = read_mask(folder / "lung" / "phantom_00.nii.gz")
    bone = pixels > 350
    rows = np.arange(SMALL.size)[None, :, None]
    centre = slice(SMALL.size // 2 - 6, SMALL.size // 2 + 6)
    assert (bone * rows)[:, :, centre].sum() / bone[:, :, centre].sum() > np.nonzero(lung)[1].mean()
    # The heart takes room from the left lung, which lies on the right of the picture, in front.
    low = lung[2:6, : SMALL.size // 2]
    assert low[:, :, : SMALL.size // 2].sum() > low[:, :, SMALL.size // 2:].sum() * 0.8
    assert lung[6].sum() > 1.2 * lung[-1].sum()


def test_writing_twice_gives_the_same_bytes_and_a_line_for_each_patient(folder, tmp_path, capsys):
    other = write_phantom(tmp_path / "deep" / "other", SMALL, progress=True)
    assert contents(other) == contents(folder)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["other"]  # nothing of the workshop is left
    assert len(capsys.readouterr().out.splitlines()) == SMALL.patients


def test_finished_folder_is_reused_and_left_as_it_is(folder):
    written, before = (folder / "phantom.json").stat().st_mtime_ns, contents(folder)
    assert write_phantom(folder, SMALL) == folder
    assert (folder / "phantom.json").stat().st_mtime_ns == written
    assert contents(folder) == before


@pytest.mark.parametrize(("change", "fault"), [
    (lambda p: None, "other settings"), (lambda p: (p / "phantom.json").write_text("[]"), "no finished phantom"),
    (lambda p: (p / "phantom.json").unlink(), "no finished phantom"),
    (lambda p: (p / "mask/phantom_00.nii.gz").unlink(), "lacks or has changed 1 .* first mask/phantom_00.nii.gz")])
def test_a_folder_that_holds_something_else_is_not_touched(folder, tmp_path, change, fault):
    other = Path(shutil.copytree(folder, tmp_path / "p"))
    change(other)
    before = contents(other)
    with pytest.raises(DatasetError, match=fault):
        write_phantom(other, replace(SMALL, seed=6) if fault == "other settings" else SMALL)
    assert contents(other) == before


def test_a_crash_leaves_no_half_folder(tmp_path, monkeypatch):
    def crash(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "p", SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_phantom(tmp_path / "file" / "p", SMALL)


def test_of_two_programs_that_make_it_at_once_both_have_it(folder, tmp_path, monkeypatch):
    write = patient._write_patients

    def overtaken(built: Path, *rest: object) -> None:
        write(built, *rest)
        shutil.copytree(folder, tmp_path / "new")
    monkeypatch.setattr(patient, "_write_patients", overtaken)
    assert write_phantom(tmp_path / "new", SMALL) == tmp_path / "new"
    assert contents(tmp_path) == {f"new/{name}": raw for name, raw in contents(folder).items()}


@pytest.mark.parametrize("wrong", [
    {"patients": 0}, {"slices": 4}, {"size": 32}, {"seed": -1}, {"vessel_targets": 0}, {"faint_share": 1.5},
    {"lookalike_rate": -0.1}, {"noise_hu": (40, 20)}, {"involved": (0.5, 1.0)}, {"lesion_share": (0.0, 0.1)}])
def test_wrong_settings(wrong):
    with pytest.raises(SettingsError):
        PhantomSettings(**wrong)
    with pytest.raises(SettingsError, match="Give 0 to 2"):
        make_patient(SMALL, 3)


@pytest.mark.parametrize("seed", range(6))
def test_small_and_odd_sizes(seed):
    settings = PhantomSettings(patients=1, slices=8 + seed, size=64 + 7 * seed, seed=seed, lookalike_rate=1)
    patient = make_patient(settings, 0)
    assert patient.hu.shape == (8 + seed, 64 + 7 * seed, 64 + 7 * seed)
    assert 0 < patient.labels().sum() < len(patient.hu)
    assert set(patient.lookalikes) == set(LOOKALIKES)


# --- the parts --------------------------------------------------------------------------------------------------

def test_smooth_noise_has_unit_variance_and_its_scale():
    field = smooth_noise(np.random.default_rng(0), (60, 80, 90), (2.0, 1.0, 1.0), 3.0)
    assert abs(field.var() - 1) < 0.1
    along = [float((field[:, :, :-lag] * field[:, :, lag:]).mean()) for lag in (1, 3, 12)]
    assert along[0] > 0.9
    assert 0.6 < along[1] < 0.9  # a Gaussian kernel of sigma 3 gives exp(-1/4) = .78 at a lag of 3
    assert abs(along[2]) < 0.15


def test_tree_obeys_murray_and_reaches_its_targets():
    rng = np.random.default_rng(0)
    targets = rng.uniform(0, 100, (50, 3))
    tree = grow_tree(rng, np.array([50.0, 50.0, -20.0]), targets, tip=0.5)
    gaps = np.linalg.norm(tree.nodes[:, None] - targets[None], axis=2).min(axis=0)
    assert np.allclose(gaps, 0)
    assert (tree.parent[1:] < np.arange(1, len(tree.parent))).all()
    assert np.isclose(tree.radius[0], 0.5 * 50 ** (1 / MURRAY))  # all ends hang on the root
    assert tree.radius.min() == 0.5
    assert (tree.radius[tree.parent] >= tree.radius - 1e-9).all()


def test_tube_has_its_thickness():
    field = np.zeros((3, 40, 40), dtype=np.float32)
    ends = np.array([[5.0, 20.0, 5.0]]), np.array([[5.0, 20.0, 35.0]])
    draw_tubes(field, *ends, np.array([3.0]), (5.0, 1.0, 1.0), 2.0)
    assert np.isclose(field[1, :, 20].sum(), 6, atol=0.6)
    assert field[0].max() == 0
    assert field[2].max() == 0
