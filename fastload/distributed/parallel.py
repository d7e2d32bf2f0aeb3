"""Models split over ranks by PyTorch's own engine, as a tensor parallel plan says.

`parallelize` makes DTensors of the parameters of a model that is on meta, and hooks the modules that have them, before
anything is read: the load that follows reads for each rank its own part.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fastload.errors import OptionError
from fastload.plan.boxes import Split, box_of

__all__ = ["agreed_seed", "mesh_of", "parallelize"]

_TP = "tp"


class ExpertParallel(ParallelStyle):
    """Whole experts on each rank: it computes those that it has, and the sums of all ranks are added up.

    For a module whose parameters are stacked by expert, and whose forward takes the states, the numbers of the chosen
    experts and their weights. Its attribute ``here``, a range, says which experts it has; for others it gives zero.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _shard_experts, _enter_experts, _leave_experts)  # type: ignore[arg-type]


class GradientSum(ParallelStyle):
    """A module that is whole on every rank, and sees a part of the inputs there: its gradients are added up."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        hooked: dict[str, nn.Parameter] = {}

        def sum_gradient(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=group)

        def hook_gradients(module: nn.Module, _: Any) -> None:
            # A load replaces the parameters: the ones to hook are those that a forward finds.
            for name, parameter in module.named_parameters(recurse=False):
                if torch.is_grad_enabled() and parameter.requires_grad and hooked.get(name) is not parameter:
                    parameter.register_post_accumulate_grad_hook(sum_gradient)  # type: ignore[no-untyped-call]
                    hooked[name] = parameter

        module.register_forward_pre_hook(hook_gradients)
        return module


# Style of a plan -> the kind of module that it is for, and how PyTorch calls it.
_STYLES: Mapping[str, tuple[type[nn.Module], ParallelStyle]] = {
    "colwise": (nn.Linear, ColwiseParallel()),
    "colwise_gather_output": (nn.Linear, ColwiseParallel(output_layouts=Replicate())),
    "rowwise": (nn.Linear, RowwiseParallel()),
    "rowwise_split_input": (nn.Linear, RowwiseParallel(input_layouts=Replicate())),
    "embedding_rowwise": (nn.Embedding, RowwiseParallel(input_layouts=Replicate())),
    "embedding_colwise": (nn.Embedding, ColwiseParallel(output_layouts=Replicate())),
    "experts": (nn.Module, ExpertParallel()),
    "replicated_with_grad_allreduce": (nn.Module, GradientSum()),
}


def mesh_of(device_mesh: DeviceMesh | None) -> DeviceMesh:
    """The mesh of one dimension over which a model is split.

    Args:
        device_mesh: a mesh of one dimension, or of several, one of which is called "tp"; None for all ranks of the
            process group.

    Raises:
        OptionError: there is no process group, or no such dimension.
    """
    if not dist.is_initialized():
        raise OptionError(
            "a model is split over the ranks of a process group, and this process is in none",
            key="tp_plan",
            fix="start the program with torchrun --nproc-per-node N, and call torch.distributed.init_process_group()",
        )
    if device_mesh is None:
        return init_device_mesh(_device_type(), (dist.get_world_size(),), mesh_dim_names=(_TP,))
    if not isinstance(device_mesh, DeviceMesh):
        raise OptionError("not a device mesh", key="device_mesh", found=repr(device_mesh), fix="see init_device_mesh")
    if device_mesh.ndim == 1:
        return device_mesh
    if _TP not in (device_mesh.mesh_dim_names or ()):
        raise OptionError(
            "a device mesh of several dimensions has to say over which of them a model is split",
            key="device_mesh",
            expected=f"a dimension called {_TP!r}",
            found=str(device_mesh.mesh_dim_names),
            fix="name the dimensions in init_device_mesh, or give a mesh of one; for fully_shard lay out a module on "
            "meta and fill it with load_model",
        )
    return device_mesh[_TP]


def parallelize(module: nn.Module, mesh: DeviceMesh, styles: Mapping[str, str]) -> None:
    """Split a model, in place.

    Args:
        module: the model, on meta. Ties of parameters are lost.
        mesh: of one dimension.
        styles: name of a module -> style (see `plan.tensor_parallel`).

    Raises:
        OptionError: a style that is for another kind of module.
    """
    modules = dict(module.named_modules())
    kinds = {name: _STYLES[style] for name, style in styles.items() if style in _STYLES}
    for name, (kind, engine) in kinds.items():
        is_fit = isinstance(modules[name], kind) and (
            hasattr(modules[name], "here") or not isinstance(engine, ExpertParallel)
        )
        if not is_fit:
            raise OptionError(
                f"the style {styles[name]!r} of a tensor parallel plan is for another kind of module",
                key=name,
                expected=kind.__name__ if kind is not nn.Module else "stacked experts",
                found=type(modules[name]).__name__,
                fix="choose another style for it, or leave it out",
            )
    firsts: dict[Hashable, _Split] = {}
    for name, (_, engine) in kinds.items():
        form = _form(modules[name], styles[name])
        if form in firsts and not isinstance(engine, GradientSum):
            firsts[form].apply_to(modules[name])
        else:
            firsts[form] = _Split.of(modules[name], mesh, engine)


class _Split(NamedTuple):
    """A module that torch has split, as the pattern for those of its form.

    Torch takes 0.7 ms for each, most of it to look at the signatures of its own hooks, and a model has hundreds.

    Attributes:
        module: the module. Its hooks get the module that they are called for, and know of none.
        attributes: what torch has set besides its parameters and hooks.
    """

    module: nn.Module
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, mesh: DeviceMesh, engine: ParallelStyle) -> _Split:
        """Have torch split a module, on its own: of a plan of names torch 2.6 takes some for others."""
        before = dict(module.__dict__)
        parallelize_module(module, mesh, engine)
        after = module.__dict__.items()
        return cls(module, {name: value for name, value in after if name not in before or before[name] is not value})

    def apply_to(self, module: nn.Module) -> None:
        """Split another module of the same form."""
        for name, parameter in self.module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter, parameter.requires_grad)
        module._forward_pre_hooks.update(self.module._forward_pre_hooks)
        module._forward_hooks.update(self.module._forward_hooks)
        module.__dict__.update(self.attributes)


def _form(module: nn.Module, style: str) -> Hashable:
    """Equal for modules that are split alike."""
    parameters = tuple(
        (name, parameter.shape, parameter.dtype, parameter.requires_grad)
        for name, parameter in module.named_parameters()
    )
    return type(module), style, parameters, bool(module._forward_pre_hooks or module._forward_hooks)


def agreed_seed(mesh: DeviceMesh) -> int:
    """A random number that all ranks of a mesh have, drawn by the first of them from torch's own generator."""
    seed = torch.randint(2**62, (1,)).to(mesh.device_type)
    group = mesh.get_group()
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return int(seed)


def _device_type() -> str:
    """Where the default group's tensors are: on the accelerator, unless its backend is for the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type


def _shard_experts(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for own, parameter in list(module.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        module.register_parameter(own, nn.Parameter(sharded, parameter.requires_grad))
        box = box_of(tuple(parameter.shape), [Split(0, mesh.size(), mesh.get_local_rank())])
        module.here = range(box.offset[0], box.offset[0] + box.shape[0])  # type: ignore[assignment]


def _enter_experts(module: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """What each rank computes is a part, and so is the gradient that it has of the inputs: these are added up."""
    return tuple(
        DTensor.from_local(held, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        if held.requires_grad
        else held
        for held in inputs
    )


def _leave_experts(module: nn.Module, output: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
