"""The choice of a backend: whatever a caller attached to a model takes effect, or is refused by name."""

import logging
from unittest import mock

import peft
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama.modeling_llama import LlamaMLP

from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling, generate_image_codes
from open_unitok.generation.backends import choose_backend, native_library
from open_unitok.generation.backends.module_changes import find_module_change

PROMPTS, UNCONDITIONAL = [[1, 20, 30, 3], [1, 60, 3]], [1, 90, 91, 3]
GREEDY = Sampling(guidance=2.0, greedy=True)
IMAGE = Image.new("RGB", (48, 48), "red")

pytestmark = pytest.mark.skipif(native_library.load_library() is None, reason="no C++ compiler")


class Negate(nn.Module):
    """A parametrisation that changes every product."""

    def forward(self, weight):
        return -weight


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: -output)


def prehooked(module):
    module.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def parametrised(module):
    parametrize.register_parametrization(module, "weight", Negate())


def patched(module):
    whole = module.forward
    module.forward = lambda *args: -whole(*args)


def wrapped(module):
    class Other(type(module)):
        def forward(self, x):
            return -super().forward(x)

    module.__class__ = Other


CHANGES = [hooked, prehooked, parametrised, patched, wrapped]
PLACES = [
    "depth_head.layers.0.self_attn.q_proj",
    "depth_head.output",
    "language_model.layers.1.mlp.down_proj",
    "visual_embedder.projector.1",
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_module_takes_effect_and_is_refused_by_native(make_model, change, place):
    model = make_model()
    assert choose_backend(model) == "native" and find_module_change(model) is None
    before = generate_image_codes(model, PROMPTS, GREEDY, [0, 0], UNCONDITIONAL)
    change(model.get_submodule(place))
    assert choose_backend(model) == "torch" == choose_backend(model, text_options={})
    after = generate_image_codes(model, PROMPTS, GREEDY, [0, 0], UNCONDITIONAL)
    assert not torch.equal(after, before)
    assert torch.equal(
        after, generate_image_codes(model, PROMPTS, GREEDY, [0, 0], UNCONDITIONAL, backend="torch")
    )
    with pytest.raises(UserError, match=f"backend = 'native' cannot run this model: {place} "):
        generate_image_codes(model, PROMPTS, GREEDY, [0, 0], UNCONDITIONAL, backend="native")


def test_hooks_are_called_in_images_and_answers_and_removing_them_restores_native(folder):
    pipe = Pipeline.from_pretrained(folder)
    called = []
    places = ("depth_head.layers.0", "language_model.layers.0", "visual_embedder.projector.0")
    hooks = [
        pipe.model.get_submodule(place).register_forward_hook(lambda *_, place=place: called.append(place))
        for place in places
    ]
    codes = pipe.generate_codes(["a star"], GREEDY)
    # K = 3 codes at each of 9 visual tokens; the first is predicted by the prefill
    assert called.count("depth_head.layers.0") == 27 and called.count("language_model.layers.0") >= 9
    for ask in (lambda: pipe.answer([IMAGE], ["What?"], 4), lambda: list(pipe.chat_stream("What?", IMAGE))):
        called.clear()
        ask()
        assert called.count("language_model.layers.0") > 1
    for hook in hooks:
        hook.remove()
    assert choose_backend(pipe.model) == "native"
    assert torch.equal(codes, pipe.generate_codes(["a star"], GREEDY))


def test_class_patches_global_hooks_and_unmerged_adapters_are_changes(make_model):
    model = make_model()
    whole = LlamaMLP.forward
    with mock.patch.object(LlamaMLP, "forward", lambda self, x: whole(self, x)):
        assert find_module_change(model) == (
            "language_model.layers.0.mlp has a replaced method forward (LlamaMLP.forward)"
        )
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert find_module_change(model) == "torch has a global forward hook for all modules"
    hook.remove()
    assert find_module_change(model) is None
    model.visual_embedder.projector[2] = nn.SiLU()
    assert "projector.2 is a torch.nn.modules.activation.SiLU, expected GELU" in find_module_change(model)
    model = make_model()
    step = model.depth_head.step
    model.depth_head.step = lambda *args: step(*args)
    assert find_module_change(model) == "depth_head has a replaced method step"
    model = make_model()
    model.language_model.norm.compile()
    assert find_module_change(model) == "language_model.norm was compiled"
    model = make_model()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert "self_attn.q_proj is a peft.tuners.lora.layer.Linear, expected Linear" in find_module_change(model)


def test_output_hidden_states_leaves_the_fast_path(make_model):
    model = make_model()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 6]]), output_hidden_states=True)
    assert choose_backend(model) == "native"


def test_the_choice_is_logged_once(make_model, caplog):
    caplog.set_level(logging.INFO)
    model = make_model()
    model.depth_head.layers[1].mlp.register_forward_hook(lambda *_: None)
    model.depth_head.register_forward_hook(lambda *_: None)
    for _ in range(3):
        choose_backend(model)
    text = caplog.text
    assert text.count("backend = auto: torch instead of native, as depth_head has a forward hook.") == 1
    assert text.count("The hooks of depth_head are not called: decoding calls its parts.") == 1


def test_wrong_backends_are_refused_when_the_pipeline_is_loaded(folder):
    for backend, text in (
        ("fast", "backend is 'fast'; it must be one of auto, torch, cuda_graph, native"),
        ("cuda_graph", "backend = 'cuda_graph' cannot run this model: it runs on CUDA, and .* on cpu"),
    ):
        with pytest.raises(UserError, match=text):
            Pipeline.from_pretrained(folder, backend=backend)
    pipe = Pipeline.from_pretrained(folder, backend="native")
    assert pipe.answer([IMAGE], ["What?"], 4, num_beams=1) == pipe.answer([IMAGE], ["What?"], 4)
    with pytest.raises(UserError, match="'native' answers greedily, without do_sample"):
        pipe.answer([IMAGE], ["What?"], 4, do_sample=True)


def test_torch_and_native_pipelines_agree(folder):
    plain, native = (Pipeline.from_pretrained(folder, backend=name) for name in ("torch", "native"))
    assert torch.equal(plain.generate_codes(["a star"]), native.generate_codes(["a star"]))
    assert plain.answer([IMAGE], ["What?"], 8) == native.answer([IMAGE], ["What?"], 8)
