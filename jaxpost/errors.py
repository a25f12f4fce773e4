"""What a user can get wrong. The text of each error is the one line that the command line prints (exit code 2)."""


class UserError(ValueError):
    """A mistake of input: names the file, line or key, and what would be right."""


class ConfigError(UserError):
    """A key of the configuration: unknown, wrong type, out of range, or at odds with another."""


class DataError(UserError):
    """A data file, an example of it, a tokenizer or a chat template."""


class CheckpointError(UserError):
    """A model folder, a weight file or a run folder."""


class ScoreError(UserError):
    """Answers without a score: a reward function that raised, hung, or gave no number."""


class EngineError(UserError):
    """A server that samples: gone, hanging, refusing, or not returning what is asked of it."""


class HostError(UserError):
    """Hosts of one run: missing, or not the same."""
