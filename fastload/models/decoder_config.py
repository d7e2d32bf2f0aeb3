"""The configs of decoders, with transformers' fields and defaults. Apart from the models: they need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fastload.errors import ConfigError
from fastload.models.config import PreTrainedConfig
from fastload.models.decoder_rope_fields import OLD_FIELDS, check_rope, layered_rope, standard_rope
from fastload.models.decoder_traits import TRAITS, Traits
from fastload.models.fields import Bounds

__all__ = [
    "DecoderConfig",
    "Gemma2Config",
    "Gemma3TextConfig",
    "GemmaConfig",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "attention_types",
    "has_experts",
    "head_size",
]

FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderConfig(PreTrainedConfig):
    """Base of all: the fields that every family has.

    Attributes:
        traits: what tells the family from others besides its fields.
        default_theta: base of the rotary position embeddings where a config has none.
    """

    traits: ClassVar[Traits] = Traits()
    default_theta: ClassVar[float] = 10_000.0
    attribute_map: ClassVar[Mapping[str, str]] = {"rope_scaling": "rope_parameters"}
    bounds: ClassVar[Mapping[str, Bounds]] = {
        "vocab_size": Bounds(1, 2**31),
        "hidden_size": Bounds(1, 2**20),
        "intermediate_size": Bounds(1, 2**24),
        "moe_intermediate_size": Bounds(1, 2**24),
        "num_hidden_layers": Bounds(0, 10_000),
        "num_attention_heads": Bounds(1, 2**20),
        "num_key_value_heads": Bounds(1, 2**20),
        "head_dim": Bounds(1, 2**20),
        "max_position_embeddings": Bounds(1, 2**31),
        "initializer_range": Bounds(0, 1e6),
        "rms_norm_eps": Bounds(0, 1e6),
        "attention_dropout": Bounds(0, 1),
        "sliding_window": Bounds(1, 2**31),
        "query_pre_attn_scalar": Bounds(1e-6, 2**31),
        "num_local_experts": Bounds(0, 2**16),
        "num_experts_per_tok": Bounds(1, 2**16),
        "decoder_sparse_step": Bounds(1, 2**31),
    }

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float | None = 0.0

    def __init__(self, /, **fields: Any) -> None:
        old = {name: fields.pop(name) for name in OLD_FIELDS if name in fields}
        super().__init__(**fields)
        self._complete()
        if getattr(self, "layer_types", None) is not None:
            # The first files that had this field spelt one so. A model that is cut short has the first layers.
            types = [FULL if name == "attention" else name for name in self.layer_types]
            self.update({"layer_types": types[: self.num_hidden_layers]})
        self._standardise_rope(old)
        self.check_fields()

    def _complete(self) -> None:
        """Set the fields that follow from others."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads

    def _standardise_rope(self, old: dict[str, Any]) -> None:
        """Bring the parameters of rotary position embeddings into one form; ``old`` are the fields of old spelling."""
        theta = old.get("rope_theta")
        self.rope_parameters = standard_rope(
            old.get("rope_scaling") or self.rope_parameters,
            theta=type(self).default_theta if theta is None else theta,
            partial=old.get("partial_rotary_factor"),
            layer_types=attention_types(self),
            n_positions=self.max_position_embeddings,
            n_trained=getattr(self, "original_max_position_embeddings", None),
        )

    def check_relations(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads and heads % kv_heads:
            raise _contradiction("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads)
        size = head_size(self)
        if self.hidden_size % heads and size == self.hidden_size // heads:
            raise _contradiction("hidden_size", f"a multiple of num_attention_heads = {heads}", self.hidden_size)
        if not size or size % 2:
            raise _contradiction("head_dim", "an even number, of which rotation makes pairs", size)
        pad, n_tokens = self.pad_token_id, self.vocab_size
        if pad is not None and not -n_tokens <= pad < n_tokens:
            raise _contradiction("pad_token_id", f"None, or less than vocab_size = {n_tokens}", pad)
        self._check_layer_types()
        # They may have been set since, in whatever spelling.
        self._standardise_rope({})
        check_rope(self.rope_parameters or {}, attention_types(self), size)

    def _check_layer_types(self) -> None:
        types = attention_types(self)
        if len(types) != self.num_hidden_layers:
            raise _contradiction("layer_types", f"num_hidden_layers = {self.num_hidden_layers} entries", len(types))
        unknown = [name for name in types if name not in (FULL, SLIDING)]
        if unknown:
            raise _contradiction("layer_types", f"{FULL} or {SLIDING}", repr(unknown[0]))
        if SLIDING in types and self.sliding_window is None:
            raise _contradiction("sliding_window", "a number of tokens for the layers of sliding attention", None)


def head_size(config: PreTrainedConfig) -> int:
    """Numbers of one head."""
    fields: Any = config
    size: int = getattr(config, "head_dim", None) or fields.hidden_size // fields.num_attention_heads
    return size


def attention_types(config: DecoderConfig) -> tuple[str, ...]:
    """For each layer "full_attention" or "sliding_attention"."""
    windows = type(config).traits.windows
    if windows == "typed":
        return tuple(config.layer_types)
    is_sliding = windows == "all" and config.sliding_window is not None
    return (SLIDING if is_sliding else FULL,) * config.num_hidden_layers


def has_experts(config: DecoderConfig, layer_idx: int) -> bool:
    """Whether the feed forward block of a layer is one of experts."""
    if type(config).traits.experts is None or not config.num_local_experts:
        return False
    is_dense = layer_idx in (getattr(config, "mlp_only_layers", None) or ())
    return not is_dense and (layer_idx + 1) % getattr(config, "decoder_sparse_step", 1) == 0


def _contradiction(key: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        "fields of the config contradict each other", key=key, expected=expected, found=found, fix="change one of them"
    )


class LlamaConfig(DecoderConfig):
    """Llama and what is built like it."""

    model_type: ClassVar[str] = "llama"
    traits: ClassVar[Traits] = TRAITS["llama"]

    hidden_act: str = "silu"
    pretraining_tp: int | None = 1
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None

    def _complete(self) -> None:
        super()._complete()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


class MistralConfig(DecoderConfig):
    """Mistral: Llama with a window over the tokens of all layers."""

    model_type: ClassVar[str] = "mistral"
    traits: ClassVar[Traits] = TRAITS["mistral"]

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def _complete(self) -> None:
        super()._complete()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads


class MixtralConfig(DecoderConfig):
    """Mixtral: Mistral with experts."""

    model_type: ClassVar[str] = "mixtral"
    traits: ClassVar[Traits] = TRAITS["mixtral"]
    default_theta: ClassVar[float] = 1_000_000.0
    attribute_map: ClassVar[Mapping[str, str]] = {**DecoderConfig.attribute_map, "num_experts": "num_local_experts"}

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096 * 32
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    def check_relations(self) -> None:
        super().check_relations()
        _check_experts(self.num_experts_per_tok, self.num_local_experts)


class Qwen2Config(DecoderConfig):
    """Qwen 2 and 2.5: biases of queries, keys and values, and layers that may have a window."""

    model_type: ClassVar[str] = "qwen2"
    traits: ClassVar[Traits] = TRAITS["qwen2"]

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def _complete(self) -> None:
        super()._complete()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            first = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
            self.layer_types = [SLIDING if index >= first else FULL for index in range(self.num_hidden_layers)]


class Qwen3Config(Qwen2Config):
    """Qwen 3: queries and keys are normalised."""

    model_type: ClassVar[str] = "qwen3"
    traits: ClassVar[Traits] = TRAITS["qwen3"]

    head_dim: int = 128
    attention_bias: bool = False


class Qwen3MoeConfig(DecoderConfig):
    """Qwen 3 with experts, in all layers or in some."""

    model_type: ClassVar[str] = "qwen3_moe"
    traits: ClassVar[Traits] = TRAITS["qwen3_moe"]
    attribute_map: ClassVar[Mapping[str, str]] = {**DecoderConfig.attribute_map, "num_experts": "num_local_experts"}

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_local_experts: int = 128
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def _complete(self) -> None:
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []

    def check_relations(self) -> None:
        super().check_relations()
        if self.num_local_experts:
            _check_experts(self.num_experts_per_tok, self.num_local_experts)


def _check_experts(n_chosen: int, n_experts: int) -> None:
    if not 1 <= n_chosen <= n_experts:
        raise _contradiction("num_experts_per_tok", f"1 to num_local_experts = {n_experts}", n_chosen)


class GemmaConfig(DecoderConfig):
    """Gemma, the first."""

    model_type: ClassVar[str] = "gemma"
    traits: ClassVar[Traits] = TRAITS["gemma"]

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    use_bidirectional_attention: bool | None = None

    def _complete(self) -> None:
        # The first files say gelu, and mean its tanh form.
        if self.hidden_act == "gelu":
            self.hidden_act = "gelu_pytorch_tanh"


class Gemma2Config(DecoderConfig):
    """Gemma 2: every second layer has a window; scores are bent."""

    model_type: ClassVar[str] = "gemma2"
    traits: ClassVar[Traits] = TRAITS["gemma2"]

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int | None = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    bos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None

    def _complete(self) -> None:
        self._alternate(2)

    def _alternate(self, pattern: int) -> None:
        """Layers of full attention at every so many, where nothing else is said."""
        if self.layer_types is None:
            numbers = range(1, self.num_hidden_layers + 1)
            self.layer_types = [SLIDING if number % pattern else FULL for number in numbers]


class Gemma3TextConfig(Gemma2Config):
    """Gemma 3 for text: every sixth layer sees all tokens, and has rotary embeddings of its own."""

    model_type: ClassVar[str] = "gemma3_text"
    traits: ClassVar[Traits] = TRAITS["gemma3_text"]
    default_theta: ClassVar[float] = 1_000_000.0
    default_local_theta: ClassVar[float] = 10_000.0

    vocab_size: int = 262_208
    max_position_embeddings: int = 131_072
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = False

    def _complete(self) -> None:
        if self.use_bidirectional_attention and self.sliding_window is not None:
            # Half of it to each side of a token.
            self.sliding_window = self.sliding_window // 2 + 1
        pattern = getattr(self, "sliding_window_pattern", 6)
        if not isinstance(pattern, int) or pattern < 1:
            raise _contradiction("sliding_window_pattern", "a number of layers", repr(pattern))
        # A field of older files, which is kept under this name in newer ones.
        self._sliding_window_pattern = pattern
        self._alternate(pattern)

    def _standardise_rope(self, old: dict[str, Any]) -> None:
        self.rope_parameters = layered_rope(
            self.rope_parameters,
            {FULL: old.get("rope_scaling")},
            {
                FULL: old.get("rope_theta") or type(self).default_theta,
                SLIDING: old.get("rope_local_base_freq") or type(self).default_local_theta,
            },
            n_positions=self.max_position_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if self.use_bidirectional_attention and self.sliding_window is not None:
            # What a file holds is the whole window.
            values["sliding_window"] = (self.sliding_window - 1) * 2
        return values
