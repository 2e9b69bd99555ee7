"""The stages of training, and the config of a run."""

import importlib
from pathlib import Path

from open_unitok.core.errors import UserError, did_you_mean

from .core import config as configs
from .core.options import RunConfig

# stage -> (module and class of its config, module of its loop); a config is read without importing torch
TRAINING_STAGES = {
    "tokenizer": ("tokenizer.config", "TokenizerRunConfig", "tokenizer.train"),
    "adapt": ("tokenizer.adapt_config", "AdaptRunConfig", "tokenizer.train"),
    "mllm": ("mllm.config", "MLLMRunConfig", "mllm.train"),
}
# conditioner of stage mllm -> module and class of its config, where that is not the stage's
CONDITIONERS = {"prompt": None, "class": ("mllm.class_config", "ClassRunConfig")}


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
    conditioner = raw.get("conditioner", "prompt")
    if stage == "mllm" and conditioner not in CONDITIONERS:
        raise UserError(
            f"{path}: conditioner is {conditioner!r}.{did_you_mean(str(conditioner), CONDITIONERS)}"
        )
    module, name = (CONDITIONERS[conditioner] if stage == "mllm" else None) or (module, name)
    cls = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    config = configs.build_config(cls, raw)
    if (Path(path).parent / "run.json").exists():
        _refuse_commands(config, path, overrides)
    return config


def _refuse_commands(config: RunConfig, path: str, overrides: list[str]) -> None:
    """Raises UserError if a run directory's config.yaml, which may be somebody else's, names a command."""
    sources = getattr(getattr(config, "data", None), "sources", [])
    paths = [p for s in sources for p in ([s.path] if isinstance(s.path, str) else s.path)]
    for command in (p for p in paths if p.startswith("pipe:")):
        if not any(command in override for override in overrides):
            raise UserError(
                f"{path} belongs to a run directory and names the command {command!r} as data: start from "
                "your own YAML, or write data.sources on the command line."
            )
