"""The stages of training, and the config of a run."""

import importlib

from open_unitok.core.errors import UserError, did_you_mean

from .core import config as configs
from .core.options import RunConfig

# stage -> (module and class of its config, module of its loop); a config is read without importing torch
TRAINING_STAGES = {
    "tokenizer": ("tokenizer.config", "TokenizerRunConfig", "tokenizer.train"),
    "mllm": ("mllm.config", "MLLMRunConfig", "mllm.train"),
}


def load_run_config(path: str, overrides: list[str]) -> RunConfig:
    """The validated config of a run.

    Raises:
        UserError: unknown stage or key, wrong type, impossible combination.
    """
    raw = configs.read_yaml(path, overrides)
    stage = raw.get("stage")
    if stage not in TRAINING_STAGES:
        hint = did_you_mean(str(stage), TRAINING_STAGES)
        raise UserError(f"{path}: stage is {stage!r}.{hint}")
    module, name, _ = TRAINING_STAGES[stage]
    cls = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return configs.build_config(cls, raw)
