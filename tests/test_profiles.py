"""Profiles: known by name, whole in a report and back, and never read from a report that says more or less."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from tiny import TINY

from covidseg.errors import ArtifactError, SettingsError
from covidseg.profiles import METHODS, PROFILES, Profile, profile_from, profile_json, profile_named, repainted

# No setting is a default, inner ones included: a reader that falls back to defaults would pass on the others alone.
ODD = replace(repainted(TINY, vessels=0.321), true_lungs=True, method="faithful",
              mil=replace(TINY.mil, curriculum=replace(TINY.mil.curriculum, order="random"),
                          paint=replace(TINY.mil.paint, share=0.123, count=(2, 3))),
              lung_net=replace(TINY.lung_net, paint=replace(TINY.lung_net.paint, solid=(0.6, 0.7))))
ALL = {"tiny": TINY, "odd": ODD,
       **{f"{name}-{method}": profile_named(name, method) for name in PROFILES for method in METHODS}}


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
    for name, method in itertools.product(PROFILES, METHODS):
        found = profile_named(name, method)
        assert (found.name, found.method) == (name, method)
        assert found.true_lungs is False, "nobody looks at true lungs unasked"
    assert profile_named("full") is PROFILES["full"]
    with pytest.raises(SettingsError, match=r"profile 'slow'.*quick, full"):
        profile_named("slow")
    with pytest.raises(SettingsError, match=r"method 'guessed'.*extended, faithful"):
        profile_named("quick", "guessed")


@pytest.mark.parametrize("name", list(PROFILES))
def test_the_faithful_method_paints_no_lesions_and_is_the_same_otherwise(name: str) -> None:
    extended, faithful = profile_named(name), profile_named(name, "faithful")
    assert extended.mil.paint.share > 0
    assert extended.segmenter.paint.share > 0
    assert faithful.mil.paint.share == faithful.segmenter.paint.share == 0
    assert faithful.segmenter.paste > 0 == extended.segmenter.paste, "which keeps lesion-free slices from standing out"
    assert faithful.segmenter.steps <= extended.segmenter.steps
    assert faithful.segmenter.refresh == (() if name == "full" else extended.segmenter.refresh)
    differs = ("paint", "paste", "fine_weight", "steps", "refresh", "threshold")
    segmenter = replace(faithful.segmenter, **{key: getattr(extended.segmenter, key) for key in differs})
    assert extended.mutual.painted > 0 == faithful.mutual.painted
    back = replace(faithful, method="extended", mil=replace(faithful.mil, paint=extended.mil.paint),
                   mutual=replace(faithful.mutual, painted=extended.mutual.painted), segmenter=segmenter)
    assert back == extended


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
    given = ALL[name]
    back = profile_from(json.loads(json.dumps(profile_json(given))))
    assert back == given
    assert asdict(back) == asdict(given)
    # Equality alone would not tell a list from a tuple inside; a frozen settings class has to stay hashable.
    assert hash(back) == hash(given)


def test_missing_and_unknown_settings_are_refused_wherever_they_belong() -> None:
    assert {(), ("mil",), ("mil", "curriculum"), ("mil", "paint"), ("segmenter", "paint"), ("classifier", "paint"),
            ("lung_net", "paint"), ("mutual",), ("fine",)} <= set(PARTS)
    for names in PARTS:
        more = profile_json(TINY)
        part_of(more, names)["unheard_of"] = 1
        with pytest.raises(ArtifactError, match=r"cannot be read.*unheard_of"):
            profile_from(more)
        for key in part_of(profile_json(TINY), names):
            less = profile_json(TINY)
            del part_of(less, names)[key]
            with pytest.raises(ArtifactError, match=rf"cannot be read.*{key}"):
                profile_from(less)


@pytest.mark.parametrize("harm", [
    {"mil": "text"}, {"mil": {**profile_json(TINY)["mil"], "paint": None}},
    {"segmenter": {**profile_json(TINY)["segmenter"], "paint": [1, 2]}},
    {"prepare": {**profile_json(TINY)["prepare"], "size": 81}},
    {"mutual": {**profile_json(TINY)["mutual"], "exchange": "sometimes"}}],
    ids=["text for a part", "nothing for a part", "a list for a part", "a size that does not fit", "no such exchange"])
def test_settings_that_cannot_be_are_refused(harm: dict) -> None:
    with pytest.raises(ArtifactError, match="Train again"):
        profile_from({**profile_json(TINY), **harm})
    for plain in ([], "text", None, {}):
        with pytest.raises(ArtifactError):
            profile_from(plain)  # type: ignore[arg-type]
