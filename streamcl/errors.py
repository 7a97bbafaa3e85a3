"""What a person may have done wrong, or met on the way: one clear message each, and the exit code that belongs to it."""


class StreamclError(Exception):
    """A message for the person who runs streamcl; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(StreamclError):
    """The command or the YAML is wrong. `problems` holds every message, each one `file:line:column: what, and what would be right`."""

    exit_code = 2

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(StreamclError):
    """The data is wrong: names the file and the row, the sample ids, or the class."""

    exit_code = 3


class RunError(StreamclError):
    """A run's folder cannot be used as asked: in use by another process, made by a newer version, or damaged beyond its checkpoints."""

    exit_code = 2


class DiskError(StreamclError):
    """The disk refused to take what had to be written. What was written before is whole."""

    exit_code = 3


class TrainingError(StreamclError):
    """Training cannot go on (a loss that is not finite, say). The run can be resumed after the fix."""

    exit_code = 1


class PluginError(StreamclError):
    """Code of a plug-in raised. The message shows its own lines, not the engine's."""

    exit_code = 1


class Interrupted(StreamclError):
    """The run was stopped from outside, with its state on disk; `streamcl resume` goes on."""

    exit_code = 130
