"""Where the store of the ranks listens."""

import socket

import pytest

from dengine.distributed.meeting import _listening


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("localhost", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_the_store_listens_by_ipv4_where_the_master_has_such_an_address(host: str, family: int) -> None:
    """Clients of IPv4 are shown as ::ffff:127.0.0.1 by a socket of both kinds, and no /etc/hosts names that."""
    if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with _listening((host, 0)) as listener:
        assert listener.family == family


def test_a_port_that_is_taken_is_an_error_of_the_system() -> None:
    with socket.create_server(("", 0)) as taken, pytest.raises(OSError, match="in use"):
        _listening(("127.0.0.1", taken.getsockname()[1]))
