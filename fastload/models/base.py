"""The base of all native models: construction, random weights, ties, and the questions one asks of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastload.dtypes import to_torch
from fastload.errors import ConfigError, IncompleteModelError, OptionError
from fastload.models.config import PreTrainedConfig
from fastload.models.initialisation import Rules, fill
from fastload.models.pretrained import PretrainedLoading
from fastload.models.resizing import resize_token_embeddings
from fastload.models.skeleton import is_building_skeleton
from fastload.options import parse_dtype

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PreTrainedModel"]

ATTENTIONS = ("sdpa", "eager")


class PreTrainedModel(PretrainedLoading, nn.Module):
    """Base of native models.

    A family sets the class attributes, builds its modules in ``__init__`` and ends it with ``post_init()``.

    Attributes:
        config_class: the family's config.
        base_model_prefix: attribute of a model with a head that holds the model without.
        _tied_weights_keys: fqn of a tied parameter -> fqn of the one it shares.
        _keys_to_ignore_on_load_missing, _keys_to_ignore_on_load_unexpected: patterns of keys not worth a word.
        _keep_in_fp32_modules: names of modules whose parameters are not converted to a shorter type.
        _no_split_modules: names of module classes that stay whole on one device.
        _initialisers: rules for the family's own parameters, beside those for torch's modules.
        _head_counts: last part of a module's name -> field of the config that counts the heads of its outputs.
        tp_size: among how many ranks the model is split.
    """

    config_class: ClassVar[type[PreTrainedConfig]] = PreTrainedConfig
    base_model_prefix: ClassVar[str] = ""
    _tied_weights_keys: ClassVar[Mapping[str, str] | None] = None
    _keys_to_ignore_on_load_missing: ClassVar[tuple[str, ...] | list[str] | None] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[tuple[str, ...] | list[str] | None] = None
    _keep_in_fp32_modules: ClassVar[tuple[str, ...] | list[str] | None] = None
    _no_split_modules: ClassVar[tuple[str, ...] | list[str] | None] = None
    _initialisers: ClassVar[Rules] = {}
    _head_counts: ClassVar[Mapping[str, str]] = {}
    main_input_name: ClassVar[str] = "input_ids"
    tp_size: int = 1
    _tp_plan_in_use: Mapping[str, str] | None = None
    _tp_mesh: Any = None

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                f"{type(self).__name__}(config) takes a config, not {type(config).__name__}; "
                f"{type(self).__name__}.from_pretrained(path) loads a checkpoint"
            )
        config.validate()
        if config.attn_implementation not in (None, *ATTENTIONS):
            raise OptionError(
                "unknown attention implementation",
                key="attn_implementation",
                expected=" or ".join(ATTENTIONS),
                found=repr(config.attn_implementation),
            )
        self.config = config
        self.name_or_path = config.name_or_path

    # Values of parameters

    def post_init(self) -> None:
        """End a constructor: random weights and ties. A skeleton gets no values, but is tied."""
        if is_building_skeleton():
            self.tie_weights()
            return
        own: list[nn.Module] = [self]
        for module in own:
            # A model inside this one has filled its own.
            own += (child for child in module.children() if not isinstance(child, PreTrainedModel))
        self._fill(own)
        self.tie_weights()

    def init_weights(self) -> None:
        """Fill all parameters anew."""
        self._fill(self.modules())
        self.tie_weights()

    def _fill(self, modules: Iterable[nn.Module]) -> None:
        std = self._initialisation_std
        filled: set[int] = set()
        for module in modules:
            # named_parameters() walks the tree below each module, a third of the time of building on meta.
            for name, parameter in module._parameters.items():
                # The first of two tied names counts: an embedding has a row of padding, the head has none.
                if parameter is not None and not parameter.is_meta and id(parameter) not in filled:
                    # A module that no rule knows keeps what its own constructor gave it.
                    fill(module, name, parameter, std, self._initialisers)
                    filled.add(id(parameter))

    def init_parameter(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Fill one parameter in place as a fresh model's: that which ``module``, a part of this model, calls ``name``.

        Raises:
            IncompleteModelError: no rule says how. A family that has such parameters lists them in ``_initialisers``.
        """
        if not fill(module, name, tensor, self._initialisation_std, self._initialisers):
            raise IncompleteModelError(
                "the checkpoint lacks a parameter that the model does not know how to initialise",
                key=f"{name} of a {type(module).__name__}",
                expected="a rule in the _initialisers of the model's class",
                fix="load a checkpoint that has the parameter, or add a rule",
            )

    @property
    def _initialisation_std(self) -> float:
        return float(getattr(self.config, "initializer_range", None) or 0.02)

    # Ties

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """fqn of a tied parameter -> fqn of the one it shares; empty where the config unties them."""
        if not getattr(self.config, "tie_word_embeddings", False):
            return {}
        return dict(self._tied_weights_keys or {})

    def tie_weights(self) -> None:
        """Make tied names hold one and the same Parameter."""
        for tied, source in self.all_tied_weights_keys.items():
            owner, _, name = tied.rpartition(".")
            setattr(self.get_submodule(owner), name, self.get_parameter(source))

    # Parts

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without its head; itself where it has none."""
        return cast(PreTrainedModel, getattr(self, self.base_model_prefix, self))

    @property
    def tp_plan(self) -> dict[str, str]:
        """Pattern of module names -> style: how this model is split over ranks (see ``plan.tensor_parallel``).

        The plan that it was loaded with, or else its family's own; empty where the family has none.
        """
        return dict(self._tp_plan_in_use if self._tp_plan_in_use is not None else self._family_tp_plan())

    def _family_tp_plan(self) -> dict[str, str]:
        """The plan of the model without its head, under the names that it has here. Heads add their own."""
        base, prefix = self.base_model, self.base_model_prefix
        return {} if base is self else {f"{prefix}.{name}": style for name, style in base._family_tp_plan().items()}

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        if self.base_model is self:
            raise NotImplementedError(f"{type(self).__name__} does not say which its token embeddings are")
        return self.base_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the embedding of tokens."""
        if self.base_model is self:
            raise NotImplementedError(f"{type(self).__name__} does not say which its token embeddings are")
        self.base_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that scores the vocabulary; None where there is none."""
        return None

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Exchange the layer that scores the vocabulary."""
        raise NotImplementedError(f"{type(self).__name__} does not score the vocabulary")

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the size of the vocabulary, of the embeddings and the head alike, in place.

        Args:
            new_num_tokens: size of the vocabulary; None keeps it (or only pads it).
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: new tokens begin at the mean of the old; otherwise at random as in a fresh model.

        Raises:
            OptionError: the model is split over ranks.
        """
        if self._tp_mesh is not None:
            raise OptionError(
                "the vocabulary of a model that is split over ranks cannot change", fix="resize and save it whole first"
            )
        return resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute layers again in the backward pass instead of keeping their activations.

        Args:
            gradient_checkpointing_kwargs: for torch.utils.checkpoint.checkpoint; ``use_reentrant`` is False by default.
        """
        self._set_gradient_checkpointing({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass."""
        self._set_gradient_checkpointing(None)

    def _set_gradient_checkpointing(self, options: dict[str, Any] | None) -> None:
        capable = [module for module in self.modules() if hasattr(module, "checkpointing")]
        if not capable:
            raise NotImplementedError(f"{type(self).__name__} has no gradient checkpointing")
        for module in capable:
            module.checkpointing = options  # type: ignore[assignment]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(getattr(module, "checkpointing", None) is not None for module in self.modules())

    # Questions

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating point parameter."""
        return next((held.dtype for held in self.parameters() if held.is_floating_point()), torch.get_default_dtype())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold, shared ones counted once."""
        left_out: set[int] = set()
        if exclude_embeddings:
            left_out = {id(held.weight) for held in self.modules() if isinstance(held, nn.Embedding)}
        return sum(
            held.numel()
            for held in self.parameters()
            if id(held) not in left_out and (held.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers unless ``return_buffers`` is False."""
        n_bytes = sum(held.nbytes for held in self.parameters())
        return n_bytes + sum(held.nbytes for held in self.buffers()) if return_buffers else n_bytes

    # Construction without weights

    @classmethod
    def _from_config(
        cls,
        config: PreTrainedConfig,
        *,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """A model with random weights, in ``dtype`` or else the config's, or else torch's default."""
        own = copy.deepcopy(config)
        if attn_implementation is not None:
            own.attn_implementation = attn_implementation
        wanted = parse_dtype(dtype)
        if wanted is not None:
            own.dtype = to_torch(wanted)
        if own.dtype is not None and not own.dtype.is_floating_point:
            raise ConfigError("weights are floating point numbers", key="dtype", found=own.dtype)
        model = cls(own)
        # Converted, not built so: the default dtype is a setting of the whole process, and of all its threads.
        return model if own.dtype is None else model._convert(own.dtype)

    def _convert(self, dtype: torch.dtype) -> Self:
        """Convert floating point parameters in place, but those of ``_keep_in_fp32_modules``."""
        kept = set(self._keep_in_fp32_modules or ()) if dtype in (torch.float16, torch.bfloat16) else set()
        for fqn, parameter in self.named_parameters():
            if parameter.is_floating_point() and not kept.intersection(fqn.split(".")):
                parameter.data = parameter.data.to(dtype)
        return self
