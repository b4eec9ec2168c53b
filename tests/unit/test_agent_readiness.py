"""Whether a port takes connections."""

import socket

from supercloud.upper.platform.agent.readiness import accepts


async def test_a_port_that_listens_accepts_and_one_that_does_not_refuses() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not await accepts("127.0.0.1", port)
        listener.listen()
        assert await accepts("127.0.0.1", port)
    assert not await accepts("127.0.0.1", port)


async def test_a_port_that_does_not_answer_is_waited_for_no_longer_than_it_may_take() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        full = []
        try:
            while len(full) < 64:  # nobody accepts: what does not fit in the queue is not answered
                full.append(socket.socket())
                full[-1].setblocking(False)
                full[-1].connect_ex(place)
            assert not await accepts(*place, timeout_s=0.05)
        finally:
            for each in full:
                each.close()
