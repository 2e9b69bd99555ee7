"""The commands of a row, in their order: every one resumes where it was killed and skips what is finished."""

import functools
from pathlib import Path
from typing import Any

from open_unitok.core.errors import UserError
from open_unitok.training.core.config import read_yaml

from .config import Study

# where the shipped configs read the data of a study
SHIPPED_DATA = {"tokenizers": "runs/study/emoji", "downstream": "runs/study/scenes"}
VALIDATION_SEED = 1_000_000  # random numbers of images by which a guidance scale is chosen
PROBED = ("quantised", "latents")  # what the LLaVA probe reads


@functools.cache
def row_config(config: str, *overrides: str) -> dict[str, Any]:
    """The plain dict of a run's YAML, read once: rows share it, so it is not to be changed."""
    return read_yaml(config, overrides)


def row_commands(study: Study, name: str, seed: int) -> list[list[str]]:
    """The arguments of `unitok` for each step of a row; the first ones train the row that it needs."""
    return _downstream(study, name, seed) if study.downstream else _tokenizers(study, name, seed)


def run_folder(study: Study, name: str, seed: int) -> Path:
    return Path(study.out, f"{name}-{seed}")


def train_command(study: Study, config: str, out: Path, seed: int, changes: dict[str, Any]) -> list[str]:
    """`train CONFIG` with the study's data, and what differs from the config."""
    shipped = SHIPPED_DATA["downstream" if study.downstream else "tokenizers"]
    moved = _moved(row_config(config, *study.overrides), shipped, study.data) if study.data != shipped else []
    given = [f"{key}={value}" for key, value in changes.items()]
    return ["train", config, f"out={out}", f"seed={seed}", *moved, *study.overrides, *given]


def _moved(value: Any, shipped: str, data: str, key: str = "") -> list[str]:
    """Overrides by which a config reads `data` wherever it names the shipped folder."""
    if isinstance(value, str):
        return [f"{key}={data}{value.removeprefix(shipped)}"] if value.startswith(f"{shipped}/") else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [o for k, v in items for o in _moved(v, shipped, data, f"{key}.{k}" if key else str(k))]


def _limit(study: Study) -> list[str]:
    return ["--limit", str(study.limit)] if study.limit else []


# ---- tokenizers on emoji -----------------------------------------------------------------------------------


def _tokenizers(study: Study, name: str, seed: int) -> list[list[str]]:
    row, run_dir, data = study.rows[name], run_folder(study, name, seed), Path(study.data)
    config = row_config(row.config or "", *study.overrides)
    discrete = config["model"].get("quantizer") != "none"
    reads_captions = config["losses"].get("clip", 1.0) > 0 and config["model"].get("embed_dim", 1) > 0
    pooling = ["--pooling", "quantised" if discrete else "latents"]
    commands = _train_tokenizer(study, name, seed)
    for split in study.splits:
        benchmarks = ["reconstruction", "emoji_reconstruction", *(["retrieval"] if reads_captions else [])]
        zeroshot = ["zeroshot"] if reads_captions else []
        labels = (("category", ["linear_probe", *zeroshot]), ("style", ["linear_probe"]))
        out, model = run_dir / "eval" / split, ["--model", f"{run_dir / 'model'}", *_limit(study)]
        commands.append(["eval", "run", *benchmarks, *model, "--data", f"{data / split}", "--out", f"{out}"])
        for label, names in labels:
            where = ["--data", f"{data / split / label}.json", "--out", f"{out / label}"]
            commands.append(["eval", "run", *names, *model, *where, *pooling])
    return commands


def _train_tokenizer(study: Study, name: str, seed: int) -> list[list[str]]:
    """The training of a row, behind that of the row that it starts from."""
    row, run_dir = study.rows[name], run_folder(study, name, seed)
    start = {"init_from": run_folder(study, row.after, seed) / "model"} if row.after else {}
    earlier = _train_tokenizer(study, row.after, seed) if row.after else []
    return [*earlier, train_command(study, row.config or "", run_dir, seed, start)]


# ---- what is trained on the codes of scenes ----------------------------------------------------------------


def _downstream(study: Study, name: str, seed: int) -> list[list[str]]:
    row, run_dir = study.rows[name], run_folder(study, name, seed)
    commands, owner = _codes(study, name, seed)
    tokenizer, codes = owner / "tokenizer" / "model", owner / "codes"
    if row.after is None:
        commands.append(_evaluate(study, ["reconstruction"], tokenizer, run_dir / "eval" / "tokenizer"))
    parts = {"classes": _classes, "probe": _probe, "joint": _joint}
    for part in row.parts:
        commands += parts[part](study, name, seed, run_dir, tokenizer, codes)
    return commands


def _codes(study: Study, name: str, seed: int) -> tuple[list[list[str]], Path]:
    """The tokenizer and the codes of the scenes, and the folder that holds both."""
    row, run_dir = study.rows[name], run_folder(study, name, seed)
    if row.after:
        return _codes(study, row.after, seed)
    commands, start = [], {}
    if row.first:
        commands.append(train_command(study, row.first, run_dir / "first", seed, {}))
        start = {"init_from": run_dir / "first" / "model"}
    commands.append(train_command(study, row.config or "", run_dir / "tokenizer", seed, start))
    model, features = run_dir / "tokenizer" / "model", ["--features", "latents"]
    commands.append([*_extract(study, "scenes", model, run_dir / "codes"), *features])
    return commands, run_dir


def _extract(study: Study, data: str, tokenizer: Path, out: Path) -> list[str]:
    tars = f"{Path(study.data, data, 'train')}/*.tar"
    return ["extract-codes", "--tokenizer", f"{tokenizer}", "--data", tars, "--out", f"{out}"]


def _evaluate(
    study: Study,
    names: list[str],
    model: Path,
    out: Path,
    more: list[str] | None = None,
    data: str = "scenes",
) -> list[str]:
    where = ["--model", f"{model}", "--data", f"{Path(study.data, data)}", "--out", f"{out}"]
    return ["eval", "run", *names, *where, *_limit(study), *(more or [])]


def _classes(
    study: Study, name: str, seed: int, run_dir: Path, tokenizer: Path, codes: Path
) -> list[list[str]]:
    """The class-conditional model; images without guidance, and by each scale, with two sets of seeds."""
    stages, own = study.downstream, run_dir / "class_codes"
    assert stages is not None
    out, config = run_dir / "classes", study.rows[name].classes or stages.classes
    _check_depth(study, name, config)
    changes = {"model.unitok": tokenizer, "data.mixture.0.path": own}
    commands = [
        _extract(study, "classes", tokenizer, own),
        train_command(study, config, out, seed, changes),
    ]
    for split, first, scales in (
        ("validation", VALIDATION_SEED, stages.guidance),
        ("test", 0, [1.0, *stages.guidance]),
    ):
        for scale in scales:
            options = ["--guidance", f"{scale:g}", "--seed", str(first)]
            options += ["--images-per-prompt", str(stages.images_per_class)]
            folder = classes_folder(run_dir, split, scale)
            commands.append(_evaluate(study, ["scene_classes"], out / "model", folder, options, "classes"))
    return commands


def _check_depth(study: Study, name: str, config: str) -> None:
    """Raise UserError where the class-conditional model does not fit the codes: before any training."""
    row = study.rows[name]
    while row.after:
        row = study.rows[row.after]
    codes = row_config(row.config or "", *study.overrides)["model"].get("num_codebooks")
    layers = row_config(config, *study.overrides)["model"].get("fields", {}).get("depth_layers")
    if codes is not None and layers is not None and (codes == 1) != (layers == 0):
        raise UserError(
            f"{config} has a depth head of {layers} layers, but the tokenizer {codes} codes per token: one "
            "code needs depth_layers 0, several need more (rows.NAME.classes is a row's own config)."
        )


def classes_folder(run_dir: Path, split: str, scale: float) -> Path:
    """Where the images of a guidance scale are evaluated."""
    return run_dir / "eval" / "classes" / f"{split}-{scale:g}"


def _probe(
    study: Study, name: str, seed: int, run_dir: Path, tokenizer: Path, codes: Path
) -> list[list[str]]:
    """LLaVA's two stages on quantised features and on latents."""
    stages = study.downstream
    assert stages is not None
    commands = []
    for source in PROBED:
        out = run_dir / f"probe_{source}"
        changes = {"model.unitok": tokenizer, "model.fields.features.source": source}
        changes["data.mixture.0.path"] = codes
        commands.append(train_command(study, stages.probe[0], out / "pretrain", seed, changes))
        changes = {"init_from": out / "pretrain" / "model", "data.mixture.0.path": codes}
        commands.append(train_command(study, stages.probe[1], out / "finetune", seed, changes))
        folder = run_dir / "eval" / f"probe_{source}"
        commands.append(_evaluate(study, ["vqav2"], out / "finetune" / "model", folder))
    return commands


def _joint(
    study: Study, name: str, seed: int, run_dir: Path, tokenizer: Path, codes: Path
) -> list[list[str]]:
    """The MLLM that reads and generates."""
    stages = study.downstream
    assert stages is not None
    config = study.rows[name].joint or stages.joint
    entries = row_config(config, *study.overrides)["data"]["mixture"]
    changes: dict[str, Any] = {"model.unitok": tokenizer}
    changes |= {f"data.mixture.{i}.path": codes for i in range(len(entries))}
    model, options = run_dir / "joint" / "model", [*stages.sampling]
    options += ["--images-per-prompt", str(stages.images_per_prompt)]
    reads = any(entry["kind"] != "text_to_image" for entry in entries)
    return [
        train_command(study, config, run_dir / "joint", seed, changes),
        *([_evaluate(study, ["vqav2"], model, run_dir / "eval" / "joint")] if reads else []),
        _evaluate(study, ["geneval"], model, run_dir / "eval" / "joint", options),
    ]
