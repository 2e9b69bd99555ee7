"""LoRA in training: trained and saved weights, resume, checkpointing, loading by peft and by the Pipeline."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from open_unitok.cli import main
from open_unitok.core.errors import UserError
from open_unitok.generation import Pipeline, Sampling
from open_unitok.mllm import UniTokForConditionalGeneration
from open_unitok.mllm.lora import add_lora, linear_layers, merge_adapter
from open_unitok.tokenizer import UniTok
from open_unitok.training.data.code_shards import CodeFolder

MORE = ("lora={rank: 4, alpha: 8, dropout: 0.1}", "optimizer.lr=1e-2", "engine.gradient_checkpointing=true")


@pytest.fixture(scope="module")
def base(mllm_reference):
    return mllm_reference / "model"


@pytest.fixture(scope="module")
def tuned(mllm, base):
    """Six steps of adapters on the reference, with activation checkpointing, which must keep gradients."""
    return mllm.train("lora", "model=null", f"init_from={base}", *MORE)


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def logits(model):
    ids = torch.tensor([[1, 5, 6, -200, -200, -200, -200, 9]])
    codes = torch.arange(12).view(1, 4, 3)
    with torch.no_grad():
        return model.eval()(input_ids=ids, image_codes=codes).logits


def test_the_run_writes_only_an_adapter(tuned, base, mllm):
    files = {path.name for path in (tuned / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    described = json.loads((tuned / "model" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base) and described["r"] == 4
    names = adapter(tuned / "model").keys()
    assert any(".depth_head.layers.0.mlp.down_proj.lora_A" in name for name in names)
    assert not any("lm_head" in name or "visual_embedder" in name for name in names)
    checkpoint = tuned / "checkpoints" / "step-00000006"
    assert (checkpoint / "adapter_config.json").exists()
    other = base.parent / "checkpoints" / "step-00000006"
    saved = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file())
    whole = sum(f.stat().st_size for f in other.rglob("*") if f.is_file())
    assert saved < whole / 2


def test_a_few_images_are_memorised(mllm, base):
    few = f"{{kind: text_to_image, path: {mllm.folder}/few}}, {{kind: captioning, path: {mllm.folder}/few}}"
    lora = "lora={rank: 8, alpha: 16, parts: [language_model, depth_head, lm_head]}"
    more = [f"data.mixture=[{few}]", lora, "steps=60", "log.every=20", "data.unconditional=0"]
    folder = mllm.train("lora-few", "model=null", f"init_from={base}", *more, "optimizer.lr=2e-2")
    first, *_, last = mllm.rows(folder)
    assert last["text_loss"] < first["text_loss"] / 2 and last["image_loss"] < first["image_loss"] / 2


@pytest.mark.slow
def test_fine_tuning_on_own_images_keeps_old_answers(mllm, tmp_path):
    """A base that answers questions about twelve images is fine-tuned on captions of four others; half of the
    samples are the old questions."""
    seen = mllm.write_codes(mllm.folder, "seen", range(12), captions=1)
    mine = mllm.write_codes(mllm.folder, "mine", range(12, 16), captions=1)
    generated = "kind: text_to_image, path"
    old = f"{{{generated}: {seen}, weight: 0.3}}, {{kind: conversation, path: {seen}, weight: 0.7}}"
    steady = ["batch_size=24", "log.every=1", "optimizer.lr=1e-2", "data.unconditional=0"]
    base = mllm.train("base-answers", f"data.mixture=[{old}]", "steps=150", *steady) / "model"
    new = f"{{{generated}: {mine}, weight: 0.35}}, {{kind: captioning, path: {mine}, weight: 0.15}}"
    mixture = f"data.mixture=[{new}, {{kind: conversation, path: {seen}, weight: 0.5}}]"
    lora = "lora={rank: 8, alpha: 16, parts: [language_model, depth_head]}"
    tuned = mllm.train("own", "model=null", f"init_from={base}", mixture, lora, "steps=80", *steady)
    first, *_, last = mllm.rows(tuned)
    assert last["text_loss/captioning"] < first["text_loss/captioning"] / 2
    pipes = [Pipeline.from_pretrained(base), Pipeline.from_pretrained(base, adapter=tuned / "model")]
    known, own = (tar_samples(Path(f"{path}.tar")) for path in (seen, mine))
    before, after = (answered(pipe, known) for pipe in pipes)
    assert before >= 90 and after >= before - 3, (before, after)
    codes = CodeFolder(mine)
    wanted = torch.from_numpy(np.stack([codes.read(0, n).codes for n in range(4)]).astype(np.int64))
    agreed = []
    for pipe in pipes:
        generated = pipe.generate_codes([caption for _, caption in own], Sampling(greedy=True, guidance=1))
        agreed.append((generated == wanted).float().mean(dim=(1, 2)).min().item())
    assert agreed[0] < 0.5 and agreed[1] >= 0.8, agreed


def tar_samples(path):
    """[(image, caption)] of a tar."""
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    names = sorted(name[:-4] for name in members if name.endswith(".png"))
    return [
        (Image.open(io.BytesIO(members[f"{n}.png"])), json.loads(members[f"{n}.json"])["captions"][0])
        for n in names
    ]


def answered(pipe, samples):
    """Per cent of the questions about these images that are answered correctly."""
    answers = pipe.answer([image for image, _ in samples], ["What is in this photo"] * len(samples))
    return 100 * np.mean([answer.strip() == caption for answer, (_, caption) in zip(answers, samples)])


def test_resumed_equals_uninterrupted(tuned, base, mllm):
    more = ["model=null", f"init_from={base}", *MORE]
    folder = mllm.train("lora-resumed", *more, "stop_at=2")
    assert not (folder / "model").exists()
    mllm.train("lora-resumed", *more)
    assert mllm.rows(folder) == mllm.rows(tuned)
    one, other = adapter(folder / "model"), adapter(tuned / "model")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_peft_pipeline_and_merged_folder_agree(tuned, base, tmp_path):
    from peft import PeftModel

    plain = UniTokForConditionalGeneration.from_pretrained(base)
    before = logits(plain)
    by_peft = logits(PeftModel.from_pretrained(plain, tuned / "model"))
    assert (before - by_peft).abs().max() > 1e-3
    pipe = Pipeline.from_pretrained(base, adapter=tuned / "model")
    assert type(pipe.model) is UniTokForConditionalGeneration
    torch.testing.assert_close(logits(pipe.model), by_peft, atol=1e-5, rtol=1e-4)
    codes = pipe.generate_codes(["a red cat"], Sampling(greedy=True, guidance=1))
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "sampling.json").write_text('{"guidance": 3.0}')
    main.run(["convert", "adapter", str(tmp_path / "base"), str(tuned / "model"), str(tmp_path / "merged")])
    merged = Pipeline.from_pretrained(tmp_path / "merged")
    assert merged.sampling == Sampling(guidance=3.0)
    assert torch.equal(merged.generate_codes(["a red cat"], Sampling(greedy=True, guidance=1)), codes)


def test_a_merged_folder_takes_a_tokenizer_of_the_same_codes(tuned, base, mllm, tmp_path):
    unitok = UniTok.from_pretrained(base / "unitok")
    with torch.no_grad():
        for parameter in unitok.decoder.parameters():
            parameter.mul_(1.5)
    unitok.save_pretrained(tmp_path / "unitok")
    command = ["convert", "adapter", str(base), str(tuned / "model")]
    main.run([*command, str(tmp_path / "merged"), "--unitok", str(tmp_path / "unitok")])
    codes = torch.zeros(1, unitok.config.num_visual_tokens, unitok.config.num_codebooks, dtype=torch.long)
    found = Pipeline.from_pretrained(tmp_path / "merged").unitok.decode(codes)
    assert torch.equal(found, unitok.decode(codes))
    mllm.write_tokenizer(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match="was trained on the codes of tokenizer"):
        main.run([*command, str(tmp_path / "refused"), "--unitok", str(tmp_path / "other")])
    assert not (tmp_path / "refused").exists()


def test_a_fine_tuned_model_keeps_the_sampling_settings_of_its_base(base, mllm, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "sampling.json").write_text('{"guidance": 3.0}')
    folder = mllm.train("keeps", "model=null", f"init_from={tmp_path / 'base'}", "steps=1")
    assert Sampling.from_folder(folder / "model") == Sampling(guidance=3.0)
    fresh = mllm.train("fresh", f"model.unitok={tmp_path / 'base' / 'unitok'}", "steps=1")
    assert not (fresh / "model" / "sampling.json").exists()  # another model, on the same tokenizer


def test_adapters_are_on_all_linear_layers_of_their_parts(base):
    model = UniTokForConditionalGeneration.from_pretrained(base)
    add_lora(model, ["visual_embedder", "lm_head"], rank=2)
    found = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    mine = ("visual_embedder", "lm_head")
    linear = {n for n, m in model.named_modules() if n.startswith(mine) and hasattr(m, "base_layer")}
    assert found == linear and "lm_head" in linear and "visual_embedder.projector.3" in linear
    assert "visual_embedder.projection.attention.qkv" in linear
    with pytest.raises(UserError, match="'head' has no linear layer"):
        linear_layers(model, ["head"])


def test_other_adapters_are_rejected(tuned, base, tmp_path, tiny_mllm):
    model = UniTokForConditionalGeneration.from_pretrained(base)
    with pytest.raises(UserError, match=r"is not an adapter: .* Did you mean .*model"):
        merge_adapter(model, tuned)
    with pytest.raises(UserError, match=r"is not an adapter"):
        merge_adapter(model, tmp_path)
    with pytest.raises(UserError, match=rf"does not fit this model \(it was trained on {base}\)"):
        merge_adapter(tiny_mllm, tuned / "model")


@pytest.fixture
def tiny_mllm(base):
    config = UniTokForConditionalGeneration.from_pretrained(base).config
    config.text_config.hidden_size = config.depth_config.hidden_size = 48
    return UniTokForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora={}"], "lora needs a trained base model"),
        (["lora={rank: 0}"], "rank must be 1 or more"),
        (["lora={parts: [decoder]}"], "'decoder' is not a part"),
        (
            ["model=null", "init_from=x", "lora={parts: [lm_head]}", "lr_factors={lm_head: 0}"],
            "nothing is left",
        ),
        (["attention=flash_attention_2", "engine.dtype=bf16"], "needs a CUDA GPU"),
        (["residual=bf16"], "residual is bf16, but engine.dtype fp32"),
        (["attention=flash_attention_2"], "engine.dtype is fp32"),
    ],
)
def test_error_messages(mllm, overrides, words):
    with pytest.raises(UserError, match=words):
        mllm.train("lora-mistake", *overrides)


def test_only_the_projector_is_trained(mllm, base):
    factors = "{language_model: 0, lm_head: 0, visual_embedder: 0, projector: 1, depth_head: 0}"
    folder = mllm.train("projector", "model=null", f"init_from={base}", f"lr_factors={factors}", "steps=1")
    one, other = mllm.weights(folder), load_file(base / "model.safetensors")
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed and all(name.startswith("visual_embedder.projector.") for name in changed)
