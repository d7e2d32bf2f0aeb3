"""`generate` and `stream`, for models that predict the next token."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastload.errors import OptionError
from fastload.models.generation.decoding import Decoding, GenerateOutput
from fastload.models.generation.generation_config import GENERATION_CONFIG_NAME, GenerationConfig, read_beside
from fastload.models.generation.prompt import prepare_prompt
from fastload.models.generation.sampling import Rule, build_rules
from fastload.models.generation.settings import Settings
from fastload.models.generation.stopping import Criterion, build_criteria
from fastload.options import FileOptions, HubOptions

__all__ = ["GenerationMixin", "Streamer"]


class Streamer(Protocol):
    """Gets tokens as they come. transformers' streamers are such."""

    def put(self, value: Tensor, /) -> object:
        """The prompt [rows, tokens], then the tokens of each step [rows]; on the CPU."""

    def end(self) -> object:
        """There will be no more, whatever the reason."""


class GenerationMixin:
    """Gives a model with a head that predicts the next token its two verbs for texts.

    The model's forward takes ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values`` (a `KVCache`),
    ``use_cache`` and ``logits_to_keep``.
    """

    @property
    def generation_config(self) -> GenerationConfig:
        """How the model generates where a call does not say: from generation_config.json, or else config.json."""
        held: GenerationConfig | None = self.__dict__.get("_generation_config")
        if held is None:
            model: Any = self
            held = self.__dict__["_generation_config"] = GenerationConfig.from_model_config(model.config)
        return held

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.__dict__["_generation_config"] = config

    @classmethod
    def can_generate(cls) -> bool:
        """True: the model has `generate`."""
        return True

    def generate(
        self, input_ids: Tensor | None = None, *, streamer: Streamer | None = None, **options: Any
    ) -> Tensor | GenerateOutput:
        """Go on with texts, token by token.

        Args:
            input_ids: [texts, tokens], padded on the left; None for a text that begins with the token for that.
            streamer: gets the prompt and then each step's tokens, with ``put(tokens)`` and at last ``end()``.
            attention_mask: [texts, tokens], 0 for padding. Without one, the padding token is padding.
            generation_config: goes before the model's own ``generation_config``.
            generator: where samples come from; by default torch's own generator.
            seed: the same seed gives the same tokens for the same prompts. In place of ``generator``. Ranks that share
                a model give the same prompts and options; with neither of these two they agree on a seed.
            tokenizer: with ``decode``, for ``stop_strings``.
            logits_processor: rules of one's own, ``(tokens, scores) -> scores``, one or several.
            stopping_criteria: ``(tokens, scores) -> rows that end``, one or several.
            max_new_tokens: most tokens to add (by default 20, or ``max_length``).
            max_length: most tokens of a text, the prompt's included.
            min_new_tokens, min_length: fewest; until then no text ends by a token for that.
            max_time: seconds after which no further step is begun.
            stop_strings: texts that end a text.
            do_sample: draw tokens; otherwise each is the most likely one.
            temperature, top_k, top_p, min_p: what they are drawn from (by default the 50 most likely).
            repetition_penalty: above 1 against tokens that the text has already.
            num_return_sequences: texts to draw for each prompt.
            eos_token_id: one or several tokens that end a text.
            pad_token_id: fills rows that ended before others; by default the first that ends a text.
            bos_token_id: begins a text.
            return_dict_in_generate, output_scores, output_logits: return a `GenerateOutput`.

        Returns:
            Prompt and new tokens, [rows, tokens].

        Raises:
            OptionError: an unknown keyword, a value that cannot be, a prompt that is empty or too long.
        """
        decoding = self._begin(input_ids, **options)
        if streamer is not None:
            streamer.put(decoding.tokens.to("cpu", copy=True))
        try:
            for tokens in decoding.run():
                if streamer is not None:
                    streamer.put(tokens)
        finally:
            # Whoever waits for tokens in another thread is not left waiting by an error or a Ctrl-C.
            if streamer is not None:
                streamer.end()
        return decoding.result()

    def stream(self, input_ids: Tensor | None = None, **options: Any) -> Iterator[Tensor]:
        """The new tokens of each step, [rows] on the CPU, as they come. Options and errors as in `generate`.

        To stop early, leave the loop.
        """
        return self._begin(input_ids, **options).run()

    def _begin(
        self,
        input_ids: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: Any = None,
        logits_processor: Rule | Sequence[Rule] | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        **overrides: Any,
    ) -> Decoding:
        """Check everything, and lay out what the steps need."""
        model: Any = self
        settings = Settings.of(self.generation_config, generation_config, overrides)
        prompt = prepare_prompt(
            input_ids,
            attention_mask,
            settings,
            n_vocabulary=model.get_input_embeddings().num_embeddings,
            device=_device(model),
        )
        n_rows, n_prompt = prompt.tokens.shape
        extra = [logits_processor] if callable(logits_processor) else list(logits_processor or ())
        return Decoding(
            model,
            prompt,
            settings,
            limit=settings.length_limit(n_prompt, getattr(model.config, "max_position_embeddings", None)),
            rules=build_rules(settings, n_prompt, prompt.mask, extra),
            criteria=build_criteria(settings, n_rows, tokenizer, stopping_criteria),
            generator=_generator(generator, _seed_for(model, settings, generator, seed), prompt.tokens.device),
        )

    def _read_companions(self, path: str | os.PathLike[str], files: FileOptions, hub: HubOptions) -> None:
        config = read_beside(path, files, hub)
        if config is not None:
            self.generation_config = config

    def _companions(self) -> dict[str, str]:
        return {GENERATION_CONFIG_NAME: self.generation_config.to_json_string()}


def _device(model: Any) -> torch.device:
    """Where the model runs. Weights that have not arrived are nowhere, but computed buffers are there at once."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held if not tensor.is_meta), torch.device("cpu"))


def _seed_for(model: Any, settings: Settings, generator: torch.Generator | None, seed: int | None) -> int | None:
    """The seed of a call. All ranks over which a model is split have to go on with the same tokens."""
    mesh = model._tp_mesh
    if mesh is None:
        return seed
    if settings.max_time is not None:
        raise OptionError(
            "ranks that share a model have to end together, and each has a clock of its own",
            key="max_time",
            fix="give max_new_tokens instead",
        )
    if not settings.do_sample or generator is not None or seed is not None:
        return seed
    from fastload.distributed.parallel import agreed_seed

    return agreed_seed(mesh)


def _generator(given: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return given
    if given is not None:
        raise OptionError("both say where samples come from", key="seed", expected="generator= or seed=", found="both")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise OptionError("a seed is a whole number", key="seed", found=repr(seed))
    return torch.Generator(device).manual_seed(seed)
