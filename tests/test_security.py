"""What must never be in the code, and where it may write; each rule is also shown to fire."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tiny import WARM

from covidseg.cli import app
from covidseg.predict import load_predictor

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "covidseg").rglob("*.py"))
# Modules that may reach the network: downloads, and the processes of one training among each other.
NETWORK = {"socket", "http", "urllib.request", "requests", "aiohttp", "httpx", "ftplib", "smtplib"}
MAY = {"fetch.py": {"requests"}}
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SECRETS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{36}|"
                     r"xox[bap]-[0-9A-Za-z-]{10}|(?i:(?:password|api_key|secret)\s*=\s*[\"'][^\"'\s]{8,}[\"'])")


def imported(code: str) -> set[str]:
    """Modules that code imports, and names in them."""
    found = set[str]()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def dangers(code: str) -> Iterator[str]:
    """Calls and imports of a module that run what a file says, or a shell."""
    yield from (f"imports {name}" for name in imported(code) if name.split(".")[0] in UNPICKLE)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "yaml.load"):
                yield f"calls {name}"
            if name == "torch.load" and said.get("weights_only") != "True":
                yield "calls torch.load without weights_only=True"
            if said.get("allow_pickle", "False") != "False":
                yield f"calls {name} with allow_pickle"
            if said.get("shell", "False") != "False":
                yield f"calls {name} with a shell"


def reached(code: str) -> set[str]:
    """Modules of the network that code imports."""
    return {name for name in NETWORK if any(f"{found}.".startswith(f"{name}.") for found in imported(code))}


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tools").rglob("*.py"))], ids=lambda path: path.name)
def test_no_code_is_read_from_files_and_no_shell_is_used(path: Path) -> None:
    assert not list(dangers(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("code", [
    "import pickle", "from joblib import load", "eval('1')", "import os\nos.system('ls')",
    "import torch\ntorch.load('x')", "import torch\ntorch.load('x', weights_only=False)",
    "import numpy\nnumpy.load('x', allow_pickle=True)", "import subprocess\nsubprocess.run('ls', shell=True)"])
def test_dangerous_code_is_noticed(code: str) -> None:
    assert len(list(dangers(code))) == 1
    assert not list(dangers("import torch\ntorch.load('x', weights_only=True)\nnet.eval()\nsubprocess.run(['ls'])"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_only_downloads_reach_the_network(path: Path) -> None:
    assert reached(path.read_text(encoding="utf-8")) <= MAY.get(path.name, set())


def test_use_of_the_network_is_noticed() -> None:
    assert reached("from urllib import request\nimport requests.adapters\nimport http.client as c") == {
        "urllib.request", "requests", "http"}
    assert not reached("from urllib.parse import urljoin")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_secret_is_kept_in_the_repository() -> None:
    for path in tracked():
        if path.name != Path(__file__).name and path.suffix not in (".safetensors", ".png", ".ico"):
            assert not SECRETS.search(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("text", ["-----BEGIN RSA PRIVATE KEY-----", "AKIA" + 16 * "A", "ghp_" + 36 * "a",
                                  "password = 'correct horse'".replace(" horse", "-horse")])
def test_a_secret_is_noticed(text: str) -> None:
    assert SECRETS.search(text)


Work = Callable[[list[str]], object]


def command(arguments: list[str]) -> None:
    app(arguments, standalone_mode=False)


def _watch(pipe: Connection, work: Work, commands: list[list[str]], folder: Path) -> None:
    """Runs commands and notes every file that is opened for writing, made, renamed or removed meanwhile."""
    seen: set[str] = set()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)) and ((mode and set(mode) & set("wax+")) or
                                                   (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                seen.add(os.path.abspath(os.fsdecode(path)))
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate"):
            seen.update(os.path.abspath(os.fsdecode(a)) for a in arguments if isinstance(a, (str, bytes, os.PathLike)))

    os.environ.clear()
    os.environ.update({
        "PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "COVIDSEG_DATA": str(folder / "cache")})
    tempfile.tempdir = None  # to be looked up anew
    os.chdir(folder / "here")
    sys.addaudithook(note)  # for the rest of this process's life
    for arguments in commands:
        work(arguments)
    pipe.send(sorted(seen))


def written(commands: list[list[str]], folder: Path, work: Work = command) -> list[Path]:
    """What commands write, with a home, a cache and a current folder of their own, which are empty before."""
    for name in ("home", "cache", "here", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    load_predictor()  # what is imported late is imported beforehand, since noting takes its time
    mine, theirs = WARM.Pipe()
    process = WARM.Process(target=_watch, args=(theirs, work, commands, folder), daemon=True)
    process.start()
    theirs.close()
    names = mine.recv()
    process.join()
    return [Path(name) for name in names]


def test_commands_write_into_their_output_the_cache_and_nowhere_else(tiny_phantom: Path, tmp_path: Path) -> None:
    scan, out = str(tiny_phantom / "im" / "phantom_00.nii.gz"), tmp_path / "out"
    paths = written([["lungs", scan, "-o", str(out)], ["predict", scan, "-o", str(out / "lesions")],
                     ["export", str(ROOT / "covidseg" / "weights"), "-o", str(out / "nets")]], tmp_path)
    assert {out / "phantom_00.nii.gz", out / "lesions" / "phantom_00.nii.gz", out / "nets" / "run.json"} <= set(paths)
    allowed = [out, tmp_path / "cache", tmp_path / "tmp", Path("/dev"), Path("/proc")]
    assert not [path for path in paths if not any(a == path or a in path.parents for a in allowed)]
    assert not list((tmp_path / "home").iterdir())
    assert not list((tmp_path / "here").iterdir())


def stray(arguments: list[str]) -> None:
    Path(arguments[0]).write_text("where it should not be", encoding="utf-8")


def test_a_stray_file_is_noticed(tmp_path: Path) -> None:
    assert tmp_path / "stray" in written([[str(tmp_path / "stray")]], tmp_path, stray)
