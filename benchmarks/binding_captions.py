"""Whether a model that generates scenes knows which word of a caption belongs to which object: the share of
images of two objects whose own caption is likelier than one with swapped words (docs/experiments/binding.md).

    python benchmarks/binding_captions.py MODEL [MODEL ...]

Chance is 50 %. Captions differ in a colour that no object has ("colour"), in the two colours ("attribution"),
in the order of the two shapes of a relation ("relation"), or in the size of one ("size"). Images are scenes
beyond those of training; half a minute of one core per model.
"""

import argparse
import random

import torch
import torch.nn.functional as F
from binding_scenes import encode_scenes

from open_unitok.core.files import model_path
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokProcessor
from open_unitok.training.data.collate import TrainingSample, collate
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.scenes.config import SceneConfig
from open_unitok.training.scenes.dataset import load_config
from open_unitok.training.scenes.phrases import RELATION_PHRASES, a_or_an, relations_between
from open_unitok.training.scenes.scene import Scene, sample_scene

IMAGES, BATCH, FIRST = 200, 50, 60_000  # FIRST: index of a scene that no training set has
KINDS = ("colour", "attribution", "relation", "size")


def sample_scenes(config: SceneConfig) -> list[Scene]:
    """Scenes of two objects of different colours and shapes; training has their swapped pairs, too."""
    found, index = [], FIRST
    while len(found) < IMAGES:
        objects = (scene := sample_scene(config, "train", index)).objects
        if len(objects) == 2 == len({o.color for o in objects}) == len({o.shape for o in objects}):
            swapped = {(objects[0].color, objects[1].shape), (objects[1].color, objects[0].shape)}
            found += [] if swapped & config.held_out_pairs else [scene]
        index += 1
    return found


def caption_pair(scene: Scene, kind: str, config: SceneConfig, rng: random.Random) -> tuple[str, str]:
    """The caption of a scene, and the one with other words."""
    first, second = scene.objects

    def both(one: str, other: str) -> str:
        return f"{a_or_an(one)} and {a_or_an(other)}"

    own = both(f"{first.color} {first.shape}", f"{second.color} {second.shape}")
    if kind == "colour":
        known = [color for color, shape in config.class_pairs if shape == first.shape]  # in training
        other = rng.choice([color for color in known if color not in (first.color, second.color)])
        return own, both(f"{other} {first.shape}", f"{second.color} {second.shape}")
    if kind == "attribution":
        return own, both(f"{second.color} {first.shape}", f"{first.color} {second.shape}")
    if kind == "size":
        other = rng.choice([name for name in config.size_names if name != first.size_name])
        return tuple(both(f"{size} {first.shape}", second.shape) for size in (first.size_name, other))  # pyright: ignore
    # in half of the captions the second object comes first
    first, second = rng.sample(scene.objects, 2)
    relation = RELATION_PHRASES[rng.choice(relations_between(first, second))]
    one, other = a_or_an(first.shape), a_or_an(second.shape)
    return f"{one} {relation} {other}", f"{other} {relation} {one}"


@torch.no_grad()
def image_nll(
    model: UniTokForConditionalGeneration, build: SequenceBuilder, captions: list[str], codes: torch.Tensor
) -> torch.Tensor:
    """(n,) negative log-likelihood in nats of each image's codes (n, N, K), given its caption."""
    found = []
    for rows in torch.arange(len(captions)).split(BATCH):
        samples = [
            TrainingSample(
                "text_to_image",
                build.build("text_to_image", captions[row], (codes.shape[1],)),
                (codes[row].numpy(),),
            )
            for row in rows.tolist()
        ]
        batch = collate(samples, model.config.image_token_id, model.config.pad_token_id or 0)
        logits = model(**batch.inputs, return_logits=True).image_logits
        losses = F.cross_entropy(logits.flatten(0, -2).float(), codes[rows].flatten(), reduction="none")
        found.append(losses.view(len(rows), -1).sum(dim=1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a folder, or the name of a shipped model")
    args = parser.parse_args()
    config = load_config("configs/scenes/scenes.yaml")
    scenes = sample_scenes(config)
    codes = encode_scenes(scenes)
    for name in args.models:
        folder = model_path(name)
        model = UniTokForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        build = SequenceBuilder(UniTokProcessor.from_pretrained(folder), max_length=256)
        for kind in KINDS:
            rng = random.Random(0)
            own, other = zip(*(caption_pair(scene, kind, config, rng) for scene in scenes))
            gain = image_nll(model, build, list(other), codes) - image_nll(model, build, list(own), codes)
            share = 100 * (gain > 0).float().mean()
            print(f"{name}: {kind} {share:.0f} %, {gain.mean():+.2f} nats", flush=True)


if __name__ == "__main__":
    main()
