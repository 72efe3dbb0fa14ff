"""The errors that the command line prints as one line: a person's to mend (exit 2), or not (1)."""


class UserError(Exception):
    """Bad input: says which field or file, its value, what was expected, and what to do."""


class TaskFailed(Exception):
    """The input was right, and what was asked could not be done: says what, and what to do."""


class ConfigError(UserError):
    """A recipe, an override or a layout that cannot run."""


class DataError(UserError):
    """A data set that is missing, truncated or does not fit the recipe."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not as they were written."""


class CheckpointNotSaved(CheckpointError):
    """A checkpoint that could not be written; older ones are untouched."""


class ConversionError(UserError):
    """Weights or a config.json that have no exact counterpart on the other side."""


class PlanError(UserError):
    """A planned step that does not fit its layout, or could never run to its end."""
