"""Tables of benchmarks/generation.py: of one run, and README's from all result files of a folder."""

import json
from pathlib import Path
from typing import Any

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
# Of the quartiles of the rounds' ratios: beside another process torch's threads wait for each other.
MAX_SPREAD = 1.3
NAMES = {"family 25 model 17": "Zen 4", "family 25 model 1": "Zen 3"}
# row -> (entries of image parts, words between them)
IMAGE_ROWS = {
    "one image, C++ steps: fp32, bf16, int8 weights": ("fp32_1", "bf16_1", "int8_1"),
    "one image, eager backend; LlamaGen's loop: fp32": ("eager_1", "llamagen_1"),
    "eight images, C++ steps: fp32, bf16, int8 weights": ("fp32_8", "bf16_8", "int8_8"),
}
# row -> entries of parts whose result is the share of the C++ steps' speed
SHARE_ROWS = {
    "`torch.compile`, share of the C++ steps' speed: fp32": ("compiled_1",),
    "`torch.compile`, tuned, share of the C++ steps' speed: fp32, bf16, torchao's int8": (
        "tuned_1",
        "tuned_bf16_1",
        "torchao_1",
    ),
    "the same, eight images: fp32, bf16": ("tuned_8", "tuned_bf16_8"),
}
ANSWER_ROWS = {
    "32 questions, four per image; one per image (one by one = 1)": "batched",
    "the same by transformers' `generate`, batched": "transformers_batched",
    "the same with its static cache": "transformers_static_batched",
}


def report(results: dict[str, Any], machine: dict[str, Any] | None) -> str:
    """All results of a run, for reading."""
    lines = []
    if "machine" in results and "cpu" in results["machine"]:
        found = results["machine"]
        lines.append(
            f"machine: {found['memory_gb_s']:.0f} GB/s from memory, {found['cache_gb_s']:.0f} from cache, "
            f"{found['fp32_gflop_s']:.0f} fp32 GFLOP/s, {found['cpu']}"
        )
    images = {part: found for part, found in results.items() if "ratio_quartiles" in found}
    if images:
        lines.append(
            "part               ms   ratio  (quartiles)    floor x floor "
            "last/first  floor   same  first s     MB"
        )
        lines += [image_line(part, found, machine) for part, found in images.items()]
    lines += [
        f"{part}: {100 * found['of_native']:.0f} % of the C++ steps' speed"
        for part, found in images.items()
        if "of_native" in found
    ]
    lines += [profile_line(part, found) for part, found in images.items() if found["profile_ms"]]
    for part, found in results.items():
        for name, times in (
            {part: found} if part == "prefix" else found if part == "answers" else {}
        ).items():
            if isinstance(times, dict) and "batched_s" in times:
                lines.append(answer_line(name, times))
        if "skipped" in found:
            lines.append(f"{part}: left out: {found['skipped']}")
    return "\n".join(lines)


def image_line(part: str, found: dict[str, Any], machine: dict[str, Any] | None) -> str:
    """Time, ratio to the baseline, floor, growth with the position and its floor, equality of codes.

    Floor of a visual token: its weights, keys and values at the bandwidth of memory, or its products in
    float32 at the rate of a large one, whichever takes longer.
    """
    machine, names = machine or {}, ("decoder", "embedder", "depth")
    bandwidth = machine.get("memory_gb_s", float("nan")) * 1e6  # bytes per millisecond
    rate = machine.get("fp32_gflop_s", float("nan")) * 1e6
    weights = sum(found["weights"].values()) * BYTES[found["dtype"]]
    rows = (
        2 * found["images"],
        found["images"],
        2 * found["images"],
    )  # the embedder reads no unconditional rows
    products = 2 * sum(count * found["weights"][name] for count, name in zip(rows, names))

    def floor(share: float) -> float:
        """With this share of the mean of keys and values."""
        read = (weights + share * found["cache_bytes"]) / bandwidth
        return max(read, products / rate) if found["dtype"] == "fp32" else read

    low, high = found["ratio_quartiles"]
    # the first and last quarter read 1/4 and 7/4 of the mean
    growth = floor(1.75) / floor(0.25)
    return (
        f"{part:12} {found['ms']:8.2f} {found['ratio']:7.2f} ({low:5.2f} {high:5.2f}) {floor(1):8.2f} "
        f"{found['ms'] / floor(1):7.2f} {found['last_over_first']:10.2f} {growth:6.2f} "
        f"{found['same_codes']:6.3f} {found['first_s']:8.1f} {found['peak_mb']:6.0f}"
    )


def profile_line(part: str, found: dict[str, Any]) -> str:
    """The time per visual token by part."""
    times = found["profile_ms"]
    depth_head = found["books"] * times["code_logits"]
    rest = found["ms"] - times["decode_step"] - depth_head  # guidance, argmax, Python
    return (
        f"{part}: embedder and decoder {times['decode_step']:.1f} ms, depth head {depth_head:.1f}, "
        f"sampling and Python {rest:.1f}"
    )


def answer_line(name: str, times: dict[str, Any]) -> str:
    """Seconds of every way, and how many times the first way's."""
    seconds = {k.removesuffix("_s"): v for k, v in times.items() if k.endswith("_s")}
    first = next(iter(seconds.values()))
    return f"{name}: " + ", ".join(f"{k} {v:.2f} s = {v / first:.2f}x" for k, v in seconds.items())


# ---- README ------------------------------------------------------------------------------------------------


def readme_table(folder: Path) -> str:
    """README's table: a column per file of generation results, and a line per result of another benchmark."""
    files = {file: json.loads(file.read_text()) for file in sorted(folder.glob("generation-*.json"))}
    columns = {short_name(file.stem.removeprefix("generation-")): found for file, found in files.items()}
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for title, parts in IMAGE_ROWS.items():
        rows.append(
            [title, *(", ".join(ratio_cell(found, part) for part in parts) for found in columns.values())]
        )
    for title, parts in SHARE_ROWS.items():
        cells = (", ".join(share_cell(found, part) for part in parts) for found in columns.values())
        rows.append([title, *cells])
    for title, way in ANSWER_ROWS.items():
        rows.append([title, *(answer_cell(found, way) for found in columns.values())])
    measured = [cells for cells in rows if set(", ".join(cells[1:]).split(", ")) != {"not measured"}]
    lines = ["| " + " | ".join(cells) + " |" for cells in measured]
    return "\n".join([*lines, *other_lines(folder)])


def short_name(device: str) -> str:
    """A result file's processor as a column's head."""
    known = next(
        (name for key, name in NAMES.items() if device.find(f"{key.replace(' ', '-')}-") >= 0), device
    )
    instructions = "AVX-512" if "AVX512" in device else "AVX2" if "AVX2" in device else "other instructions"
    return f"{instructions} ({known}{', emulated' if device.endswith('emulated') else ''})"


def ratio_cell(found: dict[str, Any], part: str) -> str:
    entry = found.get(part, {})
    low, high = entry.get("ratio_quartiles", (1, 1))
    if high > MAX_SPREAD * low:
        return f"not settled ({low:.1f} to {high:.1f})"
    if "ratio" in entry:
        return f"{entry['ratio']:.1f}x"
    # results in which the baseline is a part of its own
    base = found.get(f"baseline_{part.rpartition('_')[2]}", {})
    return f"{base['ms'] / entry['ms']:.1f}x" if "ms" in base and "ms" in entry else "not measured"


def share_cell(found: dict[str, Any], part: str) -> str:
    share = found.get(part, {}).get("of_native")
    if share and ratio_cell(found, part).startswith("not settled"):
        return "not settled"
    return f"{100 * share:.0f} %" if share else "not measured"


def answer_cell(found: dict[str, Any], way: str) -> str:
    """ "dialogues; photos" over one by one."""
    answers = found.get("answers", {})
    if f"{way}_s" not in answers.get("dialogues", {}):
        return "not measured"
    cases = (answers["dialogues"], answers["photos"])
    return "; ".join(f"{case['one_by_one_s'] / case[f'{way}_s']:.1f}x" for case in cases)


def other_lines(folder: Path) -> list[str]:
    """A line per result file of the tokenizer and of the server."""
    lines = [""]
    for file in sorted(folder.glob("tokenizer-*.json")):
        wanted = {"dtype": "float32", "batch": 1, "size": "vitamin_large"}
        rows = json.loads(file.read_text()).get("rows", [])
        ratios = {
            row["part"]: row["ratio"]
            for row in rows
            if all(row.get(key) == value for key, value in wanted.items())
        }
        if {"encode", "decode"} <= ratios.keys():
            lines.append(
                f"- Tokenizer at published size, fp32, batch 1 (plain modules = 1): encode "
                f"{ratios['encode']:.1f}x, decode {ratios['decode']:.1f}x on "
                f"{short_name(file.stem.removeprefix('tokenizer-'))}"
            )
    for file in sorted(folder.glob("serving-*.json")):
        ratio = json.loads(file.read_text())["ratio"]
        lines.append(
            f"- `unitok serve` with the demo's model, 16 clients (one client = 1): {ratio:.1f}x on "
            f"{short_name(file.stem.removeprefix('serving-'))}"
        )
    return lines
