"""What must never be in the code, where it may write, and what it may reach; each rule is also shown to fire."""

from __future__ import annotations

import ast
import builtins
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import WARM

from covidseg.cli import app
from covidseg.predict import load_predictor

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "covidseg").rglob("*.py"))
# What reaches the network: whole modules, or functions of them. Some do so only when they are given an address or the
# name of published weights; covidseg needs none of them for anything else.
NETWORK = {
    "socket", "_socket", "ssl", "socketserver", "asyncio", "http", "urllib.request", "ftplib", "smtplib", "imaplib",
    "poplib", "nntplib", "telnetlib", "xmlrpc", "webbrowser", "multiprocessing.connection", "multiprocessing.managers",
    "requests", "urllib3", "aiohttp", "httpx", "httpcore", "websocket", "websockets", "paramiko", "fsspec", "boto3",
    "pooch", "wget", "gdown", "huggingface_hub", "transformers", "datasets", "timm", "kagglehub",
    "torch.distributed", "torch.hub", "torch.utils.model_zoo", "torchvision.models", "torchvision.datasets",
    "monai.apps", "monai.bundle", "skimage.data", "skimage.io", "imageio", "scipy.datasets", "sklearn.datasets",
    "pandas"}
# The modules that may: downloads, the name of the user's cache folder, the processes of one training among each other.
MAY_REACH = {"covidseg/data/fetch.py": {"requests", "pooch"}, "covidseg/data/registry.py": {"pooch.os_cache"},
             "covidseg/devices.py": {"torch.distributed"}}
# What runs what a file or a text says, pickles among them, or a shell.
RUNS = {
    "builtins.eval", "builtins.exec", "builtins.__import__", "runpy", "code", "imp",
    "importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "jsonpickle", "joblib", "shelve", "marshal",
    "multiprocessing.connection", "multiprocessing.managers", "pandas.read_pickle", "pandas.read_hdf",
    "torch.hub", "torch.jit.load", "torch.package", "torch.serialization", "torch.utils.model_zoo",
    *(f"torch.distributed.{name}" for name in (
        "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
        "recv_object_list", "rpc", "distributed_c10d"))}
# The places that may: what the first process of a training says to the others, and the trial of a changed module.
MAY_RUN = {"covidseg/devices.py": {"torch.distributed.broadcast_object_list"},
           "tools/mutants/trial.py": {"importlib.util.spec_from_file_location"}}
SECRETS = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|gh[pousr]_[0-9A-Za-z]{36}|"
                     r"xox[bap]-[0-9A-Za-z-]{10}|(?i:(?:password|api_key|secret)\s*=\s*[\"'][^\"'\s]{8,}[\"'])")


def among(name: str, places: Iterable[str]) -> bool:
    """Whether a name in full is one of some places, or inside one."""
    return any(f"{name}.".startswith(f"{place}.") for place in places)


def imported(tree: ast.AST) -> dict[str, set[str]]:
    """What the names that imports bind stand for, in full; ``*`` for everything of a module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:  # `import a.b` binds a
                full = name.name if name.asname else name.name.partition(".")[0]
                found.setdefault(name.asname or full, set()).add(full)
        elif isinstance(node, ast.ImportFrom):
            for name in node.names:
                full = f"{'.' * node.level}{node.module or ''}.{name.name}"
                found.setdefault(name.asname or name.name, set()).add(full)
    return found


def parts(node: ast.AST) -> list[str]:
    """``a.b.c`` as a list; empty for what is no name, such as a call."""
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Attribute(value=value, attr=name) if front := parts(value):
            return [*front, name]
    return []


def used(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every name that code uses, in full, and where; also what is imported and not used."""
    known, seen = imported(tree), set[str]()
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) not in inside and (name := parts(node)):
            first, *rest = name
            seen.add(first)
            for full in known.get(first, {f"builtins.{first}"} if hasattr(builtins, first) else set()):
                yield ".".join([full, *rest]), node
    yield from ((full, tree) for name, meant in known.items() if name not in seen for full in meant)


def dangers(code: str) -> set[str]:
    """What a module uses that runs what a file says, or a shell."""
    tree, found = ast.parse(code), set[str]()
    calls = {id(node.func): {k.arg: ast.unparse(k.value) for k in node.keywords}
             for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for name, node in used(tree):
        if among(name, RUNS) or name.endswith(".*"):
            found.add(name)
        if name == "torch.load" and calls.get(id(node), {}).get("weights_only") != "True":
            found.add("torch.load without weights_only=True")
    for said in calls.values():
        found |= {f"{argument}={said[argument]}" for argument in ("allow_pickle", "shell")
                  if said.get(argument, "False") != "False"}
    return found


def reached(code: str) -> set[str]:
    """What a module uses of what reaches the network."""
    tree = ast.parse(code)
    asked = {f"{k.arg}={ast.unparse(k.value)}" for node in ast.walk(tree) if isinstance(node, ast.Call)
             for k in node.keywords if k.arg == "pretrained" and ast.unparse(k.value) != "False"}
    return asked | {name for name, _ in used(tree) if among(name, NETWORK)}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tools").rglob("*.py"))], ids=place)
def test_no_code_is_read_from_files_and_no_shell_is_used(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == MAY_RUN.get(place(path), set())


@pytest.mark.parametrize(("code", "found"), [
    ("import pickle", "pickle"), ("from joblib import load", "joblib.load"), ("eval('1')", "builtins.eval"),
    ("import builtins\nbuiltins.eval('1')", "builtins.eval"), ("list(map(eval, texts))", "builtins.eval"),
    ("__import__('os').system('ls')", "builtins.__import__"),
    ("import os\nos.system('ls')", "os.system"), ("from os import system\nsystem('ls')", "os.system"),
    ("from os import system as start\nstart('ls')", "os.system"), ("from os import *", "os.*"),
    ("import runpy\nrunpy.run_path('x')", "runpy.run_path"), ("import yaml as y\ny.load(text)", "yaml.load"),
    ("import torch\ntorch.load('x')", "torch.load without weights_only=True"),
    ("from torch import load\nload('x')", "torch.load without weights_only=True"),
    ("from torch import load\nmap(load, paths)", "torch.load without weights_only=True"),
    ("def a():\n    from torch import load\n    load('x')\ndef b():\n    from json import load",
     "torch.load without weights_only=True"),
    ("import torch\ntorch.load('x', weights_only=False)", "torch.load without weights_only=True"),
    ("import torch\ntorch.jit.load('x')", "torch.jit.load"),
    ("import torch.hub\ntorch.hub.load('a', 'b')", "torch.hub.load"),
    ("import torch.distributed as dist\ndist.broadcast_object_list(box)", "torch.distributed.broadcast_object_list"),
    ("import pandas as pd\npd.read_pickle('x')", "pandas.read_pickle"),
    ("import numpy\nnumpy.load('x', allow_pickle=True)", "allow_pickle=True"),
    ("import subprocess\nsubprocess.run('ls', shell=True)", "shell=True")])
def test_dangerous_code_is_noticed(code: str, found: str) -> None:
    assert dangers(code) == {found}


def test_harmless_code_is_not_complained_of() -> None:
    assert not dangers("import torch, subprocess, json as pickle\ntorch.load('x', weights_only=True)\nnet.eval()\n"
                       "pickle.load(f)\nsubprocess.run(['ls'])\nself.os.system\nos = here().system")


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_only_downloads_and_processes_of_one_training_reach_the_network(path: Path) -> None:
    may = MAY_REACH.get(place(path), set())
    assert not [name for name in reached(path.read_text(encoding="utf-8")) if not among(name, may)]


@pytest.mark.parametrize(("code", "found"), [
    ("from urllib import request", "urllib.request"), ("import requests.adapters", "requests"),
    ("import http.client as c", "http.client"), ("import urllib3\nurllib3.PoolManager()", "urllib3.PoolManager"),
    ("import pooch\npooch.retrieve(url, None)", "pooch.retrieve"), ("import huggingface_hub as hub", "huggingface_hub"),
    ("from torch.hub import load_state_dict_from_url as get\nget(url)", "torch.hub.load_state_dict_from_url"),
    ("import torch\ntorch.hub.load_state_dict_from_url(url)", "torch.hub.load_state_dict_from_url"),
    ("from torchvision.models import resnet18\nresnet18(weights='DEFAULT')", "torchvision.models.resnet18"),
    ("from monai.networks import nets\nnets.resnet18(pretrained=True)", "pretrained=True"),
    ("from skimage import data\ndata.lily()", "skimage.data.lily"),
    ("import skimage\nskimage.data.lily()", "skimage.data.lily"),
    ("import asyncio\nasyncio.open_connection('host', 80)", "asyncio.open_connection"),
    ("import torch.distributed as dist\ndist.init_process_group()", "torch.distributed.init_process_group")])
def test_use_of_the_network_is_noticed(code: str, found: str) -> None:
    assert reached(code) == {found}


def test_no_other_code_passes_for_use_of_the_network() -> None:
    assert not reached("from urllib.parse import urljoin\nimport torch, skimage\ntorch.nn.Module\n"
                       "skimage.measure.label\nself.requests.get\nnet(pretrained=False)")


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
# Where the standard library asks for another computer, or starts a program that might.
REACH = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.getnameinfo",
         "socket.gethostbyname", "socket.gethostbyaddr", "urllib.Request", "subprocess.Popen", "os.system", "os.exec",
         "os.posix_spawn", "os.spawn")


class Seen(NamedTuple):
    """Files that were opened for writing, made, renamed or removed, and attempts to reach another computer."""

    written: list[Path]
    reached: list[str]


def command(arguments: list[str]) -> None:
    app(arguments, standalone_mode=False)


def _watch(pipe: Connection, work: Work, commands: list[list[str]], folder: Path) -> None:
    """Runs commands and notes what they write and reach meanwhile."""
    written, reached = set[Path](), set[str]()

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)) and ((mode and set(mode) & set("wax+")) or
                                                   (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                written.add(Path(os.path.abspath(os.fsdecode(path))))
        elif event in ("os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate"):
            written.update(Path(os.path.abspath(os.fsdecode(a))) for a in arguments
                           if isinstance(a, (str, bytes, os.PathLike)))
        elif event in REACH:
            reached.add(f"{event} {', '.join(str(a) for a in arguments if not isinstance(a, socket.socket))}")

    os.environ.clear()
    os.environ.update({
        "PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache"),
        "MPLCONFIGDIR": str(folder / "cache"), "TMPDIR": str(folder / "tmp"), "COVIDSEG_DATA": str(folder / "cache")})
    tempfile.tempdir = None  # to be looked up anew
    os.chdir(folder / "here")
    sys.addaudithook(note)  # for the rest of this process's life
    for arguments in commands:
        work(arguments)
    pipe.send(Seen(sorted(written), sorted(reached)))


def watched(commands: list[list[str]], folder: Path, work: Work = command) -> Seen:
    """What commands write and reach, with a home, a cache and a current folder of their own, which are empty before."""
    for name in ("home", "cache", "here", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    load_predictor()  # what is imported late is imported beforehand, since noting takes its time
    mine, theirs = WARM.Pipe()
    process = WARM.Process(target=_watch, args=(theirs, work, commands, folder), daemon=True)
    process.start()
    theirs.close()
    seen = mine.recv()
    process.join()
    return seen


@pytest.fixture(scope="module")
def seen(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Path]:
    """What a few commands did, and the folder in which they did it."""
    folder, scan = tmp_path_factory.mktemp("watched"), str(tiny_phantom / "im" / "phantom_00.nii.gz")
    out = folder / "out"
    return watched([["data", "list"], ["data", "info", "medseg2"], ["data", "check", str(tiny_phantom)],
                    ["lungs", scan, "-o", str(out)], ["predict", scan, "-o", str(out / "lesions")],
                    ["export", str(ROOT / "covidseg" / "weights"), "-o", str(out / "nets")]], folder), folder


def test_commands_write_into_their_output_the_cache_and_nowhere_else(seen: tuple[Seen, Path]) -> None:
    (paths, _), folder = seen
    out = folder / "out"
    assert {out / "phantom_00.nii.gz", out / "lesions" / "phantom_00.nii.gz", out / "nets" / "run.json"} <= set(paths)
    allowed = [out, folder / "cache", folder / "tmp", Path("/dev"), Path("/proc")]
    assert not [path for path in paths if not any(a == path or a in path.parents for a in allowed)]
    assert not list((folder / "home").iterdir())
    assert not list((folder / "here").iterdir())


def test_commands_other_than_data_get_reach_no_other_computer_and_start_no_program(seen: tuple[Seen, Path]) -> None:
    assert seen[0].reached == []


def stray(arguments: list[str]) -> None:
    Path(arguments[0]).write_text("where it should not be", encoding="utf-8")


def test_a_stray_file_is_noticed(tmp_path: Path) -> None:
    assert tmp_path / "stray" in watched([[str(tmp_path / "stray")]], tmp_path, stray).written


def call(arguments: list[str]) -> None:
    with suppress(OSError), socket.create_connection((arguments[0], 9), timeout=5):  # port 9: nobody is there
        pass


def test_a_connection_is_noticed(tmp_path: Path) -> None:
    assert watched([["127.0.0.1"]], tmp_path, call).reached == [
        "socket.connect ('127.0.0.1', 9)", "socket.getaddrinfo 127.0.0.1, 9, 0, 1, 0"]
