"""All targets by name."""

from __future__ import annotations

from fuzz import scans, stored, tables
from fuzz.harness import Target
from fuzz.mutate import change_arrays, change_gzip, change_json, change_nifti, change_table

TARGETS = {target.name: target for target in (
    Target("nifti", "scans (.nii)", scans.nifti_seeds, scans.read_plain, change_nifti),
    Target("gzip", "scans (.nii.gz)", scans.gzip_seeds, scans.read_packed, change_gzip),
    Target("labels", "label tables", tables.label_seeds, tables.read_labels, change_table),
    Target("splits", "splits", tables.split_seeds, tables.read_splits, change_table),
    Target("artifact", "stored stages", stored.array_seeds, stored.read_arrays, change_arrays),
    Target("notes", "notes of stages", stored.note_seeds, stored.read_notes, change_json),
    Target("report", "reports of runs", stored.report_seeds, stored.read_reports, change_json),
    Target("parts", "reports of predictions", stored.part_seeds, stored.read_parts, change_table),
    Target("zip", "archives", stored.zip_seeds, stored.read_zip))}
