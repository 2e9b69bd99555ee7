"""VQAScore (arXiv 2404.01291): the probability of "Yes" that an image shows a text."""

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from open_unitok.core.errors import UserError

QUESTION, ANSWER = 'Does this figure show "{}"? Please answer yes or no.', "Yes"


def vqascore(logits: np.ndarray, labels: Sequence[int]) -> float:
    """(T, V) logits and T label tokens -> exp(-mean cross-entropy); labels of -100 are ignored."""
    # -100 marks positions without a loss, as in transformers
    kept = [i for i, label in enumerate(labels) if label != -100]
    if not kept:
        raise UserError("VQAScore needs at least one label other than -100.")
    logs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return float(np.exp(np.mean([logs[i, labels[i]] for i in kept])))
