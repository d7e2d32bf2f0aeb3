"""``PreTrainedModel.save_pretrained``, through fastload's saver.

What is in the files is what transformers would write: keys, ties, shards, config, generation config, custom code.
How it comes to the folder is fastload's: at one moment, whatever happens, and without leaving older weights behind.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, modeling_utils
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations import is_deepspeed_zero3_enabled

from fastload.distributed.detection import are_laid_out, is_first_rank
from fastload.errors import OptionError, SaveError
from fastload.hf.counting import count_save
from fastload.hf.versions import unsupported_reason
from fastload.options import Durability
from fastload.plan.sharding import parse_size
from fastload.saver import SaveReport, save_checkpoint

if TYPE_CHECKING:
    from fastload.hf.collecting import OverRanks

__all__ = ["save_pretrained"]

_LOG = logging.getLogger(__name__)
# The model whose own save_pretrained is at work, in this thread.
_BY_ITS_OWN: ContextVar[Any] = ContextVar("fastload_hf_saved_by_its_own", default=None)


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller of save_pretrained can ask."""

    is_main_process: bool = True
    state_dict: Mapping[str, torch.Tensor] | None = None
    push_to_hub: bool = False
    max_shard_size: int | str = "50GB"
    variant: str | None = None
    token: str | bool | None = None
    save_peft_format: bool = True
    save_original_format: bool = True
    distributed_checkpoint: bool = False
    safe_serialization: bool = True
    durability: Durability = "full"
    incremental: bool = False

    def given(self) -> dict[str, Any]:
        """Those that are not the default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {field.name: values[field.name] for field in fields(self) if values[field.name] is not field.default}


def save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    distributed_checkpoint: bool = False,
    safe_serialization: bool = True,
    *,
    durability: Durability = "full",
    incremental: bool = False,
    stock: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> SaveReport | None:
    """Save a transformers model: the checkpoint that its own ``save_pretrained`` writes, safely.

    Whatever happens meanwhile, the folder loads as the old checkpoint or as the new one; it may be the folder that the
    model is mapped from. Weights that are no part of the new checkpoint are removed: other shards, the other format, a
    stale index.

    Args:
        model: a PreTrainedModel, or a model with a ``save_pretrained`` of its own that saves one inside.
        save_directory: made if need be, with its parents.
        is_main_process: False on processes that are to write nothing. What is laid out over ranks all of them save
            together, whatever this is.
        state_dict: tensors to save in the place of the model's; left as it is.
        push_to_hub: upload afterwards; ``repo_id``, ``commit_message``, ``create_pr`` and what creates a repository
            may be given as well.
        max_shard_size: most bytes of a shard, as a number or as text: "5GB" is 5e9, "5GiB" 5 * 2**30.
        variant: the ``fp16`` of ``model.fp16.safetensors``.
        token: for the hub.
        save_peft_format: name adapters as peft does.
        save_original_format: undo the conversions of names and layout that the load made, so that the files are as
            those that the model came from.
        distributed_checkpoint: each process writes its part; left to transformers.
        safe_serialization: True for safetensors, False for ``.bin`` (which transformers 5 itself no longer writes).
        durability: "none", "data" or "full": what of it shall outlive a power failure (see ``save_state_dict``).
        incremental: keep shards of the folder's earlier save that have the same tensors (see ``save_state_dict``).
        stock: the ``save_pretrained`` of PreTrainedModel in whose place this is called, also by ``super()`` of a class
            with one of its own. Without it, such a class is asked to save itself.

    Returns:
        What was written; None where this process is to write nothing, and where transformers or the model's own
        ``save_pretrained`` did the work: adapters, quantised models, pipelines over processes (`stats` counts them,
        with the reason).

    Raises:
        OptionError: an argument cannot be meant, or the state dict holds what no checkpoint can.
        SaveError: tensors have no values, the folder is a file, or the operating system refused to write; whatever
            checkpoint was in the folder is still there.
    """
    options = Options(
        is_main_process,
        state_dict,
        push_to_hub,
        max_shard_size,
        variant,
        token,
        save_peft_format,
        save_original_format,
        distributed_checkpoint,
        safe_serialization,
        durability,
        incremental,
    )
    if stock is None:
        stock = inspect.unwrap(PreTrainedModel.save_pretrained)
        if inspect.unwrap(type(model).save_pretrained) is not stock and _BY_ITS_OWN.get() is not model:
            _save_by_its_own(model, save_directory, options, kwargs)
            return None
    reason, over_ranks = _reason_to_hand_over(model, options), None
    if not reason and _is_over_ranks(model, options):
        over_ranks, reason = _collected_over_ranks(model, options)
    if reason:
        count_save(reason)
        _hand_over(stock, model, save_directory, options, kwargs, reason)
        return None
    report = _save(model, os.fspath(save_directory), options, kwargs, over_ranks)
    if report is not None:
        count_save()
    return report


def _save_by_its_own(model: Any, folder: str | os.PathLike[str], options: Options, kwargs: Mapping[str, Any]) -> None:
    """Have a class that does more than PreTrainedModel do it; the PreTrainedModel inside comes back here."""
    from fastload.hf.switching import enabled

    token = _BY_ITS_OWN.set(model)
    try:
        with enabled():
            model.save_pretrained(folder, **options.given(), **kwargs)
    finally:
        _BY_ITS_OWN.reset(token)


def _reason_to_hand_over(model: Any, options: Options) -> str:
    """Why transformers should save this; "" where fastload does."""
    if reason := unsupported_reason():
        return reason
    if options.distributed_checkpoint:
        return "a distributed checkpoint"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "adapters"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        return f"quantizer {getattr(method, 'value', method)}"
    if options.state_dict is None and is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3"
    if modeling_utils.IS_SAGEMAKER_MP_POST_1_10:
        return "SageMaker model parallelism"
    if _is_over_ranks(model, options):
        return ""  # `_collected_over_ranks` says more
    tensors = options.state_dict.values() if options.state_dict is not None else model.parameters()
    wrapper = next((tensor for tensor in tensors if is_traceable_wrapper_subclass(tensor)), None)
    return f"tensors of {type(wrapper).__name__}" if wrapper is not None else ""


def _is_over_ranks(model: Any, options: Options) -> bool:
    """Whether a model is laid out over ranks, by transformers or by its user, and is itself to be saved."""
    if getattr(model.config, "distributed_config", None) or getattr(model, "_device_mesh", None):
        return True
    return options.state_dict is None and are_laid_out(model.parameters())


def _collected_over_ranks(model: Any, options: Options) -> tuple[OverRanks | None, str]:
    """What ranks save together, or why they cannot. All of them come to the same answer."""
    if getattr(model, "_pp_stage", None) is not None:
        return None, "pipeline parallelism"
    if options.state_dict is not None:
        return None, "a state dict for a model over a device mesh"
    if options.incremental or not options.safe_serialization:
        return None, "incremental, or a .bin, over ranks"
    if not are_laid_out(model.parameters()):
        return None, "a device mesh, and no parameter that is laid out over it"
    from fastload.distributed.parts import parts_of  # there is a DTensor, so that what it imports is there
    from fastload.hf.collecting import collect_over_ranks

    contents = collect_over_ranks(
        modeling_utils.unwrap_model(model),
        original_format=options.save_original_format,
        max_shard_bytes=parse_size(options.max_shard_size),
    )
    try:
        parts_of(contents.tensors, dict, contents.in_files)
    except (OptionError, RuntimeError, ValueError) as error:
        return None, f"a layout over ranks, or a conversion of it, that fastload does not know ({error})"
    return contents, ""


def _hand_over(
    stock: Callable[..., Any],
    model: Any,
    folder: str | os.PathLike[str],
    options: Options,
    kwargs: Mapping[str, Any],
    reason: str,
) -> None:
    given = options.given()
    if not given.pop("safe_serialization", True):
        _LOG.warning("%s is saved by transformers (%s), which writes no .bin: safetensors", folder, reason)
    if own := [name for name in ("durability", "incremental") if given.pop(name, None) is not None]:
        _LOG.warning("%s is saved by transformers (%s), which knows no %s", folder, reason, " and no ".join(own))
    stock(model, folder, **given, **kwargs)


def _save(
    model: Any, folder: str, options: Options, kwargs: Mapping[str, Any], over_ranks: OverRanks | None
) -> SaveReport | None:
    if os.path.isfile(folder):
        raise SaveError("a model is saved to a folder, and this is a file", file=folder, fix="give another path")
    inner: Any = modeling_utils.unwrap_model(model)
    inner.config.dtype = str(inner.dtype).removeprefix("torch.")
    inner.config.architectures = [type(inner).__name__.removeprefix("FSDP")]
    if over_ranks is None and not model.should_save_on_this_rank(options.is_main_process):
        os.makedirs(folder, exist_ok=True)
        return None
    is_uploading = options.push_to_hub and (over_ranks is None or is_first_rank())
    upload = _prepare_upload(model, folder, options.token, kwargs) if is_uploading else None
    small_files = _small_files(model, inner)
    if over_ranks is not None:
        report = _save_together(inner, over_ranks, folder, options, small_files)
    else:
        state_dict = inner.state_dict() if options.state_dict is None else options.state_dict
        report = _save_tensors(inner, state_dict, folder, options, small_files)
    if upload is not None:
        upload()
    return report


def _save_tensors(
    model: Any,
    state_dict: Mapping[str, torch.Tensor],
    folder: str,
    options: Options,
    small_files: Mapping[str, bytes],
) -> SaveReport:
    from fastload.hf.collecting import collect

    contents = collect(
        model,
        state_dict,
        original_format=options.save_original_format,
        max_shard_bytes=parse_size(options.max_shard_size),
    )
    return save_checkpoint(
        contents.tensors,
        folder,
        max_shard_size=options.max_shard_size,
        safe_serialization=options.safe_serialization,
        variant=options.variant,
        extra_files=small_files,
        # transformers writes no .bin that this would have to be like.
        shards=contents.shards if options.safe_serialization else None,
        n_parameters=model.num_parameters(),
        deferred=contents.offloaded,
        durability=options.durability,
        incremental=options.incremental,
    )


def _save_together(
    model: Any, contents: OverRanks, folder: str, options: Options, small_files: Mapping[str, bytes]
) -> SaveReport:
    return save_checkpoint(
        contents.tensors,
        folder,
        max_shard_size=options.max_shard_size,
        variant=options.variant,
        extra_files=small_files,
        shards=contents.shards,
        n_parameters=model.num_parameters(),
        in_files=contents.in_files,
        durability=options.durability,
    )


def _small_files(model: Any, inner: Any) -> dict[str, bytes]:
    """What transformers writes beside the weights: it does so to a folder of its own."""
    with TemporaryDirectory(prefix="fastload-") as scratch:
        if model.is_remote_code():
            custom_object_save(model, scratch, config=model.config)
        inner.config.save_pretrained(scratch)
        if model.can_generate():
            inner.generation_config.save_pretrained(scratch)
        files: dict[str, bytes] = {}
        for folder, _, names in os.walk(scratch):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    files[os.path.relpath(path, scratch)] = file.read()
        return files


def _prepare_upload(model: Any, folder: str, token: str | bool | None, kwargs: Mapping[str, Any]) -> Callable[[], None]:
    """Make the repository; what is returned uploads what was written to the folder since, and a model card."""
    from transformers.utils.hub import create_and_tag_model_card, hf_api

    options = dict(kwargs) if token is None else {**kwargs, "token": token}
    commit_message = options.pop("commit_message", None)
    create_pr = options.pop("create_pr", False)
    name = options.pop("repo_id", folder.split(os.path.sep)[-1])
    repo_id = hf_api().create_repo(name, exist_ok=True, **options).repo_id
    before = model._get_files_timestamps(folder) if os.path.isdir(folder) else {}

    def upload() -> None:
        card: Any = create_and_tag_model_card(repo_id, model.model_tags, token=options.get("token"))
        card.save(os.path.join(folder, "README.md"))
        model._upload_modified_files(
            folder, repo_id, before, commit_message=commit_message, token=options.get("token"), create_pr=create_pr
        )

    return upload
