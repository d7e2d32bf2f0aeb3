"""Decoders with a head for each task, with the arguments and the output fields that transformers has."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastload.models.cache import KVCache
from fastload.models.decoder import DecoderModel, DecoderPreTrainedModel
from fastload.models.decoder_config import DecoderConfig
from fastload.models.decoder_outputs import (
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from fastload.models.experts import balance_loss
from fastload.models.generation.mixin import GenerationMixin
from fastload.models.layers import causal_lm_loss, classification_loss
from fastload.models.outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

__all__ = [
    "DecoderForCausalLM",
    "DecoderForQuestionAnswering",
    "DecoderForSequenceClassification",
    "DecoderForTokenClassification",
    "DecoderHead",
]


class DecoderHead(DecoderPreTrainedModel):
    """Base of those with a head.

    Attributes:
        base_class: the family's model without a head.
    """

    base_class: ClassVar[type[DecoderModel]] = DecoderModel

    @property
    def _decoder(self) -> DecoderModel:
        decoder: DecoderModel = getattr(self, self.base_model_prefix)
        return decoder

    def _build_decoder(self, config: DecoderConfig) -> None:
        setattr(self, self.base_model_prefix, self.base_class(config))


class DecoderForCausalLM(GenerationMixin, DecoderHead):
    """Predicts the next token."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self._build_decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _family_tp_plan(self) -> dict[str, str]:
        return {**super()._family_tp_plan(), "lm_head": "colwise_gather_output"}

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_router_logits: bool | None = None,
    ) -> Any:
        """See ``DecoderModel``.

        Args:
            labels: (batch, tokens), the same as the tokens: each is predicted from those before it. -100 for those
                that do not count.
            logits_to_keep: score only the last so many tokens, or those with these numbers; 0 for all.
        """
        decoded = self._decoder(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            True,
            output_router_logits=output_router_logits,
        )
        states = decoded.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits = self._capped(self.lm_head(states))
        fields = {**decoded, "logits": logits, "loss": None if labels is None else causal_lm_loss(logits, labels)}
        del fields["last_hidden_state"]
        if type(self.config).traits.experts is None:
            return self._as_asked(CausalLMOutputWithPast(fields), return_dict)
        if decoded.router_logits:
            config = self.config
            fields["aux_loss"] = balance_loss(decoded.router_logits, config.num_experts_per_tok, attention_mask)
            if labels is not None:
                fields["loss"] = fields["loss"] + config.router_aux_loss_coef * fields["aux_loss"]
        return self._as_asked(MoeCausalLMOutputWithPast(fields), return_dict)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping if type(self.config).traits.capped_logits else None
        return logits if cap is None else (logits / cap).tanh() * cap


class DecoderForSequenceClassification(DecoderHead):
    """Scores or classifies a whole text, by its last token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._build_decoder(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See ``DecoderModel``, and ``layers.classification_loss`` for ``labels``.

        Raises:
            ValueError: several texts, and the config names no padding token by which to find their ends.
        """
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        decoded = self._decoder(*inputs, use_cache, output_hidden_states, output_attentions, True)
        states = decoded.last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        logits = self.score(states[rows, self._ends(input_ids, len(states))])
        fields = {**decoded, "logits": logits}
        for name in ("last_hidden_state", "router_logits"):
            fields.pop(name, None)
        if labels is not None:
            fields["loss"] = classification_loss(logits, labels.to(logits.device), self.config.problem_type)
        return self._as_asked(SequenceClassifierOutputWithPast(fields), return_dict)

    def _ends(self, input_ids: Tensor | None, n_texts: int) -> Tensor | int:
        """Where each text has its last token that is no padding, whichever side is padded."""
        padding = self.config.pad_token_id
        if padding is None and n_texts > 1:
            raise ValueError("the config has no pad_token_id, by which the ends of several texts are found; set one")
        if padding is None or input_ids is None:
            return -1
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((input_ids != padding) * numbers).argmax(dim=-1)


class DecoderForTokenClassification(DecoderHead):
    """Classifies every token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self._build_decoder(config)
        dropouts = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((held for held in dropouts if held is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See ``DecoderModel``. ``labels`` are (batch, tokens), -100 for those that do not count."""
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        decoded = self._decoder(*inputs, use_cache, output_hidden_states, output_attentions, True)
        logits = self.score(self.dropout(decoded.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=decoded.hidden_states, attentions=decoded.attentions
        )
        return self._as_asked(output, return_dict)


class DecoderForQuestionAnswering(DecoderHead):
    """Finds the first and last token of an answer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self._build_decoder(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """See ``DecoderModel``. A loss where both are given: ``start_positions`` and ``end_positions`` (batch), numbers
        of tokens; those beyond the text do not count."""
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds
        decoded = self._decoder(*inputs, use_cache, output_hidden_states, output_attentions, True)
        starts, ends = self.qa_outputs(decoded.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            beyond = starts.shape[1]
            loss = sum(
                F.cross_entropy(logits, positions.flatten().clamp(0, beyond), ignore_index=beyond) / 2
                for logits, positions in ((starts, start_positions), (ends, end_positions))
            )
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=starts.contiguous(),
            end_logits=ends.contiguous(),
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )
        return self._as_asked(output, return_dict)
