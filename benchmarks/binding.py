"""What a small decoder needs to learn where the objects of an image stand: steps until 90 % of the held-out
questions of a kind are right, with one thing changed at a time (docs/experiments/binding.md).

    python benchmarks/binding.py --sweep base training [--seeds 0 1 2]        # only rows that are missing
    python benchmarks/binding.py --set positions=learned lr=0.01                # one run, not stored
    python benchmarks/binding.py --table

A scene has one to four of 24 objects (6 colours x 4 shapes) in the cells of a 2 x 2 grid; a tenth of the
arrangements is held out. Kinds of questions: "exist" (is there a red circle), "colour" (of the only circle),
"read" (the colour at a place), "row" and "column" (where the red circle is), "left_right" and "above_below"
(of two objects). Chance: 50 %, for "colour" and "read" 17 %. A cell is one visual token or 2 x 2; a token has
an id of its own per object (code "joint"), a colour's and a shape's vector ("factored"), or the eight codes
that the shipped tokenizer gives for a rendered image ("scenes").
"""

import argparse
import fcntl
import json
import statistics
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import binding_scenes as data
import torch
import torch.nn.functional as F
from binding_model import Decoder, Setting
from binding_scenes import ID, KINDS, Scenes, Texts
from harness import RESULTS, processor_name, read_results, write_results
from torch import nn

from open_unitok.core.errors import UserError
from open_unitok.training.core.deepspeed_engine import parameter_groups
from open_unitok.training.core.muon import Muon, muon_groups
from open_unitok.training.core.schedules import lr_multiplier

ENOUGH = 0.9  # a kind is learnt when this share of its held-out questions is answered
EVERY, QUESTIONS = 100, 256  # steps between evaluations; questions per kind
POOL = 20_000  # rendered scenes


LEARNED = {"positions": "learned"}
SHORT = {"steps": 1500, **LEARNED}
SLOW = {"lr": 2e-3, **SHORT}
# losses, weights and questions as in configs/scenes/finetune.yaml and its data
MIXTURE = {"captions": 0.18, "images": 0.42, "text": 5.0, "shares": (3.0, 1.0, 2.0, 0.5, 0.5, 1.5, 1.5)}
PLACES = {"captions": 0.1, "images": 0.2, "shares": (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)}
CONVERSATIONS = {"turns": 2, "filler": 4}
RENDERED = {"code": "scenes", "embedder": "projection", "tokens": 4, **CONVERSATIONS}
LIKE_SCENES = {**RENDERED, **MIXTURE}
# sweep -> what is changed; each row is a run per seed
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "base": [{}, LEARNED],
    "positions": [{**SHORT, "position_norm": 0.3}, {"positions": "sinusoidal", "steps": 1500}],
    "training": [
        *({**SHORT, "optimizer": "adamw", "lr": lr} for lr in (1e-3, 3e-3)),
        *({**SHORT, "lr": lr} for lr in (2e-3, 1e-2)), {"lr": 2e-3, "steps": 1500},
        {**SHORT, "schedule": "lin00"}, {**SHORT, "init": 0.02},
        {**SHORT, "optimizer": "adamw", "lr": 1e-3, "init": 0.02},
        *({**SLOW, "batch": batch} for batch in (16, 256)),
    ],
    "model": [
        *({**SLOW, "depth": depth} for depth in (2, 6, 8)), {**SLOW, "code": "factored"},
        {**SLOW, "rope_theta": 100.0}, {**SLOW, "bidirectional": True},
        {"lr": 2e-3, "steps": 1500, "bidirectional": True},
    ],
    "data": [
        *({**SLOW, **change} for change in ({"describe": True}, {"captions": 0.5}, {"one_object": 300})),
        *({**SLOW, **change} for change in ({"tokens": 4}, CONVERSATIONS, MIXTURE)),
    ],
    "rendered": [
        LIKE_SCENES, {**LIKE_SCENES, **LEARNED}, {**LIKE_SCENES, **PLACES, **LEARNED}, {**RENDERED, **SLOW},
    ],
}  # fmt: skip


# ---- training ----------------------------------------------------------------------------------------------


def train(setting: Setting, seed: int) -> dict[str, Any]:
    """Train until every kind is learnt or for `steps`: the first evaluation at which each kind is (None =
    never), its accuracy at all evaluations in %, and the last accuracy of places in captions and of codes."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    model, start = Decoder(setting), time.perf_counter()
    scenes = Source(setting)
    model.init_positions(scenes.sample(256, rng).codes)
    optimizer = build_optimizer(model, setting)
    exam = build_exam(setting, scenes)
    curves: dict[str, list[int]] = {kind: [] for kind in exam}
    learnt: dict[str, int | None] = dict.fromkeys(KINDS)
    step = 0
    while step < setting.steps and None in learnt.values():
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * lr_multiplier(setting.schedule, step, setting.steps, 50, end=0.02)
        loss = batch_loss(model, setting, scenes, step, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % EVERY == 0 or step == setting.steps:
            for kind, share in evaluate(model, exam).items():
                curves[kind].append(round(100 * share))
                if share >= ENOUGH and kind in learnt and learnt[kind] is None:
                    learnt[kind] = step
            now = " ".join(f"{kind} {curve[-1]}" for kind, curve in curves.items())
            print(f"{setting.name}, seed {seed}, step {step}: {now}", file=sys.stderr, flush=True)
    return {"learnt": learnt, "curves": curves, "steps": step, "seconds": round(time.perf_counter() - start)}


def build_optimizer(model: Decoder, setting: Setting) -> torch.optim.Optimizer:
    """As `unitok train` groups parameters; row and column vectors are embeddings."""
    groups = parameter_groups(model, 0.05)
    if setting.optimizer == "muon":
        return Muon(muon_groups(model, groups), lr=setting.lr, betas=(0.9, 0.95))
    return torch.optim.AdamW(groups, lr=setting.lr, betas=(0.9, 0.95))


class Source:
    """Scenes with codes: new symbolic ones, or some of a fixed number of rendered ones."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def sample(self, n: int, rng: torch.Generator, held_out: bool = False, most: int = data.CELLS) -> Scenes:
        if self.setting.code != "scenes":
            scenes = data.sample_scenes(n, rng, held_out, most)
            return scenes._replace(codes=data.symbols(scenes, self.setting.code, self.setting.tokens))
        pool = data.rendered_scenes(2_000 if held_out else POOL, held_out)
        allowed = (pool.count <= most).nonzero()[:, 0]
        return pool.take(allowed[torch.randint(len(allowed), (n,), generator=rng)])


def batch_loss(
    model: Decoder, setting: Setting, source: Source, step: int, rng: torch.Generator
) -> torch.Tensor:
    """The weighted loss of a batch: conversations, captions, and images to generate."""
    scenes = source.sample(setting.batch, rng, most=1 if step < setting.one_object else data.CELLS)
    images, captions = (round(share * setting.batch) for share in (setting.images, setting.captions))
    counts = [setting.batch - images - captions, captions, images]
    asked, captioned, generated = (scenes.take(rows) for rows in torch.arange(setting.batch).split(counts))
    loss, weights = torch.zeros(()), torch.zeros(())
    texts = [data.converse(asked, rng, setting.shares, setting.turns, setting.filler, setting.describe)]
    texts += [data.caption(captioned, rng)] if captions else []
    for text, read in zip(texts, (asked, captioned)):
        states = model.read(read.codes, text.ids)[text.learned]
        entropy = F.cross_entropy(model.lm_head(states), text.ids[text.learned], reduction="none")
        loss = loss + (entropy * (1 + (setting.answer - 1) * text.value[text.learned])).sum()
        weights = weights + len(entropy)
    loss = setting.text * loss / weights
    if images:
        logits = model.generate(data.caption(generated, rng).ids, generated.codes)
        loss = loss + setting.image * F.cross_entropy(logits.flatten(0, 2), generated.codes.flatten())
    return loss


def build_exam(setting: Setting, source: Source) -> dict[str, tuple[Scenes, Texts]]:
    """QUESTIONS held-out questions of each kind, the same for every run; captions for the other losses."""
    rng, exam = torch.Generator().manual_seed(99), {}
    for number, kind in enumerate(KINDS):
        scenes = source.sample(8 * QUESTIONS, rng, held_out=True)
        if (
            number >= data.ROW
        ):  # with two objects in every row and column, which ones are occupied says nothing
            scenes = scenes.take(scenes.count == data.CELLS)
        kinds = torch.full((len(scenes.count),), number)
        texts = data.ask(scenes, kinds, rng, setting.filler, setting.describe)
        rows = (texts.ids[:, 0] == ID[kind]).nonzero()[:QUESTIONS, 0]
        exam[kind] = scenes.take(rows), Texts(*(values[rows] for values in texts)).compact()
    for name in [name for name in ("captions", "images") if getattr(setting, name)]:
        scenes = source.sample(QUESTIONS, rng, held_out=True)
        exam[name] = scenes, data.caption(scenes, rng, placed=1.0)
    return exam


@torch.no_grad()
def evaluate(model: Decoder, exam: dict[str, tuple[Scenes, Texts]]) -> dict[str, float]:
    """Share of the questions whose answer, the description included, is the most probable; of the places in
    captions; of the codes of images."""
    found = {}
    for kind, (scenes, texts) in exam.items():
        if kind == "images":
            right = model.generate(texts.ids, scenes.codes).argmax(-1) == scenes.codes
            found[kind] = float(right.float().mean())
            continue
        wrong = (model.lm_head(model.read(scenes.codes, texts.ids)).argmax(-1) != texts.ids) & texts.value
        if kind == "captions":
            found[kind] = 1 - float(wrong.sum() / texts.value.sum())
        else:
            found[kind] = 1 - float(wrong.any(1).float().mean())
    return found


# ---- sweeps ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", nargs="+", choices=list(SWEEPS), default=[], help="rows to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set", nargs="*", metavar="KEY=VALUE", help="fields of Setting: one run, not stored"
    )
    parser.add_argument("--table", action="store_true", help="print the stored rows of --sweep, default all")
    parser.add_argument("--out", type=Path, default=RESULTS / "binding.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if args.set is not None:
        setting = parse_setting(args.set)
        for seed in args.seeds:
            print(setting.name, json.dumps(train(setting, seed)), flush=True)
    if args.table:
        print(table(read_results(args.out), args.sweep or list(SWEEPS)))
        return
    for changes in [changes for sweep in args.sweep for changes in SWEEPS[sweep]]:
        for seed in args.seeds:
            measure(replace(Setting(), **changes), seed, args.out)


def measure(setting: Setting, seed: int, out: Path) -> None:
    """Train one row unless the file has it."""
    key = f"{setting.name} | seed {seed}"
    if key in read_results(out):
        return
    row = {**train(setting, seed), "processor": processor_name()}
    print(key, json.dumps(row["learnt"]), f"{row['seconds']} s", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:  # another sweep may write at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_results(out, {**read_results(out), key: row})


def parse_setting(words: list[str]) -> Setting:
    """["lr=0.01", "shares=3/1/1/1/1/1/1"] -> a setting.

    Raises:
        UserError: an unknown field or a value of the wrong type.
    """
    types, changes = {field.name: type(field.default) for field in fields(Setting)}, {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in types:
            raise UserError(f"--set {word}: {name!r} is not one of {', '.join(types)}.")
        try:
            if types[name] is tuple:
                changes[name] = tuple(float(number) for number in value.split("/"))
            else:
                changes[name] = value == "True" if types[name] is bool else types[name](value)
        except ValueError:
            raise UserError(f"--set {word}: expected {types[name].__name__}.") from None
    return replace(Setting(), **changes)


def table(rows: dict[str, Any], sweeps: list[str]) -> str:
    """Markdown: for each setting the median step at which each kind was learnt, with the range over seeds."""
    lines = [("setting", "seeds", *KINDS), ("---",) * (len(KINDS) + 2)]
    for sweep in sweeps:
        for changes in SWEEPS[sweep]:
            name = replace(Setting(), **changes).name
            found = [row for key, row in rows.items() if key.rpartition(" | ")[0] == name]
            if found:
                lines.append((name, str(len(found)), *(cell(found, kind) for kind in KINDS)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(rows: list[dict[str, Any]], kind: str) -> str:
    """Median and range of steps; of runs that did not learn it, the best accuracy in %."""
    steps = sorted(row["learnt"][kind] for row in rows if row["learnt"][kind] is not None)
    best = sorted(max(row["curves"][kind]) for row in rows if row["learnt"][kind] is None)
    parts = [f"{statistics.median(steps):g}{spread(steps)}"] if steps else []
    if best:
        count = f"{len(best)}x " if len(rows) > 1 else ""
        parts.append(
            f"{count}never: {best[0]} %"
            if best[0] == best[-1]
            else f"{count}never: {best[0]} to {best[-1]} %"
        )
    return ", ".join(parts)


def spread(steps: list[int]) -> str:
    """The range of several steps in brackets."""
    return f" ({steps[0]} to {steps[-1]})" if steps[0] != steps[-1] else ""


if __name__ == "__main__":
    main()
