"""Train a sentencepiece model that serves as the MLLM's text tokenizer and as stage 1's caption tokenizer."""

import io
from collections.abc import Iterable

from open_unitok.core.errors import UserError


def train_text_tokenizer(
    lines: Iterable[str], vocabulary: int, character_coverage: float = 1.0, max_lines: int = 0
) -> bytes:
    """The file of a byte-fallback BPE model with LLaMA's ids: <unk> 0, <s> 1, </s> 2, <0x00> 3, <0x01> 4.

    The MLLM pads with <unk>.

    Args:
        vocabulary: largest number of ids; fewer if the texts do not fill it.
        character_coverage: share of the texts' characters that get ids; the others become bytes.
        max_lines: train on a random sample of this many lines; 0 = all.

    Raises:
        UserError: there is no text, or the vocabulary is too small for its characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            input_sentence_size=max_lines,
            max_sentence_length=1 << 16,  # bytes; longer lines are left out
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more would make the model depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = (str(error).partition("] ")[2] or str(error)).partition(" Increase")[0]
        raise UserError(
            f"No text tokenizer of {vocabulary} ids can be trained on these texts: {reason} "
            "Raise the vocabulary size (--vocab-size)."
        ) from error
    return model.getvalue()


def prompt_lines(count: int) -> list[str]:
    """The words of the prompts around `count` texts, repeated so that BPE merges each into few tokens."""
    from open_unitok.mllm.prompts import TEMPLATES, TEXT_TO_IMAGE_INSTRUCTION, UNCONDITIONAL  # loads torch

    words = {word for t in TEMPLATES.values() for word in (f"{t.user}:", f"{t.assistant}:", t.system) if word}
    return [*sorted(words), TEXT_TO_IMAGE_INSTRUCTION.strip(), UNCONDITIONAL] * (1 + count // 100)
