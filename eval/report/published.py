"""Published numbers for comparison: {benchmark: {metric: {model: value}}}, in the unit of our metric.

UniTok's paper first (arXiv 2502.20321), then other unified models and tokenizers, as reported in their papers
or READMEs. Splits and prompt templates as in eval/README.md; VQAv2 is test-dev, which only the challenge
server scores. UniTok's GenEval is from another group's list; its FID on MJHQ-30K is left out: neither its
abstract nor its README has it.
"""

PAPER = "UniTok (paper)"

PUBLISHED_SCORES: dict[str, dict[str, dict[str, float]]] = {
    "vqav2": {
        "accuracy": {
            PAPER: 0.768, "Liquid 7B": 0.713, "VILA-U 256": 0.753, "VILA-U 384": 0.794, "TokenFlow-XL": 0.776,
            "Show-o 512": 0.694, "Emu3": 0.751, "Janus": 0.773,
        }
    },
    "gqa": {
        "accuracy": {
            PAPER: 0.611, "Liquid 7B": 0.584, "VILA-U 256": 0.583, "VILA-U 384": 0.608, "TokenFlow-XL": 0.625,
            "Show-o 512": 0.580, "Emu3": 0.603, "Janus": 0.591, "Janus-Pro 7B": 0.620,
        }
    },
    "textvqa": {
        "accuracy": {
            PAPER: 0.516, "Liquid 7B": 0.424, "VILA-U 256": 0.483, "VILA-U 384": 0.608, "TokenFlow-XL": 0.623,
            "Emu3": 0.647,
        }
    },
    "pope": {
        "f1": {
            PAPER: 0.832, "Liquid 7B": 0.811, "VILA-U 256": 0.839, "VILA-U 384": 0.858, "TokenFlow-XL": 0.878,
            "Show-o 512": 0.800, "Emu3": 0.852, "Janus": 0.870, "Janus-Pro 7B": 0.874,
        }
    },
    "mme": {
        "perception": {
            PAPER: 1448, "Liquid 7B": 1119, "VILA-U 256": 1336, "VILA-U 384": 1402, "TokenFlow-XL": 1551,
            "Show-o 512": 1097, "Emu3": 1244, "Janus": 1338, "Janus-Pro 7B": 1567,
        }
    },
    "mmvet": {
        "total": {
            PAPER: 0.339, "VILA-U 256": 0.277, "VILA-U 384": 0.335, "TokenFlow-XL": 0.482, "Emu3": 0.372,
            "Janus": 0.343, "Janus-Pro 7B": 0.500,
        }
    },
    "seedbench": {
        "medium/image": {"VILA-U 256": 0.563, "VILA-U 384": 0.590, "Emu3": 0.682, "UniToken": 0.699}
    },
    "mmbench": {
        "circular": {"TokenFlow-XL": 0.768, "UniToken": 0.711, "Janus": 0.694, "Janus-Pro 7B": 0.792}
    },
    "mmmu": {
        "accuracy": {
            "TokenFlow-XL": 0.432, "UniToken": 0.328, "Show-o 512": 0.267, "Emu3": 0.316,
            "Janus": 0.305, "Janus-Pro 7B": 0.410,
        }
    },
    "mmstar": {"accuracy": {"UniToken": 0.461}},
    "ai2d": {"accuracy": {"UniToken": 0.687}},
    "ocrbench": {"score": {"UniToken": 757}},
    "geneval": {
        "overall": {
            "UniTok (another group)": 0.59, "TokenFlow-XL": 0.55, "UniToken": 0.63, "Show-o 512": 0.68,
            "Emu3": 0.54, "Janus": 0.61, "Janus-Pro 7B": 0.80, "Chameleon": 0.39, "LlamaGen": 0.32,
        }
    },
    "genai_bench": {
        "advanced": {PAPER: 0.67, "Liquid 7B": 0.65, "VILA-U 256": 0.64, "Show-o 256": 0.60},
        "counting": {PAPER: 0.76}, "differentiation": {PAPER: 0.79}, "comparison": {PAPER: 0.74},
        "negation": {PAPER: 0.46}, "universal": {PAPER: 0.73},
    },
    "dpg_bench": {
        "dpg": {
            "TokenFlow-XL": 73.4, "Show-o 256": 67.3, "Emu3": 80.6, "Janus": 79.7, "Janus-Pro 7B": 84.2,
            "LlamaGen": 64.8,
        }
    },
    "mjhq": {"fid": {"Liquid 7B": 5.47, "MUSE-VL": 7.73}},
    "imagenet_generation": {
        "gfid": {
            PAPER: 2.51, "LlamaGen": 2.34, "VAR": 1.97, "Open-MAGVIT2": 2.51, "IBQ": 2.05, "FQGAN": 3.08,
            "VQ-KD": 4.10,
        }
    },
    "reconstruction": {
        "rfid": {
            PAPER: 0.41, "UniTok from CLIP": 0.38, "VILA-U 256": 1.80, "TokenFlow": 1.37, "LlamaGen": 2.19,
            "VAR": 0.90, "Open-MAGVIT2": 1.17, "IBQ": 1.00, "FQGAN": 0.76, "QLIP B-16": 3.21,
        }
    },
    "zeroshot": {
        "top1": {
            PAPER: 0.708, "UniTok from CLIP": 0.786, "VILA-U 256": 0.733, "VILA-U 384": 0.780,
            "QLIP B-16": 0.743, "TokLIP L-384": 0.800,
        }
    },
}  # fmt: skip
# the units of the metrics above that are not fractions
PUBLISHED_UNITS = {
    ("mme", "perception"): "points", ("ocrbench", "score"): "points", ("dpg_bench", "dpg"): "points",
    ("mjhq", "fid"): "fid", ("imagenet_generation", "gfid"): "fid", ("reconstruction", "rfid"): "fid",
    **{("genai_bench", name): "score" for name in PUBLISHED_SCORES["genai_bench"]},
}  # fmt: skip
