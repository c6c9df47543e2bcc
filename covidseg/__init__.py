"""covidseg: COVID-19 lesions outlined in chest CT from slice labels alone. A teaching and reproduction package.

    import covidseg
    scan = covidseg.read_scan("scan.nii.gz")
    mask = covidseg.segment(scan)                   # (slices, rows, columns) bool

A chapter is a module, and a stage imports only earlier stages and what all of them share::

    lungs, lungnet (2) > preprocess (1) > classifier (3) > gradcam (4) > patches (5) <> curriculum (6) > segmenter (7)

    shared   augment, training, devices, unet, profiles, store, atomic, errors
    above    pipeline (the recipe), predict (masks for new scans), batch (many of them)
    wings    data (scans, sets, phantom), evaluation (metrics, Table 1), baselines (earlier systems),
             cli (commands), book (what the chapters show, and the page of `predict --preview`)

**Not a medical device.** Nothing here may be used for diagnosis or treatment.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from covidseg.data.folder import load_dataset as load_dataset
    from covidseg.data.scan import read_mask as read_mask
    from covidseg.data.scan import read_scan as read_scan
    from covidseg.data.scan import write_like as write_like
    from covidseg.pipeline import open_run as open_run
    from covidseg.predict import load_predictor as load_predictor
    from covidseg.predict import lung_masks as lung_masks
    from covidseg.predict import segment as segment

__version__ = "0.1.0"

DISCLAIMER = "covidseg is teaching and research software, not a medical device: never use it for diagnosis."

# The public face; what is asked for is imported then, so that `import covidseg` costs nothing.
_PLACES = {"read_scan": "data.scan", "read_mask": "data.scan", "write_like": "data.scan", "load_dataset": "data.folder",
           "lung_masks": "predict", "open_run": "pipeline", "load_predictor": "predict", "segment": "predict"}
__all__ = ["DISCLAIMER", "__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _PLACES:
        return getattr(importlib.import_module(f"covidseg.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'covidseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
