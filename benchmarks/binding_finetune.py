"""How long the place vectors of a trained model must be: accuracy while configs/scenes/places.yaml trains, by
their share of the norm of the visual vectors (docs/experiments/binding.md).

    python benchmarks/binding_finetune.py --share 0.33 [--steps 600] [KEY=VALUE ...]
    python benchmarks/binding_finetune.py --table

It needs the data and the model that configs/scenes/places.yaml names; the run of the docs is that config with
schedule.kind=constant batch_size=32 'data.mixture=[{kind: conversation, path: runs/scenes/codes3}]'.

Questions are about 2,000 scenes beyond the 40,000 that the data has, with full names; position is asked about
two and three objects, and about four, where a model that ignores the named object is right in half the cases.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partialmethod
from typing import Any

import torch
from binding_scenes import encode_scenes
from harness import RESULTS, processor_name, read_results, write_results

from open_unitok.core.errors import UserError
from open_unitok.core.files import model_path
from open_unitok.core.text_files import read_json
from open_unitok.mllm.visual_embedder import VisualEmbedder
from open_unitok.training.core.deepspeed_engine import set_lr_multiplier
from open_unitok.training.core.run_dir import RunDir
from open_unitok.training.core.schedules import lr_multiplier
from open_unitok.training.data.collate import Batch, TrainingSample, collate
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.mllm.train import TrainState, build_train_state, train_step
from open_unitok.training.run import load_run_config
from open_unitok.training.scenes.dataset import as_turns, load_config
from open_unitok.training.scenes.questions import sample_question
from open_unitok.training.scenes.scene import sample_scene

CONFIG = "configs/scenes/places.yaml"
SCENES, QUESTIONS, EVERY, EVAL_BATCH = 2_000, 250, 25, 125
# name -> (kind of question, numbers of objects)
EVAL_SETS = {
    "existence": ("existence", (1, 2, 3, 4)),
    "position, 2 or 3": ("position", (2, 3)),
    "position, 4": ("position", (4,)),
    "relation": ("relation", (2, 3, 4)),
}
ROWS_FILE = RESULTS / "binding_finetune.json"


def run(share: float, overrides: list[str], steps: int) -> dict[str, Any]:
    """Fine-tune for `steps`; accuracies in % at every evaluation."""
    VisualEmbedder.with_positions = partialmethod(VisualEmbedder.with_positions, norm_ratio=share)
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config(CONFIG, [f"out={folder}/run", "checkpoint.every=100000", *overrides])
        base = read_json(model_path(str(config.init_from)) / "config.json")
        if base.get("visual_positions", "none") != "none":
            raise UserError(f"{config.init_from} has position vectors already: --share would have no effect.")
        state = build_train_state(config, RunDir.open(config))
        eval_sets, start = build_eval_sets(state), time.perf_counter()
        curves: dict[str, list[float]] = {name: [] for name in eval_sets}
        state.parts.model.train()
        for step in range(steps + 1):
            if step % EVERY == 0 or step == steps:
                for name, batches in eval_sets.items():
                    curves[name].append(round(100 * accuracy(state.parts.model, batches), 1))
                now = ", ".join(f"{name} {curve[-1]}" for name, curve in curves.items())
                print(f"share {share}, step {step}: {now}", file=sys.stderr, flush=True)
            if step == steps:
                break
            schedule = config.schedule
            ends = schedule.warmup, schedule.start, schedule.end
            set_lr_multiplier(state.engine, lr_multiplier(schedule.kind, step, config.steps, *ends))
            train_step(state, config, state.mixture.next(), step)
    seconds = round(time.perf_counter() - start)
    return {"share": share, "overrides": overrides, "seconds": seconds, "curves": curves}


def build_eval_sets(state: TrainState) -> dict[str, list[Batch]]:
    """Batches of one question each about scenes that are not in training."""
    processor, sizes = state.parts.processor, state.parts.model.config
    config = load_config("configs/scenes/scenes.yaml")
    assert processor is not None
    build = SequenceBuilder(processor, max_length=256).build
    scenes = [sample_scene(config, "train", config.train + config.text_lines + i) for i in range(SCENES)]
    rng, eval_sets = random.Random(0), {}
    for name, (kind, numbers) in EVAL_SETS.items():
        some = [scene for scene in scenes if len(scene.objects) in numbers]
        asked = [(scene, sample_question(scene, config, rng, kind, config.class_pairs)) for scene in some]
        asked = [(scene, question) for scene, question in asked if question][:QUESTIONS]
        samples = []
        for codes, (_, question) in zip(encode_scenes([scene for scene, _ in asked]).numpy(), asked):
            sequence = build("conversation", json.dumps(as_turns([question])), (len(codes),))
            samples.append(TrainingSample("conversation", sequence, (codes,)))
        eval_sets[name] = [
            collate(samples[i : i + EVAL_BATCH], sizes.image_token_id, sizes.pad_token_id)
            for i in range(0, len(samples), EVAL_BATCH)
        ]
    return eval_sets


@torch.no_grad()
def accuracy(model: Any, batches: list[Batch]) -> float:
    """The share of the answers whose every token is the most probable one."""
    right = []
    model.eval()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch.inputs, return_logits=True).logits
        labels = batch.inputs["labels"]
        assert labels is not None
        right.append(((logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] < 0)).all(1))
    model.train()
    return torch.cat(right).float().mean().item()


def table(rows: dict[str, Any]) -> str:
    """Markdown: accuracies in % by share and step."""
    steps = [0, 50, 100, 150, 200, 250, 300, 400, 500, 600]
    lines = [("share of the norm", "questions", *map(str, steps)), ("---",) * (len(steps) + 2)]
    for row in rows.values():
        for name, curve in row["curves"].items():
            cells = [f"{curve[s // EVERY]:.0f}" if s // EVERY < len(curve) else "" for s in steps]
            lines.append((f"{row['share']:g}", name, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=1 / 3, help="place vectors' norm per visual norm")
    parser.add_argument(
        "--steps", type=int, default=300, help="steps to train, of the schedule of the config"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the stored rows")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the config")
    args = parser.parse_args()
    if not args.table:
        row = run(args.share, args.overrides, args.steps)
        rows = {**read_results(ROWS_FILE), f"{args.share:.3g}": {**row, "processor": processor_name()}}
        write_results(ROWS_FILE, rows)
    print(table(read_results(ROWS_FILE)))


if __name__ == "__main__":
    main()
