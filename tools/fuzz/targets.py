"""All targets by name."""

from __future__ import annotations

from fuzz import scans, stored, tables
from fuzz.harness import Target, inside_gzip, inside_header

TARGETS = {target.name: target for target in (
    Target("nifti", "scans (.nii)", scans.nifti_seeds, scans.read_plain),
    Target("gzip", "scans (.nii.gz)", scans.gzip_seeds, scans.read_packed, inside_gzip),
    Target("labels", "label tables", tables.label_seeds, tables.read_labels),
    Target("splits", "splits", tables.split_seeds, tables.read_splits),
    Target("artifact", "stored stages", stored.array_seeds, stored.read_arrays, inside_header),
    Target("notes", "notes of stages", stored.note_seeds, stored.read_notes),
    Target("report", "reports of runs", stored.report_seeds, stored.read_reports),
    Target("parts", "reports of predictions", stored.part_seeds, stored.read_parts),
    Target("zip", "archives", stored.zip_seeds, stored.read_zip))}
