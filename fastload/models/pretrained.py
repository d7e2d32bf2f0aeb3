"""from_pretrained and save_pretrained, for every native model."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from fastload.checkpoint import Checkpoint
from fastload.dtypes import to_torch
from fastload.errors import OptionError
from fastload.filling import fill_module, ranks_of_machine
from fastload.loader import parse_pinned_memory
from fastload.models.config import PreTrainedConfig
from fastload.models.config_file import find_config_file
from fastload.models.skeleton import skeleton
from fastload.models.splitting import device_on, mesh_asked_for, split
from fastload.options import Durability, FileOptions, HubOptions, LoadOptions, parse_dtype, reject_unknown
from fastload.pauses import paused_collector
from fastload.placement.device import Staging, begin_pinning
from fastload.placement.device_map import DeviceMapArgument, lay_out, named_devices
from fastload.plan.keys import KeyRules
from fastload.plan.slots import walk_modules
from fastload.plan.tensor_parallel import TensorParallelPlan
from fastload.reports import LoadReport, Stopwatch, collapse_keys
from fastload.sources.hub import pinned
from fastload.sources.resolve import locate_checkpoint
from fastload.sources.steady import read_steadily
from fastload.storage.devices import device_for
from fastload.streaming.arrivals import parse_memory_budget

if TYPE_CHECKING:
    from fastload.saver import SaveReport

__all__ = ["PretrainedLoading"]

_LOG = logging.getLogger("fastload")


class PretrainedLoading:
    """The mixin that gives an architecture its two verbs."""

    config: PreTrainedConfig
    config_class: ClassVar[type[PreTrainedConfig]]
    base_model_prefix: ClassVar[str] = ""
    _keys_to_ignore_on_load_missing: ClassVar[tuple[str, ...] | list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...] | list[str] | None] = None
    _tied_weights_keys: ClassVar[Mapping[str, str] | None] = None
    _keep_in_fp32_modules: ClassVar[tuple[str, ...] | list[str] | None] = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device_map: DeviceMapArgument = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        device_mesh: Any = None,
        tp_plan: str | TensorParallelPlan | None = None,
        key_mapping: Mapping[str, str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        strict: bool = False,
        variant: str | None = None,
        subfolder: str = "",
        use_safetensors: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        attn_implementation: str | None = None,
        detached: bool = False,
        lazy: bool = False,
        stream: bool = False,
        memory_budget: int | str | None = None,
        pinned_memory: int | str | None = None,
        dedup: str | None = None,
        verify: bool = False,
        **config_fields: Any,
    ) -> Any:
        """Build the model from its config and fill it with trained weights.

        The model is in eval mode. On the CPU, and where no conversion is asked for, its parameters are views of the
        mapped files: nothing is read until it is used, and writing to a parameter never changes the file.

        Args:
            path: a folder with config.json and weights, or the id of a repository on a model hub.
            model_args: further positional arguments of the model's constructor.
            config: the config to use instead of the folder's config.json, or the path of one.
            dtype: type of the floating point weights; "auto" for the config's, or else the files'. None for float32.
            torch_dtype: the older name of dtype.
            device_map: a device, a strategy ("auto", "balanced", "sequential"), or module name -> device.
            max_memory: device -> limit for the strategies, such as ``{"cpu": "4GB"}``.
            device_mesh: a DeviceMesh over whose ranks the model is split: of one dimension, or its dimension "tp"
                (ranks along the others have the same parts). Each rank reads and holds its own part.
            tp_plan: how it is split: "auto" for the model's own plan (see `tp_plan`), or module name pattern -> style
                (see ``plan.tensor_parallel``). Without a ``device_mesh``, over all ranks of the process group.
            key_mapping: regular expression -> replacement for the files' keys.
            ignore_mismatched_sizes: initialise parameters anew whose shape in the files differs.
            output_loading_info: return ``(model, info)``; info has missing_keys, unexpected_keys, mismatched_keys
                and error_msgs.
            strict: raise KeyMatchError on any missing, unexpected or mismatched key.
            variant: the ``fp16`` of ``model.fp16.safetensors``.
            subfolder: folder below the checkpoint's that holds config and weights.
            use_safetensors: True for safetensors only, False for .bin only, None for safetensors first.
            revision, token, cache_dir, local_files_only, force_download: how a hub is asked (see HubOptions).
            attn_implementation: "sdpa" or "eager".
            detached: copy what would stand on the mapped files, so that they may be rewritten in place (see `detach`).
            lazy: bring the weights of a block when it is first used (`fastload.wait` brings all).
            stream: return at once, and bring the weights in the background in the order of use.
            memory_budget: most bytes of weights to keep in memory, as a number, "4GB", or "auto" for what is free.
                What is beyond is read for each forward. ``device_map="auto", max_memory={"cpu": "4GB"}`` says so too.
            pinned_memory: most host memory that is pinned to load to a CUDA device, as a number or "512MB".
            dedup: "node" to have the ranks of a machine read cold files for each other (see `load_model`).
            verify: first compare all bytes of the weight files with their checksums (see `Checkpoint.verify`).
            config_fields: fields of the config to be set otherwise than in the file, and keywords of the model's own
                constructor.

        Raises:
            TypeError: a keyword that is neither an option nor a field of the config.
            FastloadError: see `fastload.errors`; nothing is left half loaded.
        """
        clock = Stopwatch()
        files = FileOptions(variant=variant, subfolder=subfolder, use_safetensors=use_safetensors)
        hub = HubOptions(
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        mesh = mesh_asked_for(
            device_mesh,
            tp_plan,
            {
                "device_map": device_map,
                "max_memory": max_memory,
                "lazy": lazy,
                "stream": stream,
                "memory_budget": memory_budget,
            },
        )
        device_map = device_map if mesh is None else device_on(mesh)
        model_options = {name: config_fields.pop(name) for name in cls._own_options() & config_fields.keys()}
        with paused_collector(), ranks_of_machine(LoadOptions(device_map=_one_device(device_map), dedup=dedup)) as node:
            opening = partial(cls._open, path, config, files, hub, config_fields, clock)
            config, checkpoint = read_steadily(path, opening, subfolder=subfolder)
            with clock("open"):
                if memory_budget is None and max_memory is None and mesh is None and node is None:
                    checkpoint.read_ahead()
                pinned_bytes = parse_pinned_memory(pinned_memory)
                begin_pinning(named_devices(device_map), lambda: checkpoint.n_bytes, Staging(device_for, pinned_bytes))
                config.dtype = _choose_dtype(dtype if torch_dtype is None else torch_dtype, config, checkpoint)
                config.attn_implementation = attn_implementation or config.attn_implementation
            if verify:
                with clock("verify"):
                    checkpoint.verify()
            with clock("skeleton"):
                with skeleton():
                    model: Any = cls(config, *model_args, **model_options)  # type: ignore[call-arg]
                if mesh is not None:
                    split(model, mesh, tp_plan)
                layout = lay_out(model, device_map, max_memory, config.dtype, memory_budget, ())
            options = LoadOptions(
                dtype=parse_dtype(config.dtype),
                device_map=layout.placed_on,
                is_dispatched=layout.is_dispatched,
                strict=strict,
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                key_mapping=key_mapping,
                detached=detached,
                lazy=lazy,
                stream=stream,
                memory_budget_bytes=parse_memory_budget(layout.memory_budget),
                pinned_bytes=pinned_bytes,
                dedup=dedup,
            )
            report = fill_module(
                model,
                checkpoint,
                options,
                source=os.fspath(path),
                clock=clock,
                rules=cls._key_rules(),
                initialise=model.init_parameter,
                node=node,
            )
            with clock("finish"):
                _set_eval(model)
        model.name_or_path = config.name_or_path = os.fspath(path)
        model._read_companions(path, files, pinned(hub, checkpoint.files[0]))
        if device_map is not None:
            model.hf_device_map = layout.devices
        _warn_of_keys(cls.__name__, report)
        return (model, _loading_info(report)) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        variant: str | None = None,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        durability: Durability = "full",
        incremental: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> SaveReport | None:
        """Write config.json and the weights, so that from_pretrained and transformers read them.

        The save is atomic: whatever happens in its course, the folder loads as it was before or as it is to be. The
        files that the model is mapped from may be overwritten.

        Args:
            save_directory: folder, made if need be.
            max_shard_size: most bytes of a shard, as a number or "5GB" (decimal) or "5GiB".
            safe_serialization: True for safetensors, False for .bin.
            variant: the ``fp16`` of ``model.fp16.safetensors``.
            state_dict: tensors to save in place of the model's own.
            is_main_process: False does nothing, for all ranks but one of a distributed program. With DTensors every
                rank has to call, and takes part whatever this is.
            durability: "none", "data" or "full": what of it shall outlive a power failure (see ``save_state_dict``).
            incremental: keep shards of the folder's earlier save that have the same tensors (see ``save_state_dict``).
            push_to_hub: upload what was written afterwards, in one commit.
            repo_id: the repository, made if need be; the folder's name otherwise.
            commit_message, private, token: for the hub.

        Returns:
            What was written; None if this is not the main process.
        """
        from fastload.distributed.detection import are_laid_out, is_first_rank
        from fastload.saver import save_checkpoint
        from fastload.saving import with_offloaded

        model: Any = self
        tensors = with_offloaded(model, model.state_dict() if state_dict is None else state_dict)
        is_together = are_laid_out(tensors.values())
        if not (is_main_process or is_together):
            return None
        self.config.architectures = [type(self).__name__]
        self.config.dtype = model.dtype
        report = save_checkpoint(
            tensors,
            save_directory,
            max_shard_size=max_shard_size,
            safe_serialization=safe_serialization,
            variant=variant,
            extra_files={"config.json": self.config.to_json_string(), **self._companions()},
            tied=self._tied_names(),
            in_files=self._as_in_files,
            durability=durability,
            incremental=incremental,
        )
        if push_to_hub and (not is_together or is_first_rank()):
            from fastload.sources.hub import upload

            upload(
                os.fspath(save_directory),
                (*report.files, *report.kept),
                repo_id or os.path.basename(os.path.abspath(save_directory)),
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
            )
        return report

    def _read_companions(self, path: str | os.PathLike[str], files: FileOptions, hub: HubOptions) -> None:
        """Read the files beside config.json that this kind of model has use for. Here it has none."""

    def _companions(self) -> dict[str, str]:
        """File name -> text of what is saved beside config.json."""
        return {}

    def _as_in_files(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A model's tensors under the names, and in the pieces, that checkpoints of the family have."""
        return tensors

    def _tied_names(self) -> dict[str, str]:
        """Names that hold the same parameter as another -> that other, as far as they are tied at this moment."""
        parameters = dict(cast(nn.Module, self).named_parameters(remove_duplicate=False))
        declared = self._tied_weights_keys or {}
        return {tied: kept for tied, kept in declared.items() if parameters.get(tied) is parameters.get(kept)}

    @classmethod
    def _own_options(cls) -> set[str]:
        """Keywords of the architecture's constructor beside the config, such as ``add_pooling_layer``."""
        return set(inspect.signature(cls.__init__).parameters) - {"self", "config"}

    @classmethod
    def _open(
        cls,
        path: str | os.PathLike[str],
        config: PreTrainedConfig | str | os.PathLike[str] | None,
        files: FileOptions,
        hub: HubOptions,
        config_fields: Mapping[str, Any],
        clock: Stopwatch,
    ) -> tuple[PreTrainedConfig, Checkpoint]:
        """The config and the opened weights, of one commit where they come from a hub."""
        with clock("resolve"):
            if not isinstance(config, PreTrainedConfig):
                config_file = find_config_file(path if config is None else config, subfolder=files.subfolder, hub=hub)
                if config is None:
                    hub = pinned(hub, config_file)
                config = config_file
            config = cls._read_config(config, config_fields)
            found = locate_checkpoint(path, files, hub)
        with clock("open"):
            return config, Checkpoint(found)

    @classmethod
    def _read_config(cls, config: PreTrainedConfig | str, fields: Mapping[str, Any]) -> PreTrainedConfig:
        """The config of a file, or a copy of the caller's, with some fields set otherwise. TypeError for no field."""
        if isinstance(config, str):
            read, unknown = cls.config_class.from_pretrained(config, return_unused_kwargs=True, **fields)
        else:
            unknown = {name: value for name, value in fields.items() if not config.has_field(name)}
            read = copy.deepcopy(config)
            for name, value in fields.items():
                setattr(read, name, value)
        reject_unknown(f"{cls.__name__}.from_pretrained", unknown)
        return read

    @classmethod
    def _key_rules(cls) -> KeyRules:
        return KeyRules(
            base_prefix=cls.base_model_prefix,
            ignore_missing=tuple(cls._keys_to_ignore_on_load_missing or ()),
            ignore_unexpected=tuple(cls._keys_to_ignore_on_load_unexpected or ()),
            keep_in_fp32=tuple(cls._keep_in_fp32_modules or ()),
        )


def _one_device(device_map: DeviceMapArgument) -> dict[str, str]:
    """The device map of LoadOptions where all goes to one device that is named; empty otherwise."""
    devices = named_devices(device_map)
    return {"": devices[0]} if len(devices) == 1 else {}


def _choose_dtype(dtype: str | torch.dtype | None, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The type to load in: asked for, or for "auto" the config's, or else that of the first floating point tensor."""
    if dtype != "auto":
        chosen = parse_dtype(dtype if dtype is not None else torch.get_default_dtype())
    else:
        dtypes = (checkpoint.spec(key).dtype for key in checkpoint)
        of_files = (dtype for dtype in dtypes if dtype.castable)
        chosen = parse_dtype(config.dtype) or next(of_files, None)
    if chosen is None:
        return torch.get_default_dtype()
    if not chosen.castable:
        raise OptionError(
            "models are loaded in floating point types only",
            key="dtype",
            expected="float32, float16, bfloat16 or float64",
            found=chosen.torch_name,
        )
    return to_torch(chosen)


def _set_eval(model: nn.Module) -> None:
    """``model.eval()``, which takes as long as placing the weights of a small model when it goes through `train`."""
    modules = list(walk_modules(model).values())
    if any(type(module).train is not nn.Module.train for module in modules):
        model.eval()
        return
    for module in modules:
        module.__dict__["training"] = False


def _loading_info(report: LoadReport) -> dict[str, Any]:
    return {
        "missing_keys": set(report.missing_keys),
        "unexpected_keys": set(report.unexpected_keys),
        "mismatched_keys": set(report.mismatched_keys),
        "error_msgs": [],
    }


def _warn_of_keys(name: str, report: LoadReport) -> None:
    """One warning for all that a user of the model should know about its keys."""
    lines = [f"  not in the files, initialised at random: {row}" for row in collapse_keys(report.initialised_keys)]
    lines += [f"  not in the model, left out: {row}" for row in collapse_keys(report.unexpected_keys)]
    if lines:
        _LOG.warning("%s from %s:\n%s", name, report.source, "\n".join(lines))
