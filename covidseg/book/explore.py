"""Sliders and buttons that redraw a picture: live in a notebook, and drawn beforehand where no kernel runs.

Numbers are chosen with a slider, words with buttons. In Jupyter and on Colab ipywidgets draw when one is moved. While
the book is built (``COVIDSEG_STATIC=1``) every choice is drawn at once and leaves plain HTML: pictures and inputs, a
dozen words of script and no library, so that the page works with no kernel and no network. Without JavaScript, and on
paper, a selection of the pictures stands side by side. :func:`explore_scan` shows the page that ``covidseg predict
--preview`` writes: a whole scan and what was found in it.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from covidseg.book.figures import draw_slice, legend, new_figure, overlay
from covidseg.book.preview import preview_page
from covidseg.data.scan import Scan
from covidseg.errors import SettingsError
from covidseg.lungs import Lungs
from covidseg.predict import shipped_predictor

# More frames than that make a page of many megabytes.
MOST_FRAMES = 80
# How many of them stand side by side where no slider can move.
MONTAGE = 6
DPI = 90
PAGE_HEIGHT = "48rem"

Draw = Callable[..., "Figure | tuple[Figure, str]"]

# A handler on each input itself: no script element, and no ids that could clash with those of another explorer.
_SWITCH = ("const box = this.closest('.covidseg-explorer'); let frame = 0;"
           "box.querySelectorAll('input').forEach(input => {"
           " if (input.type === 'range') {"
           "  const label = JSON.parse(input.dataset.labels)[input.value];"
           "  input.setAttribute('aria-valuetext', label);"
           "  input.parentNode.querySelector('output').textContent = label;"
           " } else if (!input.checked) return;"
           " frame += input.value * input.dataset.stride; });"
           "box.querySelectorAll('figure').forEach((figure, k) => { figure.hidden = k !== frame; })")
# A selection of the frames side by side, each with the choice that it stands for.
_MONTAGE = (".covidseg-explorer .control,.covidseg-explorer figure:not(.montage){display:none}"
            ".covidseg-explorer figure.montage{display:inline-block!important;width:32%;vertical-align:top}"
            ".covidseg-explorer figure.montage::before{content:attr(data-choice);display:block;text-align:center}")
_STYLE = ("<style>.covidseg-explorer{max-width:46rem}.covidseg-explorer figure{margin:0}"
          ".covidseg-explorer figcaption{color:inherit!important;font-weight:400}"
          ".covidseg-explorer .control{display:grid;grid-template-columns:minmax(7rem,auto) 1fr 5rem;gap:.6rem;"
          "align-items:center;margin:0 0 .3rem}.covidseg-explorer .words{display:flex;flex-wrap:wrap;gap:.3rem .4rem;"
          "border:0;padding:0}.covidseg-explorer .words legend{float:left;width:auto;font:inherit;margin:0 .6rem 0 0}"
          # The dot itself is out of sight, not gone: the keyboard and screen readers find it.
          ".covidseg-explorer .words input{position:absolute;opacity:0}"
          ".covidseg-explorer .words span{display:block;border:1px solid;border-radius:.3rem;padding:.1rem .6rem;"
          "cursor:pointer}.covidseg-explorer .words input:checked+span{background:#1b4f8a;color:#fff;"
          "border-color:#1b4f8a}.covidseg-explorer .words input:focus-visible+span{outline:3px solid #e69f00}"
          ".covidseg-explorer img{max-width:100%;height:auto}"
          f"@media print{{{_MONTAGE}}}</style>"
          # Where scripts are off, the sliders cannot move anything.
          f"<noscript><style>{_MONTAGE}</style></noscript>")


def is_static() -> bool:
    """Whether pages are being made that no kernel stands behind."""
    return os.environ.get("COVIDSEG_STATIC", "") not in ("", "0")


class Explorer:
    """A picture that changes with sliders and buttons. Shown when it is the value of a cell.

    Args:
        draw: is called with one value of each control, in their order, and returns a figure, or a figure and a
            caption.
        controls: label of each control (with its unit) -> the values that it offers, in order. Values that are all
            words become buttons, others a slider.
        start: label -> value to begin with; the middle one if it is not named.
        name: what is shown, for the description that screen readers read.

    Raises:
        SettingsError: no controls, no values, or a start that is not among them.
    """

    def __init__(self, draw: Draw, controls: Mapping[str, Sequence[Any]], *, start: Mapping[str, Any] | None = None,
                 name: str) -> None:
        self.draw, self.name = draw, name
        start = start or {}
        self.controls = {label: list(values) for label, values in controls.items()}
        if not self.controls or not all(self.controls.values()):
            raise SettingsError("an explorer needs at least one control, and values for each",
                                remedy="Give controls such as {'threshold': [0.2, 0.5]}")
        unknown = [label for label, value in start.items() if value not in self.controls.get(label, ())]
        if unknown:
            raise SettingsError(f"the explorer cannot start at {start[unknown[0]]!r} of {unknown[0]!r}",
                                remedy="Choose a control that it has, and one of its values")
        self.at = [values.index(start[label]) if label in start else len(values) // 2
                   for label, values in self.controls.items()]

    def frame(self, places: Sequence[int]) -> tuple[Figure, str, str]:
        """Figure, caption and choice in words; ``places`` are positions in the lists of values."""
        chosen = [values[k] for values, k in zip(self.controls.values(), places, strict=True)]
        drawn = self.draw(*chosen)
        figure, caption = drawn if isinstance(drawn, tuple) else (drawn, "")
        return figure, caption, ", ".join(f"{label} {value}"
                                          for label, value in zip(self.controls, chosen, strict=True))

    def page(self) -> str:
        """HTML with all frames, drawn now.

        Raises:
            SettingsError: the choices make more than ``MOST_FRAMES`` frames.
        """
        sizes = [len(values) for values in self.controls.values()]
        count = int(np.prod(sizes))
        if count > MOST_FRAMES:
            raise SettingsError(f"{count} pictures are too many for a page", remedy=f"At most {MOST_FRAMES}: offer "
                                "fewer values")
        strides = [int(np.prod(sizes[k + 1:])) for k in range(len(sizes))]
        first = sum(k * stride for k, stride in zip(self.at, strides, strict=True))
        montage = set(np.linspace(0, count - 1, min(MONTAGE, count)).round().astype(int).tolist())
        frames = []
        for number, places in enumerate(itertools.product(*(range(n) for n in sizes))):
            figure, caption, choice = self.frame(places)
            description = "; ".join(filter(None, (self.name, choice, caption)))
            # A fifth of the size of PNG for noisy pictures.
            jpeg = base64.b64encode(_image(figure, "jpeg", pil_kwargs={"quality": 80})).decode()
            frames.append(f'<figure data-choice="{html.escape(choice)}"{" class=montage" * (number in montage)}'
                          f'{" hidden" * (number != first)}>'
                          f'<img alt="{html.escape(description)}" src="data:image/jpeg;base64,{jpeg}">'
                          f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        inputs = "".join(_control(label, values, place, stride) for (label, values), place, stride
                         in zip(self.controls.items(), self.at, strides, strict=True))
        # A form, so that the names of its buttons are its own; nothing is ever sent.
        return f'{_STYLE}<form class="covidseg-explorer" onsubmit="return false">{inputs}{"".join(frames)}</form>'

    def live(self) -> Any:
        """An ipywidgets ``VBox`` (versions 7.7 and 8) that draws whenever a control is moved."""
        import ipywidgets as widgets

        def control(label: str, values: Sequence[Any], place: int) -> Any:
            shared = {"options": [(str(value), k) for k, value in enumerate(values)], "value": place,
                      "description": label, "style": {"description_width": "initial"}}
            if _are_words(values):
                return widgets.ToggleButtons(**shared)
            return widgets.SelectionSlider(**shared, continuous_update=False, layout={"width": "32rem"})

        controls = [control(label, values, place)
                    for (label, values), place in zip(self.controls.items(), self.at, strict=True)]
        picture, caption = widgets.Image(format="png"), widgets.HTML()

        def draw(*_: Any) -> None:
            figure, text, _choice = self.frame([one.value for one in controls])
            picture.value, caption.value = _image(figure, "png"), html.escape(text)

        for one in controls:
            one.observe(draw, names="value")
        draw()
        return widgets.VBox([*controls, picture, caption])

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        display(HTML(self.page()) if is_static() else self.live())


explore = Explorer  # what a cell does


def browse(images: np.ndarray, masks: Mapping[str, np.ndarray] | None = None, *, titles: Sequence[str] = (),
           spacing: tuple[float, float] | None = None, name: str = "slice", every: int = 1) -> Explorer:
    """A slider through slices ``(S, H, W)``, HU or normalised, with outlines of masks: name -> ``(S, H, W)`` bool.

    ``titles`` are texts for the first slices, default their numbers; ``spacing`` millimetres between rows and columns;
    ``every`` = 2 offers every second slice, and so on, which keeps a page small.
    """
    masks = masks or {}

    def draw(number: int) -> tuple[Figure, str]:
        figure, axes = new_figure(1, 1, (4.4, 4.6))
        draw_slice(axes[0, 0], images[number], spacing)
        overlay(axes[0, 0], {key: mask[number] for key, mask in masks.items()})
        if masks:
            legend(figure, list(masks))
        return figure, titles[number] if number < len(titles) else f"slice {number}"

    return explore(draw, {"slice": range(0, len(images), every)}, name=name)


class ScanPage:
    """A page of :func:`explore_scan`, shown in a frame when it is the value of a cell; ``page`` is its HTML."""

    def __init__(self, page: str) -> None:
        self.page = page

    def _repr_html_(self) -> str:
        # Whole pages cannot stand inside others; and in a frame of its own none of the notebook is in its reach.
        return (f'<iframe srcdoc="{html.escape(self.page)}" sandbox="allow-scripts" title="Slices of a scan with '
                f'outlines of lungs and lesions" style="width:100%;height:{PAGE_HEIGHT};border:0"></iframe>')


def explore_scan(scan: Scan, mask: np.ndarray, lungs: np.ndarray | Lungs | None = None, *, name: str = "") -> ScanPage:
    """All slices of a scan with outlines of lungs and lesions, amounts by slice, and what was understood of the file.

    Args:
        scan: the scan.
        mask: ``(slices, rows, columns)`` bool, its lesions, by whatever method.
        lungs: its lungs, bool as ``mask``, of one body in order; by default the best that the package finds, with
            whether the slices are one body, and with warnings. What :meth:`covidseg.predict.Predictor.lungs` found will
            do as well.
        name: what the scan is called on the page.

    Raises:
        NoLungError: no lungs were given, and there are none in any slice.
        SettingsError: scan, mask and lungs have not one shape.
    """
    if lungs is None:
        lungs = shipped_predictor().lungs(scan, check=False)
    elif not isinstance(lungs, Lungs):
        lungs = Lungs(lungs, (), volume=True)
    return ScanPage(preview_page(scan, lungs, mask, name=name))


def _are_words(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _control(label: str, values: Sequence[Any], place: int, stride: int) -> str:
    """HTML of a slider, or of buttons: ``stride`` is how many frames lie between two neighbouring values."""
    texts = [html.escape(str(value)) for value in values]
    label, script = html.escape(label), html.escape(_SWITCH)
    if _are_words(values):
        buttons = "".join(f'<label><input type="radio" name="{label}" value="{k}" data-stride="{stride}"'
                          f'{" checked" * (k == place)} oninput="{script}"><span>{text}</span></label>'
                          for k, text in enumerate(texts))
        return f'<fieldset class="control words"><legend>{label}</legend>{buttons}</fieldset>'
    labels = html.escape(json.dumps([str(value) for value in values], ensure_ascii=False))
    return (f'<label class="control"><span>{label}</span><input type="range" min="0" max="{len(values) - 1}" '
            f'value="{place}" data-stride="{stride}" data-labels="{labels}" aria-valuetext="{texts[place]}" '
            f'oninput="{script}"><output>{texts[place]}</output></label>')


def _image(figure: Figure, form: str, **options: Any) -> bytes:
    """A figure as a picture file; it is closed for pyplot, which else would keep every one that was ever drawn."""
    raw = io.BytesIO()
    figure.savefig(raw, format=form, dpi=DPI, **options)
    plt.close(figure)
    return raw.getvalue()
