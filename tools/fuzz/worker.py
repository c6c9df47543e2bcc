"""One target under atheris, in a process of its own, since libFuzzer ends the process when it is done.

``python -m fuzz.worker TARGET --seconds 60 --folder FOLDER --kept FILES``: corpus and scratch files lie in a folder,
and the file of a finding gets the name that ``--kept`` begins.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import atheris

# Modules whose lines guide the search: those that read, and those of others that do most of the work for them.
INSTRUMENTED = ["covidseg", "nibabel.nifti1", "nibabel.nifti2", "nibabel.analyze", "nibabel.wrapstruct",
                "nibabel.volumeutils", "nibabel.orientations", "zipfile", "csv", "json"]
LONGEST, SLOWEST, MEMORY = 1 << 14, 20, 4096  # bytes of a file, seconds and MB to read it
TOKENS = Path(__file__).with_name("tokens.dict")


def main() -> None:
    """Searches until the time is over or something is found; does not return."""
    parser = argparse.ArgumentParser(prog="fuzz.worker")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True)
    options = parser.parse_args()
    with atheris.instrument_imports(include=INSTRUMENTED):
        from covidseg.errors import CovidsegError
        from fuzz.targets import TARGETS
    logging.disable()  # nibabel says of every header what is odd about it
    warnings.simplefilter("ignore")
    target = TARGETS[options.target]
    corpus, scratch = options.folder / "corpus", options.folder / "scratch"
    for folder in (corpus, scratch):
        folder.mkdir(parents=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def run(data: bytes) -> None:
        with suppress(CovidsegError):  # what should come of a broken file
            target.run(data, scratch)

    def change(data: bytes, size: int, seed: int) -> bytes:
        """Half of all changes keep what the format has around its content, half are anywhere."""
        def mutate(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, size))
        return bytes((target.change(data, mutate) if seed % 2 else mutate(data))[:size])

    atheris.Setup([sys.argv[0], f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", f"-timeout={SLOWEST}",
                   f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={options.kept}", f"-dict={TOKENS}",
                   "-print_final_stats=1", "-seed=1", str(corpus)], run, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
