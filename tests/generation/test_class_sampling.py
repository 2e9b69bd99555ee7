"""Codes of class-conditional models: golden greedy codes, caches, batches, guidance, prefixes, backends."""

import json

import pytest
import torch
from safetensors.torch import load_file

from open_unitok.core.errors import UserError
from open_unitok.generation.backends import CLASS_BACKENDS, choose_backend
from open_unitok.generation.image_sampling import generate_image_codes
from open_unitok.generation.sampling import Sampling, apply_guidance
from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.mllm.class_conditional.convert import from_llamagen


def build(**fields):
    sizes = {
        "num_classes": 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "depth_layers": 1, "num_codebooks": 3, "codebook_size": 11,
        "num_image_tokens": 9,
    }  # fmt: skip
    torch.manual_seed(0)
    model = ClassConditionalModel(ClassConditionalConfig(**{**sizes, **fields})).eval()
    torch.nn.init.normal_(model.depth_head.output.weight, std=0.5)
    return model


def generate(model, classes, sampling, seeds=None, **options):
    null = model.config.null_class
    unconditional = None if null is None else [null]
    seeds = seeds or list(range(len(classes)))
    return generate_image_codes(model, [[c] for c in classes], sampling, seeds, unconditional, **options)


class Static(CLASS_BACKENDS["cuda_graph"]):
    """The steps that a CUDA graph captures, run one by one."""

    def compile_step(self, step, state):
        return step


@pytest.fixture(params=["torch", "static"])
def backend(request, monkeypatch):
    """Both sets of steps, under the name "torch"."""
    if request.param == "static":
        monkeypatch.setitem(CLASS_BACKENDS, "torch", Static)


SETTINGS = {
    "cfg1": {"guidance": 1.0},
    "cfg3": {"guidance": 3.0},
    "cfg3_interval4": {"guidance": 3.0, "guidance_interval": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_codes_equal_those_of_the_published_sampler(name, golden, backend):
    out = load_file(golden / "heads" / "c2i.safetensors")
    meta = json.loads((golden / "heads" / "c2i.meta.json").read_text())
    weights = {key[8:]: value for key, value in out.items() if key.startswith("weights.")}
    model = from_llamagen(weights, "golden", num_heads=2, num_image_tokens=16)
    labels = out["greedy.labels"]
    codes = generate(model, labels.tolist(), Sampling(greedy=True, **SETTINGS[name]))
    assert torch.equal(codes, out[f"greedy.{name}.codes"])
    logits = model(labels, codes).image_logits
    torch.testing.assert_close(logits, out[f"greedy.{name}.logits"], atol=1e-5, rtol=0)
    if name == "cfg3":
        null = torch.full_like(labels, meta["sizes"]["null_class"])
        empty = model(null, codes).image_logits
        torch.testing.assert_close(empty, out["greedy.uncond_logits_cfg3"], atol=1e-5, rtol=0)
        assert torch.equal(apply_guidance(torch.cat([logits, empty]), 3.0).argmax(dim=-1), codes)


@pytest.mark.parametrize("fields", [{}, {"num_codebooks": 1, "depth_layers": 0}, {"code_sizes": [11, 4, 7]}])
def test_cached_steps_equal_teacher_forcing_and_a_batch_its_images(fields, backend):
    model, classes = build(**fields), [0, 3, 3, 4]
    greedy = Sampling(greedy=True, guidance=2.0)
    codes = generate(model, classes, greedy)
    # uncached: the whole sequence anew for every code
    labels = torch.tensor(classes)
    logits = model(labels, codes).image_logits
    empty = model(torch.full_like(labels, 5), codes).image_logits
    assert torch.equal(apply_guidance(torch.cat([logits, empty]), 2.0).argmax(dim=-1), codes)
    sampled = Sampling(guidance=1.5, temperature=0.9, top_k=8, top_p=0.95)
    together = generate(model, classes, sampled)
    alone = [generate(model, [c], sampled, [i]) for i, c in enumerate(classes)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[1], together[2])  # the same class with another seed


def test_a_prefix_is_kept_and_continued_as_without_it(backend):
    model, sampling = build(), Sampling(guidance=2.0)
    whole = generate(model, [1, 2], sampling)
    for given in (1, 8):
        assert torch.equal(generate(model, [1, 2], sampling, prefix=whole[:, :given]), whole)


def test_guidance_one_is_the_class_alone_and_above_needs_a_null_class():
    model = build(class_dropout=0.0)
    codes = generate(model, [1, 2], Sampling(guidance=1.0, greedy=True))
    assert torch.equal(model(torch.tensor([1, 2]), codes).image_logits.argmax(dim=-1), codes)
    with pytest.raises(UserError, match="guidance = 1 generates without"):
        generate(model, [1], Sampling(guidance=2.0))


def test_guidance_interval_is_that_of_the_published_sampler():
    assert Sampling(guidance=3.0).guidances(4) == [3.0] * 4
    assert Sampling(guidance=3.0, guidance_interval=0).guidances(4) == [3.0, 3.0, 1.0, 1.0]
    assert Sampling(guidance=3.0, guidance_interval=9).guidances(4) == [3.0] * 4
    for wrong in (-2, 1.5, True):
        with pytest.raises(UserError, match="guidance_interval is"):
            Sampling(guidance_interval=wrong)


def test_backends_are_chosen_by_the_kind_of_model():
    model = build()
    assert choose_backend(model) == choose_backend(model, "torch") == "torch"
    for name, reason in (("native", "does not run class-conditional models"), ("cuda_graph", "runs on CUDA")):
        with pytest.raises(UserError, match=reason) as error:
            choose_backend(model, name)
        assert "\n" not in str(error.value)
