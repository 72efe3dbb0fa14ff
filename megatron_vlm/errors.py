"""The errors a person can mend. The command line prints them as one line and exits with 2."""


class UserError(Exception):
    """Bad input: says which field or file, its value, what was expected, and what to do."""


class ConfigError(UserError):
    """A recipe, an override or a layout that cannot run."""


class DataError(UserError):
    """A data set that is missing, truncated or does not fit the recipe."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""


class ConversionError(UserError):
    """Weights or a config.json that have no exact counterpart on the other side."""
