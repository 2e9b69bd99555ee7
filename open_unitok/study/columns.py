"""The columns of the tables of a study."""

from typing import NamedTuple

from .config import Study


class Column(NamedTuple):
    """A column of a table; `places`: decimals after multiplying by `scale`; `better`: more, less or ""."""

    key: str
    title: str
    places: int = 1
    scale: float = 1.0
    better: str = "more"


class Table(NamedTuple):
    """Columns of one split, or of the model itself."""

    title: str
    split: str | None
    columns: tuple[Column, ...]


# of the model itself, then per split
MODEL_COLUMNS = (
    Column("tokens", "tokens", 0, better=""),
    Column("bits", "bits", 0, better=""),
    Column("parameters", "parameters without text tower, M", 2, better=""),
    Column("step_seconds", "s per step", 2, better="less"),
    Column("encode_ms", "encode, ms", 1, better="less"),
    Column("decode_ms", "decode, ms", 1, better="less"),
)
SPLIT_COLUMNS = (
    Column("psnr", "PSNR, dB", 2),
    Column("ssim", "SSIM", 3),
    Column("emoji", "nearest: emoji, %", 1, 100),
    Column("in_style", "and style, %", 1, 100),
    Column("frechet", "FD (EfficientNet-Lite0)", 1, better="less"),
    Column("usage", "entries used, %", 0, 100),
    Column("perplexity", "perplexity", 0, better=""),
    Column("agreement", "codes kept, %", 0, 100),
    Column("overlap", "codebook overlap, %", 1, 100, "less"),
    Column("retrieval", "R@1 of 100, %", 1, 100),
    Column("zeroshot_category", "zero-shot category, %", 1, 100),
    Column("probe_category", "probe category, %", 1, 100),
    Column("probe_style", "probe style, %", 1, 100),
)
QUALITY_COLUMNS = (Column("psnr", "PSNR, dB", 2), Column("ssim", "SSIM", 3))
CLASS_COLUMNS = (
    Column("classes_none", "no guidance, %", 1, 100),
    Column("classes_best", "best guidance, %", 1, 100),
    Column("guidance", "its scale", 1, better=""),
    Column("classes_ceiling", "ceiling, %", 1, 100),
)
PROBE_COLUMNS = (
    Column("probe_latents", "latents, %", 1, 100),
    Column("probe_quantised", "quantised, %", 1, 100),
)
JOINT_COLUMNS = (
    Column("vqa", "questions, %", 1, 100),
    Column("vqa_existence", "existence, %", 1, 100),
    Column("vqa_count", "count, %", 1, 100),
    Column("vqa_colour", "colour, %", 1, 100),
    Column("vqa_shape", "shape, %", 1, 100),
    Column("vqa_position", "position, %", 1, 100),
    Column("vqa_relation", "relation, %", 1, 100),
    Column("geneval", "GenEval-style, %", 1, 100),
    Column("geneval_ceiling", "ceiling, %", 1, 100),
)


def study_tables(study: Study) -> list[Table]:
    """The tables of a study, the most important first."""
    if study.downstream is None:
        own = [Table(f"On `{split}`", split, SPLIT_COLUMNS) for split in study.splits]
        return [*own, Table("Sizes and times", None, MODEL_COLUMNS)]
    split = study.splits[0]
    return [
        Table("Class-conditional generation", split, CLASS_COLUMNS),
        Table("LLaVA probe", split, PROBE_COLUMNS),
        Table("One model that reads and generates", split, JOINT_COLUMNS),
        Table("The tokenizers on scenes", split, QUALITY_COLUMNS),
        Table("Sizes and times of the tokenizers", None, MODEL_COLUMNS),
    ]


def known_columns(study: Study) -> dict[str, Column]:
    """Key -> column, of all tables of a study."""
    return {column.key: column for table in study_tables(study) for column in table.columns}
