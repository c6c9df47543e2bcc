"""The register that ships with covidseg, faulty registers, and from a name to a folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from data_server import nifti, volume

from covidseg.data import phantom, registry
from covidseg.data.phantom import patient
from covidseg.data.registry import cache_root, data_root, entry, is_present, load_registry, resolve
from covidseg.data.splits import read_split, split_names
from covidseg.errors import DatasetError

GOOD = """
[toy]
title = "Toy"
kind = "download"
layout = "volumes"
doi = ""
page = ""
licence = "CC0 1.0"
licence_file = "cc0-1.0.txt"
megabytes = 1
citation = "x"
note = "x"
[[toy.files]]
name = "a.zip"
url = "https://example.org/a.zip"
checksum = ""
size = 0
role = "image"
"""


def write_volume(folder: Path, name: str = "a") -> None:
    (folder / "im").mkdir(parents=True)
    (folder / "im" / f"{name}.nii.gz").write_bytes(nifti(volume(0, (1,))[0]))
    (folder / "slice_labels.csv").write_text(f"volume,slice,has_lesion\n{name},0,0\n{name},1,1\n")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COVIDSEG_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_shipped_register_is_complete() -> None:
    register = load_registry()
    assert list(register) == ["medseg1", "medseg2", "zenodo20", "mosmed", "phantom"]
    for item in register.values():
        assert len(item.licence_text()) > 50
        assert item.licence == "MIT" or re.search(r"https://creativecommons\.org/\S+/legalcode", item.licence_text())
        assert item.citation
        assert item.note
        for remote in item.files:
            assert remote.url.startswith("https://")
            if item.name != "medseg2":  # the one set without published checksums
                assert remote.checksum
    assert {r.name: r.checksum for r in register["medseg2"].files} == dict.fromkeys(
        ("rp_im.zip", "rp_lung_msk.zip", "rp_msk.zip"), "")
    names = [r.url for item in register.values() for r in item.files]
    assert len(names) == len(set(names)) == 11
    kept = {p.suffix for folder in ("splits", "licences") for p in (data_root() / folder).iterdir()}
    assert kept == {".csv", ".txt"}, "no scans beside the register"


def test_patients_of_the_register_agree_with_the_splits() -> None:
    assert entry("medseg2").patient_of("3") == entry("medseg2").patient_of("2") == "2"
    assert entry("medseg2").patient_of("4") == "4"
    assert entry("zenodo20").patient_of("radiopaedia_10_85902_3") == "radiopaedia_10_85902_1"
    split = read_split("medseg2")
    assert all(patient == entry("medseg2").patient_of(volume) for volume, patient in split.patients.items())
    assert set(split_names()) <= set(load_registry())


def change(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda text: "[", "cannot be read"),
    (change('title = "Toy"', ""), "title"),
    (change('doi = ""', 'doi = ""\ncolour = "red"'), "colour"),
    (change("[toy]", '["../toy"]\nx = 1\n[toy]'), "usable name"),
    (change('kind = "download"', 'kind = "magic"'), "magic"),
    (change('kind = "download"', 'kind = "generated"'), "names 1 files"),
    (change('layout = "volumes"', 'layout = "heap"'), "heap"),
    (change('licence_file = "cc0-1.0.txt"', 'licence_file = "../secret"'), "licence file"),
    (change('name = "a.zip"', 'name = "../a.zip"'), "plain file name"),
    (change('name = "a.zip"', 'name = ".bashrc"'), "plain file name"),
    (change("https://", "http://"), "https"),
    (change('checksum = ""', 'checksum = "md5:123"'), "malformed checksum"),
    (change('checksum = ""', 'checksum = "crc32:12345678"'), "malformed checksum"),
    (change("size = 0", "size = -1"), "negative size"),
    (change('role = "image"', 'role = "king"'), "king"),
    (change('role = "image"', 'role = "image"\ntaste = "sweet"'), "taste"),
])
def test_faulty_registers_are_refused(spoil: Callable[[str], str], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(GOOD)
    assert load_registry(tmp_path / "r.toml")["toy"].files[0].name == "a.zip"
    (tmp_path / "r.toml").write_text(spoil(GOOD))
    with pytest.raises(DatasetError, match=complaint):
        load_registry(tmp_path / "r.toml")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_registry(tmp_path / "none.toml")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DatasetError, match="medseg1, medseg2, zenodo20, mosmed, phantom"):
        entry("medseg3")


def test_cache_folder_can_be_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("COVIDSEG_DATA")
    assert cache_root().name == "covidseg"
    monkeypatch.setenv("COVIDSEG_DATA", "~nobody-of-that-name/data")
    assert cache_root() == Path("~nobody-of-that-name/data"), "no trace, also where nobody knows the home"


def test_resolve_a_folder(cache: Path, tmp_path: Path) -> None:
    write_volume(tmp_path / "mine")
    assert resolve(tmp_path / "mine") == resolve(str(tmp_path / "mine")) == tmp_path / "mine"
    for unknown in (tmp_path / "other", "medseg3", "~nobody-of-that-name/data"):
        with pytest.raises(DatasetError, match="neither a data folder nor the name"):
            resolve(unknown)


def test_resolve_a_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="covidseg data get medseg2"):
        resolve("medseg2")
    write_volume(tmp_path / "medseg2")  # a folder of that name in the working directory does not stand in for it
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="has not been fetched"):
        resolve("medseg2")
    assert resolve("./medseg2") == Path("medseg2")
    write_volume(cache / "medseg2")
    assert is_present(cache / "medseg2")
    assert resolve("medseg2") == cache / "medseg2"
    (cache / "medseg2" / "slice_labels.csv").unlink()  # the table is written last
    assert not is_present(cache / "medseg2")
    with pytest.raises(DatasetError, match="has not been fetched"):
        resolve("medseg2")


def test_phantom_is_made_on_demand_and_once_for_each_version(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = phantom.PhantomSettings(patients=1, slices=8, size=64, vessel_targets=20)
    whole = phantom.write_phantom
    monkeypatch.setattr(phantom, "write_phantom", lambda folder: whole(folder, small))
    first = resolve("phantom")
    assert first == cache / f"phantom-{phantom.mark()}"
    written = (first / "phantom.json").stat().st_mtime_ns
    assert resolve("phantom") == first
    assert (first / "phantom.json").stat().st_mtime_ns == written
    monkeypatch.setattr(patient, "VERSION", patient.VERSION + 1)
    assert registry.home("phantom") != first
    assert registry.home("medseg1") == cache / "medseg1"


def test_installed_package_finds_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "covidseg"
    (package / "_data").mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(package / "data" / "registry.py"))
    assert data_root() == package / "_data"
    (package / "_data").rmdir()
    assert data_root() == tmp_path / "site" / "data"


@pytest.mark.parametrize(("name", "words"), [
    ("medseg9", "made from medseg2: name that. Known are medseg1"), ("medseg100", "made from medseg1"),
    ("mosmeddata", "Did you mean mosmed?"), ("Phantom", "Did you mean phantom?"), ("xyz", "Known are medseg1, med")])
def test_a_name_that_is_none_gets_the_one_that_was_meant(name: str, words: str) -> None:
    for ask in (entry, resolve):
        with pytest.raises(DatasetError) as caught:
            ask(name)
        assert words in str(caught.value)
