"""The files that name requirements, versions and exit codes agree with each other."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from xml.etree import ElementTree
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import covidseg
from covidseg import errors

ROOT = Path(__file__).resolve().parents[1]
# conda-forge's name for a requirement that comes from there.
FROM_CONDA = {"torch": "pytorch", "torchvision": "torchvision"}
CONDA_ONLY = ["python=3.12", "pip"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


# --- environment.yml ---------------------------------------------------------------------------------------------

def environment_faults(project: dict, environment: dict) -> list[str]:
    """Lines that environment.yml lacks or has in excess, compared with pyproject.toml's core and `book` parts."""
    conda, pip = list(CONDA_ONLY), []
    for line in [*project["dependencies"], *project["optional-dependencies"]["book"]]:
        requirement = Requirement(line)
        if requirement.name in FROM_CONDA:
            conda.append(f"{FROM_CONDA[requirement.name]}{line.removeprefix(requirement.name)}")
        else:
            pip.append(line)
    have_conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    have_pip = next((d["pip"] for d in environment["dependencies"] if isinstance(d, dict)), [])
    faults = []
    for section, wanted, have in (("dependencies", conda, have_conda), ("pip", [*pip, "-e ."], have_pip)):
        faults += [f"{section} lacks {line}" for line in wanted if line not in have]
        faults += [f"{section} has {line}, pyproject.toml has not" for line in have if line not in wanted]
    return faults


def test_environment_yml_agrees_with_pyproject(project: dict) -> None:
    environment = yaml.safe_load(read("environment.yml"))
    assert environment_faults(project, environment) == []
    pip = environment["dependencies"][-1]["pip"]
    pip.remove("jupyter-book>=1.0.4,<2")
    pip.append("left-over>=1")
    environment["dependencies"].remove("pytorch>=2.6")
    assert environment_faults(project, environment) == [
        "dependencies lacks pytorch>=2.6", "pip lacks jupyter-book>=1.0.4,<2",
        "pip has left-over>=1, pyproject.toml has not"]


# --- what the package imports ------------------------------------------------------------------------------------

# Imports whose distribution another requirement brings along.
BROUGHT = {
    "cv2": "grad-cam, as one of several builds of OpenCV; gradcam.py enlarges maps with it as the library does",
    "PIL": "matplotlib, which writes pictures with it",
    "IPython": "ipywidgets, which are nothing without it"}
# Requirements that no module imports.
NOT_IMPORTED = {
    "grad-cam": "chapter 4 and `make bench` compare with it, and it brings OpenCV",
    "torchvision": "grad-cam imports it, and its version has to fit torch's"}


def dependency_faults(package: Path, declared: list[str]) -> list[str]:
    """Imports of a package that no requirement brings, and requirements that it does not import."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - {package.name, *BROUGHT}
    known = packages_distributions()
    needed = {top: {canonicalize_name(name) for name in known.get(top, [top])} for top in tops}
    names = {canonicalize_name(Requirement(line).name) for line in declared}
    return [f"{top} is imported and not declared" for top in sorted(tops) if not needed[top] & names] + [
        f"{name} is declared and not imported" for name in sorted(names - set().union(*needed.values()))
        if name not in NOT_IMPORTED]


def test_the_package_declares_what_it_imports(project: dict) -> None:
    assert dependency_faults(ROOT / "covidseg", project["dependencies"]) == []


def test_dependency_check_fires(tmp_path: Path) -> None:
    package = tmp_path / "made_up"
    (package / "inner").mkdir(parents=True)
    (package / "one.py").write_text("import os, numpy as np\nfrom made_up.inner import two\nfrom . import three\n")
    (package / "inner" / "two.py").write_text("def late():\n    from yaml.nodes import Node\n    import left_over\n")
    assert dependency_faults(package, ["numpy>=2", "pyyaml", "scipy>=1"]) == [
        "left_over is imported and not declared", "scipy is declared and not imported"]
    assert dependency_faults(package, ["numpy"]) == [
        "left_over is imported and not declared", "yaml is imported and not declared"]


# --- requirements.lock and requirements-bootstrap.txt ------------------------------------------------------------

def pins(text: str) -> list[tuple[Requirement, int]]:
    """Pinned requirements of a lock file with the number of their hashes."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = [line for line in joined.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.split("--hash")[0].strip()), line.count("--hash=sha256:")) for line in lines]


def lock_faults(project: dict, text: str) -> list[str]:
    """Requirements of pyproject.toml that the lock does not meet on Python 3.11 or 3.12, and pins without hashes."""
    locked = pins(text)
    faults = [f"{requirement} has no hash" for requirement, hashes in locked if not hashes]
    extras = (line for part in project["optional-dependencies"].values() for line in part)
    wanted = [Requirement(line) for line in (*project["dependencies"], *extras)]
    for python in ("3.11.9", "3.12.9"):
        marker = {"python_full_version": python, "python_version": python[:4], "sys_platform": "linux",
                  "implementation_name": "cpython", "platform_python_implementation": "CPython"}
        have = {canonicalize_name(r.name): next(iter(r.specifier)).version for r, _ in locked
                if r.marker is None or r.marker.evaluate(marker)}
        for requirement in wanted:
            name = canonicalize_name(requirement.name)
            if name != project["name"] and not requirement.specifier.contains(have.get(name, "0")):
                faults.append(f"Python {python[:4]}: {requirement} is not met by {have.get(name, 'any pin')}")
    return faults


def test_lock_meets_pyproject_with_hashes(project: dict) -> None:
    lock = read("requirements.lock")
    assert lock_faults(project, lock) == [], "run `make lock`"
    unpinned = re.sub(r"^nibabel==.*?(?=^\S)", "", lock, flags=re.MULTILINE | re.DOTALL)
    assert "Python 3.11: nibabel>=5.3 is not met by any pin" in lock_faults(project, unpinned)
    assert lock_faults(project, lock + "left-over==1.0\n") == ["left-over==1.0 has no hash"]


def bootstrap_faults(bootstrap: str, lock: str, build_system: dict) -> list[str]:
    """Pins without hashes or in conflict with the lock, and build requirements that are not pinned."""
    locked: dict[str, list[str]] = {}
    for requirement, _ in pins(lock):
        locked.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier))
    first = pins(bootstrap)
    faults = [f"{r} has no hash" for r, hashes in first if not hashes]
    faults += [f"{r} differs from requirements.lock" for r, _ in first
               if str(r.specifier) not in locked.get(canonicalize_name(r.name), [str(r.specifier)])]
    names = {canonicalize_name(r.name) for r, _ in first}
    needed = ["uv", *(Requirement(line).name for line in build_system["requires"])]
    return faults + [f"{name} is missing" for name in needed if canonicalize_name(name) not in names]


def test_bootstrap_fits_the_lock() -> None:
    build_system = tomllib.loads(read("pyproject.toml"))["build-system"]
    assert bootstrap_faults(read("requirements-bootstrap.txt"), read("requirements.lock"), build_system) == []
    bad = "uv==1.0\npluggy==0.1 --hash=sha256:00\n"
    assert bootstrap_faults(bad, read("requirements.lock"), {"requires": ["hatchling>=1.27"]}) == [
        "uv==1.0 has no hash", "pluggy==0.1 differs from requirements.lock", "hatchling is missing"]


# --- one version, one table of exit codes ------------------------------------------------------------------------

def version_faults(version: str, files: dict[str, str]) -> list[str]:
    """Names of the files whose text does not state the version in its usual form."""
    number = re.escape(version)
    forms = {"pyproject.toml": rf'^version = "{number}"', "CITATION.cff": rf"^version: {number}$",
             "CHANGELOG.md": rf"^## {number}\b"}
    return [name for name, text in files.items() if not re.search(forms[name], text, flags=re.MULTILINE)]


def test_version_is_the_same_everywhere() -> None:
    files = {name: read(name) for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")}
    assert version_faults(covidseg.__version__, files) == []
    assert version_faults("99.9", files) == list(files)


KINDS = [errors.CovidsegError, *errors.CovidsegError.__subclasses__()]


def exit_code_faults(readme: str) -> list[str]:
    """Exit codes that the table of the README lacks, invents, gives to another error or explains in other words."""
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \| `?(\w+)`? \|$", readme, re.MULTILINE)
    table = {int(code): (name, meaning) for code, meaning, name in rows if name in {kind.__name__ for kind in KINDS}}
    faults = []
    for kind in KINDS:
        name, meaning = table.pop(kind.exit_code, ("", ""))
        own_meaning = str(kind.__doc__).strip().rstrip(".").lower()
        if name != kind.__name__:
            faults.append(f"{kind.exit_code} should be {kind.__name__}")
        elif meaning.lower() != own_meaning and kind is not errors.CovidsegError:
            faults.append(f"{kind.exit_code}: {own_meaning}")
    return faults + [f"{code} is not in use" for code in table]


def test_readme_lists_the_exit_codes() -> None:
    readme = read("README.md")
    assert exit_code_faults(readme) == []
    assert exit_code_faults(readme.replace("| 4 |", "| 44 |")) == ["4 should be DatasetError", "44 is not in use"]
    assert exit_code_faults(readme.replace("| 7 | no lung", "| 7 | some lung")) == [
        "7: no lung was found where one is needed"]


def test_a_setting_is_one_of_a_few() -> None:
    errors.one_of("b", ("a", "b"), "letter")
    errors.one_of("b", {"b": 1}, "letter")
    with pytest.raises(errors.SettingsError, match=r"^there is no letter 'x'\. Choose one of a, b\.$"):
        errors.one_of("x", ("a", "b"), "letter")
    with pytest.raises(errors.SettingsError, match=r"no number 3\. Choose one of 1, 2"):
        errors.one_of(3, (1, 2), "number")


# --- the wheel ---------------------------------------------------------------------------------------------------

def packed_files() -> set[str]:
    """What has to come along with the modules: nets, recorded runs, registry, splits, licences, quizzes and so on."""
    nets = {f"stages/{net}.safetensors{end}" for net in ("segmenter", "patches", "lung_net") for end in ("", ".sha256")}
    weights = {f"covidseg/weights/{name}" for name in {"run.json", "run.json.sha256", "MODEL_CARD.md", *nets}}
    data = {f"covidseg/_data/{folder.name}/{path.relative_to(folder)}"
            for folder in (ROOT / "results", ROOT / "data/splits", ROOT / "data/licences")
            for path in folder.rglob("*") if path.is_file()}
    book = {str(path.relative_to(ROOT)) for pattern in ("quizzes/*.json", "nets/*.safetensors*", "nets/run.json*")
            for path in (ROOT / "covidseg" / "book").glob(pattern)}
    return {*weights, *data, *book, "covidseg/book/preview.html", "covidseg/_data/registry.toml",
            "covidseg/py.typed"}


def wheel_faults(names: set[str]) -> list[str]:
    """Files that a wheel lacks, and files in it that no package should hold."""
    known = packed_files()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "covidseg").rglob("*.py")}
    own = {name for name in names if ".dist-info/" not in name}
    return [f"lacks {name}" for name in sorted((known | modules) - own)] \
        + [f"has {name}" for name in sorted(own - known - modules)]


def test_a_wheel_holds_the_nets_and_the_recorded_runs(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.builders.wheel")  # comes with `make venv` only
    wheel, = hatchling.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with ZipFile(wheel) as packed:
        names = set(packed.namelist())
        for name in ("weights/run.json", "weights/stages/segmenter.safetensors"):
            assert packed.read(f"covidseg/{name}") == (ROOT / "covidseg" / name).read_bytes()
    assert wheel_faults(names) == []
    assert any(name.startswith("covidseg/_data/results/table1-") for name in names)
    lacking = names - {"covidseg/weights/stages/patches.safetensors.sha256", "covidseg/_data/registry.toml"}
    assert wheel_faults(lacking | {"covidseg/_data/im/scan.nii.gz"}) == [
        "lacks covidseg/_data/registry.toml", "lacks covidseg/weights/stages/patches.safetensors.sha256",
        "has covidseg/_data/im/scan.nii.gz"]


# --- Makefile and picture ----------------------------------------------------------------------------------------

def unexplained_targets(makefile: str, helped: str) -> list[str]:
    """Targets of .PHONY that `make help` does not show."""
    phony = re.search(r"^\.PHONY:(.*)$", makefile, flags=re.MULTILINE)
    assert phony is not None
    shown = re.findall(r"^  make (\w+)\s", helped, flags=re.MULTILINE)
    return [target for target in phony.group(1).split() if target not in {"FORCE", *shown}]


def run_make(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """make as a user calls it, also when `make test` runs these tests."""
    clean = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False)


def test_make_help_explains_every_target() -> None:
    shown = run_make("help", folder=ROOT)
    assert shown.returncode == 0
    assert unexplained_targets(read("Makefile"), shown.stdout) == []
    assert unexplained_targets(".PHONY: help mystery\n", shown.stdout) == ["mystery"]


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "requirements-bootstrap.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = run_make("venv", "PYTHON=no-such-python", folder=tmp_path)
    assert done.returncode != 0
    assert "no Python 3.11 or newer among: no-such-python" in done.stderr
    assert not (tmp_path / ".venv" / ".ready").exists()


@pytest.mark.parametrize("name", ["it's here", 'a "b" $HOME `c`'])
def test_make_works_in_a_folder_whatever_its_name(tmp_path: Path, name: str) -> None:
    """With programs in place of Python and uv that only say where they were asked to work."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("Makefile", "requirements.lock", "requirements-bootstrap.txt", "pyproject.toml"):
        (folder / file).symlink_to(ROOT / file)
    fake = folder / "python"
    fake.write_text('#!/bin/sh\n[ "$1 $2" = "-m venv" ] && mkdir -p .venv/bin && cp python .venv/bin/python && '
                    'cp python .venv/bin/uv\n[ "$1" != pip ] || echo "$VIRTUAL_ENV"\n')
    fake.chmod(0o755)
    done = run_make("venv", "PYTHON=./python", folder=folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}/.venv" in done.stdout
    assert (folder / ".venv" / ".ready").read_text() == str(folder)
    assert "new environment" not in run_make("venv", "PYTHON=./python", folder=folder).stdout


def picture_faults(svg: str) -> list[str]:
    """What a drawing lacks for readers who cannot see it or read it on a dark page."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    faults = [f"no <{tag}>" for tag in ("title", "desc") if not (root.findtext(f"{space}{tag}") or "").strip()]
    first = root.find(f"{space}rect")
    if first is None or first.get("width") != (root.get("viewBox") or "").split()[2]:
        faults.append("no background of its own")
    return faults


def test_pipeline_picture_is_described() -> None:
    assert picture_faults(read("chapters/images/pipeline.svg")) == []
    bare = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><title>x</title></svg>'
    assert picture_faults(bare) == ["no <desc>", "no background of its own"]
