"""Options of benchmarks: the sampling settings of a model, unknown options, the table itself."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from open_unitok.cli.eval.run import add_arguments, given_options, load_model
from open_unitok.core.errors import UserError
from open_unitok.eval.core.generated_images import SAMPLING_KEYS, describe_sampling
from open_unitok.eval.core.open_answers import VQAV2_SCORERS
from open_unitok.eval.metrics.image_quality import SSIM_MODES
from open_unitok.eval.registry import BENCHMARKS, find_benchmark, select_options
from open_unitok.eval.understanding.pope import POPE_SCORERS
from open_unitok.generation import Sampling


def test_images_are_sampled_with_the_models_own_settings(tmp_path):
    def resolved(*flags):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        command = ["geneval", "--model", str(tmp_path), "--data", "d", "--out", "o", *flags]
        given, geneval = given_options(parser.parse_args(command)), find_benchmark("geneval")
        options = select_options(given, [geneval])
        model = load_model(str(tmp_path), "cpu", [geneval], given, options)
        settings, _ = geneval.resolve(options["geneval"])
        assert asdict(model.sampling) == {key: getattr(settings, key) for key in SAMPLING_KEYS}
        return settings

    (tmp_path / "config.json").write_text('{"model_type": "unitok_mllm"}')
    assert resolved() == find_benchmark("geneval").resolve({})[0]
    own = {"guidance": 2.5, "temperature": 0.25, "greedy": True, "guidance_schedule": "linear"}
    (tmp_path / "sampling.json").write_text(json.dumps(own))
    assert vars(resolved()) | own == vars(resolved())
    changed = vars(resolved("--no-greedy", "--guidance", "3"))
    assert changed == vars(resolved()) | {"greedy": False, "guidance": 3.0}
    assert describe_sampling(resolved()) == "guidance 2.5 (linear), greedy"


def test_an_option_that_no_chosen_benchmark_has_names_those_that_do():
    chosen = [find_benchmark("geneval"), find_benchmark("gqa")]
    assert select_options({"split": "x"}, chosen) == {"geneval": {}, "gqa": {"split": "x"}}
    chosen = [find_benchmark("pope"), find_benchmark("gqa")]
    with pytest.raises(UserError, match=r"--judge-runs is not an option of pope, gqa; it is one of mmvet\."):
        select_options({"judge_runs": 3}, chosen)
    with pytest.raises(UserError, match=r"--grid .* it is one of dpg_bench\."):
        select_options({"grid": 512}, chosen)
    with pytest.raises(UserError, match="judge_runs is 0; it must be at least 1"):
        find_benchmark("mmvet").resolve({"judge_runs": 0})
    with pytest.raises(UserError, match="pope has no option 'guidance'"):
        find_benchmark("pope").resolve({"guidance": 3.0})


def test_the_table_agrees_with_the_benchmarks():
    """Options of one name are one option; sampling defaults are those of `Sampling`; scorers are real."""
    known = {}
    for benchmark in BENCHMARKS.values():
        names = [option.name for option in benchmark.all_options]
        assert len(set(names)) == len(names)
        for option in benchmark.all_options:
            if option.name != "scorer":
                assert known.setdefault(option.name, option) == option
        code = benchmark.code
        assert callable(code.load) and callable(code.answer) and callable(code.score)
    assert {key: known[key].default for key in SAMPLING_KEYS} == asdict(Sampling())
    assert BENCHMARKS["vqav2"].scorers == VQAV2_SCORERS and BENCHMARKS["pope"].scorers == POPE_SCORERS
    assert set(BENCHMARKS["reconstruction"].scorers) == set(SSIM_MODES)


def test_commands_of_the_readme_parse():
    text = (Path(__file__).parents[3] / "eval" / "README.md").read_text()
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    fenced = "".join(blocks).replace("\\\n", " ")
    commands = [m[1].split("#")[0].split() for m in re.finditer(r"eval run ((?!NAME)[^\n]*)", fenced)]
    assert len(commands) > 5
    for words in commands:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(words)
        select_options(given_options(args), [find_benchmark(name) for name in args.names if name != "all"])
