"""Questions about emoji: name, style, category, and which of two names; conversations made of them."""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from .packages import STYLES, EmojiImage

# the first one of each kind is asked in the evaluation
EMOJI_QUESTIONS = {
    "name": ("What is this?", "Which emoji is this?", "What is this emoji called?"),
    "style": ("Which style is it?", "In which style is it?", "What is the style?"),
    "category": ("Which category is it?", "To which category does it belong?", "What is the category?"),
    "choice": ("Is it {} or {}?", "Which is it, {} or {}?", "What is this, {} or {}?"),
}
CONVERSATIONS = 4  # per image


class EmojiQuestion(NamedTuple):
    """A question about an emoji; `kind` is a key of EMOJI_QUESTIONS."""

    kind: str
    question: str
    answer: str


def evaluation_questions(image: EmojiImage, names: Sequence[str]) -> list[EmojiQuestion]:
    """One question of each kind; `names` are those that the wrong one of a choice is sampled from."""
    rng = Random(f"evaluation/{image.key}")
    return [_ask(image, kind, phrases[0], names, rng) for kind, phrases in EMOJI_QUESTIONS.items()]


def sample_conversations(image: EmojiImage, names: Sequence[str]) -> list[list[dict[str, str]]]:
    """Conversations of one to three questions in LLaVA's format, the image before the first question.

    A name that was asked for or offered answers later questions, so it is the last thing of a conversation.
    """
    rng, found = Random(f"conversations/{image.key}"), []
    for _ in range(CONVERSATIONS):
        kinds = [*rng.sample(("style", "category"), rng.randrange(3)), rng.choice(("name", "name", "choice"))]
        turns = []
        for number, kind in enumerate(kinds):
            asked = _ask(image, kind, rng.choice(EMOJI_QUESTIONS[kind]), names, rng)
            turns.append({"from": "human", "value": ("" if number else "<image>\n") + asked.question})
            turns.append({"from": "gpt", "value": asked.answer})
        found.append(turns)
    return found


def _ask(image: EmojiImage, kind: str, phrase: str, names: Sequence[str], rng: Random) -> EmojiQuestion:
    emoji = image.emoji
    if kind == "choice":
        wrong = rng.choice([name for name in names if name != emoji.name])
        both = [emoji.name, wrong]
        rng.shuffle(both)
        return EmojiQuestion(kind, phrase.format(*both), emoji.name)
    answers = {"name": emoji.name, "style": STYLES[image.style].title, "category": emoji.category}
    return EmojiQuestion(kind, phrase, answers[kind])
