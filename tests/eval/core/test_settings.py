"""Whose settings a benchmark draws with: those that are asked for, else the model's own."""

import argparse
import json
from dataclasses import asdict
from types import SimpleNamespace

from open_unitok.cli.eval.run import add_arguments, settings_of
from open_unitok.eval.core.harness import Settings
from open_unitok.eval.core.model import Model
from open_unitok.generation import Sampling


def test_drawings_are_made_as_the_model_says(tmp_path):
    def settings(*options):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        command = ["geneval", "--model", str(tmp_path), "--data", "d", "--out", "o", *options]
        return settings_of(parser.parse_args(command), str(tmp_path))

    assert settings() == Settings()
    own = {"guidance": 2.5, "temperature": 0.25, "greedy": True, "guidance_schedule": "linear"}
    (tmp_path / "sampling.json").write_text(json.dumps(own))
    assert settings() == Settings(**own)
    assert settings("--no-greedy", "--guidance", "3") == Settings(**own | {"greedy": False, "guidance": 3.0})
    assert settings().decoding == "guidance 2.5 (linear), greedy"
    assert asdict(Model.sampling.fget(SimpleNamespace(settings=settings()))) == asdict(Sampling(**own))
