"""Everything fastload raises.

    FastloadError
    +-- OptionError (ValueError)              an argument that cannot be meant
    |   +-- SharedMemoryError (RuntimeError)  tensors for one file share memory, and the caller has to choose
    +-- ConfigError (ValueError)              config.json is missing, not JSON, or names nothing known
    +-- CheckpointNotFoundError (FileNotFoundError)   no weights, no shard, no folder, no such repository
    +-- AmbiguousCheckpointError              one folder, two checkpoints, and no rule that chooses
    +-- UnreadableFileError (OSError)         the operating system refused to read
    +-- HubError (OSError)                    the model hub answered with a failure
    +-- FormatError                           the bytes of a file are not what its format promises
    |   +-- TruncatedFileError                the file ends before its contents do
    |   +-- ChangedFileError                  the file became another one after its header was read
    |   +-- HeaderError                       a safetensors header breaks the format
    |   +-- IndexFileError                    a shard index names what is not there, or leaves its folder
    |   +-- UnknownDtypeError                 a data type fastload or this torch does not have
    |   +-- UnsafePickleError                 a pickle asks for code, or for more than a state dict needs
    |   +-- ArchiveError                      the zip or tar around a pickle is damaged or lies
    |   +-- IntegrityError                    bytes are not those that their checksum was made of
    +-- KeyMatchError                         keys of the checkpoint and of the model do not fit
    +-- IncompleteModelError                  a tensor would be left without a value
    +-- BlockError (OSError)                  weights that arrive while the model runs could not be read
    +-- DeviceMemoryError (MemoryError)       an accelerator has too little memory, or none can be pinned for it
    +-- RankError (RuntimeError)              another rank of a process group failed, or is gone
    +-- SaveError (OSError)                   writing failed; the previous checkpoint is untouched
    +-- MissingDependencyError (ImportError)  an optional package is needed and absent

Each message says which file, which key, what was expected, what was found and what to do about it.
"""

from __future__ import annotations

import os

__all__ = [
    "AmbiguousCheckpointError",
    "ArchiveError",
    "BlockError",
    "ChangedFileError",
    "CheckpointNotFoundError",
    "ConfigError",
    "DeviceMemoryError",
    "FastloadError",
    "FormatError",
    "HeaderError",
    "HubError",
    "IncompleteModelError",
    "IndexFileError",
    "IntegrityError",
    "KeyMatchError",
    "MissingDependencyError",
    "OptionError",
    "RankError",
    "SaveError",
    "SharedMemoryError",
    "TruncatedFileError",
    "UnknownDtypeError",
    "UnreadableFileError",
    "UnsafePickleError",
]


class FastloadError(Exception):
    """Base of every error that fastload raises on purpose.

    Args:
        problem: what is wrong, in one sentence.
        file: the file it is wrong in.
        key: the tensor or field it is wrong with.
        expected: what a good input would have there.
        found: what is there.
        fix: what the reader can do.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.key = key
        self.expected = expected
        self.found = found
        self.fix = fix
        details = {"file": self.file, "key": key, "expected": expected, "found": found, "to do": fix}
        lines = [f"  {name + ':':<9} {value}" for name, value in details.items() if value is not None]
        super().__init__("\n".join([problem, *lines]))

    def __str__(self) -> str:
        # OSError and ImportError print their arguments in a form of their own; the message is the same everywhere.
        return str(self.args[0])


class OptionError(FastloadError, ValueError):
    """An argument has a value that cannot be meant, or two arguments contradict each other."""


class SharedMemoryError(OptionError, RuntimeError):
    """Tensors for `save_file` share memory. A RuntimeError too, which is what safetensors raises."""


class ConfigError(FastloadError, ValueError):
    """config.json is missing, is not JSON, or names no architecture that is known."""


class CheckpointNotFoundError(FastloadError, FileNotFoundError):
    """There are no weights where they were looked for, or a file they are made of is missing."""


class AmbiguousCheckpointError(FastloadError):
    """A folder holds two checkpoints of one format, and nothing says which is the current one."""


class UnreadableFileError(FastloadError, OSError):
    """The operating system refused to open, stat, map or read a file."""


class HubError(FastloadError, OSError):
    """The model hub could not be reached, refused access, or does not have the revision."""


class FormatError(FastloadError):
    """The bytes of a file are not what its format promises."""


class TruncatedFileError(FormatError):
    """The file ends before its contents do, or was cut after it was opened."""

    @classmethod
    def since_opened(cls, file: str, expected_bytes: int, found_bytes: int) -> TruncatedFileError:
        """Of a weight file that is shorter than it was when its header was read."""
        return cls(
            "a weight file was cut after its header was read",
            file=file,
            expected=f"{expected_bytes} bytes",
            found=f"{found_bytes} bytes",
            fix="wait until whoever writes it is done, then load again",
        )


class ChangedFileError(FormatError):
    """The file was replaced or rewritten after its header was read, so that the header says nothing of its bytes."""


class HeaderError(FormatError):
    """A safetensors header breaks a rule of the format."""


class IndexFileError(FormatError):
    """A shard index is not JSON, names what is not there, or points outside its folder."""


class UnknownDtypeError(FormatError):
    """A data type that fastload does not know, or that the installed torch does not have."""


class UnsafePickleError(FormatError):
    """A pickle asks for a call or an object that a state dict has no need of."""


class ArchiveError(FormatError):
    """The zip or tar around a pickle is damaged, or its directory lies about its contents."""


class IntegrityError(FormatError):
    """A file's bytes are not those that its checksums, or its name in a download cache, were made of."""


class KeyMatchError(FastloadError):
    """Keys, shapes or dtypes of the checkpoint do not fit the model; all problems are in the one message."""


class IncompleteModelError(FastloadError):
    """A parameter or buffer would be left on the meta device or without a value."""


class BlockError(FastloadError, OSError):
    """Weights that arrive after the load, with a block of the model, could not be read or kept."""


class DeviceMemoryError(FastloadError, MemoryError):
    """Weights do not fit into the memory of an accelerator, or host memory cannot be pinned for it. All was freed."""


class RankError(FastloadError, RuntimeError):
    """Another rank of a process group failed in what ranks do together, or is gone."""


class SaveError(FastloadError, OSError):
    """Writing failed. Files of the checkpoint that was there before are untouched."""


class MissingDependencyError(FastloadError, ImportError):
    """An optional package is needed for what was asked, and is not installed."""
