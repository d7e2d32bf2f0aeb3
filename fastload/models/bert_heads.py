"""BERT with a head for each task, with the arguments and the output fields that transformers has."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastload.models.bert import BertConfig, BertModel, BertPreTrainedModel
from fastload.models.initialisation import Rules, zeros
from fastload.models.layers import activation, causal_lm_loss, classification_loss
from fastload.models.outputs import (
    BertForPreTrainingOutput,
    CausalLMOutputWithCrossAttentions,
    KeyValues,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
]

_LOG = logging.getLogger("fastload")


class BertPredictionHeadTransform(nn.Module):
    """The layer between the hidden states and the scores of the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        transformed: Tensor = self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))
        return transformed


class BertLMPredictionHead(nn.Module):
    """Scores of the vocabulary. The decoder's bias is in checkpoints under two names, which are tied."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores: Tensor = self.decoder(self.transform(hidden_states))
        return scores


class BertHeads(nn.Module):
    """The heads BERT was trained with: masked tokens, and whether one sentence follows the other."""

    def __init__(self, config: BertConfig, *, predictions: bool, seq_relationship: bool) -> None:
        super().__init__()
        if predictions:
            self.predictions = BertLMPredictionHead(config)
        if seq_relationship:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertWithVocabularyHead(BertPreTrainedModel):
    """Base of those that score the vocabulary."""

    cls: BertHeads
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _initialisers: ClassVar[Rules] = {BertLMPredictionHead: {"bias": zeros}}

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias


class BertForPreTraining(BertWithVocabularyHead):
    """Masked tokens and next sentences, as BERT was trained."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=True, seq_relationship=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. A loss where both are given: ``labels`` (batch, tokens), -100 for those that do not
        count, and ``next_sentence_label`` (batch), 1 for a second sentence that does not follow the first."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, return_dict=True, **outputs_asked)
        scores = self.cls.predictions(encoded.last_hidden_state)
        relationship = self.cls.seq_relationship(encoded.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
            loss = loss + F.cross_entropy(relationship, next_sentence_label.flatten())
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=scores,
            seq_relationship_logits=relationship,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._as_asked(output, return_dict)


class BertLMHeadModel(BertWithVocabularyHead):
    """A decoder that predicts the next token; its config has ``is_decoder=True``."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if not config.is_decoder:
            _LOG.warning("BertLMHeadModel without is_decoder=True: every token sees those that come after it")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, predictions=True, seq_relationship=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: KeyValues | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``.

        Args:
            labels: (batch, tokens), the same as the tokens: each is predicted from those before it. -100 for those
                that do not count.
            logits_to_keep: score only the last so many tokens, or those with these numbers; 0 for all.
        """
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
            False if labels is not None else use_cache,
            return_dict=True,
            **outputs_asked,
        )
        states = encoded.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        elif logits_to_keep:
            states = states[:, -logits_to_keep:]
        logits = self.cls.predictions(states)
        output = CausalLMOutputWithCrossAttentions(
            loss=None if labels is None else causal_lm_loss(logits, labels),
            logits=logits,
            past_key_values=encoded.past_key_values,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            cross_attentions=encoded.cross_attentions,
        )
        return self._as_asked(output, return_dict)


class BertForMaskedLM(BertWithVocabularyHead):
    """Predicts masked tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        if config.is_decoder:
            _LOG.warning("BertForMaskedLM with is_decoder=True: no token sees those that come after it")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertHeads(config, predictions=True, seq_relationship=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. ``labels`` are (batch, tokens), -100 for those that do not count."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        other = encoder_hidden_states, encoder_attention_mask
        encoded = self.bert(*inputs, *other, return_dict=True, **outputs_asked)
        logits = self.cls.predictions(encoded.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._as_asked(_output(MaskedLMOutput, loss, logits, encoded), return_dict)


class BertForNextSentencePrediction(BertPreTrainedModel):
    """Predicts whether the second sentence follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertHeads(config, predictions=False, seq_relationship=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. ``labels`` are (batch), 1 for a second sentence that does not follow the first."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, return_dict=True, **outputs_asked)
        logits = self.cls.seq_relationship(encoded.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels.flatten())
        return self._as_asked(_output(NextSentencePredictorOutput, loss, logits, encoded), return_dict)


class BertWithClassifier(BertPreTrainedModel):
    """Base of those with a linear layer after dropout."""

    def __init__(self, config: BertConfig, *, n_scores: int, pooled: bool) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=pooled)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, n_scores)
        self.post_init()


class BertForSequenceClassification(BertWithClassifier):
    """Scores or classifies a whole text."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, n_scores=config.num_labels, pooled=True)
        self.num_labels = config.num_labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``, and ``layers.classification_loss`` for ``labels``."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, return_dict=True, **outputs_asked)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        return self._as_asked(_output(SequenceClassifierOutput, loss, logits, encoded), return_dict)


class BertForMultipleChoice(BertWithClassifier):
    """Chooses one of several texts: all inputs are (batch, choices, tokens...)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, n_scores=1, pooled=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. ``labels`` are (batch): the number of the right choice."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        flat = (None if held is None else held.flatten(0, 1) for held in inputs)
        encoded = self.bert(*flat, return_dict=True, **outputs_asked)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(-1, given.shape[1])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self._as_asked(_output(MultipleChoiceModelOutput, loss, logits, encoded), return_dict)


class BertForTokenClassification(BertWithClassifier):
    """Classifies every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, n_scores=config.num_labels, pooled=False)
        self.num_labels = config.num_labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. ``labels`` are (batch, tokens), -100 for those that do not count."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, return_dict=True, **outputs_asked)
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return self._as_asked(_output(TokenClassifierOutput, loss, logits, encoded), return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """Finds the first and last token of an answer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.num_labels = config.num_labels
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **outputs_asked: bool | None,
    ) -> Any:
        """See ``BertModel``. A loss where both are given: ``start_positions`` and ``end_positions`` (batch), numbers
        of tokens; those beyond the text do not count."""
        inputs = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        encoded = self.bert(*inputs, return_dict=True, **outputs_asked)
        starts, ends = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
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
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._as_asked(output, return_dict)


def _output(kind: type[ModelOutput], loss: Tensor | None, logits: Tensor, encoded: ModelOutput) -> ModelOutput:
    return kind(loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
