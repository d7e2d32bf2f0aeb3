"""Keys are renamed as transformers renames them when it is asked key by key, for every table that it has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaModel, conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from fastload.hf.renaming import natural_order, rename_keys
from tests.hf.families import FAMILIES, build, model_class

Answer = tuple[dict[str, tuple[int | None, dict[str, list[str]]]], set[str], list[bool]]
"""(name -> (place of its converter, pattern or key -> keys), names that are not wanted, which transforms were used)"""


def by_transformers(keys: Iterable[str], transforms: list[Any], prefix: str, wanted: Mapping[str, Any]) -> Answer:
    """What asking transformers about one key after the other comes to."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    place = {pattern: transforms.index(each) for each in converters for pattern in each.source_patterns}
    made: dict[str, tuple[int | None, dict[str, list[str]]]] = {}
    unexpected: set[str] = set()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        converter = None if pattern is None else place[pattern]
        if name in wanted:
            _, gathered = made.setdefault(name, (converter, {}))
            gathered.setdefault(key if pattern is None else pattern, []).append(key)
        elif converter is None:
            unexpected.add(name)
        else:
            targets = transforms[converter].target_patterns
            unexpected |= {name.replace(targets[0], target) for target in targets}
    return made, unexpected, [transform.was_used() for transform in transforms]


def by_fastload(keys: Iterable[str], transforms: list[Any], model: Any, wanted: Mapping[str, Any]) -> Answer:
    renamed = rename_keys(keys, transforms, model, wanted)
    made = {
        name: (None if source.converter is None else transforms.index(source.converter), source.keys)
        for name, source in renamed.sources.items()
    }
    return made, set(renamed.unexpected), [transform.was_used() for transform in transforms]


def in_order(answer: Answer) -> Any:
    """An answer, with the order in which each name gathers its keys."""
    made, unexpected, used = answer
    return {name: (place, list(gathered.items())) for name, (place, gathered) in made.items()}, unexpected, used


@cache
def tables() -> dict[str, list[Any]]:
    """Every model type and class that transformers has conversions for."""
    conversion_mapping.get_checkpoint_conversion_mapping("")
    return dict(conversion_mapping._checkpoint_conversion_mapping_cache)


def fresh(table: str, scope: str | None, prefix: str) -> list[Any]:
    """A table's transforms, for a part of a model if a scope says so; nobody has used them yet."""
    transforms = conversion_mapping.get_checkpoint_conversion_mapping(table)
    for transform in transforms:
        if scope is not None:
            transform.scope_prefix, transform.base_model_prefix = scope, prefix
    return list(transforms)


NUMBER = st.sampled_from(["0", "1", "2", "9", "10", "11", "127"])
WORD = st.sampled_from(["weight", "bias", "layers", "model", "experts", "attn", "blocks", "norm1", "w2", "731", "a#b"])


@st.composite
def texts_matching(draw: st.DrawFn, pattern: str) -> str:
    """A key, or a part of one, that a source pattern may match: its wildcards replaced by numbers and words."""
    text = pattern.replace("*.", ".*.")
    text = re.sub(r"\(\?<?[!=][^()]*\)|\(\?:|\(\?P<\w+>", "", text)
    text = re.sub(r"\[\^?[^\]]*\][+*]?", lambda _: draw(WORD), text)
    text = re.sub(r"\\d[+*]?|\.\*\??|\.\+\??|\\w[+*]?|\\S\+", lambda _: draw(st.sampled_from(["#", "#", "2"])), text)
    text = re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", text)
    return re.sub(r"[\\^$()?+*]", "", text)


@st.composite
def keys_for(draw: st.DrawFn, transforms: Sequence[Any]) -> list[str]:
    """Keys that some of the transforms match, in several layers and for several experts, and others."""
    keys: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        transform = draw(st.sampled_from(transforms))
        patterns = draw(st.sampled_from([transform.source_patterns, [draw(WORD)]]))
        places = ["", "model."] if patterns[0].startswith("^") else ["", "model.", "model.layers.#.", "#.", "a.#.b.#."]
        scope = f"{transform.scope_prefix}." if transform.scope_prefix else ""
        before = draw(st.sampled_from(["", scope])) + draw(st.sampled_from(places))
        after = draw(st.sampled_from(["", "", ".weight", ".#", ".#.weight", "_scale_inv"]))
        numbers = draw(st.lists(st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), min_size=1, max_size=3))
        for pattern in patterns:
            text = before + draw(texts_matching(pattern)) + after
            for filled in numbers:
                rest = iter(filled)
                keys.append(re.sub("#(?!b)", lambda _, rest=rest: next(rest, "5"), text))
    return list(dict.fromkeys(keys))


@st.composite
def cases(draw: st.DrawFn, transforms: list[Any], prefix: str) -> tuple[list[str], set[str]]:
    """Keys of files, and names of a model that has most of what they are renamed to."""
    keys = draw(keys_for(transforms))
    everything = [f"{part}{name}" for name in names(keys, transforms) for part in ("", f"{prefix}.")]
    everything += [name.removeprefix(f"{prefix}.") for name in everything]
    left_out = draw(st.sets(st.sampled_from(sorted({*everything, *keys})), max_size=6))
    only_keys = set(keys) if draw(st.booleans()) else set()
    whole = draw(st.sampled_from(["plain", "prefixed", "all"]))
    kept = {name for name in everything if whole == "all" or name.startswith(f"{prefix}.") == (whole == "prefixed")}
    return keys, (kept | only_keys) - left_out - {""}


def names(keys: Iterable[str], transforms: list[Any]) -> set[str]:
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return {rename_source_key(key, renamings, converters)[0] for key in keys}


THOROUGH = settings(
    max_examples=150,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
META = torch.empty(1, device="meta")


@THOROUGH
@given(data=st.data())
def test_every_table_of_transformers(data: st.DataObject) -> None:
    table = data.draw(st.sampled_from(sorted(tables())))
    scope = data.draw(st.sampled_from([None, None, "", "encoder", "layers.1"]))
    keys, wanted_names = data.draw(cases(fresh(table, scope, "model"), "model"))
    assert_same_answers(keys, wanted_names, lambda: fresh(table, scope, "model"))


def assert_same_answers(keys: list[str], wanted_names: Iterable[str], make: Any) -> None:
    wanted = dict.fromkeys(sorted(wanted_names), META)
    asked, planned = make(), make()
    expected = by_transformers(keys, asked, LlamaModel.base_model_prefix, wanted)
    assert in_order(by_fastload(keys, planned, LlamaModel, wanted)) == in_order(expected)


PIECES = st.sampled_from(
    [
        r"layers",
        r"model",
        r"\.",
        r".",
        r"(\d+)",
        r"\d+",
        r".*",
        r"[^.]+",
        r"attn",
        r"experts.*",
        r"weight",
        r"norm",
        "1",
        r"w\d",
    ]
)


@THOROUGH
@given(data=st.data())
def test_mappings_of_the_callers_own(data: st.DataObject) -> None:
    rules: dict[str, str] = {}
    for _ in range(data.draw(st.integers(1, 3))):
        begin, end = data.draw(st.sampled_from(["", "^"])), data.draw(st.sampled_from(["", "$"]))
        body = "".join(data.draw(st.lists(PIECES, min_size=1, max_size=5)))
        source = begin + body + end
        target = data.draw(st.sampled_from(["new", "blocks.1", "", "norm"]))
        if body.count("(") == 1 and data.draw(st.booleans()):
            target += r".\1"
        rules[source] = target

    def make() -> list[Any]:
        return [WeightRenaming(source, target) for source, target in rules.items()]

    keys, wanted_names = data.draw(cases(make(), "model"))
    assert_same_answers(keys, wanted_names, make)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_of_real_models(family: str) -> None:
    model = build(family)
    wanted = model.state_dict()
    stored = list(conversion_mapping_reverted(model))

    def make() -> list[Any]:
        return list(conversion_mapping.get_model_conversion_mapping(model))

    keys = sorted({*stored, *wanted, *(f"{model.base_model_prefix}.{key}" for key in stored[:5])})
    expected = by_transformers(keys, make(), model_class(family).base_model_prefix, wanted)
    assert in_order(by_fastload(keys, make(), model, wanted)) == in_order(expected)
    # The model's own file alone fills all of it.
    made, unexpected, _ = by_fastload(stored, make(), model, wanted)
    assert unexpected == set()
    assert made.keys() <= wanted.keys()


def conversion_mapping_reverted(model: Any) -> Mapping[str, Any]:
    """What transformers stores of a model."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


PARTS = st.one_of(NUMBER, WORD, st.sampled_from(["", "00", "01", "x1", "x01", "x10", "²", "\u0661"]))


@THOROUGH
@given(st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=12))
def test_the_order_of_keys_is_transformers(keys: list[str]) -> None:
    try:
        expected = sorted(keys, key=dot_natural_key)
    except (TypeError, ValueError):
        return  # keys that transformers cannot sort
    assert sorted(keys, key=natural_order) == expected
