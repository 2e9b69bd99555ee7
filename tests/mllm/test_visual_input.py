"""Dual and continuous visual input: rows, what sees the features, decoding, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig, SiglipVisionModel

from open_unitok.core.errors import UserError
from open_unitok.generation import Sampling, generate_image_codes, generate_text_ids, iter_text_ids
from open_unitok.mllm import UniTokForConditionalGeneration, UniTokMLLMConfig, UniTokProcessor
from open_unitok.mllm.features import FeatureAdapter, FeatureOptions, FeatureSource, ReadImages, feature_sizes
from open_unitok.tokenizer import UniTok, UniTokConfig
from open_unitok.training.data.collate import TrainingSample, collate
from open_unitok.training.data.sequences import SequenceBuilder
from open_unitok.training.data.tar_index import BadSample

IMAGE, FEATURE, IGNORED = -200, -201, -100
N, K, ENTRIES, SOURCE = 4, 3, 16, {"source": "latents"}
TALK = [{"from": "human", "value": "<image>\nWhat is in this photo"}, {"from": "gpt", "value": "a cat"}]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "image_size": 32,
    "stem_width": 8,
    "stage_widths": (8, 8),
    "stage_depths": (1, 1),
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_widths": (8, 8),
    "decoder_depths": (1, 1),
    "num_codebooks": K,
    "codebook_size": ENTRIES,
    "codebook_dim": 4,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "text_vocab_size": 64,
}


@pytest.fixture(scope="module")
def unitok():
    torch.manual_seed(0)
    return UniTok(UniTokConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def parts(unitok, golden):
    """parts(visual_input, features) -> processor and model; equal weights for equal names."""
    made = {}

    def make(visual_input, features=SOURCE):
        key = json.dumps([visual_input, features])
        if key not in made:
            given = {} if visual_input == "discrete" else {"visual_input": visual_input, "features": features}
            tokens = {"num_continuous_tokens": N} if given else {}
            processor = UniTokProcessor.from_text_tokenizer(
                golden / "mllm" / "tokenizer.model",
                image_size=32,
                num_image_tokens=N,
                template="plain",
                **given,
                **tokens,
            )
            processor.unitok = unitok
            ids = {name: i for name, i in processor.token_ids().items() if i is not None}
            text = {**TEXT, "vocab_size": processor.vocab_size, "max_position_embeddings": 128}
            depth = {"num_hidden_layers": 1}
            config = UniTokMLLMConfig.for_tokenizer(
                unitok.config, text_config=text, depth_config=depth, **ids, **given
            )
            model = UniTokForConditionalGeneration(config)
            generator = torch.Generator()
            for name, parameter in sorted(model.named_parameters()):
                generator.manual_seed(sum(map(ord, name)))
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            model.init_from_tokenizer(unitok)
            made[key] = processor, model.eval()
        return made[key]

    return make


def codes_of(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, ENTRIES, (count, N, K)))


def features_of(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    return torch.randn(count, config.num_continuous_tokens, config.continuous_dim, generator=generator)


def sample_of(processor, kind, text, count, width=12, seed=0):
    row = SequenceBuilder(processor, 100).build(kind, text, (N,) * count)
    random = np.random.default_rng(seed)
    codes = tuple(random.integers(0, ENTRIES, (N, K)).astype(np.uint16) for _ in range(count))
    reads = kind not in ("text_to_image", "document") and processor.visual_input != "discrete"
    features = tuple(random.standard_normal((N, width)).astype(np.float16) for _ in range(count * reads))
    return TrainingSample(
        kind, row, () if reads and processor.visual_input == "continuous" else codes, features
    )


# ---- rows --------------------------------------------------------------------------------------------------


def test_the_kind_of_a_sample_is_the_task_switch(parts):
    processor = parts("dual")[0]
    sep, boi, eoi = processor.sep_token_id, processor.boi_token_id, processor.eoi_token_id
    read, generated = [IMAGE] * N + [sep] + [FEATURE] * N, [IMAGE] * N
    expected = {"captioning": read, "text_to_image": generated, "document": generated, "reading": read}
    for kind, image in expected.items():
        text = json.dumps(["a cat", 0, "a dog"]) if kind in ("document", "reading") else "a cat"
        sequence = SequenceBuilder(processor, 100).build(kind, text, (N,))
        ids, labels = sequence.ids.tolist(), sequence.labels.tolist()
        start = ids.index(boi)
        assert ids[start : start + len(image) + 2] == [boi, *image, eoi]
        of_image = [label for i, label in zip(ids, labels) if i in (IMAGE, FEATURE, sep)]
        assert set(of_image) == ({IMAGE} if kind in ("text_to_image", "document") else {IGNORED})
    talk = SequenceBuilder(processor, 100).build("conversation", json.dumps(TALK), (N,))
    assert FEATURE in talk.ids and set(talk.labels[np.isin(talk.ids, [FEATURE, sep])]) == {IGNORED}
    question = processor.question_ids("What is in this photo")
    assert talk.ids[: len(question)].tolist() == question
    probe = parts("continuous")[0]
    assert [i for i in probe.question_ids("What") if i < 0] == [FEATURE] * N and probe.sep_token_id is None


def test_rows_are_cut_before_an_image_never_inside(parts):
    processor = parts("dual")[0]
    text = json.dumps(["a", 0, "b", 1, "c"])
    whole = len(SequenceBuilder(processor, 100).build("reading", text, (N, N)).ids)
    for limit in range(6, whole + 1):
        sequences = SequenceBuilder(processor, limit)
        try:
            row = sequences.build("reading", text, (N, N))
        except BadSample:
            continue
        ids = row.ids.tolist()
        assert ids.count(FEATURE) == ids.count(IMAGE) == N * sequences.num_images("reading", row, N)
        assert ids.count(processor.sep_token_id) == ids.count(IMAGE) // N
        assert ids[-1] != processor.boi_token_id
    with pytest.raises(BadSample, match="does not fit into max_length"):
        SequenceBuilder(processor, N + 4).build("captioning", "a cat", (N,))


# ---- what sees the features --------------------------------------------------------------------------------


def test_text_behind_the_features_changes_with_them(parts):
    processor, model = parts("dual")
    ids = torch.tensor([processor.question_ids("What is in this photo")])
    codes, first = codes_of(1), int((ids[0] == FEATURE).nonzero()[0])
    logits = [
        model(input_ids=ids, image_codes=codes, image_features=features_of(model, 1, seed)).logits[0]
        for seed in range(2)
    ]
    assert torch.equal(logits[0][:first], logits[1][:first])
    assert not torch.allclose(logits[0][-1], logits[1][-1], atol=1e-3)


def test_generated_images_never_change_with_the_adapter(parts):
    processor, model = parts("dual")
    rows = [processor.text_to_image_ids(text) for text in ("a red cat", "a dog")]
    unconditional = [processor.unconditional_ids()] * 2
    assert not any(FEATURE in row for row in rows)
    given = (rows, Sampling(2.0), [0, 1], unconditional)
    before = generate_image_codes(model, *given)
    state = {name: tensor.clone() for name, tensor in model.feature_adapter.state_dict().items()}
    torch.nn.init.normal_(model.feature_adapter[0].weight)
    after = generate_image_codes(model, *given)
    model.feature_adapter.load_state_dict(state)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", ["text_to_image", "text", "document"])
def test_rows_without_features_equal_discrete_input(parts, kind):
    """Bit for bit, losses included; the adapter gets a gradient of exactly 0, the same as none."""
    text = json.dumps(["a cat", 0, "a dog"]) if kind == "document" else "a red cat"
    count = 0 if kind == "text" else 1
    found = []
    for visual_input in ("discrete", "dual", "continuous"):
        processor, model = parts(visual_input)
        batch = collate([sample_of(processor, kind, text, count)], IMAGE, 0)
        assert "image_features" not in batch.inputs
        found.append(model(**batch.inputs))
    for other in found[1:]:
        for name in ("logits", "loss", "text_loss", "image_loss"):
            assert torch.equal(getattr(other, name), getattr(found[0], name)), name


def test_discrete_models_and_processors_are_stored_as_before(parts, tmp_path):
    processor, model = parts("discrete")
    assert not [name for name in model.state_dict() if name.startswith("feature_adapter")]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    stored = (json.loads((tmp_path / name).read_text()) for name in ("config.json", "processor_config.json"))
    for words in stored:
        assert not [
            word for word in words if "feature" in word or "continuous" in word or "visual_inp" in word
        ]


@pytest.mark.parametrize("visual_input", ["dual", "continuous"])
def test_every_trainable_weight_gets_a_gradient(parts, visual_input):
    """Also in batches without features or without codes: ranks of ZeRO 3 must run the same modules."""
    processor, model = parts(visual_input)
    model.train()
    kinds = {"captioning": ("a cat", 1), "text": ("a cat", 0), "text_to_image": ("a cat", 1)}
    for kind, (text, count) in kinds.items():
        model.zero_grad()
        batch = collate([sample_of(processor, kind, text, count)], IMAGE, 0)
        model(**batch.inputs).loss.backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, (kind, missing)
        total = sum(float(p.grad.abs().sum()) for p in model.feature_adapter.parameters())
        assert (total > 0) == (kind == "captioning"), kind
    model.eval()


def test_packed_rows_equal_separate_rows(parts):
    processor, model = parts("dual")
    samples = [
        sample_of(processor, "captioning", "a cat", 1, seed=1),
        sample_of(processor, "text_to_image", "a dog", 1, seed=2),
        sample_of(processor, "conversation", json.dumps(TALK), 1, seed=3),
        sample_of(processor, "text", "The quick brown fox", 0),
    ]
    sums = [model(**collate([sample], IMAGE, 0).inputs, reduction="sum") for sample in samples]
    packed = model(**collate(samples, IMAGE, 0, pack_to=100).inputs, reduction="sum")
    for name in ("text_loss", "image_loss"):
        expected = sum(float(getattr(out, name)) for out in sums)
        assert float(getattr(packed, name)) == pytest.approx(expected, rel=2e-6)


# ---- answers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dual", "continuous"])
def asked(request, parts):
    processor, model = parts(request.param)
    prompts, images = [], []
    for number, (question, count) in enumerate(
        [("What", 1), ("What is in this photo", 2), ("a cat", 0), ("What", 1)]
    ):
        prompts.append(processor.question_ids(question, count))
        codes = codes_of(count, number) if request.param == "dual" else codes_of(0)
        images.append(ReadImages(codes, 9 * features_of(model, count, number) if count else None))
    # the same image with two questions shares its prefill
    prompts.append(processor.question_ids("What is a dog", 1))
    images.append(images[0])
    return model, prompts, images


def test_answers_of_a_batch_are_those_alone(asked):
    model, prompts, images = asked
    expected = [generate_text_ids(model, [p], [i], 6, backend="torch")[0] for p, i in zip(prompts, images)]
    assert len({tuple(row) for row in expected}) > 2
    for options in ({"backend": "torch"}, {"backend": "native"}, {"share_prefix": False}, {"batch_size": 2}):
        assert generate_text_ids(model, prompts, images, 6, **options) == expected, options
    for backend in ("torch", "native"):
        rows = [[] for _ in prompts]
        for new in iter_text_ids(model, prompts, images, 6, backend=backend):
            for row, i in zip(rows, new):
                row += [] if i is None else [i]
        assert rows == expected, backend
    beams = generate_text_ids(model, prompts, images, 6, num_beams=2)
    alone = [generate_text_ids(model, [p], [i], 6, num_beams=2)[0] for p, i in zip(prompts, images)]
    assert beams == alone


def test_cached_answers_are_those_of_a_full_pass(asked):
    model, prompts, images = asked
    answers = generate_text_ids(model, prompts, images, 6, backend="torch")
    for prompt, read, answer in zip(prompts, images, answers):
        if not answer:
            continue
        ids = torch.tensor([prompt + answer])
        given = read.inputs(model.device)
        logits = model(input_ids=ids, **given).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


def test_images_with_equal_codes_and_other_features_share_nothing(parts):
    processor, model = parts("dual")
    prompts, codes = [processor.question_ids("What")] * 2, codes_of(1)
    images = [ReadImages(codes, 5 * features_of(model, 1, seed)) for seed in (0, 3)]
    both = generate_text_ids(model, prompts, images, 8)
    assert both == [generate_text_ids(model, [p], [i], 8)[0] for p, i in zip(prompts, images)]
    assert both[0] != both[1]


def test_the_processor_gives_transformers_generate_its_inputs(parts):
    for visual_input in ("dual", "continuous"):
        processor, model = parts(visual_input)
        images = [Image.fromarray(np.full((32, 32, 3), v, np.uint8)) for v in (20, 200)]
        inputs = processor(images=images, text=["<image>\nWhat", "<image>\nWhat is in this photo"])
        assert inputs["image_features"].shape == (2, N, K * 4)
        assert len(inputs["image_codes"]) == (2 if visual_input == "dual" else 0)
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        read = processor.read_images(images)
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])
        ]
        alone = [generate_text_ids(model, [p], [read.select([i])], 3)[0] for i, p in enumerate(prompts)]
        assert [row[: len(a)] for row, a in zip(found.tolist(), alone)] == alone


# ---- sources -----------------------------------------------------------------------------------------------


def test_features_of_the_tokenizer(unitok):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = {
        "quantised": unitok.up_project(unitok.quantizer.embed(unitok.encode(pixels))),
        "latents": unitok.encode_latents(pixels).half(),
        "encoder": unitok.encoder(pixels).half(),
    }
    fingerprints = set()
    for source, wanted in expected.items():
        options = FeatureOptions(source)
        found = FeatureSource(options, unitok)
        codes, features = found.encode(pixels)
        assert torch.equal(codes, unitok.encode(pixels)) and torch.equal(features, wanted)
        assert features.shape[1:] == feature_sizes(options, unitok.config)
        # an image's features do not depend on its batch
        torch.testing.assert_close(found.encode(pixels[1:2])[1][0], features[1], rtol=1e-3, atol=2e-3)
        fingerprints.add(found.fingerprint())
    assert len(fingerprints) == 3
    # of codes alone, as code folders hold them: exactly those of the pixels
    source = FeatureSource(FeatureOptions("quantised"), unitok)
    assert torch.equal(source.of_codes(unitok.encode(pixels).to(torch.uint16)), expected["quantised"])
    other = UniTok(unitok.config).eval()
    other.load_state_dict(unitok.state_dict())
    with torch.no_grad():
        next(other.up_projection.parameters()).mul_(2)
    assert other.fingerprint() == unitok.fingerprint()  # the codes are the same, the features are not
    assert FeatureSource(FeatureOptions("quantised"), other).fingerprint() != source.fingerprint()
    assert FeatureSource(FeatureOptions("latents"), other).fingerprint() in fingerprints


def test_features_of_a_siglip(unitok, tmp_path):
    """Last hidden state after the last norm, of the squashed image; 46 pixels hold 3 x 3 patches of 14."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionModel(SiglipVisionConfig(image_size=46, patch_size=14, **sizes)).eval()
    siglip.save_pretrained(tmp_path)
    normal = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(normal))
    options = FeatureOptions("tower", str(tmp_path))
    assert feature_sizes(options, unitok.config) == (9, 16)
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    source = FeatureSource(options, unitok)
    squashed = image.resize((46, 46), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(squashed)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = siglip(pixel_values=pixels).last_hidden_state
    _, found = source.encode(torch.zeros(1, 3, 32, 32), source.tower_batch([image]))
    torch.testing.assert_close(found, expected.half(), rtol=1e-3, atol=1e-3)
    assert source.fingerprint() != FeatureSource(FeatureOptions("latents"), unitok).fingerprint()


def test_the_probes_projector_has_the_published_size():
    with torch.device("meta"):
        projector = FeatureAdapter(1024, 4096, norm=True)
        published = FeatureAdapter(1152, 4096, norm=False)
    assert sum(p.numel() for p in projector.parameters()) == 20_981_760
    assert projector[0].eps == 1e-6 and [type(m).__name__ for m in published] == ["Linear", "GELU", "Linear"]
    assert all(m.bias is not None for m in published if isinstance(m, torch.nn.Linear))


# ---- refusals ----------------------------------------------------------------------------------------------

DUAL = {"visual_input": "dual", "features": SOURCE, "sep_token_id": 5}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"visual_input": "double"}, r"visual_input = 'double'\. Did you mean 'dual'\?"),
        (
            {"visual_input": "dual"},
            "features.source = None; visual_input = 'dual' needs one of quantised, latents",
        ),
        ({**DUAL, "features": {"source": "latent"}}, "features.source = 'latent'"),
        (
            {**DUAL, "features": {**SOURCE, "nrom": True}},
            r"features.nrom is not an option\. Did you mean 'norm'",
        ),
        ({**DUAL, "features": {"source": "tower"}}, "'tower', and no other, takes the folder or hub id"),
        ({**DUAL, "features": {**SOURCE, "tower": "x"}}, "'tower', and no other, takes the folder or hub id"),
        (
            {**DUAL, "features": {"source": "tower", "tower": "nowhere"}},
            "features.tower.path is 'nowhere', but",
        ),
        (
            {**DUAL, "features": {"source": "tower", "tower": {"pth": "x"}}},
            "features.tower.pth is not an option",
        ),
        ({**DUAL, "features": {"source": "tower", "tower": 5}}, "features.tower = 5: must be a folder"),
        (
            {**DUAL, "features": {"source": "tower", "tower": {"layer": -2}}},
            "features.tower.path must be the folder or hub id",
        ),
        ({**DUAL, "sep_token_id": None}, "features.separator = True, but sep_token_id = None"),
        ({**DUAL, "visual_input": "continuous"}, "features.separator = False, but sep_token_id = 5"),
        ({**DUAL, "features": {**SOURCE, "norm": 1}}, "features.norm = 1: must be true or false"),
        ({"features": SOURCE}, "features is set, but visual_input = 'discrete' reads no features"),
        ({**DUAL, "feature_token_id": -200}, "feature_token_id = -200 has another meaning"),
        ({**DUAL, "num_continuous_tokens": 0, "continuous_dim": 3}, None),
    ],
)
def test_bad_fields(unitok, fields, line):
    if line is None:  # 0 asks for the tokenizer's own sizes
        assert UniTokMLLMConfig.for_tokenizer(unitok.config, **{**fields, "num_continuous_tokens": 4})
        return
    with pytest.raises(UserError, match=line) as caught:
        UniTokMLLMConfig.for_tokenizer(unitok.config, **fields)
    assert "\n" not in str(caught.value)


def test_dual_input_refuses_a_pyramid():
    pyramid = {"quantizer": "residual", "quantizer_options": {"scales": [1, 2, 4]}}
    config = UniTokConfig(**{**SMALL, "image_size": 64, "codebook_dim": 6, "num_codebooks": 2}, **pyramid)
    with pytest.raises(UserError, match=r"'dual' with codes of a pyramid \(scales \[1, 2, 4\]\): take a"):
        UniTokMLLMConfig.for_tokenizer(config, **DUAL)
    summed = UniTokMLLMConfig.for_tokenizer(config, visual_input="continuous", features=SOURCE)
    assert (summed.num_continuous_tokens, summed.read_length) == (16, 16)


def test_bad_inputs(parts):
    processor, model = parts("dual")
    ids = torch.tensor([processor.question_ids("What")])
    codes, features = codes_of(1), features_of(model, 1)
    cases = [
        ({"image_codes": codes}, "hold 4 feature placeholders, but image_features hold 0 images"),
        ({"image_codes": codes, "image_features": features.repeat(2, 1, 1)}, "image_features hold 2 images"),
        (
            {"image_codes": codes, "image_features": features[..., :5]},
            r"expected \(images, 4 features, width 12",
        ),
        ({"image_features": features}, "hold 4 image placeholders, but no image_codes were given"),
    ]
    for given, line in cases:
        with pytest.raises(UserError, match=line):
            model(input_ids=ids, **given)
    discrete = parts("discrete")[1]
    with pytest.raises(UserError, match="visual_input = 'discrete' reads codes alone"):
        discrete(input_ids=torch.tensor([[1, 5]]), image_features=features)
    # features of an image that is generated; features as targets
    boi, sep = processor.boi_token_id, processor.sep_token_id
    for behind in ([sep] + [FEATURE] * N, [FEATURE] * N):
        row = torch.tensor([[1, 9, boi, *[IMAGE] * N, *behind, 7]])
        labels = torch.where(row == IMAGE, IMAGE, IGNORED)
        given = {"input_ids": row, "image_codes": codes, "image_features": features}
        model(**given, labels=torch.where(row == 7, 7, IGNORED))
        with pytest.raises(UserError, match="An image that is generated has features behind its codes"):
            model(**given, labels=labels)
        with pytest.raises(UserError, match="features are never targets"):
            model(**given, labels=torch.where(row == FEATURE, 7, IGNORED))
    with pytest.raises(UserError, match="A text holds"):
        processor.question_ids("a \x02 b", 0)
