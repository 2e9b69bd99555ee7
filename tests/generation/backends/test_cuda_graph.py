"""The step that a CUDA graph captures, on a CPU: its codes, fixed addresses and missing synchronisation. The
graph itself: tests/gpu."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, generate_image_codes, image_sampling
from open_unitok.generation.backends import BACKENDS, choose_backend, cuda_graph, graph_capture

PROMPTS = [[1, 20, 30, 40, 50, 3], [1, 60, 3], [1, 7, 8, 9, 10, 11, 12, 13, 3]]
UNCONDITIONAL = [1, 90, 91, 3]
SAMPLED = Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.95, guidance_schedule="linear")
GREEDY = Sampling(guidance=3.0, greedy=True)
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Watch(TorchDispatchMode):
    """Records operators that would synchronise host and device."""

    def __init__(self):
        super().__init__()
        self.waits, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func.overloadpacket.__name__ in WAITS:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchedBackend(cuda_graph.CudaGraph):
    """A substitute for a captured graph: the same step on the same tensors, with synchronisation recorded."""

    made = ()

    def compile_step(self, step, state):
        WatchedBackend.made = (*WatchedBackend.made, self)
        self.watch, self.addresses = Watch(), []

        def watched():
            with self.watch:
                step()
            tensors = [*state, *self.counters, *self.captured.tensors.values()]
            self.addresses.append([t.data_ptr() for t in tensors])

        return watched


def generate(backend, model, sampling, prefix=None):
    """Codes from a given backend, on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sampling, "choose_backend", lambda model, *a, **options: backend)
        return generate_image_codes(model, PROMPTS, sampling, [1, 2, 3], UNCONDITIONAL, prefix)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cuda_graph", WatchedBackend)
    monkeypatch.setattr(WatchedBackend, "made", ())


@pytest.mark.parametrize(
    "sampling", [SAMPLED, GREEDY, Sampling(guidance=1.0)], ids=["sampled", "greedy", "unguided"]
)
@pytest.mark.parametrize("given", [0, 4])
def test_the_static_step_generates_the_same_codes_without_waiting(model, sampling, given, watched):
    expected = generate("torch", model, sampling)
    prefix = expected[:, :given] if given else None
    assert torch.equal(generate("cuda_graph", model, sampling, prefix), expected)
    (backend,) = WatchedBackend.made
    assert len(backend.addresses) == 8 - given and backend.watch.calls > 100
    assert all(addresses == backend.addresses[0] for addresses in backend.addresses)
    assert not backend.watch.waits


@pytest.mark.parametrize("attention", ["eager", "unitok_varlen"])
def test_the_static_step_runs_with_other_attention(make_model, watched, attention):
    model = make_model()
    model.language_model.set_attn_implementation(attention)
    assert cuda_graph.cuda_graph_obstacle(model) is None
    assert torch.equal(generate("cuda_graph", model, SAMPLED), generate("torch", model, SAMPLED))
    assert len(WatchedBackend.made) == 1 and not WatchedBackend.made[0].watch.waits


def test_all_layers_share_one_bias_and_grouped_keys_are_not_repeated(full_model, watched, monkeypatch):
    """A bool mask becomes a bias again in every layer, and repeated keys are copied at every step."""
    config, calls = full_model.config.text_config, []
    attention = torch.nn.functional.scaled_dot_product_attention
    step = WatchedBackend.decode_step

    def seen(query, key, value, attn_mask=None, **options):
        if attn_mask is not None and attn_mask.dim() == 4:  # the decoder's
            calls[-1].append((attn_mask.dtype, attn_mask.data_ptr(), attn_mask.shape[-1] % 16, key.shape[1]))
        return attention(query, key, value, attn_mask, **options)

    def step_seen(backend, codes):
        calls.append([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
            step(backend, codes)

    monkeypatch.setattr(WatchedBackend, "decode_step", step_seen)
    assert config.num_key_value_heads < config.num_attention_heads
    generate("cuda_graph", full_model, GREEDY)
    assert [len(layers) for layers in calls] == [config.num_hidden_layers] * 8
    for layers in calls:
        assert set(layers) == {(torch.float32, layers[0][1], 0, config.num_key_value_heads)}


def test_a_failed_capture_is_logged_and_changes_nothing(full_model, monkeypatch, caplog):
    expected = generate("torch", full_model, SAMPLED)

    def fail(device):
        raise RuntimeError("no stream here\nand more")

    monkeypatch.setattr(torch.cuda, "Stream", fail)
    graph_capture._side_stream.cache_clear()
    assert torch.equal(generate("cuda_graph", full_model, SAMPLED), expected)
    assert "without a CUDA graph: no stream here" in caplog.text and "more" not in caplog.text


def test_a_graph_needs_cuda(full_model):
    with pytest.raises(UserError, match="it runs on CUDA, and the model is on cpu"):
        choose_backend(full_model, "cuda_graph", num_steps=100)
