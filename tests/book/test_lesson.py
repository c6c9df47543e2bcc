"""What a chapter stands on: scans of either edition, nets that come with the package, sentences that must be true."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from covidseg.book import lesson as page
from covidseg.data.registry import cache_root
from covidseg.errors import DatasetError, SettingsError
from covidseg.pipeline import Run


@pytest.fixture
def small(tiny_run: Run, tmp_path: Path) -> Run:
    """A run like the finished one that has trained nothing yet."""
    return Run(tiny_run.data, tiny_run.profile, tiny_run.seed, tmp_path / "run", "cpu", lambda line: None)


@pytest.mark.nets
def test_shipped_nets_spare_a_chapter_the_ones_before(tiny_run: Run, small: Run, tmp_path: Path) -> None:
    shipped = tmp_path / "nets"
    names = [path.name for path in page.ship(tiny_run, shipped)]
    assert "classifier1.safetensors" in names
    brought = page.bring(small, page.NETS[:2], shipped)
    assert brought == ("lung_net", "classifier1")
    assert page.bring(small, page.NETS[:2], shipped) == (), "they are there now"
    assert not small.store.path("mil1", small.key("mil1")).exists(), "a later stage is the chapter's own"
    # Weights, not maps, are compared: where a net of this size sees next to nothing, the map is rounding made visible.
    found, trained = small.ensemble(1).state_dict(), tiny_run.ensemble(1).state_dict()
    torch.testing.assert_close(found, trained, rtol=2 ** -11, atol=1e-7)  # half precision
    assert small.history("classifier1") == tiny_run.history("classifier1")


def test_nets_of_other_settings_or_another_seed_are_not_brought(tiny_run: Run, tmp_path: Path) -> None:
    page.ship(tiny_run, tmp_path / "nets")
    other = Run(tiny_run.data, tiny_run.profile, tiny_run.seed + 1, tmp_path / "run", "cpu", lambda line: None)
    assert page.bring(other, page.NETS, tmp_path / "nets") == ()
    assert page.bring(other, page.NETS, tmp_path / "none") == ()


def test_folders_of_ones_own(tiny_phantom: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COVIDSEG_RUNS", str(tmp_path))
    opened = page.open_lesson([str(tiny_phantom), str(tiny_phantom)], trains="classifier1")
    assert opened.real
    assert len(opened.run.data.cases) == len(opened.test.cases) == 4
    text = opened._repr_markdown_()
    assert "training scans phantom, test scans phantom; profile `quick`, seed 0" in text
    assert "never use it for diagnosis" in text
    assert str(tiny_phantom) not in text + repr(opened)


@pytest.mark.parametrize(("data", "complaint"), [
    ("medsag", "names no scans for the book.*phantom, medseg"), (["one"], "names no scans"),
    (["nowhere-a", "nowhere-b"], "neither a data folder")])
def test_scans_that_are_none(data: str | list[str], complaint: str) -> None:
    with pytest.raises(DatasetError, match=complaint):
        page.open_lesson(data)


def test_folders_of_ones_own_are_looked_at_before_any_chapter_runs(tiny_phantom: Path, tmp_path: Path) -> None:
    good, nowhere = str(tiny_phantom), str(tmp_path / "nowhere")
    for pair in ([nowhere, good], [good, nowhere]):
        with pytest.raises(DatasetError, match=r"nowhere: is neither a data folder.*Known are"):
            page.find_scans(pair)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"empty: holds no scans\. Expected im/"):
        page.find_scans([good, str(tmp_path / "empty")])
    assert page.find_scans([good, good]) == (good, good, "patients: training scans phantom, test scans phantom")


def test_folders_of_ones_own_need_both_labels_and_outlines(tiny_phantom: Path, tmp_path: Path) -> None:
    good, healthy, bare = str(tiny_phantom), tmp_path / "healthy", tmp_path / "bare"
    shutil.copytree(tiny_phantom, bare)
    (bare / "mask" / "phantom_02.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"bare: .*no lesion mask for phantom_02\. Add the masks"):
        page.find_scans([good, str(bare)])
    assert page.find_scans([str(bare), good])[0] == str(bare), "training scans need no outlines"
    shutil.copytree(tiny_phantom, healthy)
    (healthy / "slice_labels.csv").write_text("volume,slice,has_lesion\nphantom_00,0,0\n")
    with pytest.raises(DatasetError, match=r"healthy: training needs slices with and without a lesion.*Complete"):
        page.find_scans([str(healthy), good])
    assert page.find_scans([good, str(healthy)])[1] == str(healthy), "test scans need no labels of both kinds"


def test_unknown_stage() -> None:
    with pytest.raises(SettingsError, match=r"no stage 'grad-cam'.*lung_net, classifier1"):
        page.open_lesson(trains="grad-cam")


@pytest.mark.parametrize("answer", ["n", ""])
def test_missing_set_is_offered_with_its_licence(answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COVIDSEG_DATA", str(tmp_path))
    monkeypatch.setattr(builtins, "input", lambda question: answer)
    with pytest.raises(DatasetError, match="covidseg data get medseg2") as caught:
        page.open_lesson("medseg")
    assert str(cache_root()) not in str(caught.value), "no page names a folder of a machine"
    assert "licence CC0 1.0" in capsys.readouterr().out


def test_nobody_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(question: str) -> str:
        raise EOFError
    monkeypatch.setenv("COVIDSEG_DATA", str(tmp_path))
    monkeypatch.setattr(builtins, "input", nobody)
    with pytest.raises(DatasetError, match="has not been fetched"):
        page.find_scans("medseg")


def test_notebook_and_package_are_of_one_version() -> None:
    page.begin(page.__version__)
    with pytest.raises(SettingsError, match=r"written for covidseg 0\.0\.9"):
        page.begin("0.0.9")


def test_claims_are_checked() -> None:
    assert page.claim(("Better.", True), ("Worse.", False)).data == "Better."
    assert page.claim(("Better.", False), ("Worse.", np.True_)).data == "Worse."
    with pytest.raises(AssertionError, match=r"no longer true: Better\. \| Worse\."):
        page.claim(("Better.", False), ("Worse.", False))


def test_a_close_up_shows_the_lungs_as_fine_as_they_are_stored() -> None:
    image, lung = np.full((60, 80), 40.0), np.zeros((60, 80), bool)
    lung[10:50, 20:30] = lung[10:50, 50:60] = True
    image[lung] = -900.0
    picture, (shown,) = page.close_up(image, lung, lung, margin=0.1)
    assert picture.shape == shown.shape
    assert 44 <= picture.shape[0] == picture.shape[1] <= 52
    assert shown.sum() == lung.sum()
    assert picture[shown].mean() < 0.1 < 0.9 < picture[~shown & (picture > 0.5)].mean()
