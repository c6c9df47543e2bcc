"""Runs the tests that compute with nets as other processors would run them: ``make processors``.

Libraries choose their code by what a processor can do, and each choice rounds otherwise; so does another number of
threads. A test whose verdict hangs on that passes where it was written and fails elsewhere. Here each set of
instructions that this processor has takes a turn, chosen by environment variables; but for the newest, with which it
computes anyway: those tests are run under it by ``make test``.
"""

from __future__ import annotations

import os
import subprocess
import sys

ASK = "import torch; print(torch.backends.cpu.get_cpu_capability())"
# From old to new: torch's name of the instructions, number of threads, so that one and two take turns as well, what
# oneDNN may use, and the processor that OpenBLAS (NumPy, SciPy) takes this one for.
KINDS = (("default", 1, "SSE41", "Nehalem"), ("avx2", 2, "AVX2", "Haswell"), ("avx512", 1, "AVX512_CORE", "SkylakeX"))


def environment(name: str, threads: int, onednn: str, openblas: str) -> dict[str, str]:
    """Variables for a program that has to compute like this; what the user has set for OpenBLAS stays."""
    chosen = {"ATEN_CPU_CAPABILITY": name, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": str(threads),
              "OMP_WAIT_POLICY": "PASSIVE"}
    return {"OPENBLAS_CORETYPE": openblas, **os.environ, **chosen}


def there(variables: dict[str, str]) -> bool:
    """Whether this processor can compute like that: torch falls back to what it has."""
    said = subprocess.run([sys.executable, "-c", ASK], env=variables, capture_output=True, text=True, check=True)
    return said.stdout.strip().lower() == variables["ATEN_CPU_CAPABILITY"]


def main(arguments: list[str]) -> int:
    """Runs the tests marked ``nets`` as each kind of processor; arguments go to pytest. Returns the exit code."""
    here, failed = [kind for kind in KINDS if there(environment(*kind))], []
    for name, *_ in KINDS[len(here):]:
        print(f"processors: this one has no {name}; left out", flush=True)
    for name, threads, *rest in here[:-1]:
        print(f"processors: {name}, {threads} thread{'s' * (threads > 1)}", flush=True)
        tests = [sys.executable, "-m", "pytest", "-m", "nets", "-q", *arguments]
        if subprocess.run(tests, env=environment(name, threads, *rest)).returncode:
            failed.append(name)
    own = "".join(f"; {name} is its own, see `make test`" for name, *_ in here[-1:])
    print(f"processors: {len(here[:-1]) - len(failed)} of {len(here[:-1])} older kinds agree{own}"
          + "".join(f"; not {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
