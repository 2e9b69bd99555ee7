"""An image-text model of transformers as a judge of generated images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from open_unitok.core.errors import UserError
from open_unitok.core.files import existing

from ..core.benchmark import Record, Task
from ..core.judge_pass import (
    ExternalFindings,
    judge_findings,
    read_external_findings,
    read_judge_pass,
    samples_with_images,
)
from ..core.results import model_fingerprint


class VqaModel:
    """A local model that AutoModelForImageTextToText can load.

    Raises:
        UserError: the folder is missing or not such a model.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        path = existing(folder, "--vqa-model must be a folder in transformers' layout.")
        # bfloat16 is slow on most CPUs
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            self.processor = AutoProcessor.from_pretrained(path, local_files_only=True)
            self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{path} holds no image-text model that transformers can load: {reason}"
            ) from error
        self.model: Any = self.model.to(device).eval()  # pyright: ignore
        self.tokens = self.processor.tokenizer
        self.tokens.padding_side = (
            "left"  # so that the next token of every row is predicted at the last position
        )
        # LLaMA's tokenizer has no pad token
        if self.tokens.pad_token is None:
            self.tokens.pad_token = self.tokens.eos_token
        self.device = device
        self.about: dict[str, Any] = {"model": path.name, "fingerprint": model_fingerprint(path)}

    def _inputs(self, images: Sequence[Image.Image], questions: Sequence[str]):
        """The inputs of a batch, in the model's chat template or, without one, LLaVA's format."""
        if getattr(self.processor, "chat_template", None):
            content = [[{"type": "image"}, {"type": "text", "text": q}] for q in questions]
            texts = [
                self.processor.apply_chat_template(
                    [{"role": "user", "content": c}], add_generation_prompt=True
                )
                for c in content
            ]
        else:
            texts = [f"USER: <image>\n{q} ASSISTANT:" for q in questions]
        batch = self.processor(images=list(images), text=texts, padding=True, return_tensors="pt")
        return batch.to(self.device, dtype=self.model.dtype)

    def probabilities(
        self, images: Sequence[Image.Image], questions: Sequence[str], answer: str
    ) -> list[float]:
        """Per image the probability that the next token is the first token of `answer`."""
        import torch

        token = self.tokens(answer, add_special_tokens=False).input_ids[0]
        with torch.inference_mode():
            logits = self.model(**self._inputs(images, questions)).logits[:, -1].float()
        return logits.softmax(dim=-1)[:, token].cpu().tolist()

    def answers(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 5
    ) -> list[str]:
        """Greedy answers of at most `max_new_tokens` tokens."""
        import torch

        batch = self._inputs(images, questions)
        with torch.inference_mode():
            ids = self.model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        # generate() returns prompt and answer
        new = ids[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokens.batch_decode(new, skip_special_tokens=True)]


def read_vqa_findings(
    task: Task,
    records: dict[int, Record],
    folder: Path,
    kind: str,
    key: str,
    file: str,
    check: Callable[[Record, str], Any],
) -> ExternalFindings:
    """The findings of `file` in the run folder if it exists, else `key` of the judge pass `kind`.

    Args:
        file: name of a file of lines {"index", ..., "model"}.
        check: (line, location for the error text) -> the finding; UserError if it is malformed.

    Raises:
        UserError: there is neither.
    """
    path = folder / file
    if path.exists():
        return read_external_findings(path, task.samples, check, "model", "a model without a name")
    judged = read_judge_pass(folder, kind, samples_with_images(task.samples, records))
    if judged is None:
        raise UserError(
            f"{folder}: the images are generated, but not judged. Run again with --vqa-model FOLDER "
            f"(the images are kept), or write the findings of another model to {path}."
        )
    found, problems = judge_findings(judged[0])
    by_index = {i: record[key] for i, record in found.items()}
    return ExternalFindings(by_index, judged[1]["model"], problems)
