"""Every error megadistill raises on purpose: one short tree, one line a message.

A message says what is wrong, where, what was found, what was expected, and what to do. The
programs in launch/ and tools/ print it without a traceback and leave with `exit_code`.
"""

ADVICE = (
    "; `tools/inspect_cache.py CACHE --verify` lists every damaged block, and "
    "`tools/merge_and_inspect.py --repair CACHE` drops them, so that generating makes them again"
)


class MegadistillError(Exception):
    """The root: something the user can mend."""

    exit_code = 2
    common = False  # whether all ranks raise it, so that one of them reports it
    secondary = False  # whether it follows from another rank's end, which is reported there


class ConfigError(MegadistillError):
    """The configuration is wrong, or contradicts the models or the machine."""


class ArgumentError(MegadistillError, ValueError):
    """A public function was called with arguments that do not fit."""


class DataError(MegadistillError):
    """The corpus is missing, empty or not what the configuration says it is."""


class BadDocumentError(DataError):
    """Error for a document that cannot be used. `data.on_bad_document: skip` leaves it out.

    Raised with the reason alone; where the document stands is added by who reads the corpus.
    """


class TeacherError(MegadistillError):
    """The teacher cannot be loaded, or says something that is not a distribution."""


class TrainError(MegadistillError):
    """Training cannot start or go on."""


class StoreError(MegadistillError):
    """A block store cannot be read or written."""


class RecipeError(StoreError):
    """A store was made by another recipe than the one asked for."""


class LockedError(StoreError):
    """Another run is writing the store."""


class CorruptBlockError(StoreError):
    """A file of a store is not what its checksum, its marker or the format says."""

    def __init__(self, file: str, expected: object, found: object) -> None:
        super().__init__(f"{file}: expected {expected}, found {found}: the file is damaged{ADVICE}")
        self.file, self.expected, self.found = file, expected, found

    def __reduce__(self) -> tuple:
        # Exceptions cross process borders; the default would call __init__ with the message alone.
        return type(self), (self.file, self.expected, self.found)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
