"""Token merging: what it saves in encode time, and what it costs in codes and PSNR.

    python benchmarks/merging.py                           # both parts, one thread
    python benchmarks/merging.py --part time --only 512
    python benchmarks/merging.py --part quality --tokenizer DIR --images 'DIR/*.png'

"time": UniTok-Large with random weights (time does not depend on them), one image of 256 and 512 pixels, from
pixels to codes. Calls with and without merging alternate and are measured in seconds of the processor, which
other load changes little. "products": share of the encoder's matrix products that is left, counted by torch.

"quality": a trained tokenizer, by default the shipped "scenes" (16 tokens, 2 blocks) with 200 of its test
scenes: share of codes that equal those without merging, and PSNR of the reconstruction. Nothing is retrained.
"""

import argparse
import glob
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, load_average, processor_name, read_results, result_file, write_results
from torch.utils.flop_counter import FlopCounterMode

from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.images import from_pil, load_image, to_pixels
from open_unitok.training.scenes.dataset import load_config
from open_unitok.training.scenes.scene import render, sample_scene

ROOT = Path(__file__).parents[1]
BATCH = 50
# pixels -> variants of the large model, 31 blocks
LARGE: dict[int, list[dict[str, Any]]] = {
    256: [
        *({"method": "tome", "r": r} for r in (2, 4, 8)),
        {"method": "tofu", "r": 8, "prune_until": 10},
        *({"method": "cluster", "at": 2, "keep": keep} for keep in (0.5, 0.25)),
    ],
    512: [
        *({"method": "tome", "r": r} for r in (8, 16, 32)),
        *({"method": "cluster", "at": 2, "keep": keep} for keep in (0.5, 0.25)),
    ],
}
# variants of a model of 16 tokens and 2 blocks
SMALL: list[dict[str, Any]] = [
    *({"method": "tome", "r": r} for r in (1, 2, 4, [8, 4])),
    {"method": "tofu", "r": 4, "prune_until": 1},
    *({"method": "cluster", "at": 1, "keep": keep} for keep in (0.75, 0.5, 0.25)),
    {"method": "cluster", "at": 1, "keep": 0.5, "alpha": 0.5},
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=["time", "quality"], choices=["time", "quality"])
    parser.add_argument("--only", nargs="+", type=int, default=list(LARGE), choices=LARGE, help="pixels")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokenizer", default="scenes", help="of the quality (default: scenes)")
    parser.add_argument("--images", help="glob of image files (default: test scenes)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = result_file("merging", processor_name(), args.out)
    results = read_results(file)
    if "quality" in args.part:
        name = args.tokenizer if args.images is None else f"{Path(args.tokenizer).name}, {args.images}"
        results[f"quality of {name}"] = measure_quality(args.tokenizer, args.images)
        write_results(file, results)
    for pixels in args.only if "time" in args.part else ():
        results[f"time at {pixels}"] = measure_time(pixels, args.repeats)
        write_results(file, results)
    print(f"load average {load_average()}")
    for title, rows in results.items():
        heads = list(next(iter(rows.values())))
        table = [[title, *heads], ["---"] * (len(heads) + 1)]
        table += [[name, *(str(row[head]) for head in heads)] for name, row in rows.items()]
        print("\n".join("| " + " | ".join(cells) + " |" for cells in table))


def name_of(merge: dict[str, Any] | None) -> str:
    if merge is None:
        return "none"
    options = {key: value for key, value in merge.items() if key != "method"}
    return f"{merge['method']}, " + ", ".join(f"{key} {value}" for key, value in options.items())


def large_model(pixels: int, merge: dict[str, Any] | None, state: dict[str, torch.Tensor] | None) -> UniTok:
    """UniTok-Large with a small decoder and text tower, which encoding does not use."""
    rest: dict[str, Any] = {
        "decoder_options": {"num_hidden_layers": 1},
        "text_num_layers": 1,
        "text_vocab_size": 64,
    }
    rest |= {"image_size": pixels, "encoder_options": merge and {"merge": merge}}
    config = UniTokConfig.named("vitamin_large", **rest)
    if state is None:
        torch.manual_seed(0)
        return UniTok(config).eval()
    with torch.device("meta"):
        model = UniTok(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


@torch.no_grad()
def measure_time(pixels: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Processor seconds of `encode` for one image, of each variant in turns with none."""
    base = large_model(pixels, None, None)
    state = base.state_dict()
    image = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)) * 2 - 1
    base.encode(image)  # kernels are loaded
    rows: dict[str, dict[str, Any]] = {}
    plain_flop = products(base, image)
    plain_times: list[float] = []
    for merge in LARGE[pixels]:
        model = large_model(pixels, merge, state)
        times, own_plain = [], []
        for _ in range(repeats):
            own_plain.append(processor_seconds(base, image))
            times.append(processor_seconds(model, image))
        plain_times += own_plain
        rows[name_of(merge)] = {
            "tokens left": tokens_left(model, image),
            "products": round(products(model, image) / plain_flop, 3),
            "seconds": round(min(times), 2),
            "of none": round(min(times) / min(own_plain), 3),
        }
        print(name_of(merge), rows[name_of(merge)], flush=True)
    none = {"tokens left": (pixels // 16) ** 2, "products": 1.0, "seconds": round(min(plain_times), 2)}
    return {"none": {**none, "of none": 1.0}, **rows}


def processor_seconds(model: UniTok, image: torch.Tensor) -> float:
    start = time.process_time()
    model.encode(image)
    return time.process_time() - start


def products(model: UniTok, image: torch.Tensor) -> float:
    """FLOPs of the encoder, on meta tensors."""
    with torch.device("meta"):
        shadow = UniTok(model.config).eval().encoder
    with FlopCounterMode(display=False) as counter:
        shadow(image.to("meta"))
    return counter.get_total_flops()


def tokens_left(model: UniTok, image: torch.Tensor) -> int:
    """M after the last block."""
    count = (image.shape[2] // 16) * (image.shape[3] // 16)
    options: Any = model.encoder.blocks[0].merge
    return count - sum(options.r) if options.at is None else options.num_clusters(count)


@torch.no_grad()
def measure_quality(tokenizer: str, pattern: str | None) -> dict[str, dict[str, Any]]:
    """Codes and reconstructions of a trained tokenizer with each variant against those without merging."""
    base = UniTok.from_pretrained(tokenizer, dtype=torch.float32).eval()
    side = base.config.image_size
    if pattern is None:
        config = load_config(ROOT / "configs" / "scenes" / "scenes.yaml")
        images = [from_pil(render(sample_scene(config, "test", index))) for index in range(200)]
    else:
        images = [to_pixels(load_image(path), side) for path in sorted(glob.glob(pattern))]
    pixels = torch.stack([image.squeeze(0) for image in images])
    plain_codes = encode(base, pixels)
    rows = {
        "none": {"codes unchanged, %": 100.0, "tokens unchanged, %": 100.0, "PSNR, dB": psnr(base, pixels)}
    }
    for merge in SMALL:
        model = UniTok.from_pretrained(
            tokenizer, dtype=torch.float32, encoder_options={"merge": merge}
        ).eval()
        same = encode(model, pixels) == plain_codes
        rows[name_of(merge)] = {
            "codes unchanged, %": round(100 * same.float().mean().item(), 1),
            "tokens unchanged, %": round(100 * same.all(dim=-1).float().mean().item(), 1),
            "PSNR, dB": psnr(model, pixels),
        }
    return rows


def encode(model: UniTok, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.encode(batch) for batch in pixels.split(BATCH)])


def psnr(model: UniTok, pixels: torch.Tensor) -> float:
    """Mean over the images, of pixels in [-1, 1]."""
    shown = torch.cat([model.decode(model.encode(batch)) for batch in pixels.split(BATCH)])
    errors = (shown - pixels).square().mean(dim=(1, 2, 3))
    return round((10 * (4 / errors).log10()).mean().item(), 2)


if __name__ == "__main__":
    main()
