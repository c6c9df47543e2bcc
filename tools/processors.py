"""Runs the tests that compute with nets as other processors would run them: ``make processors``.

Libraries choose their code by what a processor can do, and each choice rounds otherwise; so does another number of
threads. A test whose verdict hangs on that passes where it was written and fails elsewhere. Here each set of
instructions that this processor has takes a turn, chosen by environment variables.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

ASK = "import torch; print(torch.backends.cpu.get_cpu_capability())"


@dataclass(frozen=True)
class Kind:
    """One kind of processor.

    Attributes:
        name: Name of the instructions in torch.
        threads: Number of threads, so that one and two take turns as well.
        onednn: Instructions that oneDNN may use.
        openblas: Kind of processor that OpenBLAS takes this one for.
    """

    name: str
    threads: int
    onednn: str
    openblas: str

    def environment(self) -> dict[str, str]:
        """Variables for a program that has to compute like this; what the user has set for OpenBLAS stays."""
        chosen = {"ATEN_CPU_CAPABILITY": self.name, "ONEDNN_MAX_CPU_ISA": self.onednn,
                  "OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return {"OPENBLAS_CORETYPE": self.openblas, **os.environ, **chosen}

    def there(self) -> bool:
        """Whether this processor can compute like that: torch falls back to what it has."""
        said = subprocess.run([sys.executable, "-c", ASK], env=self.environment(), capture_output=True, text=True,
                              check=True).stdout.strip()
        return said.lower() == self.name


# From old to new. OpenBLAS (NumPy, SciPy) goes by kinds of processor, torch and oneDNN by instructions.
KINDS = (Kind("default", 1, "SSE41", "Nehalem"), Kind("avx2", 2, "AVX2", "Haswell"),
         Kind("avx512", 1, "AVX512_CORE", "SkylakeX"))


def main(arguments: list[str]) -> int:
    """Runs the tests marked ``nets`` as each kind of processor; arguments go to pytest. Returns the exit code."""
    failed, run = [], 0
    for kind in KINDS:
        if not kind.there():
            print(f"processors: this one has no {kind.name}; left out", flush=True)
            continue
        print(f"processors: {kind.name}, {kind.threads} thread{'s' * (kind.threads > 1)}", flush=True)
        run += 1
        command = [sys.executable, "-m", "pytest", "-m", "nets", "-q", *arguments]
        if subprocess.run(command, env=kind.environment()).returncode:
            failed.append(kind.name)
    print(f"processors: {run - len(failed)} of {run} kinds agree" + "".join(f"; not {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
