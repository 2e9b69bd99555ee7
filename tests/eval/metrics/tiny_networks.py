"""Tiny CLIP and DINOv2 weights from seeds, so that published code gives the same outputs anywhere."""

import numpy as np
import torch

WORDS = [
    "[UNK]",
    "[PAD]",
    "[BOS]",
    "[EOS]",
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "and",
    "on",
    "the",
    "mat",
    "cup",
]


def random_weights(state, scale=0.2):
    """A state dict of random numbers, a seed per tensor by order of names; norms and scales are about 1."""
    ones = ("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight", "gamma")
    return {
        # RandomState: its stream never changes
        name: torch.tensor(np.random.RandomState(k).standard_normal(tuple(tensor.shape)) * scale).float()
        + (1.0 if name.endswith(ones) else 0.0)
        for k, (name, tensor) in enumerate(sorted(state.items()))
        if tensor.is_floating_point()
    }


def word_tokenizer():
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_clip(folder, side=16):
    """A CLIP of 2 x 8 wide layers for images of `side` pixels, and a tokenizer of whole words."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2,
        "pad_token_id": 1,
    }  # fmt: skip
    vision = small | {"image_size": side, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.load_state_dict(random_weights(model.state_dict()), strict=False)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    CLIPProcessor(image_processor=images, tokenizer=word_tokenizer()).save_pretrained(folder)
    return folder


def write_blip(folder, side=32):
    """A BLIP VQA of one layer with BLIP's vocabulary, for images of `side` pixels."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": 30524, "encoder_hidden_size": 8, "max_position_embeddings": 40, "pad_token_id": 1,
        "bos_token_id": 30522, "sep_token_id": 3, "eos_token_id": 3,
    }  # fmt: skip
    vision = small | {"image_size": side, "patch_size": 16}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.load_state_dict(random_weights(model.state_dict(), 1.0), strict=False)
    model.eval().save_pretrained(folder)
    images = BlipImageProcessor(size={"height": side, "width": side})
    BlipProcessor(image_processor=images, tokenizer=word_tokenizer()).save_pretrained(folder)
    return folder


def write_dinov2(path, width=64, depth=2):
    """The weight file of a ViT with patches of 14 pixels, in the published layout; 64 wide with one head."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for i in range(depth):
        block = {
            "norm1.weight": (width,), "norm1.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ls1.gamma": (width,),
            "ls2.gamma": (width,), "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    torch.save(random_weights({name: torch.empty(shape) for name, shape in shapes.items()}), path)
    return path


def blocky_image(seed):
    """A small random image with large pixels, of random height and width, uint8 (H, W, 3)."""
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 256, (int(random.randint(3, 9)), int(random.randint(3, 9)), 3)).astype(
        np.uint8
    )
    return pixels.repeat(int(random.randint(10, 60)), 0).repeat(int(random.randint(10, 60)), 1)


def caption(seed):
    """A few random words."""
    random = np.random.RandomState(seed)
    return " ".join(WORDS[4:][i] for i in random.randint(0, len(WORDS) - 4, int(random.randint(1, 9))))
