"""covidseg: COVID-19 lesions outlined in chest CT from slice labels alone.

A teaching and reproduction package. Every stage of the method is a module:

``lungs, lungnet -> preprocess -> classifier -> gradcam -> patches <-> curriculum -> segmenter``

with ``augment``, ``training``, ``parallel``, ``unet``, ``store`` and ``atomic`` beneath and ``profiles``, ``pipeline``,
``predict`` and ``batch`` above. ``data`` reads scans, ``evaluation`` measures masks, ``baselines`` holds earlier
systems, ``cli`` the commands, and ``book`` what only the chapters use.

**Not a medical device.** Nothing here may be used for diagnosis or treatment.
"""

__version__ = "0.1.0"

DISCLAIMER = "covidseg is teaching and research software, not a medical device: never use it for diagnosis."
