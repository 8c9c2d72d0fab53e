class DataError(ValueError):
    """The data cannot be used as it is; the message names the rows and says what to do."""
