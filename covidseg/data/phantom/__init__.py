"""A procedural chest CT: patients made of formulas and chance, with the truth known to the voxel.

The phantom stands in for real scans where none may be shipped: in tests, in the first chapters and wherever a
student wants to know the right answer. It is deterministic per seed, in Hounsfield units (HU), and made to be
as hard as real CT in what matters for weak supervision: faint lesions, vessels and look-alikes that are as bright
as lesions, patients who differ. Its settings were chosen so that the stages of the method rank about as on real CT:
that they do is no finding. It is not a medical device, and nothing measured on it says how a method does on patients.

A patient is made in this order (:mod:`covidseg.data.phantom.patient`): body and organs
(:mod:`covidseg.data.phantom.anatomy`), lung tissue, look-alikes and lesions (:mod:`covidseg.data.phantom.lesions`),
vessels and airways over them (:mod:`covidseg.data.phantom.vessels`), and at last the scanner with its blur and noise.
"""

from covidseg.data.phantom.patient import LOOKALIKES, PhantomPatient, is_healthy, make_patient, mark, write_phantom
from covidseg.data.phantom.settings import PhantomSettings

__all__ = ["LOOKALIKES", "PhantomPatient", "PhantomSettings", "is_healthy", "make_patient", "mark", "write_phantom"]
