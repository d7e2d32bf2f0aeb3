"""Many tensors of the files that are one tensor of the model: the experts of a layer, a joined projection.

Pure. A fusion says by name which keys belong together and by which operations (stack, concatenate, and their nesting)
they become one; the result is a list of pieces, each a box of the fused tensor. The spelling of patterns and the order
of operations are those of the weight converters in transformers, so that its tables translate line by line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastload.errors import KeyMatchError, OptionError
from fastload.formats.specs import FusedSpec, Piece, TensorSpec, contiguous_stride

__all__ = ["Concatenate", "FusedSpec", "Fusion", "Piece", "Stack", "fuse", "join"]


@dataclass(frozen=True, slots=True)
class Stack:
    """Join the tensors that one pattern matches along a new dimension, in the order of the number in their keys."""

    dim: int = 0


@dataclass(frozen=True, slots=True)
class Concatenate:
    """Join what the patterns gave along a dimension that is there, in the order of the patterns."""

    dim: int = 0


@dataclass(frozen=True, slots=True)
class Fusion:
    """One rule.

    Attributes:
        sources: ends of the keys that belong together, such as ``"experts.*.gate_proj.weight"``; ``*`` is a number.
            What stands before the end tells one fused tensor from another.
        target: end of the fused tensor's name.
        operations: what makes one of them, in order: at most one Stack, then at most one Concatenate.
    """

    sources: tuple[str, ...]
    target: str
    operations: tuple[Stack | Concatenate, ...]

    def __post_init__(self) -> None:
        kinds = [type(operation) for operation in self.operations]
        wanted = [Stack] * any("*" in source for source in self.sources) + [Concatenate] * (len(self.sources) > 1)
        if kinds != wanted:
            raise OptionError(
                "the operations of a fusion do not make one tensor of its sources",
                key=self.target,
                expected=", ".join(kind.__name__ for kind in wanted) or "none",
                found=", ".join(kind.__name__ for kind in kinds) or "none",
                fix="a Stack for sources with '*', then a Concatenate for several sources",
            )


def fuse(specs: Mapping[str, TensorSpec], fusions: Sequence[Fusion]) -> tuple[dict[str, TensorSpec], list[FusedSpec]]:
    """The specs that no fusion takes, and the fused tensors in the order in which their first pieces occur.

    Raises:
        KeyMatchError: pieces of one fused tensor are missing or do not fit each other; all such cases in one error.
    """
    rest: dict[str, TensorSpec] = {}
    groups: dict[str, tuple[Fusion, dict[int, dict[int, TensorSpec]]]] = {}
    patterns = [
        (fusion, index, *source.partition("*")) for fusion in fusions for index, source in enumerate(fusion.sources)
    ]
    endings = tuple(tail if star else head for _, _, head, star, tail in patterns)
    for key, spec in specs.items():
        if not key.endswith(endings):
            rest[key] = spec
            continue
        for fusion, index, head, star, tail in patterns:
            place = _place_of(key, head, star, tail)
            if place is not None:
                prefix, number = place
                _, members = groups.setdefault(prefix + fusion.target, (fusion, {}))
                members.setdefault(index, {})[number] = spec
                break
        else:
            rest[key] = spec
    problems: list[str] = []
    fused = [_assemble(name, fusion, members, problems) for name, (fusion, members) in groups.items()]
    if problems:
        raise KeyMatchError(
            f"tensors that belong together do not fit ({len(problems)} problems)",
            file=next(iter(specs.values())).region.file,
            found="\n            ".join(problems),
            fix="fetch or save the checkpoint again",
        )
    return rest, [spec for spec in fused if spec is not None]


def _place_of(key: str, head: str, star: str, tail: str) -> tuple[str, int] | None:
    """What stands before a source in a key, and the number that its ``*`` is; None where the key is another's."""
    number = "0"
    if star:
        if not key.endswith(tail):
            return None
        key, dot, number = key[: len(key) - len(tail)].rpartition(".")
        key += dot
        if not (number.isascii() and number.isdigit()) or (number[0] == "0" and number != "0"):
            return None
    prefix = key.removesuffix(head)
    if len(prefix) + len(head) != len(key) or not (prefix.endswith(".") or not prefix):
        return None
    return prefix, int(number)


def _assemble(
    name: str, fusion: Fusion, members: Mapping[int, Mapping[int, TensorSpec]], problems: list[str]
) -> FusedSpec | None:
    """The pieces of one fused tensor; None, and a line in problems, where they do not make one."""
    absent = [source for index, source in enumerate(fusion.sources) if index not in members]
    counts = {len(numbered) for numbered in members.values()}
    gaps = [index for index, numbered in members.items() if set(numbered) != set(range(len(numbered)))]
    every = [spec for numbered in members.values() for spec in numbered.values()]
    if absent or gaps or len(counts) > 1:
        problems.append(f"{name}: {', '.join(absent) or 'numbers of its pieces'} missing ({len(every)} pieces found)")
        return None
    stack = next((operation for operation in fusion.operations if isinstance(operation, Stack)), None)
    joint = next((operation for operation in fusion.operations if isinstance(operation, Concatenate)), None)
    parts = [[members[index][number] for number in sorted(members[index])] for index in range(len(fusion.sources))]
    fused = join(name, parts, stack, joint)
    if fused is None:
        found = ", ".join(sorted({f"{spec.dtype} {list(spec.shape)}" for spec in every})[:4])
        problems.append(f"{name}: its pieces differ ({found} ...)")
    return fused


def _concatenated_dim(stack: Stack | None, joint: Concatenate | None, n_dims: int) -> int | None:
    """The dimension of a piece in which pieces of different sources may differ; None if there is none."""
    if joint is None:
        return None
    if stack is None:
        return joint.dim % n_dims
    dim, stacked = joint.dim % (n_dims + 1), stack.dim % (n_dims + 1)
    return None if dim == stacked else dim - (dim > stacked)


def _without(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return shape if dim is None else shape[:dim] + shape[dim + 1 :]


def join(
    name: str, parts: Sequence[Sequence[TensorSpec]], stack: Stack | None, joint: Concatenate | None
) -> FusedSpec | None:
    """Tensors of one type as one: those of each part stacked, then the parts concatenated.

    Args:
        name: of the result.
        parts: what each source has, in order; at least one, none empty. Without a stack, one tensor each.
        stack: how the tensors of a part become one; a stacked index is a dimension that a piece does not have.
        joint: how the parts become one.

    Returns:
        The result; None where types or shapes do not fit, or where there are more tensors than the operations join.
    """
    every = [spec for part in parts for spec in part]
    n_dims = len(every[0].shape)
    if (stack is None and any(len(part) > 1 for part in parts)) or (joint is None and len(parts) > 1):
        return None
    n_fused_dims = n_dims + (stack is not None)
    if any(op is not None and not -n_fused_dims <= op.dim < n_fused_dims for op in (stack, joint)):
        return None
    along = _concatenated_dim(stack, joint, n_dims)
    if len({spec.dtype for spec in every}) > 1 or len({_without(spec.shape, along) for spec in every}) > 1:
        return None
    if any(len({spec.shape for spec in part}) > 1 for part in parts):
        return None
    shapes = []
    for part in parts:
        shape = list(part[0].shape)
        if stack is not None:
            shape.insert(stack.dim % n_fused_dims, len(part))
        shapes.append(shape)
    if len({_without(tuple(shape), None if joint is None else joint.dim % n_fused_dims) for shape in shapes}) > 1:
        return None
    return _layout(name, parts, shapes, stack, joint)


def _layout(
    name: str,
    parts: Sequence[Sequence[TensorSpec]],
    shapes: Sequence[Sequence[int]],
    stack: Stack | None,
    joint: Concatenate | None,
) -> FusedSpec:
    """Where each piece begins, and how it lies; shapes are those of the stacked parts."""
    whole = list(shapes[0])
    if joint is not None:
        whole[joint.dim] = sum(shape[joint.dim] for shape in shapes)
    strides = contiguous_stride(tuple(whole))
    stacked_dim = None if stack is None else stack.dim % len(whole)
    pieces: list[Piece] = []
    begin = 0
    for part, shape in zip(parts, shapes, strict=True):
        for number, spec in enumerate(part):
            if stacked_dim is None:
                pieces.append(Piece(spec, begin, strides))
            else:
                at = begin + number * strides[stacked_dim]
                pieces.append(Piece(spec, at, _without(strides, stacked_dim)))
        if joint is not None:
            begin += shape[joint.dim] * strides[joint.dim]
    return FusedSpec(name, tuple(whole), tuple(pieces))
