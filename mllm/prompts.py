"""Prompt templates of conversations and text-to-image prompts, and their ids and labels (as in the published
code; conversations in the vicuna format).

An image is one `IMAGE_MARK` in text and one placeholder id, which `expand_images` replaces by all
of its tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from open_unitok.core.errors import UserError, did_you_mean

from .config import IGNORED

IMAGE_MARK = "<image>"
UNCONDITIONAL = "<unconditional>"  # tokenised as plain text, not a special id
TEXT_TO_IMAGE_INSTRUCTION = " Generate an image based on this description."

Encode = Callable[[str], list[int]]  # text -> ids, bos first
Turns = Sequence[dict[str, str]]  # [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]


class Template(NamedTuple):
    """A conversation template: SYSTEM USER: question ASSISTANT: answer</s>USER: ..."""

    system: str
    user: str = "USER"
    assistant: str = "ASSISTANT"
    text_to_image: str = TEXT_TO_IMAGE_INSTRUCTION

    def prompt(self, question: str) -> str:
        """The text before the answer to `question`, up to the colon."""
        return f"{self.opening}{self.user}: {question} {self.assistant}:"

    @property
    def opening(self) -> str:
        """The text before the first question."""
        return f"{self.system} " if self.system else ""


TEMPLATES = {
    "vicuna_v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    # for small models: boi after the caption requests an image, without an instruction
    "plain": Template("", text_to_image=""),
}


class ReadingStyle(NamedTuple):
    """How an image that is read and the text around it are prepared."""

    image_mode: str  # of `to_pixels`, for questions
    alignment_mode: str  # the same for projector pretraining, where images come from code folders
    images_first: bool  # whether the images of a question move to its beginning
    alignment_end: str  # behind the caption in projector pretraining, in place of eos


READING_STYLES = {
    "unitok": ReadingStyle("pad", "pad", images_first=False, alignment_end=" "),
    "llava": ReadingStyle("pad_grey", "crop", images_first=True, alignment_end="\n"),
}


def find_reading_style(name: str) -> ReadingStyle:
    """
    Raises:
        UserError: there is no such style.
    """
    if name not in READING_STYLES:
        raise UserError(f"reading = {name!r}." + did_you_mean(name, READING_STYLES))
    return READING_STYLES[name]


def put_images_first(text: str) -> str:
    """A question with its image marks moved to the beginning, a line each."""
    count = text.count(IMAGE_MARK)
    if not count:
        return text
    rest = text.replace(IMAGE_MARK, "").strip()
    return (f"{IMAGE_MARK}\n" * count + rest).strip()


def find_template(name: str) -> Template:
    """
    Raises:
        UserError: there is no such template.
    """
    if name not in TEMPLATES:
        raise UserError(f"template = {name!r}." + did_you_mean(name, TEMPLATES))
    return TEMPLATES[name]


def ids_with_images(encode: Encode, text: str, image_token_id: int) -> list[int]:
    """Ids of `text` with one bos; the pieces between marks are tokenised separately, as published."""
    # every piece gets a bos from `encode`: keep only the first
    first, *others = text.split(IMAGE_MARK)
    ids = encode(first)
    for piece in others:
        ids += [image_token_id, *encode(piece)[1:]]
    return ids


def check_turns(turns: Turns) -> list[tuple[str, str]]:
    """[(question, answer), ...]; an answer before the first question is dropped.

    Raises:
        UserError: the speakers do not alternate, or a turn has no text.
    """
    if turns and turns[0].get("from") == "gpt":
        turns = turns[1:]
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn.get("from") != expected or not isinstance(turn.get("value"), str):
            raise UserError(
                f"Turn {i} of a conversation is {turn!r}; expected {{'from': {expected!r}, 'value': text}}: "
                "human and gpt alternate."
            )
    if not turns or len(turns) % 2:
        raise UserError(f"A conversation has {len(turns)} turns; expected pairs of a question and an answer.")
    return [(turns[i]["value"], turns[i + 1]["value"]) for i in range(0, len(turns), 2)]


def conversation_ids(
    turns: Turns, encode: Encode, template: Template, image_token_id: int, end: str, legacy: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation as published: tokenise the whole text, then locate the answers by the
    number of ids of each round.

    If the numbers do not add up (a word is tokenised differently alone than within the text), the sample has
    no targets.

    Args:
        encode: of a tokenizer that adds a bos.
        end: the text of eos, which ends every answer.
        legacy: LLaMA's tokenizer option: True = text after `end` is tokenised as a new text, with a space
            before it.

    Raises:
        UserError: see `check_turns`.
    """
    between = f" {template.assistant}: "
    text = template.opening + "".join(
        f"{template.user}: {question}{between}{answer}{end}" for question, answer in check_turns(turns)
    )
    with_image = IMAGE_MARK in text
    ids = ids_with_images(encode, text, image_token_id)

    def count(piece: str) -> int:
        return len(ids_with_images(encode, piece, image_token_id) if with_image else encode(piece))

    labels = list(ids)
    labels[0] = IGNORED  # bos
    position = 1
    for i, part in enumerate(text.split(end)):
        halves = part.split(between)
        if not part or len(halves) != 2:
            break
        # A round tokenised alone has a bos where the whole text has the eos that `split` removed, so its
        # count is right. Without legacy the first word of a later round has no space token: one less. `given`
        # also excludes the bos and the space at the end of `between`, which is part of the answer's first
        # token.
        shift = int(i > 0 and not legacy)
        length, given = count(part) - shift, count(halves[0] + between) - 2 - shift
        labels[position : position + given] = [IGNORED] * given
        position += length
    labels[position:] = [IGNORED] * (len(labels) - position)
    if position != len(ids):  # no targets are better than wrong ones
        labels = [IGNORED] * len(ids)
    return ids, [IGNORED if i == image_token_id else label for i, label in zip(ids, labels)]


def located_conversation_ids(
    turns: Turns,
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]]]],
    template: Template,
    image_token_id: int,
    end: str,
) -> tuple[list[int], list[int]]:
    """The ids of `conversation_ids`, without bos, and labels located by the characters of each id.

    An answer may hold `IMAGE_MARK`, the text of eos or the names of the speakers.

    Args:
        encode: text -> ids without bos, and the (start, end) of each in the text.

    Raises:
        UserError: see `check_turns`.
    """
    parts = [(template.opening, False)] if template.opening else []
    for question, answer in check_turns(turns):
        # the space before an answer is part of its first token, or a token that is generated
        given = f"{template.user}: {question} {template.assistant}:"
        parts += [(given, False), (f" {answer}{end}", True)]
    ids: list[int] = []
    labels: list[int] = []
    piece, answers = "", []  # text since the last image, and the spans of the answers in it

    def encode_piece() -> None:
        found, spans = encode(piece) if piece else ([], [])
        targets = [any(start < stop <= last for start, last in answers) for _, stop in spans]
        ids.extend(found)
        labels.extend(i if target else IGNORED for i, target in zip(found, targets))

    for text, is_answer in parts:
        if is_answer:
            answers.append((len(piece), len(piece) + len(text)))
            piece += text
            continue
        first, *others = text.split(IMAGE_MARK)
        piece += first
        for other in others:
            encode_piece()
            ids.append(image_token_id)
            labels.append(IGNORED)
            piece, answers = other, []
    encode_piece()
    return ids, labels


def conversation_pieces(
    turns: Turns, prompt: Callable[[list[tuple[str, str]], str], str], end: Callable[[str], str]
) -> list[tuple[str, bool]]:
    """A conversation as [(text, is_target), ...] for other tokenizers; the caller tokenises each piece
    separately, so that labels need no counting.

    Args:
        prompt: (earlier rounds, question) -> the text up to the answer.
        end: answer -> the answer with the text that ends it.

    Raises:
        UserError: see `check_turns`; the template changes the text of a round when another round follows.
    """
    rounds, pieces, written = check_turns(turns), [], ""
    for i, (question, answer) in enumerate(rounds):
        upto = prompt(rounds[:i], question)
        if not upto.startswith(written):
            raise UserError("The chat template changes earlier rounds: train on one round per conversation.")
        pieces += [(upto[len(written) :], False), (end(answer), True)]
        written = upto + end(answer)
    return pieces


def expand_images(ids: Sequence[int], image_token_id: int, images: Sequence[Sequence[int]]) -> list[int]:
    """Replace the placeholder of image i by images[i], the ids of all its tokens.

    Raises:
        UserError: the number of placeholders differs from the number of images.
    """
    found = sum(i == image_token_id for i in ids)
    if found != len(images):
        raise UserError(f"The text marks {found} images ({IMAGE_MARK}), but {len(images)} were given.")
    rest = iter(images)
    return [i for token in ids for i in (next(rest) if token == image_token_id else [token])]
