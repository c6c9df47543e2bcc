"""covidseg: COVID-19 lesions outlined in chest CT from slice labels alone.

A teaching and reproduction package. Every stage of the method is a flat module:

``io, dataset -> lungs -> prepare -> classify -> cam -> patches, mil -> fine -> refine -> metrics``

with ``nifti``, ``morphology``, ``artifacts``, ``train`` and ``distributed`` beneath and ``keys``, ``pipeline``,
``stream``, ``parts``, ``viz`` and ``cli`` above.

**Not a medical device.** Nothing here may be used for diagnosis or treatment.
"""

__version__ = "0.1.0"

DISCLAIMER = "covidseg is teaching and research software, not a medical device: never use it for diagnosis."
