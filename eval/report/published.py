"""Published numbers for comparison: {benchmark: {metric: {model: value}}}; fractions, or MME points.

UniTok's paper first (arXiv 2502.20321), then other unified models, as reported in their papers. Splits and
prompt templates as in eval/README.md; VQAv2 is test-dev, which only the challenge server scores.
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
}  # fmt: skip
