"""The model classes of lmms-eval; the only module that imports lmms-eval."""

from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms as Base  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from open_unitok.core import distributed
from open_unitok.core.errors import UserError

from . import adapter


class OpenUniTok(Base):
    """Model class for simple tasks, whose images are separate from the text.

    Args:
        pretrained: a model folder or hub id.
        batch_size: requests per batch.
        device: None = cuda if available; every process uses its own GPU.
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
            raise UserError(f"--model_args has unknown keys: {', '.join(sorted(more))}.")
        self.pipeline = adapter.load_lmms_pipeline(pretrained, device, dtype, distributed.local_rank())
        # "auto" is valid in lmms-eval
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else int(max_batch_size or 32)

    @property
    def device(self) -> Any:
        """The model's device, on which lmms-eval gathers results."""
        return self.pipeline.device

    def document(self, task: str, split: str, number: int) -> Any:
        """The dataset entry of a request."""
        return self.task_dict[task][split][number]

    def question(self, arguments: tuple[Any, ...]) -> adapter.VisualRequest:
        """A simple request: (text, options, doc_to_visual, number, task, split)."""
        text, options, visuals, number, task, split = arguments
        images = adapter.images_of(visuals(self.document(task, split, number)))
        return adapter.VisualRequest(images, _without_marks(text), dict(options))

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        answers: list[str] = []
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            # 16 batches at a time: enough to group equal options, and images fit into memory
            size = 16 * self.batch_size
            for start in range(0, len(requests), size):
                part = [self.question(request.args) for request in requests[start : start + size]]
                answers += adapter.answer_requests(self.pipeline, part, self.batch_size, bar.update)
        for request, text in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """(loss, is greedy) of each answer option; lmms-eval chooses the option with the smallest loss."""
        results = []
        for request in tqdm(requests, desc="options", disable=self.rank != 0):
            text, target, visuals, number, task, split = request.args
            document = self.document(task, split, number)
            option: Any = target(document) if callable(target) else target
            found = adapter.continuation_loss(
                self.pipeline, adapter.images_of(visuals(document)), _without_marks(text), option
            )
            # lmms-eval unwraps one GenerationResult per request
            results.append(GenerationResult(text=found))  # pyright: ignore[reportArgumentType]
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not supported."""
        raise UserError("Tasks with several rounds (generate_until_multi_round) are not supported.")


class OpenUniTokChat(OpenUniTok):
    """Model class for chat tasks, whose images have positions in the text."""

    is_simple = False

    def question(self, arguments: tuple[Any, ...]) -> adapter.VisualRequest:
        """A chat request: (text, doc_to_messages, options, number, task, split)."""
        _, messages, options, number, task, split = arguments
        images, text = adapter.parse_messages(messages(self.document(task, split, number)))
        return adapter.VisualRequest(images, text, dict(options))


def _without_marks(text: str) -> str:
    """The text without image marks: images of a simple task come before the text."""
    return text.replace(adapter.IMAGE_MARK, "").strip()
