"""The fingerprint of a tokenizer: code shards and MLLM folders carry it, and a mismatch is rejected.

Without it a changed tokenizer would train an MLLM on stale codes and raise no error. One option changes the
codes and is not hashed: the flat `num_attention_heads`, which has no single default to compare with; hashing
it would change the fingerprint of every stored tokenizer. `encoder_options.num_attention_heads` is hashed.
"""

import hashlib
import json

from torch import nn

# Part of the model -> prefix of its tensors' names in the hash. Never change the prefixes: code shards and
# MLLM folders store hashes of these names. A part may be renamed in the code, but not here.
_PREFIXES = {"encoder": "encoder.", "down_projection": "down_projection.", "quantizer": ""}

# Config options that change the codes but no tensor, with the published UniTok's values. They are hashed only
# where they differ from these: fingerprints stored before an option existed stay valid.
_DEFAULTS = {
    "encoder": "vitamin",
    "encoder_options": None,
    "quantizer": "multi_codebook",
    "quantizer_options": None,
    "projection_heads": None,
    "projection_causal": False,
    "adapter_layers": 0,
    "adapter_heads": 8,
}


def compute_fingerprint(model: nn.Module) -> str:
    """Hex sha256 of everything that determines the codes of a `UniTok`: tensors as float32, and options."""
    digest = hashlib.sha256()
    tensors = {}
    for part, prefix in _PREFIXES.items():
        module = model.get_submodule(part)
        # A quantiser also holds usage statistics, which do not affect codes: hash only the tensors it names.
        found = module.fingerprint_tensors() if part == "quantizer" else module.state_dict()  # pyright: ignore
        tensors |= {prefix + name: tensor for name, tensor in found.items()}
    # sorted: the hash must not depend on the order in which modules are assigned
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.numpy()).cast("B") if tensor.numel() else b"")
    for option, default in _DEFAULTS.items():
        value = getattr(model.config, option) or default  # {} is the same as None
        if option == "encoder_options" and value:  # so is a merging that is switched off
            value = {name: given for name, given in value.items() if name != "merge" or given} or default
        if value != default:
            digest.update(f"{option} = {json.dumps(value, sort_keys=True)}\n".encode())
    return digest.hexdigest()
