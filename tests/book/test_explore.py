"""Sliders: frames drawn beforehand that switch in a browser, and widgets that draw when they are moved."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from covidseg.book.explore import MOST_FRAMES, Explorer, browse, explore, explore_scan, is_static
from covidseg.book.figures import new_figure
from covidseg.book.preview import preview_page
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import SettingsError
from covidseg.lungs import Lungs, survey_lungs
from covidseg.predict import Predictor


def draw(level: float, side: str) -> tuple[Figure, str]:
    figure, axes = new_figure(1, 1, (1, 1))
    axes[0, 0].plot([0, level])
    return figure, f"{side} at {level} <ok>"


@pytest.fixture
def explorer() -> Explorer:
    return explore(draw, {"level": [0.1, 0.2, 0.3], "side": ["left", "right"]}, start={"level": 0.3}, name="a line")


def test_page_holds_all_frames_and_shows_one(explorer: Explorer) -> None:
    page = explorer.page()
    frames = re.findall(r"<figure[^>]*>", page)
    assert [" hidden" in frame for frame in frames] == [True] * 5 + [False]
    assert 'alt="a line; level 0.3, side right; right at 0.3 &lt;ok&gt;"' in page
    assert "<script" not in page
    assert "http" not in page
    assert len(re.findall(r"data:image/jpeg;base64,[\w+/=]{500,}", page)) == 6
    assert page.count("class=montage") == 6


def test_frames_follow_the_sliders_in_a_browser(explorer: Explorer, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<body>{explorer.page()}{explorer.page()}</body>", encoding="utf-8")  # two must not interfere
    page = browser.new_page()
    page.goto(file.as_uri())
    first, second = page.locator(".covidseg-explorer").all()
    first.locator("input").nth(0).fill("0")
    assert first.locator("figure:visible").inner_text() == "right at 0.1 <ok>"
    first.get_by_text("left", exact=True).click()
    assert first.locator("figure:visible").inner_text() == "left at 0.1 <ok>"
    assert first.locator("output").all_inner_texts() == ["0.1"]
    assert first.locator("input").nth(0).get_attribute("aria-valuetext") == "0.1"
    assert second.locator("figure:visible").inner_text() == "right at 0.3 <ok>"


def test_words_are_buttons_that_the_keyboard_moves(explorer: Explorer, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<body>{explorer.page()}</body>", encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    group = page.get_by_role("group", name="side")
    assert [one.is_checked() for one in group.get_by_role("radio").all()] == [False, True]
    group.get_by_role("radio", name="right").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("figure:visible").inner_text() == "left at 0.3 <ok>"
    page.keyboard.press("Enter")  # must not send the form away
    assert page.locator("figure:visible").inner_text() == "left at 0.3 <ok>"
    assert page.url == file.as_uri()
    kinds = [type(child).__name__ for child in explorer.live().children[:2]]
    assert kinds == ["SelectionSlider", "ToggleButtons"]


def test_without_scripts_and_on_paper_a_montage_stands(explorer: Explorer, browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(f"<body>{explorer.page()}</body>", encoding="utf-8")
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(file.as_uri())
    assert plain.locator("figure:visible").count() == 6
    assert plain.locator("input:visible").count() == 0
    paper = browser.new_page()
    paper.goto(file.as_uri())
    assert paper.locator("figure:visible").count() == 1
    paper.emulate_media(media="print")
    assert paper.locator("figure:visible").count() == 6
    assert paper.evaluate("getComputedStyle(document.querySelector('figure'), '::before').content") == (
        '"level 0.1, side left"')
    many = tmp_path / "many.html"
    many.write_text(f"<body>{explore(draw, {'level': range(9), 'side': ['left']}, name='x').page()}</body>")
    paper.goto(many.as_uri())
    assert paper.locator("figure:visible").count() == 6, "the frame of the slider stands aside"


def test_widget_draws_what_its_sliders_say(explorer: Explorer) -> None:
    level, side, picture, caption = explorer.live().children
    assert caption.value == "right at 0.3 &lt;ok&gt;"
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG")
    level.value = 0
    assert caption.value == "right at 0.1 &lt;ok&gt;"
    assert bytes(picture.value) != before
    side.value = 0
    assert caption.value == "left at 0.1 &lt;ok&gt;"


def test_static_pages_are_asked_for_by_the_environment(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    for value, kind in (("1", "HTML"), ("0", "VBox"), ("", "VBox")):
        monkeypatch.setenv("COVIDSEG_STATIC", value)
        assert is_static() == (value == "1")
        explorer._ipython_display_()
        assert type(shown[-1]).__name__ == kind


def test_bad_controls_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least one control"):
        explore(draw, {"level": []}, name="x")
    with pytest.raises(SettingsError, match="cannot start at 7 of 'level'"):
        explore(draw, {"level": [1, 2]}, start={"level": 7}, name="x")
    with pytest.raises(SettingsError, match="cannot start at 1 of 'depth'"):
        explore(draw, {"level": [1, 2]}, start={"depth": 1}, name="x")
    with pytest.raises(SettingsError, match=f"{MOST_FRAMES + 1} pictures are too many"):
        explore(draw, {"level": range(MOST_FRAMES + 1)}, name="x").page()


def test_browse_shows_slices_with_their_titles() -> None:
    images = np.stack([np.full((8, 8), -500.0)] * 3)
    mask = np.zeros((3, 8, 8), bool)
    mask[:, 2:5, 2:5] = True
    shown = browse(images, {"truth": mask}, titles=["feet", "middle"], spacing=(1, 1), name="a volume")
    assert [shown.frame([k])[1] for k in range(3)] == ["feet", "middle", "slice 2"]
    assert shown.at == [1]
    every_second = browse(images, titles=["feet", "middle", "head"], name="a volume", every=2)
    assert list(every_second.controls["slice"]) == [0, 2], "the slices' own numbers"
    assert every_second.frame([1])[1] == "head"
    assert len(shown.frame([0])[0].axes[0].collections) == 1  # the outline


def test_a_scan_is_shown_in_a_frame(tiny_phantom: Path, browser: Any, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    scan = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    mask = read_mask(tiny_phantom / "mask" / "phantom_01.nii.gz", like=scan)
    found = survey_lungs(scan.pixels)
    with monkeypatch.context() as patch:  # the nets take their time
        patch.setattr(Predictor, "lungs", lambda *args, check: found)
        shown = explore_scan(scan, mask, name="<a name>")
    assert shown.page == explore_scan(scan, mask, found, name="<a name>").page
    assert shown.page == preview_page(scan, found, mask, name="<a name>")
    assert explore_scan(scan, mask, found.masks).page == preview_page(scan, Lungs(found.masks, (), True), mask)
    frame = shown._repr_html_()
    assert html.unescape(frame.partition('srcdoc="')[2].partition('"')[0]) == shown.page
    file = tmp_path / "page.html"
    file.write_text(f"<body>{frame}", encoding="utf-8")
    page = browser.new_page()
    page.goto(file.as_uri())
    inner = page.frame_locator("iframe")
    assert not inner.locator("#said").inner_text().startswith("Slice 0: ")
    inner.locator("#slice").press("Home")
    assert inner.locator("#said").inner_text().startswith("Slice 0: ")
