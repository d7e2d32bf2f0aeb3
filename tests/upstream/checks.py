"""transformers' own checks of loading and saving, for the small models of `families`.

Run by `python -m tests.upstream`; a plain pytest run does not find this file, which needs what the runner fetches.
"""

from __future__ import annotations

import inspect
import re
import unittest
from typing import Any

import transformers
from transformers_tests.test_modeling_common import ModelTesterMixin

from tests.upstream.families import BATCH, FAMILIES, IMAGE, LENGTH, Family, Inputs

# What a check does with files shows in its source. Checks of names alone cannot come out differently.
LOADS_OR_SAVES = re.compile(r"from_pretrained|save_pretrained|load_state_dict|_offload")
CHECKS = {name: check for name, check in vars(ModelTesterMixin).items() if name.startswith("test_") and callable(check)}


class SmallModel:
    """What the checks ask of a model's test file: sizes, and a config with inputs."""

    is_training = False
    batch_size, seq_length, image_size = BATCH, LENGTH, IMAGE

    def __init__(self, family: Family) -> None:
        self.family = family

    def get_config(self) -> transformers.PreTrainedConfig:
        return self.family.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, Inputs]:
        return self.family.config(), self.family.inputs()


def checks_of(family: Family) -> type[unittest.TestCase]:
    """A class with the checks that load or save; the others are switched off."""
    off = {name: None for name, check in CHECKS.items() if not LOADS_OR_SAVES.search(inspect.getsource(check))}
    given: dict[str, Any] = {
        "model_tester": SmallModel(family),
        "all_model_classes": family.model_classes(),
        "__module__": __name__,
    }
    return type(f"Test_{family.model_type}", (ModelTesterMixin, unittest.TestCase), off | given | family.traits)


globals().update({checks.__name__: checks for checks in map(checks_of, FAMILIES)})
