from __future__ import annotations

import errno

import pytest

from alignkd.errors import FileSystemError, raise_if_passing


def test_a_server_that_does_not_answer_is_the_file_systems_failure():
    with pytest.raises(
        FileSystemError, match=r"^data\.json: the file system failed \(Connection timed out\)"
    ):
        raise_if_passing(OSError(errno.ETIMEDOUT, "Connection timed out"), "data.json")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("image file is truncated"),  # what Pillow raises
        ValueError("not an image"),
    ],
)
def test_what_is_wrong_with_a_file_is_left_to_the_caller(error):
    raise_if_passing(error, "data.json")
