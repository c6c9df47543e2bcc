"""The page of a scan: its numbers and outlines are those of the arrays, it loads nothing, and it works in a browser."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from inputs import disk
from PIL import Image
from skimage.draw import polygon2mask

from covidseg import DISCLAIMER, __version__
from covidseg.book import preview
from covidseg.book.figures import COLORS, window
from covidseg.book.preview import outline, preview_page
from covidseg.data.scan import Scan, read_scan
from covidseg.errors import SettingsError
from covidseg.lungs import Lungs

SHAPE = (5, 60, 90)  # with rows twice as far apart as columns
AFFINE = np.diag([-2.0, -4.0, 10.0, 1.0])


def scan_of(hu: np.ndarray, folder: Path, order: str = "LPS") -> Scan:
    """A scan as it is read from a file, stored in some order of voxels."""
    image = nib.Nifti1Image(hu.transpose(2, 1, 0), AFFINE)
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(order))
    nib.save(image.as_reoriented(turn), folder / f"{order}.nii")
    return read_scan(folder / f"{order}.nii")


@pytest.fixture
def masks() -> tuple[np.ndarray, np.ndarray]:
    """Lungs in the slices 1 to 4, and in 2 and 3 lesions that reach beyond them."""
    lungs, lesions = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    lungs[1:] = disk(SHAPE, (30, 30), 14, 10) | disk(SHAPE, (30, 60), 14, 10)
    lesions[2] = disk(SHAPE, (40, 30), 6) & ~disk(SHAPE, (40, 30), 2)
    lesions[3, 25:30, 55:62] = True
    return lungs, lesions


@pytest.fixture
def hu(masks: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """A body in air, ``(slices, rows, columns)``."""
    values = np.where(disk(SHAPE, (30, 45), 25, 40), 40, -1000) + np.zeros(SHAPE)
    values[masks[0]] = -850
    values[masks[1]] = -300
    return (values + np.random.default_rng(0).normal(0, 10, SHAPE)).astype(np.int16)


@pytest.fixture
def scan(hu: np.ndarray, tmp_path: Path) -> Scan:
    return scan_of(hu, tmp_path)


def content(page: str) -> dict[str, Any]:
    """What a page was filled with."""
    found, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def picture(page: str, number: int) -> np.ndarray:
    """Grey levels of a slice, in 0..255."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content(page)["slices"][number]))), float)


def inside(path: str, shape: tuple[int, int]) -> np.ndarray:
    """The mask that an outline was drawn around."""
    mask = np.zeros(shape, bool)
    for part in re.findall(r"M([^l]+)l([^z]+)z", path):
        start, steps = (np.array(re.findall(r"-?\d+", text), int).reshape(-1, 2) for text in part)
        corners = np.cumsum(np.concatenate([start, steps]), axis=0)
        mask ^= polygon2mask(shape, (corners[:, ::-1] - 1) / 2)  # a hole is an outline inside another
    return mask


def test_numbers_are_those_of_the_arrays(scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    lungs, lesions = masks
    found = content(preview_page(scan, Lungs(lungs, ("odd",), True), lesions, made={"nets": "none"}))
    ml = 2 * 4 * 10 / 1000
    assert found["ml"] == pytest.approx(lesions.sum(axis=(1, 2)) * ml)
    assert found["share"][:2] == [None, 0]
    assert found["share"][2] == pytest.approx(lesions[2].sum() / (lungs | lesions)[2].sum(), abs=1e-4)
    assert dict(found["totals"]) == {
        "lesion": f"{lesions.sum() * ml:.1f} ml", "lung": f"{(lungs | lesions).sum() * ml:.0f} ml",
        "share of the lung": f"{100 * lesions.sum() / (lungs | lesions).sum():.1f} %",
        "slices with lung": "4 of 5", "slices with lesion": "2 of 5"}
    assert found["start"] == 2, "the slice with most lesion"
    assert found["sheet"] == [2, 3]
    assert found["warnings"] == ["odd"]
    assert found["made"] == [["nets", "none"], ["covidseg", __version__]]
    assert found["colors"] == {"lung": COLORS["lung"], "lesion": COLORS["prediction"]}
    assert found["mm"] == [180, 240]


def test_outlines_are_those_of_the_masks(scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    found = content(preview_page(scan, Lungs(masks[0], (), True), masks[1]))["outlines"]
    for name, each in zip(("lung", "lesion"), masks, strict=True):
        for path, mask in zip(found[name], each, strict=True):
            np.testing.assert_array_equal(inside(path, mask.shape), mask)
    whole = np.ones((4, 6), bool)
    np.testing.assert_array_equal(inside(outline(whole), whole.shape), whole)


@pytest.mark.parametrize(("order", "axes"), [("LPS", "left, back, head"), ("IAR", "feet, front, right")])
def test_what_was_understood_of_the_file(hu: np.ndarray, masks: tuple[np.ndarray, np.ndarray], tmp_path: Path,
                                         order: str, axes: str) -> None:
    facts = dict(content(preview_page(scan_of(hu, tmp_path, order), Lungs(masks[0], (), True), masks[1]))["file"])
    assert facts["axes as stored"] == f"towards {axes}"
    assert facts["voxels"] == ("90 x 60 x 5" if order == "LPS" else "5 x 60 x 90")
    assert facts["spacing"] == "2 mm across, 4 mm down, 10 mm between slices"
    assert facts["slices"] == "of one body, in order"
    assert facts["grey values"].startswith("in Hounsfield units, -10")
    assert facts["shown"] == "centre -600, width 1500 HU"
    assert facts["padding"] == "none found"


def test_pictures_look_alike_in_any_unit(hu: np.ndarray, scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    lungs = Lungs(masks[0], (), True)
    plain = preview_page(scan, lungs, masks[1])
    assert picture(plain, 3).shape == (120, 90), "square pixels, as wide as the columns"
    assert np.abs(picture(plain, 3)[::2] - 255 * window(hu[3])).mean() < 3
    stored = np.where(disk(SHAPE, (29.5, 44.5), 29.5, 44.5), hu.astype(int) + 1024, -2000).astype(np.int16)
    odd = replace(scan, pixels=stored, value_range=(-2000, int(stored.max())))
    page = preview_page(odd, lungs, masks[1])
    assert dict(content(page)["file"])["grey values"].startswith("not in Hounsfield units")
    body = disk(SHAPE, (30, 45), 25, 40).repeat(2, axis=0)
    assert np.abs(picture(page, 3) - picture(plain, 3))[body].mean() < 40
    display = replace(odd, pixels=np.clip(stored // 6, 0, 255).astype(np.uint8), unit="display", value_range=(0, 255))
    for one in (odd, display):
        grey = picture(preview_page(one, lungs, masks[1]), 3)
        levels = [np.median(grey[mask.repeat(2, axis=0)]) for mask in (masks[0][3] & ~masks[1][3], masks[1][3])]
        assert 15 < levels[0] < levels[1] - 40 < levels[1] < 200, levels


def test_padding_is_said_and_black(scan: Scan) -> None:
    y, x = np.ogrid[:256, :256]
    outside = (y - 127.5) ** 2 + (x - 127.5) ** 2 > 120 ** 2
    lungs = np.zeros((2, 256, 256), bool)
    lungs[:, 90:150, 60:110] = lungs[:, 90:150, 150:200] = True
    pixels = np.where(lungs, -850, np.random.default_rng(0).normal(40, 20, lungs.shape))
    padded = replace(scan, pixels=np.where(outside, 500, pixels).astype(np.int16), spacing=(5, 1, 1),
                     grid=replace(scan.grid, shape=(256, 256, 2)))
    page = preview_page(padded, Lungs(lungs, (), True), np.zeros_like(lungs))
    assert dict(content(page)["file"])["padding"] == "found outside the field of view in 2 of 2 slices, shown black"
    assert np.median(picture(page, 0)[outside]) == 0
    assert content(page)["start"] == 0


def test_a_stack_has_shares_only(hu: np.ndarray, scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    stored = replace(scan, pixels=((hu + 1024) * np.array([1, 2, 3, 4, 5])[:, None, None] // 50).astype(np.uint8),
                     unit="display", value_range=(0, 255))
    page = preview_page(stored, Lungs(masks[0], (), False), masks[1])
    assert content(page)["ml"] is None
    assert " ml" not in json.dumps([content(page)["totals"], content(page)["warnings"]])
    assert dict(content(page)["file"])["shown"] == "brightness fitted to each slice"
    tissue = [np.median(picture(page, k)[96:104, 40:50]) for k in (1, 4)]
    assert abs(tissue[0] - tissue[1]) < 12, "though one was stored four times as bright"


def test_bytes_and_pixels_have_a_limit(scan: Scan, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).normal(-400, 300, (16, 256, 256)).astype(np.int16)
    large = replace(scan, pixels=noise, spacing=(1, 1, 1), grid=replace(scan.grid, shape=(256, 256, 16)))
    empty = np.zeros(noise.shape, bool)
    page = preview_page(large, Lungs(empty, (), True), empty)
    assert picture(page, 0).shape == (256, 256)
    used = sum(map(len, content(page)["slices"])) * 3 / 4
    monkeypatch.setattr(preview, "BYTES", used / 2)
    half = sum(map(len, content(preview_page(large, Lungs(empty, (), True), empty))["slices"])) * 3 / 4
    assert 0.25 * used < half < 0.55 * used
    monkeypatch.setattr(preview, "PIXELS", 16 * 128 ** 2)
    assert picture(preview_page(large, Lungs(empty, (), True), empty), 0).shape == (128, 128)
    assert preview.BYTES * 4 / 3 < 10e6


def test_names_and_warnings_cannot_become_markup(scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    harm = "</script><script>alert(1)</script>{{data}}&\udcff"
    page = preview_page(scan, Lungs(masks[0], (harm,), True), masks[1], name=harm)
    assert page.count("<script") == preview_page(scan, Lungs(masks[0], (), True), masks[1]).count("<script") == 2
    assert content(page)["warnings"] == [harm]
    assert "<title>&lt;/script&gt;&lt;script&gt;alert(1)" in page
    page.encode("utf-8")


def test_nothing_is_loaded_and_no_folder_is_named(scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    page = preview_page(scan, Lungs(masks[0], (), True), masks[1], name="case")
    assert "default-src 'none'" in page
    assert re.findall(r"https?://[\w./]*", page) == ["http://www.w3.org/2000/svg"], "a name, and no address"
    assert not re.findall(r"\b(?:url\(|@import|<link|<iframe|fetch\(|import\()", page)
    assert set(re.findall(r'src="?([^"\s>]{0,20})', page.replace("image.src = ", ""))) <= {"'none'; img-src"}
    assert scan.path.parent.name not in page
    assert html.escape(DISCLAIMER) in page.split("<main>")[0]


def test_masks_of_another_scan_are_refused(scan: Scan, masks: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(SettingsError, match="Give masks of this very scan"):
        preview_page(scan, Lungs(masks[0][1:], (), True), masks[1])
    with pytest.raises(SettingsError, match="Give masks of this very scan"):
        preview_page(scan, Lungs(masks[0], (), True), masks[1][:, 1:])


# --- in a browser -----------------------------------------------------------------------------------------------

@pytest.fixture
def opened(scan: Scan, masks: tuple[np.ndarray, np.ndarray], browser: Any, tmp_path: Path) -> Any:
    """The page in a browser; what goes wrong there is in the list ``faults``."""
    harm = "<img src=x onerror=alert(1)>"
    file = tmp_path / "page.html"
    file.write_text(preview_page(scan, Lungs(masks[0], (harm,), True), masks[1], name=harm), encoding="utf-8")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append("a dialog"))
    page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else
            faults.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert faults == []


def test_slices_change_by_key_wheel_and_click(opened: Any, masks: tuple[np.ndarray, np.ndarray]) -> None:
    said, image = opened.locator("#said"), opened.locator("#view img")
    share = masks[1][2].sum() / (masks[0] | masks[1])[2].sum()
    assert said.inner_text() == f"Slice 2: {masks[1][2].sum() * 0.08:.1f} ml of lesion, {100 * share:.1f} % of the lung"
    before = image.get_attribute("src")
    opened.keyboard.press("ArrowRight")  # the slider has the focus at once
    assert said.inner_text().startswith("Slice 3: ")
    assert image.get_attribute("src") != before
    assert opened.locator("#slice").get_attribute("aria-valuetext").startswith("3, ")
    opened.keyboard.press("Home")
    assert said.inner_text() == "Slice 0: no lung"
    opened.locator("#view").hover()
    opened.mouse.wheel(0, -100)
    opened.wait_for_function("document.getElementById('said').textContent.startsWith('Slice 1: ')")
    chart = opened.locator(".chart svg").first
    width = chart.bounding_box()["width"]
    chart.click(position={"x": 0.9 * width, "y": 10})
    assert said.inner_text().startswith("Slice 4: 0.0 ml")
    opened.keyboard.press("ArrowLeft")
    assert said.inner_text().startswith("Slice 3: ")


def test_outlines_can_be_switched(opened: Any) -> None:
    lung, lesion = (opened.locator(f"#view .{kind}.line") for kind in ("lung", "lesion"))

    def shown() -> list[str]:
        return [each.evaluate("path => getComputedStyle(path).display") for each in (lung, lesion)]
    assert shown() == ["inline", "inline"]
    opened.keyboard.press("1")
    assert shown() == ["none", "inline"]
    opened.get_by_label("lesions").uncheck()
    assert shown() == ["none", "none"]
    opened.keyboard.press("1")
    assert shown() == ["inline", "none"]


def test_page_fits_a_phone_and_can_be_read_by_all(opened: Any) -> None:
    for width, scheme in ((390, "dark"), (1280, "light")):
        opened.set_viewport_size({"width": width, "height": 844})
        opened.emulate_media(color_scheme=scheme)
        assert opened.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        violations = Axe().run(opened, options={"preload": False}).response["violations"]
        assert [(one["id"], one["nodes"][0]["target"]) for one in violations] == []


def test_paper_has_some_slices_and_no_slider(opened: Any) -> None:
    assert opened.locator("#sheet .picture:visible").count() == 0
    opened.emulate_media(media="print")
    assert opened.locator("#slice:visible").count() == 0
    boxes = [each.bounding_box() for each in opened.locator("#sheet .picture").all()]
    assert len(boxes) == 2
    assert all(box["height"] == pytest.approx(box["width"] * 240 / 180, rel=0.02) for box in boxes)
