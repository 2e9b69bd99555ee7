"""Models of ranks other than 0: no memory for weights before rank 0's arrive; no random number is lost."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from open_unitok.core.errors import UserError
from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.training.core import replicas
from open_unitok.training.core.replicas import SampleWithoutStoring, parameters_on_meta
from open_unitok.training.data import seeding
from open_unitok.training.mllm import model as mllm_model
from open_unitok.training.run import load_run_config

CHUNK = replicas._CHUNK


@pytest.mark.parametrize("size", [1, 15, 17, 1000, CHUNK + 3, 2 * CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("sample", [nn.init.normal_, nn.init.uniform_])
def test_the_random_stream_goes_on_without_memory(sample, size):
    torch.manual_seed(0)
    sample(torch.empty(size))
    expected = torch.rand(5)
    torch.manual_seed(0)
    with SampleWithoutStoring():
        empty = torch.empty(size, device="meta")
        assert sample(empty) is empty
        assert torch.equal(torch.rand(5), expected)  # tensors with memory are sampled as always


def test_only_parameters_are_on_meta():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 4)
            self.two.weight = self.one.weight
            self.one.weight.requires_grad_(False)
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.register_parameter("none", None)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    with parameters_on_meta():
        net = Net()
    assert all(parameter.is_meta for parameter in net.parameters()) and net.table.equal(torch.arange(3.0))
    assert net.two.weight is net.one.weight and not net.one.weight.requires_grad
    parameters = list(net.parameters())
    with replicas.allocated_on_demand(net, torch.device("cpu")):
        assert not next(net.parameters()).is_meta and parameters[1].is_meta
    replicas.materialise(net, torch.device("cpu"))
    # optimizer groups made before still hold the parameters
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    assert not any(parameter.is_meta for parameter in parameters)
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_decoder_is_not_copied(mllm, tmp_path, monkeypatch, tied):
    """Its tensors become the model's, and new parts have the numbers that they have beside a random one."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=3000, tie_word_embeddings=tied))
    decoder.save_pretrained(tmp_path / "decoder")
    given = ["model.text={}", f"model.language_model={tmp_path / 'decoder'}", f"out={tmp_path / 'run'}"]
    config = load_run_config(str(mllm.folder / "config.yaml"), given)
    monkeypatch.setattr(mllm_model, "_load_decoder", lambda folder: decoder)
    model = mllm_model.new_parts(config).model
    assert all(not parameter.is_meta for parameter in model.parameters())
    ours, theirs = dict(model.named_parameters()), dict(decoder.named_parameters())
    for name, parameter in theirs.items():
        name = name if name.startswith("lm_head") else f"language_model.{name.removeprefix('model.')}"
        assert ours[name].data_ptr() == parameter.data_ptr(), name
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.manual_seed(seeding.derive_seed(config.seed, "model"))
    plain = UniTokForConditionalGeneration(model.config)
    for name, parameter in plain.depth_head.named_parameters():
        assert parameter.equal(ours[f"depth_head.{name}"]), name
    for (name, buffer), (_, other) in zip(plain.named_buffers(), model.named_buffers(), strict=True):
        assert buffer.equal(other), name


def test_an_error_of_rank_0_is_raised(monkeypatch):
    def fail():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        replicas.build_on_main(fail, nn.Module)
    # rank 1 of two gets it by broadcast
    monkeypatch.setattr(replicas.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(replicas.distributed, "is_main", lambda: False)

    def send(sent, device):
        sent[0] = {"error": "no such model"}

    monkeypatch.setattr(replicas.dist, "broadcast_object_list", send)
    with pytest.raises(UserError, match="no such model"):
        replicas.build_on_main(fail, nn.Module)
