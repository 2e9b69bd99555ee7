"""The class-conditional model: golden files of the published module, sizes, dropouts, bad input."""

import math

import pytest
import torch
from transformers import AutoModel

from open_unitok.core.errors import UserError
from open_unitok.mllm.class_conditional import ClassConditionalConfig, ClassConditionalModel
from open_unitok.mllm.class_conditional.convert import from_llamagen, our_name, to_llamagen
from open_unitok.mllm.class_conditional.layers import rotary_table, rotate

# parameters in millions: LlamaGen on 16,384 codes; 8 x 4,096 codes with 1 and with 4 depth layers
COUNTS = {
    "B": (110.9, 143.1, 164.4),
    "L": (342.9, 389.3, 427.9),
    "XL": (774.7, 837.0, 897.9),
    "XXL": (1411.0, 1489.6, 1574.6),
    "3B": (3096.7, None, None),
    "XXXL": (None, 4056.2, 4294.1),
}


def draw(model, batch=3, seed=0):
    """Random classes and codes for a model."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    shape = (batch, config.num_image_tokens, config.num_codebooks)
    codes = torch.randint(min(config.book_sizes), shape, generator=generator)
    return torch.randint(config.num_classes, (batch,), generator=generator), codes


def test_equals_the_published_module(published):
    model, out, meta = published.model, published.out, published.meta
    torch.testing.assert_close(model.rotary(), out["rotary"], atol=1e-6, rtol=0)
    result = model.train()(out["labels"], out["codes"], return_logits=True)
    torch.testing.assert_close(result.last_hidden_state, out["hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.image_logits, out["logits"], atol=1e-5, rtol=0)
    assert abs(result.loss.item() - meta["loss"]) < 1e-5
    result.loss.backward()
    parameters = dict(model.named_parameters())
    assert {our_name(name) for name in meta["grad_norms"]} == parameters.keys()
    for name, norm in meta["grad_norms"].items():
        found = parameters[our_name(name)].grad
        assert found is not None and abs(found.norm().item() - norm) < 1e-5, name


@pytest.mark.parametrize("size", COUNTS)
def test_published_numbers_of_parameters(size):
    books = [{"num_codebooks": 1, "codebook_size": 16384}, {"depth_layers": 1}, {"depth_layers": 4}]
    for fields, millions in zip(books, COUNTS[size]):
        with torch.device("meta"):
            model = ClassConditionalModel(ClassConditionalConfig.named(size, **fields))
        if millions is not None:
            assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_the_class_is_at_no_position_and_cells_turn_by_their_differences():
    table = rotary_table(4, 6, 16, 10000.0, torch.device("cpu"))
    assert table.shape == (25, 8, 2) and not table[0].any()
    states = torch.randn(2, 1, 1, 16)
    turned = rotate(states.expand(2, 1, 25, 16), table)
    products = turned[0, 0] @ turned[1, 0].T  # of a query at every place with a key at every place
    assert not products[0].any() and not products[:, 0].any()
    cells = products[1:, 1:].view(4, 6, 4, 6)
    # the same step of rows and columns, anywhere in the grid
    torch.testing.assert_close(cells[0, 1, 2, 4], cells[1, 2, 3, 5], atol=2e-6, rtol=0)
    assert abs(cells[0, 1, 2, 4] - cells[0, 1, 1, 4]) > 1e-3


def test_starts_at_the_logarithm_of_the_codebook_size_and_every_parameter_gets_a_gradient(tiny):
    model = ClassConditionalModel(tiny(code_sizes=None).config)
    assert math.isclose(model(*draw(model)).loss.item(), math.log(11), rel_tol=1e-6)
    for fields in ({}, {"num_codebooks": 1, "depth_layers": 0}):
        model = tiny(**fields).train()
        model(*draw(model)).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_one_codebook_has_neither_depth_head_nor_bias(tiny):
    model = tiny(num_codebooks=1, depth_layers=0)
    names = model.state_dict().keys()
    assert {name for name in names if name.startswith("depth_head.")} == {"depth_head.output.weight"}
    published = {"cls_embedding.embedding_table.weight", "tok_embeddings.weight", "output.weight"}
    assert published < to_llamagen(model).keys()
    again = from_llamagen(to_llamagen(model), "x", num_heads=2, num_image_tokens=9)
    assert again.config.num_classes == 5 and again.config.null_class == 5
    torch.testing.assert_close(again(*draw(model)).image_logits, model(*draw(model)).image_logits)


def test_codes_see_earlier_codes_and_the_class_alone(tiny):
    model = tiny()
    classes, codes = draw(model)
    before = model(classes, codes).image_logits
    for n, k in ((8, 2), (8, 1), (4, 0), (0, 1)):
        changed = codes.clone()
        changed[:, n, k] = (changed[:, n, k] + 1) % 11
        same = (model(classes, changed).image_logits == before).all(dim=(0, 3))  # (N, K)
        place = n * 3 + k
        assert same.flatten()[: place + 1].all()
        # every later code of the token, and of later tokens, depends on it
        assert not same.flatten()[place + 1 :].any()
    assert not (model((classes + 1) % 5, codes).image_logits == before).all(dim=(0, 3)).any()


def test_sub_codebooks_of_other_sizes_are_masked(tiny):
    model = tiny(code_sizes=[11, 4, 7])
    logits = model(*draw(model)).image_logits
    lowest = torch.finfo(torch.float32).min
    assert (logits[..., 1, 4:] == lowest).all() and (logits[..., 2, 7:] == lowest).all()
    assert (logits[..., 0, :] > lowest).all()
    with pytest.raises(UserError, match="go up to"):
        classes, codes = draw(model)
        codes[0, 0, 1] = 4
        model(classes, codes)


def test_dropout_and_drop_path_act_in_training_alone(tiny):
    for fields in ({"dropout": 0.5}, {"attention_dropout": 0.5}, {"drop_path": 0.6}):
        model = tiny(**fields)
        inputs = draw(model)
        assert torch.equal(model(*inputs).image_logits, model(*inputs).image_logits)
        model.train()
        found = [model(*inputs, return_logits=True).image_logits for _ in range(4)]
        assert any(not torch.equal(found[0], other) for other in found[1:])
    # whole branches of whole samples
    model = tiny(drop_path=0.6, num_hidden_layers=3).train()
    assert [layer.drop_path for layer in model.layers] == pytest.approx([0.0, 0.3, 0.6])
    branch = model.layers[2]._drop(torch.ones(200, 2, 2))
    kept = branch.flatten(1).amax(dim=1)
    assert set(kept.tolist()) == {0.0, kept.max().item()} and math.isclose(
        kept.max().item(), 2.5, rel_tol=1e-5
    )


def test_saves_and_loads_by_the_auto_class(tiny, tmp_path):
    model = tiny(token_layout={"rows": 1, "columns": 9})
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ClassConditionalModel and loaded.config.layout.grid == (1, 9)
    inputs = draw(model)
    assert torch.equal(loaded(*inputs).image_logits, model(*inputs).image_logits)


def test_gradient_checkpointing_changes_nothing(tiny):
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(*draw(model)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_classes": 0}, "num_classes = 0: must be at least 1"),
        ({"class_dropout": 1.0}, "class_dropout = 1.0: must be 0 or more and below 1"),
        ({"hidden_size": 36, "num_attention_heads": 6}, "the width of a head must be a multiple of 4"),
        ({"num_codebooks": 1, "depth_layers": 2}, "depth_layers = 2 must be 0 with num_codebooks = 1"),
        ({"depth_layers": 0}, "depth_layers = 0 must be at least 1 with num_codebooks = 8"),
        ({"dropout": 0.1, "drop_path": 0.1}, "set dropout and attention_dropout to 0"),
        ({"num_image_tokens": 10}, "do not fill a square grid"),
        (
            {"num_image_tokens": 18, "token_layout": {"rows": 4, "columns": 4, "registers": 2}},
            "one token per cell and no registers",
        ),
        ({"num_classes": "10"}, "num_classes = '10': must be a whole number"),
        ({"num_classes": True}, "num_classes = True: must be a whole number"),
        ({"depth_layers": 1.5}, "depth_layers = 1.5: must be a whole number"),
        ({"dropout": "0.1"}, "dropout = '0.1': must be a number"),
        ({"class_dropout": float("nan")}, "class_dropout = nan: must be 0 or more and below 1"),
        ({"rope_base": 0}, "rope_base = 0: must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: must be a number above 0"),
        ({"token_layout": [4, 4]}, r"token_layout = \[4, 4\]: must be"),
        ({"code_sizes": 8}, "code_sizes = 8: must be a list of whole numbers"),
        ({"code_sizes": [3, 4096]}, "expected num_codebooks = 8 sizes"),
    ],
)
def test_rejects_sizes_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as error:
        ClassConditionalConfig(**fields)
    assert "\n" not in str(error.value)


def test_rejects_inputs_in_one_line(tiny):
    model = tiny(class_dropout=0.0)
    classes, codes = draw(model)
    for wrong, message in (
        ((classes + 5, codes), "classes range from .* allowed: 0 to 4"),
        ((classes, codes[:, :4]), "expected .B,. and .B, 9, 3."),
        ((classes[:2], codes), "expected .B,. and .B, 9, 3."),
        ((classes, codes + 9), "image_codes range from"),
    ):
        with pytest.raises(UserError, match=message):
            model(*wrong)
    with pytest.raises(UserError, match="'XS' is not a class-conditional size"):
        ClassConditionalConfig.named("XS")


def test_converts_both_checkpoints_and_rejects_others(published):
    back = to_llamagen(published.model)
    assert back.keys() == published.weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in published.weights.items())
    # as training scripts save it, with tables that some versions keep
    saved = {"model": {**back, "freqs_cis": torch.zeros(3)}, "steps": 1}
    wrapped = {"model": {f"module.{name}": tensor for name, tensor in back.items()}}
    for nested in (saved, wrapped):
        model = from_llamagen(nested, "x", num_heads=2, num_image_tokens=16)
        assert model.config.num_classes == 10 and model.config.null_class == 10
    model = from_llamagen(back, "x", num_heads=2, num_image_tokens=16, num_classes=11)
    assert model.config.null_class is None
    with pytest.raises(UserError, match="has width 32, which is not a published size: give --heads"):
        from_llamagen(back, "x")
    with pytest.raises(UserError, match=r"has 11 classes .* not 9"):
        from_llamagen(back, "x", num_heads=2, num_classes=9)
    with pytest.raises(UserError, match="conditioned on captions"):
        from_llamagen({"cls_embedding.cap_proj.fc1.weight": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match="not a checkpoint of LlamaGen"):
        from_llamagen({"weight": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match="x does not fit"):
        from_llamagen({k: v for k, v in back.items() if k != "norm.weight"}, "x", num_heads=2)
