"""Fields of a run that starts from a tokenizer: what may change, in the model and in its plan."""

import pytest

from open_unitok.core.errors import UserError
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.tokenizer.layers import drop_path_stacks
from open_unitok.training.run import load_run_config
from open_unitok.training.tokenizer.model import build_model
from open_unitok.training.tokenizer.plan import measure, model_on_meta, plan_run

BARE = ("losses.clip=0", "losses.lpips=0", "caption_tokenizer=null", "data.sources=[{path: x}]")


SIZES = {
    "image_size": 64,
    "stem_width": 8,
    "stage_widths": (8, 16),
    "stage_depths": (1, 1),
    "hidden_size": 32,
}
SIZES |= {
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "decoder_widths": (16, 8),
    "decoder_depths": (1, 1),
}
SIZES |= {"num_codebooks": 4, "codebook_size": 16, "codebook_dim": 4, "embed_dim": 0, "drop_path_rate": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer whose blocks have drop path."""
    path = tmp_path_factory.mktemp("init_from") / "model"
    UniTok(UniTokConfig(**SIZES)).save_pretrained(path)
    return path


def run_from(folder, *overrides):
    own = [f"init_from={folder}", "model={}", *BARE, *overrides]
    return load_run_config("configs/demo/tokenizer.yaml", own)


def rates(model):
    stacks = drop_path_stacks(model)
    return {name: [block.drop_path_rate for block in stack] for name, stack in stacks.items()}


@pytest.mark.parametrize(
    ("fields", "rate"), [("{}", 0.1), ("{image_size: 96}", 0.1), ("{drop_path_rate: 0.4}", 0.4)]
)
def test_drop_path_reaches_the_blocks(folder, fields, rate):
    """The run's rate, else that of the model; what is saved is what the blocks have."""
    config = run_from(folder, f"model={fields}")
    for model in (build_model(config, None), model_on_meta(config)[0]):
        assert model.config.drop_path_rate == rate
        assert rates(model) == dict.fromkeys(("encoder", "decoder"), pytest.approx([0, rate / 2, rate]))


def test_drop_path_of_a_run_may_be_switched_off(folder):
    model = build_model(run_from(folder, "model={drop_path_rate: 0.0}"), None)
    assert not rates(model) and model.config.drop_path_rate == 0


def test_a_plan_counts_the_images_of_the_run(folder):
    small, large = (run_from(folder, f"model={{image_size: {side}}}") for side in (64, 128))
    assert model_on_meta(large)[0].config.image_shape == (128, 128)
    plans = [plan_run(config, 1) for config in (small, large)]
    assert plans[1].tokens == 4 * plans[0].tokens
    assert 3.5 < plans[1].memory[0].activations / plans[0].memory[0].activations < 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model={hidden_size: 48}"], "model.hidden_size is 48, but the model at init_from has"),
        (["model={hiden_size: 32}"], "Unknown config key 'model.hiden_size'. Did you mean 'hidden_size'?"),
        (["init_from=nowhere/at/all"], "init_from is nowhere/at/all, but there is no"),
        (["init_from=HERE"], "holds a model of type 'llama', not a visual tokenizer"),
    ],
)
def test_a_plan_of_other_sizes_is_rejected(folder, tmp_path, overrides, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    overrides = [text.replace("HERE", str(tmp_path)) for text in overrides]
    with pytest.raises(UserError) as error:
        plan_run(run_from(folder, *overrides), 1)
    assert message in str(error.value)


def test_a_plan_may_come_before_its_tokenizer():
    """Sizes are those of the run until the folder exists."""
    config = load_run_config("configs/demo/tokenizer.yaml", ["init_from=nowhere/at/all", *BARE])
    plan = plan_run(config, 1)
    assert plan.assumed == ["nowhere/at/all is not here: the sizes in the section model are assumed"]


def test_a_plan_counts_the_encoder_of_every_image(folder):
    """With fewer decoded images, what runs for all of them is not less."""
    config = run_from(folder)
    model, _ = model_on_meta(config)
    whole, half, encoder = (measure(model, {}, config, share).flops for share in (1.0, 0.5, 0.0))
    assert half == pytest.approx((whole + encoder) / 2, rel=1e-6)
    assert 0.1 * whole < encoder < 0.6 * whole
