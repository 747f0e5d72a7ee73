"""`pipe:COMMAND`: a tar on the standard output of a shell command, as webdataset has it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, cast

from mmfilter.core.input.places import PIPE, Stamp
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, RawSample
from mmfilter.core.input.source import InputOptions, Source
from mmfilter.core.input.sources.webdataset_tar import tar_samples
from mmfilter.errors import ShardError

_READER_GONE = (0, -13, 141)
"""Exit statuses of a command whose output nobody reads to the end; 13 is SIGPIPE, as the shell and Python tell it."""
_PATIENCE = 5.0
"""Seconds that a command has for its end once nobody reads it."""
_TAIL = 4096


class PipedTar(Source):
    """Runs the command when it is read; what it prints on stderr is quoted if it fails."""

    kind = "pipe"

    def __init__(self, path: str, options: InputOptions) -> None:
        super().__init__(path)
        self._options = options

    @property
    def stem(self) -> str:
        named = re.findall(r"[\w-]+(?=\.tar\b)", self.path)
        return f"pipe-{named[-1] if named else hashlib.sha256(self.path.encode()).hexdigest()[:8]}"

    def stamp(self) -> Stamp:
        return Stamp()

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        """The samples of the tar; raises `ShardError` when the command fails, also after a whole tar."""
        self._options.check_pipe(self.path)
        command = self.path.removeprefix(PIPE)
        with tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
            )
            try:
                yield from tar_samples(self.path, _output(process), max_member_bytes)
            except ShardError:
                self._end(process)
                if process.returncode not in _READER_GONE:
                    raise self._failed(process.returncode, stderr) from None
                raise
            finally:
                self._end(process)
            if process.returncode:
                raise self._failed(process.returncode, stderr)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop reading; a command that goes on writing is told so by the system."""
        _output(process).close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()

    def _failed(self, status: int, stderr: BinaryIO) -> ShardError:
        stderr.seek(max(0, stderr.seek(0, 2) - _TAIL))
        lines = stderr.read().decode("utf-8", "replace").split("\n")
        said = next((f" ({' '.join(line.split())})" for line in reversed(lines) if line.strip()), "")
        return ShardError(self.path, f"failed with exit status {status}{said}; run the command by itself to see why")


def _output(process: subprocess.Popen[bytes]) -> BinaryIO:
    if process.stdout is None:
        raise AssertionError("the command was started without a pipe")
    return cast(BinaryIO, process.stdout)
