"""transformers' Trainer: accumulation, evaluation, predictions; outputs as mappings and tuples."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from open_unitok.mllm import UniTokMLLMOutput

IDS = torch.tensor([[7, 8, -200, -200, -200, -200, 9, 10, 11], [20, 21, 22, -200, -200, -200, -200, 4, 2]])
LABELS = torch.tensor([[-100] * 6 + [9, 10, 11], [-100] * 3 + [-200] * 4 + [4, 2]])


@pytest.fixture
def codes():
    return torch.randint(0, 8, (2, 4, 3), generator=torch.Generator().manual_seed(5))


class Rows(torch.utils.data.Dataset):
    """Eight samples with different numbers of targets: answers of 1 to 3 ids, and images."""

    def __init__(self, codes):
        self.codes = codes

    def __len__(self):
        return 8

    def __getitem__(self, i):
        labels = LABELS[i % 2].clone()
        if i % 2 == 0:
            labels[6 : 6 + i // 2 % 3] = -100
        ids = IDS[i % 2]
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": ids * 0 + 1,
            "image_codes": self.codes[i % 2],
        }


def trainer_of(model, codes, folder, accumulation=1):
    arguments = TrainingArguments(
        str(folder), max_steps=1, learning_rate=0.0, per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation, report_to=[], logging_steps=1, use_cpu=True,
        disable_tqdm=True, save_strategy="no", max_grad_norm=1e9, seed=1,
    )  # fmt: skip
    return Trainer(
        model=copy.deepcopy(model), args=arguments, train_dataset=Rows(codes), eval_dataset=Rows(codes)
    )


def test_loss_and_gradient_do_not_depend_on_accumulation(tiny, codes, tmp_path):
    model, found = tiny(), []
    for accumulation in (1, 2, 4):
        trainer = trainer_of(model, codes, tmp_path, accumulation)
        trainer.train()
        found.append(next(row for row in trainer.state.log_history if "loss" in row))
    for row in found[1:]:
        assert row["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-5)
    # the sum over text tokens and codes, divided by the number of labels: a visual token counts once
    rows = [Rows(codes)[i] for i in range(8)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    total = model(**batch, reduction="sum").loss.item()
    assert found[0]["loss"] == pytest.approx(total / int((batch["labels"] != -100).sum()), rel=1e-4)


def test_text_loss_with_num_items_is_the_mean(tiny, codes):
    inputs = {"input_ids": IDS[:1], "image_codes": codes[:1], "labels": LABELS[:1]}
    model = tiny()
    torch.testing.assert_close(model(**inputs, num_items_in_batch=3).loss, model(**inputs).loss)
    torch.testing.assert_close(
        model(**inputs, num_items_in_batch=torch.tensor([[6]])).loss * 2, model(**inputs).loss
    )


def test_evaluate_and_predict(tiny, codes, tmp_path):
    trainer = trainer_of(tiny(), codes, tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(Rows(codes)).predictions
    assert predictions.shape == (8, 9, 90)


def test_outputs_are_mappings_and_tuples(tiny, codes):
    model, inputs = tiny(), {"input_ids": IDS, "image_codes": codes}
    out = model(**inputs, labels=LABELS)
    assert isinstance(out, UniTokMLLMOutput) and out["loss"] is out.loss is out[0] and "logits" in out
    assert model(**inputs, labels=LABELS, return_logits=False)[0].dim() == 0
    plain = model(**inputs)
    assert plain[0] is plain.logits and "loss" not in plain
    pair = model(**inputs, labels=LABELS, return_dict=False)
    assert type(pair) is tuple and torch.equal(pair[0], out.loss) and torch.equal(pair[1], out.logits)
    assert model.train()(**inputs, labels=LABELS).logits is None


def test_hidden_states_and_attentions(tiny, codes):
    model, inputs = tiny(), {"input_ids": IDS, "image_codes": codes}
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    torch.testing.assert_close(out.hidden_states[0], model.embed_inputs(IDS, codes))
    assert [a.shape for a in out.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))
    torch.testing.assert_close(out.logits, model(**inputs).logits)
    assert model.language_model.config._attn_implementation == "sdpa"
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    wanted = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    found = model.generate(**inputs, **options, **wanted)
    assert torch.equal(found.sequences, model.generate(**inputs, **options))
    assert len(found.hidden_states) == len(found.attentions) == 3
    assert found.attentions[0][0].shape == (2, 4, 9, 9) and found.attentions[1][0].shape == (2, 4, 1, 10)
