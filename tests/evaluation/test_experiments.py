"""Table 1: comparisons that go on where they were stopped, and tables that say what the counts say."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import TINY, TINY_BASELINES, finished_run, quiet

from covidseg import DISCLAIMER
from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.evaluation import experiments as module
from covidseg.evaluation.evaluate import (
    Evaluation,
    Method,
    StageResult,
    measure,
    stage_method,
    supervised_method,
    training_truth,
)
from covidseg.evaluation.experiments import (
    EARLIER,
    HEADS,
    OURS,
    Line,
    by_system,
    compare,
    counts_of,
    differences,
    levels_of,
    measured_key,
    patients_of,
    split_table,
    strongest_earlier,
    table1,
    table_lines,
    volume_table,
)
from covidseg.evaluation.methods import PUBLISHED, SYSTEMS, BaselineProfile, System, Trained
from covidseg.evaluation.metrics import NAMES as FIGURES
from covidseg.evaluation.metrics import macro, micro
from covidseg.evaluation.statistics import bootstrap_difference, bootstrap_interval, paired_test
from covidseg.evaluation.tables import Record
from covidseg.pipeline import Run

# --- comparisons ------------------------------------------------------------------------------------------------

MEASURED = ["phantom_01", "phantom_02"]


@pytest.fixture(scope="module")
def run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A folder of its own that starts with the stages of the extended method."""
    finished = finished_run(tiny_phantom)
    folder = Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("compare") / "run"))
    return Run(finished.data, TINY, 0, folder, "cpu", quiet)


@pytest.fixture(scope="module")
def test_set(run: Run) -> Dataset:
    return run.data.subset(MEASURED)


@pytest.fixture(scope="module")
def results(run: Run, test_set: Dataset) -> list[Record]:
    return compare(run, test_set, None, TINY_BASELINES)


def again(run: Run, folder: Path, **changes: object) -> tuple[Run, list[str]]:
    """A new Run object on a folder, and the list its log goes to."""
    lines: list[str] = []
    given = {"data": run.data, "profile": TINY, "seed": 0, **changes}
    return Run(**given, folder=folder, device="cpu", log=lines.append), lines  # type: ignore[arg-type]


def test_every_system_is_compared(results: list[Record], run: Run) -> None:
    assert [result["system"] for result in results] == list(SYSTEMS)
    assert len(list((run.folder / "table1").iterdir())) == len(SYSTEMS)
    for result in results:
        trained = SYSTEMS[result["system"]].train(run, TINY_BASELINES)  # as it is stored
        assert result["seed"] == 0
        assert result["parameters"] == trained.parameters()
        assert result["seconds"] == trained.seconds()
        assert [row["name"] for row in result["rows"]] == [name for name, _, _ in trained.method.rows]
        assert list(result["counts"]) == [f"{case}:{k}" for case in MEASURED for k in range(10)]
        assert result["slices"] == 20
    assert [line.key for line in table_lines(results)] == list(SYSTEMS)


def test_counts_survive_the_round_trip(results: list[Record], run: Run, test_set: Dataset) -> None:
    methods = [SYSTEMS["otsu"].train(run, TINY_BASELINES).method, stage_method(run),
                 supervised_method(run, run.supervised(training_truth(run)))]
    for name, direct in zip(("otsu", "extended", "masks"), measure(run, test_set, methods), strict=True):
        own = by_system(results)[name]
        answer = direct.stages[-1]
        assert counts_of(own).dtype == np.int64
        np.testing.assert_array_equal(counts_of(own), answer.counts[None])
        np.testing.assert_allclose(own[0]["reliability"], answer.reliability, atol=0.05)
        np.testing.assert_array_equal(levels_of(own), answer.levels[None])
        assert levels_of([{**own[0], "levels": None}]) is None
        assert own[0]["rows"][-1]["micro"]["dice"] == pytest.approx(answer.micro().dice, abs=1e-4, nan_ok=True)
        assert (own[0]["classifier_auc"] is None) is (name != "extended")
    assert own[0]["counts"].keys() == dict.fromkeys(direct.names).keys()


def test_a_finished_comparison_is_read(results: list[Record], run: Run, test_set: Dataset,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")
    monkeypatch.setattr(module, "measure", never)
    monkeypatch.setattr(module, "cross_validated", never)
    second, lines = again(run, run.folder)
    assert compare(second, test_set, None, TINY_BASELINES) == results
    some = compare(second, test_set, ["masks", "decovnet"], TINY_BASELINES)
    assert some == [results[2], results[-1]], "in the order of the table"
    assert lines == []


def test_a_comparison_that_was_stopped_goes_on(results: list[Record], run: Run, test_set: Dataset, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    for path in (folder / "table1").iterdir():
        if path.name.startswith(("otsu-", "ad3d-mil-3d-")):
            path.unlink()
        else:  # a mark that no measurement would leave
            path.write_text(json.dumps({**json.loads(path.read_text()), "mark": True}))
    asked: list[int] = []

    def watched(run: Run, test: Dataset, methods: Sequence[Method], **rest: bool) -> list[Evaluation]:
        asked.append(len(methods))
        return measure(run, test, methods, **rest)
    monkeypatch.setattr(module, "measure", watched)
    second, lines = again(run, folder)
    found = compare(second, test_set, None, TINY_BASELINES)
    assert asked == [2]
    assert [line for line in lines if "step" in line] == [], "the nets were stored"
    for result, before in zip(found, results, strict=True):
        assert result.pop("mark", False) is (result["system"] not in ("otsu", "ad3d-mil-3d"))
        assert result == before


def hand_made(count: int = 1) -> Evaluation:
    row = StageResult("by hand", "none", 0.5, np.tile([1, 2, 3, 4], (count, 1)), np.zeros((10, 3)), np.zeros((101, 4)),
                      np.zeros((count, 3, 2)), np.ones(count), np.ones(count))
    return Evaluation([row], float("nan"), count, names=tuple(f"v:{k}" for k in range(count)))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two systems and no training: notes what was measured."""
    seen: list[str] = []

    def system(name: str) -> System:
        def train(run: Run, baselines: BaselineProfile) -> Trained:
            seen.append(name)
            return Trained(Method([("by hand", "none", 0.5)], lambda crops, volume: (None, [])), run, {}, [])
        return System(name, train)

    def crossed(run: Run, test: Dataset) -> Evaluation:
        seen.append("cross-validation")
        return hand_made(2)
    for name in ("otsu", "masks"):
        monkeypatch.setitem(SYSTEMS, name, system(name))
    monkeypatch.setattr(module, "measure", lambda run, test, methods, **rest: [hand_made() for _ in methods])
    monkeypatch.setattr(module, "cross_validated", crossed)
    return seen


def changed_file(data: Dataset, part: str, folder: Path) -> Dataset:
    """The same set with one voxel of a file of its first volume turned."""
    case = data.cases[0]
    scan = read_scan(getattr(case, part))
    pixels = scan.pixels.copy()
    pixels[4, 60, 60] = pixels[4, 60, 60] == 0
    path = write_like(pixels if part == "image" else pixels != 0, scan.grid, folder / f"{part}.nii.gz")
    return replace(data, cases=(replace(case, **{part: path}), *data.cases[1:]))


def changed_case(data: Dataset, **changes: object) -> Dataset:
    return replace(data, cases=(replace(data.cases[0], **changes), *data.cases[1:]))  # type: ignore[arg-type]


TEST_CHANGES: dict[str, Callable[[Dataset, Path], Dataset]] = {
    "image": lambda data, folder: changed_file(data, "image", folder),
    "mask": lambda data, folder: changed_file(data, "mask", folder),
    "lung": lambda data, folder: changed_file(data, "lung", folder),
    "fewer volumes": lambda data, folder: data.subset(MEASURED[:1]),
    "another order": lambda data, folder: data.subset(MEASURED[::-1]),
    "the other side of a stack": lambda data, folder: changed_case(data, labels={0: 0, 4: 1}),
    "name": lambda data, folder: changed_case(data, id="other"),
    "patient": lambda data, folder: changed_case(data, patient="other"),
}


@pytest.mark.parametrize("change", list(TEST_CHANGES))
def test_whatever_decides_what_is_measured_is_in_the_key(test_set: Dataset, tmp_path: Path, change: str) -> None:
    assert measured_key(test_set) == measured_key(replace(test_set))
    assert measured_key(TEST_CHANGES[change](test_set, tmp_path)) != measured_key(test_set)


def test_other_settings_or_test_slices_are_another_measurement(run: Run, test_set: Dataset, tmp_path: Path,
                                                               faked: list[str]) -> None:
    mine, _ = again(run, tmp_path)
    slower = replace(TINY, segmenter=replace(TINY.segmenter, rate=0.123))
    other_baseline = replace(TINY_BASELINES, ad3d_mil=replace(TINY_BASELINES.ad3d_mil, outline=0.123))
    for number, (other, data, baselines) in enumerate((
            (mine, test_set, TINY_BASELINES), (mine, changed_file(test_set, "mask", tmp_path), TINY_BASELINES),
            (mine, test_set, other_baseline), (again(run, tmp_path, seed=1)[0], test_set, TINY_BASELINES),
            (again(run, tmp_path, profile=slower)[0], test_set, TINY_BASELINES),
            (again(run, tmp_path, data=run.data.subset(MEASURED))[0], test_set, TINY_BASELINES)), start=1):
        for _ in range(2):  # the second time it is read
            compare(other, data, ["otsu"], baselines)
            assert len(faked) == number
    moved = load_dataset(shutil.copytree(run.data.root, tmp_path / "elsewhere"))
    compare(again(run, tmp_path, data=moved)[0], moved.subset(MEASURED), ["otsu"], TINY_BASELINES)
    assert len(faked) == 6, "where the files lie does not matter"


def test_other_training_masks_concern_the_upper_bound_only(run: Run, test_set: Dataset, tmp_path: Path,
                                                           faked: list[str]) -> None:
    compare(again(run, tmp_path)[0], test_set, ["otsu", "masks"], TINY_BASELINES)
    assert faked == ["otsu", "masks"]
    data = changed_file(run.data, "mask", tmp_path)
    compare(again(run, tmp_path, data=data)[0], test_set, ["otsu", "masks"], TINY_BASELINES)
    assert faked == ["otsu", "masks", "masks"]


@pytest.mark.parametrize("lacking", [0, 1, 4])
def test_without_training_masks_the_test_slices_own_are_cross_validated(
        run: Run, test_set: Dataset, tmp_path: Path, faked: list[str], lacking: int) -> None:
    cases = tuple(replace(case, mask=None) if k < lacking else case for k, case in enumerate(run.data.cases))
    mine, lines = again(run, tmp_path, data=replace(run.data, cases=cases))
    for _ in range(2):
        otsu, masks = compare(mine, test_set, ["otsu", "masks"], TINY_BASELINES)
        assert faked == (["otsu", "cross-validation"] if lacking else ["otsu", "masks"])
    assert (otsu["parameters"], otsu["seconds"]) == (0, 0)
    if lacking:
        assert (masks["parameters"], masks["seconds"], masks["slices"]) == (None, None, 2)
        assert masks["counts"] == {"v:0": "1 2 3 4", "v:1": "1 2 3 4"}
    assert len(lines) == 2, "one line a system: all of it was measured once"


# --- records made by hand ---------------------------------------------------------------------------------------

LESION = np.array([0, 400, 300, 200, 500, 250, 100, 600, 0, 350])  # pixels of ten slices of 10000, two without
NAMES = [f"v{k // 2}:{k % 2}" for k in range(10)]
STACK = [f"stack:{k}" for k in range(10)]


def counts(sensitivity: float, false: int, seed: int = 0) -> np.ndarray:
    """Slices of which about a share is found, with some false alarms."""
    rng = np.random.default_rng(seed)
    hit = rng.binomial(LESION, sensitivity)
    wrong = rng.integers(false // 2, false + 1, len(LESION))
    return np.stack([hit, wrong, LESION - hit, 10_000 - LESION - wrong], axis=1)


def record(system: str, seed: int, table: np.ndarray, names: Sequence[str] = NAMES, auc: float | None = None,
           parameters: int | None = 1234, seconds: float | None = 60.0) -> Record:
    return {"system": system, "seed": seed, "parameters": parameters, "seconds": seconds, "slices": len(table),
            "classifier_auc": auc, "rows": [], "reliability": None,
            "counts": {name: " ".join(map(str, row)) for name, row in zip(names, table.tolist(), strict=True)}}


def comparison(seeds: int, names: Sequence[str] = NAMES) -> list[Record]:
    """All but the 3D systems; seeds mixed, ours best of the weak ones, full supervision best of all."""
    levels = {"masks": (0.95, 20), "extended": (0.8, 60), "faithful": (0.7, 60), "ad3d-mil": (0.6, 300),
              "decovnet": (0.6, 100), "grad-cam": (0.5, 200), "otsu": (0.9, 900)}
    return [record(name, seed, counts(*level, seed=seed + 10), names, None if name == "otsu" else 0.8 + seed / 10,
                   seconds=None if name == "masks" else 60.0 + seed)
            for seed in reversed(range(seeds)) for name, level in levels.items()]


def test_systems_and_seeds_are_put_in_order() -> None:
    found = by_system(comparison(3))
    assert list(found) == ["otsu", "grad-cam", "decovnet", "ad3d-mil", "faithful", "extended", "masks"]
    assert all([result["seed"] for result in own] == [0, 1, 2] for own in found.values())
    assert by_system([]) == {}


def test_lines_follow_from_the_counts() -> None:
    lines = {line.key: line for line in table_lines(comparison(2))}
    for name, level in (("otsu", (0.9, 900)), ("extended", (0.8, 60)), ("masks", (0.95, 20))):
        line, own = lines[name], [counts(*level, seed=seed + 10) for seed in (0, 1)]
        assert line.title == SYSTEMS[name].title
        assert line.seeds == (0, 1)
        for k, table in enumerate(own):
            hit, false, miss, rest = table.sum(axis=0).tolist()
            np.testing.assert_allclose(line.micro[k], [
                2 * hit / (2 * hit + false + miss), hit / (hit + false + miss), hit / (hit + false),
                hit / (hit + miss), rest / (rest + false)])
            dice = [2 * h / (2 * h + f + m) for h, f, m, _ in table[LESION > 0].tolist()]
            assert line.macro[k] == pytest.approx(np.mean(dice)) == pytest.approx(macro(table).dice)
        groups = np.array([volume.split(":")[0] for volume in NAMES])
        assert line.interval == bootstrap_interval(np.stack(own), groups=groups)
        assert line.interval[0] < line.micro[:, 0].mean() < line.interval[1]
        assert line.parameters == 1234
        assert line.seconds == (None if name == "masks" else 60.5)
    np.testing.assert_allclose(lines["extended"].auc, [0.8, 0.9])
    assert np.isnan(lines["otsu"].auc).all()


def test_dice_of_each_volume() -> None:
    table = volume_table(comparison(2))
    assert table is not None
    assert [row[0] for row in table.rows] == [*(f"v{k}" for k in range(5)), "mean"]
    ours, dice = table.heads.index("extended"), []
    for k in range(5):
        pooled = [counts(0.8, 60, seed=seed + 10)[2 * k:2 * k + 2].sum(axis=0) for seed in (0, 1)]
        dice.append(np.mean([2 * hit / (2 * hit + false + miss) for hit, false, miss, _ in pooled]))
    assert [row[ours] for row in table.rows] == [f"{value:.2f}" for value in (*dice, np.mean(dice))]
    assert volume_table(comparison(2, STACK)) is None
    assert volume_table([]) is None


def test_whole_volumes_are_drawn_and_single_slices_of_a_stack() -> None:
    assert patients_of(comparison(1)).tolist() == [f"v{k // 2}" for k in range(10)]  # type: ignore[union-attr]
    assert patients_of(comparison(1, STACK)) is None
    colons = [record("otsu", 0, counts(0.5, 9), [f"a:b{k % 2}:{k}" for k in range(10)])]
    assert set(patients_of(colons)) == {"a:b0", "a:b1"}  # type: ignore[arg-type]
    single, grouped = (table_lines(comparison(1, names))[0].interval for names in (STACK, NAMES))
    assert single == bootstrap_interval(counts(0.9, 900, 10))
    assert single != grouped


def test_the_strongest_earlier_system_has_the_highest_mean_dice() -> None:
    assert strongest_earlier(comparison(2)) == "decovnet", "not Otsu, masks or ours"
    assert strongest_earlier([r for r in comparison(2) if r["system"] not in EARLIER]) is None
    assert strongest_earlier([]) is None
    best_once = [record("ad3d-mil", 0, counts(0.9, 10)), record("ad3d-mil", 1, counts(0.1, 10)),
                 record("decovnet-3d", 0, counts(0.7, 10)), record("decovnet-3d", 1, counts(0.7, 10))]
    assert strongest_earlier(best_once) == "decovnet-3d", "the mean over seeds counts"
    assert strongest_earlier(best_once[:1] + best_once[2:]) == "ad3d-mil"


@pytest.mark.parametrize("names", [NAMES, STACK], ids=["volumes", "stack"])
def test_ours_are_compared_with_the_strongest_in_pairs(names: list[str]) -> None:
    results = comparison(2, names)
    lines = {line.key: line for line in table_lines(results)}
    groups = patients_of(results)
    other = np.stack([counts(0.6, 100, seed=seed + 10) for seed in (0, 1)])
    for name, level in (("faithful", (0.7, 60)), ("extended", (0.8, 60))):
        own = np.stack([counts(*level, seed=seed + 10) for seed in (0, 1)])
        assert lines[name].dice == bootstrap_difference(own, other, "dice", groups=groups)
        assert lines[name].iou == bootstrap_difference(own, other, "iou", groups=groups)
        assert lines[name].dice != lines[name].iou
        assert lines[name].patients is (groups is not None)
        np.testing.assert_equal(lines[name].p, np.nan if groups is None else paired_test(own, other, groups))
        expected = np.mean([micro(a).dice - micro(b).dice for a, b in zip(own, other, strict=True)])
        assert lines[name].dice.mean == pytest.approx(expected)  # type: ignore[union-attr]
    for name in lines.keys() - set(OURS):
        assert lines[name].dice is lines[name].iou is None
        assert np.isnan(lines[name].p)


def test_differences_as_sentences() -> None:
    patients = [f"p{k}:0" for k in range(len(LESION))]
    lines = table_lines(comparison(2, patients))
    faithful, extended = differences(lines, "decovnet")
    line = next(line for line in lines if line.key == "extended")
    assert line.p < 0.01
    dice, iou = (f"+{each.mean:.3f} (+{each.low:.3f} to +{each.high:.3f})" for each in (line.dice, line.iou) if each)
    assert extended == (f"ours, extended against DeCoVNet on slices: Dice {dice}, IoU {iou}, "
                        f"signed rank test over patients p = {line.p:.1g}")
    assert faithful.startswith("ours, faithful against DeCoVNet on slices: ")
    few = differences(table_lines(comparison(2)), "decovnet")
    assert [sentence.endswith("too few patients for a paired test") for sentence in few] == [True, True], "five volumes"
    unknown = differences(table_lines(comparison(2, STACK)), "decovnet")
    assert all("no test: the patients of these slices are not known" in sentence for sentence in unknown)
    assert not any("p =" in sentence for sentence in unknown)
    alone = table_lines([r for r in comparison(1) if r["system"] not in EARLIER])
    assert differences(alone, "decovnet") == []


def test_a_test_set_without_a_lesion_has_dashes(recwarn: pytest.WarningsRecorder) -> None:
    healthy = np.array([[0, 0, 0, 100]] * 8)
    names = [f"v:{k}" for k in range(8)]
    lines = table_lines([record(name, 0, healthy, names) for name in ("otsu", "decovnet", "extended")])
    assert len(recwarn) == 0
    row = table1(lines).markdown().splitlines()[2]
    assert row == "| Otsu in the lung, no learning | – | – | – | – | 1.000 | – | – | – |"
    assert len(differences(lines, "decovnet")) == 1


# --- tables -----------------------------------------------------------------------------------------------------

def cells(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Rows of the Markdown table by title."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table1(lines).markdown().splitlines()]
    assert rows[0] == ["", *(" ".join(head.split()) for head in HEADS)]
    assert {len(row) for row in rows} == {1 + len(HEADS)}
    assert len({row[0] for row in rows}) == len(rows), "each title once"
    return {row[0]: row[1:] for row in rows[2:]}


def test_published_figures_stand_once_under_the_last_system_of_their_kind() -> None:
    three_d = [record(name, 0, counts(0.5, 90)) for name in ("decovnet-3d", "ad3d-mil-3d")]
    rows = cells(table_lines(comparison(1) + three_d))
    assert list(rows) == [
        *(SYSTEMS[name].full_title for name in ("otsu", "grad-cam", "decovnet", "decovnet-3d")),
        "*published: DeCoVNet*", *(SYSTEMS[name].full_title for name in ("ad3d-mil", "ad3d-mil-3d")),
        "*published: AD3D-MIL*", "ours, faithful",
        "ours, extended", "*published: dual-task mutual learning*", SYSTEMS["masks"].title]
    assert rows["*published: DeCoVNet*"] == ["0.72", "0.56", "0.73", "0.70", "0.98", "", "", ""]
    for name, figures in PUBLISHED.items():
        assert [float(cell) for cell in rows[f"*published: {name}*"][:5]] == list(figures)
    some = [r for r in comparison(1) if r["system"] in ("otsu", "decovnet", "faithful", "masks")]
    assert list(cells(table_lines(some)))[1:5] == [
        "DeCoVNet on slices (our 2D port, lungs, map, threshold and training)", "*published: DeCoVNet*",
        "ours, faithful", "*published: dual-task mutual learning*"]


def drawn_by_rule(system: str, dice: float) -> Record:
    rows = [{"name": name, "supervision": "slice labels", "threshold": 0.5, "micro": dict.fromkeys(FIGURES, value),
             "macro": dict.fromkeys(FIGURES, value / 2)} for name, value in (("top", dice), ("level", 0.9))]
    return {**record(system, 0, counts(0.5, 90)), "rows": rows}


def test_the_outline_of_a_systems_own_authors_stands_below_it() -> None:
    rows = cells(table_lines([drawn_by_rule("decovnet-3d", 0.25), drawn_by_rule("ad3d-mil", 0.75)]))
    assert list(rows)[:2] == [SYSTEMS["decovnet-3d"].full_title, "DeCoVNet on slabs: its own rule"]
    assert rows["DeCoVNet on slabs: its own rule"] == ["0.250"] * 5 + ["0.125", "", ""]
    assert sum("own rule" in title for title in rows) == 1, "AD3D-MIL's authors draw none"


def test_the_split_table_by_hand() -> None:
    table = split_table(comparison(2), {"first": slice(0, 4), "all": slice(None)})
    assert table.heads == ("micro / macro Dice", "first", "all")
    own = [counts(0.8, 60, seed=seed + 10) for seed in (0, 1)]
    for column, part in ((1, slice(0, 4)), (2, slice(None))):
        means = [np.mean([average(each[part]).dice for each in own]) for average in (micro, macro)]
        row = next(row for row in table.rows if row[0] == "ours, extended")
        assert row[column] == f"{means[0]:.3f} / {means[1]:.3f}"


def test_both_tables_show_the_figures_of_their_lines() -> None:
    """The terminal's shows deviations of Dice only, for want of room."""
    lines = table_lines(comparison(3))
    rows, narrow = cells(lines), table1(lines, narrow=True)
    assert [row[0] for row in narrow.rows] == [title.split(" (our")[0] for title in rows]
    short = {row[0]: row[1:] for row in narrow.rows}
    for line in lines:
        columns = [*line.micro.T, line.macro]
        low, high = (f"{end:.3f}" for end in line.interval)
        assert rows[SYSTEMS[line.key].full_title] == [
            *(f"{each.mean():.3f} ± {each.std(ddof=1):.3f}" for each in columns), f"{low} to {high}",
            "–" if line.key == "otsu" else "0.900 ± 0.100"]
        dice, *others = (f"{each.mean():.3f}" for each in columns)
        assert short[line.title] == [f"{dice}±{columns[0].std(ddof=1):.3f}", *others, f"{low}-{high}",
                                     "–" if line.key == "otsu" else "0.900"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(narrow.rich("a title"))
    text = console.export_text()
    assert "a title" in text
    assert "".join(DISCLAIMER.split()) in "".join(text.split())
    assert all(cell in text for row in short.values() for cell in row[:6])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "nothing is cut off in a terminal of 80 columns"
    assert "±" not in table1(table_lines(comparison(1))).markdown(), "a single seed has no deviation"
