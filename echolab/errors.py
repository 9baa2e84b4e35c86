"""The one exception that reaches a user: one line, what is wrong and what to do."""


class EcholabError(Exception):
    """A clear error. The command prints its message as one line and exits with 1."""


class Busy(EcholabError):
    """Another process holds the store's lock."""


class Unreadable(EcholabError):
    """One file that cannot be read. Among many, the others are read all the same."""


class WrongUsage(EcholabError):
    """An option that makes no sense, whatever the data. The command exits with 2."""
