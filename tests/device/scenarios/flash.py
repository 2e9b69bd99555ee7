"""flash_attention_2 in MLLM training and generation, with a stand-in for the package flash-attn."""

import flash_attn
import torch
import torch.nn.functional as F
from emulated_cuda import host_copy, measure

from open_unitok.generation import Sampling, generate_image_codes
from open_unitok.training.mllm import train as mllm_train

from .parts import TESTS, Folders, error_of, load_conftest
from .training import conftest, train_measured

BF16 = torch.bfloat16


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda", BF16)


def scenario_stand_in() -> dict:
    """The stand-in against SDPA: outputs and gradients, packed and plain, shared heads, a window."""
    errors = {}
    starts = torch.tensor([0, 3, 10], dtype=torch.int32, device="cuda")
    for window in (-1, 2):
        q, k, v = (_random(10, heads, 8).requires_grad_() for heads in (4, 2, 2))
        found = flash_attn.flash_attn_varlen_func(
            q, k, v, starts, starts, 7, 7, causal=True, window_size=(window, window)
        )
        whole = flash_attn.flash_attn_func(
            q[None, 3:], k[None, 3:], v[None, 3:], 0.0, None, True, (window, 0)
        )
        found.float().square().sum().backward()
        copies = [host_copy(x).float().requires_grad_() for x in (q, k, v)]
        parts = []
        for first, last in ((0, 3), (3, 10)):
            mask = torch.ones(last - first, last - first, dtype=torch.bool).tril()
            mask = mask if window < 0 else mask.triu(-window)
            one = (x[first:last].transpose(0, 1) for x in copies)
            parts.append(F.scaled_dot_product_attention(*one, mask, enable_gqa=True).transpose(0, 1))
        expected = torch.cat(parts)
        expected.square().sum().backward()
        pairs = {"output": (found, expected), "plain": (whole[0], expected[3:])}
        pairs |= {f"grad {n}": (x.grad, y.grad) for n, x, y in zip("qkv", (q, k, v), copies)}
        for name, (a, b) in pairs.items():
            error = (host_copy(a).float() - b.detach()).abs().max() / b.detach().abs().max()
            errors[f"{name}, window {window}"] = float(error)
    return errors


def scenario_refusals() -> dict:
    """What the package refuses."""
    q, starts = _random(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    call = flash_attn.flash_attn_varlen_func
    return {
        "dtype": error_of(lambda: flash_attn.flash_attn_func(*[q.float()[None]] * 3)),
        "bounds": error_of(lambda: call(q, q, q, starts.long(), starts.long(), 4, 4)),
        "longest": error_of(lambda: call(q, q, q, starts, starts, 3, 3)),
        "tensor": error_of(lambda: call(q, q, q, starts, starts, starts.max(), 4)),
    }


def scenario_training() -> dict:
    """The losses of runs with flash attention (chosen by `auto`) and SDPA."""
    root = conftest.mllm_folder.__wrapped__(Folders(), TESTS / "golden")
    found = {}
    for rows, options in (("packed", ["data.pack_to=100"]), ("padded", [])):
        for attention in ("auto", "sdpa"):
            flash_attn.CALLS.clear()
            given = ("steps=2", "log.every=1", f"attention={attention}", *options)
            run = train_measured(mllm_train, root / "config.yaml", "run", *given)
            kept = {name: run["metrics"][name] for name in ("loss", "grad_norm")}
            found[f"{rows}, {attention}"] = {**kept, "calls": dict(flash_attn.CALLS), "syncs": run["syncs"]}
    return found


def scenario_generation() -> dict:
    """Logits and greedy answers of a padded batch, and codes of an image, by both kinds of attention."""
    tiny_model = load_conftest("generation").tiny_model
    ids = torch.tensor([[1, 20, 30, 40, 50], [0, 0, 1, 60, 3]], device="cuda")
    mask = (ids != 0).long()
    found = {}
    for name in ("sdpa", "flash_attention_2"):
        model = tiny_model().to("cuda", BF16)
        model.language_model.set_attn_implementation(name)
        flash_attn.CALLS.clear()
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
            alone = model(ids[:1]).logits[0]
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        greedy = Sampling(guidance=3.0, greedy=True)
        codes, report = measure(
            generate_image_codes, model, [[1, 20, 30, 3], [1, 60, 3]], greedy, [1, 2], [1, 3]
        )
        found[name] = {
            "logits": [*host_copy(logits).float()[mask.cpu() > 0].tolist(), *host_copy(alone).tolist()],
            "text": host_copy(text).tolist(),
            "codes": host_copy(codes).tolist(),
            "calls": dict(flash_attn.CALLS),
            "replays": report["replays"],
        }
    return found
