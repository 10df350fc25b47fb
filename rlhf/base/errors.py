"""The one kind of error that is the user's to fix."""


class UserError(ValueError):
    """Something the user can fix: a value, a file, a machine that is not there.

    The message is one line, or a line per problem: what is wrong (key=value), then the fix. It is
    printed without a traceback, and the exit code is 2. Every other exception is a bug of ours and
    keeps its traceback.
    """
