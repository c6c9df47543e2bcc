"""Two published weakly supervised systems, trained on the same slice labels as this project's method.

- :mod:`~covidseg.baselines.decovnet`: DeCoVNet (Wang X. et al., IEEE TMI 39(8), 2020, 2615-2625);
- :mod:`~covidseg.baselines.ad3d_mil`: AD3D-MIL (Han Z. et al., IEEE TMI 39(8), 2020, 2584-2594).

Both read whole volumes and learn from one label a volume. The labels here belong to slices and every training
volume holds a lesion, so each system comes twice from the same code: as the published 3D net on *slabs*, runs of
slices with one label (:mod:`~covidseg.baselines.slabs`), and as a 2D port on single slices, which is what unrelated
slices can be given to. Neither paper segments: how a map becomes a mask is stated with each function.
"""
