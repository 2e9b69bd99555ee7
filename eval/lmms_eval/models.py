"""The classes that lmms-eval builds; this module alone imports lmms-eval."""

from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms as Base  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

from . import adapter


class OpenUniTok(Base):
    """For tasks that give a text and images apart.

    Args:
        pretrained: a model folder or hub id.
        batch_size: questions answered together.
        device: None = cuda where there is one; under several processes each takes a GPU of its own.
        dtype: None = bfloat16 on cuda, float32 elsewhere.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        **more: Any,
    ):
        super().__init__()
        if more:
            raise UserError(f"--model_args has keys that are not known here: {', '.join(sorted(more))}.")
        self.pipeline = adapter.load(pretrained, device, dtype, distributed.local_rank())
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else int(max_batch_size or 32)

    @property
    def device(self) -> Any:
        """Where the model is; lmms-eval gathers there."""
        return self.pipeline.device

    def document(self, task: str, split: str, number: int) -> Any:
        """The sample that a request is about."""
        return self.task_dict[task][split][number]

    def question(self, arguments: tuple[Any, ...]) -> adapter.Question:
        """A simple request: (text, options, doc_to_visual, number, task, split)."""
        text, options, visuals, number, task, split = arguments
        images = adapter.images_of(visuals(self.document(task, split, number)))
        return adapter.Question(images, plain(text), dict(options))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests; images are opened batch by batch."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            size = 16 * self.batch_size  # enough to make batches of like options, little enough to hold
            for start in range(0, len(requests), size):
                part = [self.question(request.args) for request in requests[start : start + size]]
                answers += adapter.answer(self.pipeline, part, self.batch_size, bar.update)
        for request, text in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Losses of options, since lmms-eval takes the smallest; wrapped, since it unwraps them once."""
        results = []
        for request in tqdm(requests, desc="options", disable=self.rank != 0):
            text, target, visuals, number, task, split = request.args
            document = self.document(task, split, number)
            option = target(document) if callable(target) else target
            found = adapter.loss_of(self.pipeline, adapter.images_of(visuals(document)), plain(text), option)
            results.append(GenerationResult(text=found))  # pyright: ignore[reportArgumentType]
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not offered."""
        raise UserError("Tasks of several rounds (generate_until_multi_round) cannot be run with this model.")


class OpenUniTokChat(OpenUniTok):
    """For tasks that give messages; images stay where they stand between the texts."""

    is_simple = False

    def question(self, arguments: tuple[Any, ...]) -> adapter.Question:
        """A chat request: (text, doc_to_messages, options, number, task, split)."""
        _, messages, options, number, task, split = arguments
        images, text = adapter.question_of(messages(self.document(task, split, number)))
        return adapter.Question(images, text, dict(options))


def plain(text: str) -> str:
    """A simple task's text; its images come first, so that marks of other models go."""
    return text.replace(adapter.MARK, "").strip()
