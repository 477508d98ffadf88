import pytest

from alignkd.errors import UserError
from launcher.backends import backend_named
from launcher.backends.hostfile import Host, read_hostfile


def test_a_hostfile_names_hosts_and_slots(tmp_path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# comment\n\nnode-1 slots=4\nme@10.0.0.2   slots = 4 # another\n")
    assert read_hostfile(path) == [Host("node-1", 4), Host("me@10.0.0.2", 4)]
    assert backend_named("ssh").hosts(path, 1, 2) == (Host("node-1", 4),)
    assert backend_named("local").hosts(None, None, None) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no host"),
        ("a slots=0", "at least one slot"),
        ("a", "line 1: 'a' is not of the form"),
        ("a slots=x", "not of the form"),
        ("$(touch x) slots=1", "not of the form"),
        ("-oProxyCommand=x slots=1", "not of the form"),
        ("-l slots=1", "a host name"),
        ("a slots=1\na slots=1", "line 2: a appears twice"),
        ("a slots=1\nb slots=2", "same number of slots"),
    ],
)
def test_every_bad_line_is_reported(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(path)


def test_a_hostfile_must_fit_the_other_options(tmp_path) -> None:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\n")
    for (backend, *arguments), message in (
        (("local", path, None, None), "--hostfile is only for the ssh back end"),
        (("slurm", path, None, None), "--hostfile is only for the ssh back end"),
        (("ssh", None, None, None), "needs --hostfile"),
        (("ssh", path, 2, None), "has 1 host"),
        (("ssh", path, 1, 3), "gives 2 slots"),
        (("ssh", tmp_path / "missing", None, None), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            backend_named(backend).hosts(*arguments)
