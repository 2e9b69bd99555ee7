"""Models that judge images or answers: object detectors, VQA models, language models."""
