"""Exceptions of the public API. All subclass ``ValueError``; every message is one line that names the culprit."""


class ConfigError(ValueError):
    """A misspelt, contradictory or out-of-range config field or argument."""


class DataError(ValueError):
    """Training or evaluation data that cannot be used (empty corpus, bad line, wrong row)."""


class CheckpointError(ValueError):
    """Saved weights that do not match what they are loaded into (missing, extra or mis-shaped tensors, corrupt files)."""


class PromptError(ValueError):
    """A generation request that cannot be served (empty or too long prompt, token id out of range)."""


class MediaError(ValueError):
    """An image, sound or video that is corrupt, empty, oversized, or does not match its placeholders."""
