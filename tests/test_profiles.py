"""Profiles: known by name, whole in a report and back, and never read from a report that says more or less."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from tiny import TINY

from covidseg.errors import ArtifactError, SettingsError
from covidseg.profiles import METHODS, PROFILES, Profile, profile_from, profile_json, profile_named, repainted

ALL = {"tiny": TINY, **{f"{name}-{method}": profile_named(name, method) for name in PROFILES for method in METHODS}}


def parts(plain: dict, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where settings lie in a report: the top, ``mil``, ``mil.paint`` and so on."""
    yield above
    for name, value in plain.items():
        if isinstance(value, dict):
            yield from parts(value, (*above, name))


PARTS = list(parts(profile_json(TINY)))


def part_of(plain: dict, names: tuple[str, ...]) -> dict:
    for name in names:
        plain = plain[name]
    return plain


def test_profiles_by_name() -> None:
    assert profile_named("quick").name == "quick"
    assert profile_named("full").name == "full"
    assert profile_named("full") is PROFILES["full"]
    with pytest.raises(SettingsError, match=r"profile 'slow'.*quick, full"):
        profile_named("slow")
    with pytest.raises(SettingsError, match=r"method 'guessed'.*extended, faithful"):
        profile_named("quick", "guessed")


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_faithful_method_paints_no_lesions_and_is_the_same_otherwise(name: str) -> None:
    extended, faithful = profile_named(name), profile_named(name, "faithful")
    assert (extended.method, faithful.method) == ("extended", "faithful")
    assert extended.mil.paint.share > 0
    assert extended.segmenter.paint.share > 0
    assert faithful.mil.paint.share == faithful.segmenter.paint.share == 0
    assert faithful.segmenter.paste > 0 == extended.segmenter.paste, "which keeps lesion-free slices from standing out"
    assert faithful.segmenter.steps <= extended.segmenter.steps
    segmenter = replace(faithful.segmenter, **{key: getattr(extended.segmenter, key)
                                               for key in ("paint", "paste", "fine_weight", "steps", "threshold")})
    back = replace(faithful, method="extended", mil=replace(faithful.mil, paint=extended.mil.paint),
                   segmenter=segmenter)
    assert back == extended


@pytest.mark.parametrize("name", list(PROFILES))
@pytest.mark.parametrize("method", METHODS)
def test_no_profile_looks_at_true_lungs_unasked(name: str, method: str) -> None:
    assert profile_named(name, method).true_lungs is False


def test_repainting_leaves_other_paint_alone() -> None:
    changed = repainted(TINY, share=0.1, vessels=0.2)
    for part in (changed.mil, changed.segmenter):
        assert (part.paint.share, part.paint.vessels) == (0.1, 0.2)
    assert changed.mil.paint == replace(TINY.mil.paint, share=0.1, vessels=0.2)
    assert replace(changed, mil=TINY.mil, segmenter=TINY.segmenter) == TINY, "the lung net and classifier keep theirs"


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_sizes_of_the_profiles_fit_patches_and_strides(profile: Profile) -> None:
    assert profile.prepare.size % 40 == 0
    assert profile.prepare.size % 2 ** (len(profile.segmenter.channels) - 1) == 0
    assert profile.lung_net.size % 2 ** (len(profile.lung_net.channels) - 1) == 0


@pytest.mark.parametrize("name", list(ALL))
def test_settings_survive_json(name: str) -> None:
    back = profile_from(json.loads(json.dumps(profile_json(ALL[name]))))
    assert back == ALL[name]
    assert asdict(back) == asdict(ALL[name])
    # Equality alone would not tell a list from a tuple inside; a frozen settings class has to stay hashable.
    assert hash(back) == hash(ALL[name])


def test_settings_that_are_no_defaults_survive_json() -> None:
    """Inner settings as well: a reader that falls back to defaults would pass on the profiles alone."""
    mil = replace(TINY.mil, curriculum=replace(TINY.mil.curriculum, order="random"),
                  paint=replace(TINY.mil.paint, share=0.123, count=(2, 3)))
    odd = replace(repainted(TINY, vessels=0.321), true_lungs=True, method="faithful", mil=mil,
                  lung_net=replace(TINY.lung_net, paint=replace(TINY.lung_net.paint, solid=(0.6, 0.7))))
    back = profile_from(json.loads(json.dumps(profile_json(odd))))
    assert back == odd
    assert back != TINY
    assert back.mil.curriculum.order == "random"
    assert back.mil.paint.count == (2, 3)
    assert back.segmenter.paint.vessels == 0.321
    assert back.lung_net.paint.solid == (0.6, 0.7)
    assert back.true_lungs is True


def test_the_walk_over_the_parts_reaches_the_inner_ones() -> None:
    assert {(), ("mil",), ("mil", "curriculum"), ("mil", "paint"), ("segmenter", "paint"), ("classifier", "paint"),
            ("lung_net", "paint"), ("mutual",), ("fine",)} <= set(PARTS)


@pytest.mark.parametrize("names", PARTS, ids=lambda names: ".".join(names) or "top")
def test_a_missing_setting_is_refused_wherever_it_belongs(names: tuple[str, ...]) -> None:
    plain = profile_json(TINY)
    assert part_of(plain, names)
    for key in part_of(plain, names):
        less = copy.deepcopy(plain)
        del part_of(less, names)[key]
        with pytest.raises(ArtifactError, match=rf"cannot be read.*{key}"):
            profile_from(less)


@pytest.mark.parametrize("names", PARTS, ids=lambda names: ".".join(names) or "top")
def test_an_unknown_setting_is_refused_wherever_it_stands(names: tuple[str, ...]) -> None:
    plain = profile_json(TINY)
    part_of(plain, names)["unheard_of"] = 1
    with pytest.raises(ArtifactError, match=r"cannot be read.*unheard_of"):
        profile_from(plain)


@pytest.mark.parametrize("harm", [
    lambda plain: plain.update(mil="text"), lambda plain: plain["mil"].update(paint=None),
    lambda plain: plain["segmenter"].update(paint=[1, 2]), lambda plain: plain["prepare"].update(size=81),
    lambda plain: plain["mutual"].update(exchange="sometimes")],
    ids=["text for a part", "nothing for a part", "a list for a part", "a size that does not fit", "no such exchange"])
def test_settings_that_cannot_be_are_refused(harm: object) -> None:
    plain = profile_json(TINY)
    harm(plain)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match="Train again"):
        profile_from(plain)


@pytest.mark.parametrize("plain", [[], "text", None, {}], ids=["list", "text", "null", "empty"])
def test_what_is_no_profile_is_refused(plain: object) -> None:
    with pytest.raises(ArtifactError):
        profile_from(plain)  # type: ignore[arg-type]
