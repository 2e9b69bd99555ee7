"""Studies and finished rows that are made up, so that tables, claims and pages need no training."""

import json

import numpy as np
import yaml
from PIL import Image

from open_unitok.study.jobs import settings_digest, study_jobs

ROWS = {
    "base": {"config": "configs/study/base.yaml", "title": "UniTok"},
    "ibq": {"config": "configs/study/quantizers/ibq.yaml", "title": "IBQ", "minutes": 70},
    "continuous": {"config": "configs/study/encoders/continuous.yaml", "title": "KL", "minutes": 60},
    "coda": {"config": "configs/study/encoders/coda.yaml", "title": "CODA", "after": "continuous"},
}
DOWNSTREAM = {
    "classes": "configs/study/downstream/classes.yaml",
    "probe": [f"configs/study/downstream/probe_{stage}.yaml" for stage in ("pretrain", "finetune")],
    "joint": "configs/study/downstream/joint.yaml",
    "guidance": [1.5, 3],
}
DOWNSTREAM_ROWS = {
    "k8": {"config": "configs/study/downstream/base.yaml", "title": "UniTok 8"},
    "k1": {
        "config": "configs/study/downstream/unitok_k1.yaml",
        "classes": "configs/study/downstream/classes_single.yaml",
        "title": "UniTok 1",
    },
    "dual": {
        "after": "k8",
        "parts": ["joint"],
        "joint": "configs/study/downstream/joint_dual.yaml",
        "title": "dual",
    },
}


def write_study(folder, **changes):
    """A YAML of four rows on emoji; with `downstream` one of three rows on scenes."""
    study = {
        "out": str(folder / "runs"),
        "data": str(folder / "data"),
        "results": str(folder / "results"),
        "baseline": "k8" if "downstream" in changes else "base",
        "splits": ["test" if "downstream" in changes else "pairs"],
        "rows": DOWNSTREAM_ROWS if "downstream" in changes else ROWS,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return str(path)


def write_result(study, row, seed, scores=None, columns=None, reasons=None, strip=True, **quality):
    """A finished row whose images have the given scores (column -> list); a column is their mean."""
    job = next(job for job in study_jobs(study) if (job.row, job.seed) == (row, seed))
    scores = {name: [round(float(v), 4) for v in values] for name, values in (scores or {}).items()}
    split = study.splits[0]
    result = {
        "row": row, "seed": seed, "settings": settings_digest(study, job), "limit": study.limit,
        "processor": "P",
        "columns": {"tokens": 16, "bits": 768.0, **(columns or {})},
        "splits": {split: {name: float(np.mean(v)) for name, v in scores.items()} | quality},
        "images": {split: scores}, "reasons": reasons or {}, "curve": [[1, 2.0], [2, 1.0]],
    }  # fmt: skip
    if study.downstream:
        result["guided"] = [[1.0, 0.5], [1.5, 0.6], [3.0, 0.55]]
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text(json.dumps(result))
    if strip:
        Image.new("RGB", (64, 8), "red").save(job.result.with_suffix(".webp"))
    return job
