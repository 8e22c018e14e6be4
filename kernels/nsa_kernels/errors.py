"""The one exception for what a user got wrong."""


class SettingError(ValueError):
    """A setting or an input breaks a rule; the message names the setting, the rule and the value.

    Raised deliberately and caught by type: commands print its message in one line. Any other exception is a
    programming error, or a fault of the machine, and keeps its traceback.
    """
