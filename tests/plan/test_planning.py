"""Plans are data: made here without a file, a module or a device."""

from __future__ import annotations

import json

import pytest

from fastload.dtypes import DTYPES
from fastload.errors import KeyMatchError
from fastload.formats.specs import Encoding, Region, TensorSpec
from fastload.options import LoadOptions
from fastload.plan.keys import KeyRules
from fastload.plan.planning import device_finder, plan_model, plan_state_dict
from fastload.plan.rows import Action, LoadPlan
from fastload.plan.slots import Slot


def spec(key: str, offset: int = 0, dtype: str = "F32", shape: tuple[int, ...] = (4,), **region: object) -> TensorSpec:
    n_bytes = DTYPES[dtype].itemsize
    for size in shape:
        n_bytes *= size
    return TensorSpec(key, DTYPES[dtype], shape, Region("f", offset, n_bytes, **region))  # type: ignore[arg-type]


def slot(fqn: str, dtype: str = "F32", shape: tuple[int, ...] = (4,), on_meta: bool = True) -> Slot:
    return Slot(fqn, DTYPES[dtype], shape, on_meta=on_meta)


def plan(specs: list[TensorSpec], slots: list[Slot], rules: KeyRules | None = None, **options: object) -> LoadPlan:
    return plan_model(
        {s.key: s for s in specs},
        {s.fqn: s for s in slots},
        LoadOptions(**options),  # type: ignore[arg-type]
        rules or KeyRules(),
        "folder",
    )


def test_equal_types_are_mapped_and_others_cast() -> None:
    made = plan([spec("a"), spec("b", 16, "BF16")], [slot("a"), slot("b")])
    assert [(row.fqn, row.action, row.dtype.code) for row in made.rows] == [
        ("a", Action.MAP, "F32"),
        ("b", Action.CAST, "F32"),
    ]
    assert made.bytes_by_action() == {"map": 16, "cast": 8}


def test_rows_are_in_the_order_of_the_file() -> None:
    made = plan([spec("a", 64), spec("b", 0)], [slot("a"), slot("b")])
    assert [row.fqn for row in made.rows] == ["b", "a"]


def test_a_misaligned_tensor_is_copied_and_an_encoded_one_decoded() -> None:
    deflated = Encoding("deflate", 5, None, 1)
    made = plan([spec("a", 2), spec("b", 64, encoding=deflated)], [slot("a"), slot("b")])
    assert [row.action for row in made.rows] == [Action.COPY, Action.DECODE]


@pytest.mark.parametrize("kept", ["I64", "U8", "BOOL", "F8_E4M3", "C64"])
def test_integers_and_eight_bit_floats_are_not_cast(kept: str) -> None:
    made = plan([spec("a", dtype=kept)], [slot("a")], dtype=DTYPES["BF16"])
    assert (made.rows[0].action, made.rows[0].dtype.code) == (Action.MAP, kept)


def test_the_callers_dtype_wins_over_the_modules() -> None:
    made = plan([spec("a")], [slot("a")], dtype=DTYPES["BF16"])
    assert (made.rows[0].action, made.rows[0].dtype.code) == (Action.CAST, "BF16")


def test_modules_that_need_float32_keep_it_in_float16_but_not_in_bfloat16() -> None:
    rules = KeyRules(keep_in_fp32=("wo",))
    specs, slots = [spec("a.wo.weight"), spec("wolf", 64)], [slot("a.wo.weight"), slot("wolf")]
    half = plan(specs, slots, rules, dtype=DTYPES["F16"])
    assert [row.dtype.code for row in half.rows] == ["F32", "F16"]
    brain = plan(specs, slots, rules, dtype=DTYPES["BF16"])
    assert [row.dtype.code for row in brain.rows] == ["BF16", "BF16"]


def test_a_module_with_memory_of_its_own_is_filled() -> None:
    made = plan([spec("a", dtype="BF16")], [slot("a", on_meta=False)])
    assert (made.rows[0].action, made.rows[0].dtype.code) == (Action.FILL, "F32")


def test_the_longest_module_name_decides_on_the_device() -> None:
    find = device_finder({"": "cpu", "h": "cuda:0", "h.1": "cuda:1"})
    assert [find(n) for n in ("w", "h.0.w", "h.1.w", "h.10.w", "hat.w")] == ["cpu", "cuda:0", "cuda:1", "cuda:0", "cpu"]


def test_another_device_is_a_move() -> None:
    made = plan([spec("a")], [slot("a")], device_map={"": "cuda:0"})
    assert (made.rows[0].action, made.rows[0].device) == (Action.MOVE, "cuda:0")


def test_every_problem_is_in_one_error() -> None:
    with pytest.raises(KeyMatchError) as caught:
        plan(
            [spec("a", shape=(2,)), spec("extra", 64)],
            [slot("a"), *(slot(f"layers.{i}.w") for i in range(12))],
            strict=True,
        )
    message = str(caught.value)
    assert "shape of a: [2] in the file, [4] in the model" in message
    assert "not in the model: extra" in message
    assert "missing in the files: layers.{0...11}.w" in message
    assert "folder" in message


def test_mismatched_shapes_are_refused_unless_ignored() -> None:
    specs, slots = [spec("a", shape=(2,))], [slot("a")]
    with pytest.raises(KeyMatchError, match="ignore_mismatched_sizes"):
        plan(specs, slots)
    made = plan(specs, slots, ignore_mismatched_sizes=True)
    assert made.rows == ()
    assert made.mismatched == (("a", (2,), (4,)),)


def test_strict_refuses_a_mismatch_even_if_it_was_to_be_ignored() -> None:
    with pytest.raises(KeyMatchError):
        plan([spec("a", shape=(2,))], [slot("a")], ignore_mismatched_sizes=True, strict=True)


def test_shared_storages_count_once() -> None:
    made = plan_state_dict({"a": spec("a"), "b": spec("b")}, dtype=None, device="cpu")
    assert made.n_bytes == 16


def test_a_plan_is_plain_data() -> None:
    made = plan([spec("a", dtype="BF16")], [slot("a")])
    row = json.loads(json.dumps(made.to_dict()))["rows"][0]
    assert row["action"] == "cast"
    assert row["reason"] == "BF16 to F32"
