"""What of the rules is loaded when: all of them once, then what is published alone."""

from pathlib import Path

import pytest

from supercloud.model.errors import Permanent
from supercloud.upper.platform.agent import nftables, paths
from supercloud.upper.platform.agent.firewall import Firewall, Publication, Rules, ruleset


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel was given."""
    said: list[str] = []
    monkeypatch.setattr(paths, "FIREWALL", str(tmp_path / "firewall.nft"))
    monkeypatch.setattr(nftables, "is_there", lambda: True)
    monkeypatch.setattr(nftables, "apply", said.append)
    return said


def rules(*ports: int, uplink: str = "eth0") -> Rules:
    return ruleset(uplink, [], [Publication("tcp", n, "10.64.0.2", 80) for n in ports])


async def test_what_is_in_force_is_not_loaded_again(loaded: list[str]) -> None:
    firewall = Firewall()
    await firewall.apply(rules())
    await firewall.apply(rules())
    await firewall.apply(rules(7001))
    assert loaded == [rules().frame + rules().ports, rules(7001).ports]
    assert loaded[0].startswith("destroy table inet supercloud\n")
    assert "destroy" not in loaded[1]
    await firewall.apply(rules(7001, uplink="eth1"))
    assert loaded[2] == rules(7001, uplink="eth1").frame + rules(7001).ports


async def test_the_next_agent_finds_the_frame_and_says_the_ports_itself(loaded: list[str]) -> None:
    """So does a clone, whose template had none published."""
    await Firewall().apply(rules())
    await Firewall().apply(rules(7001))
    await Firewall().apply(rules())  # as an agent before may have left some
    assert loaded[1:] == [rules(7001).ports, rules().ports]


async def test_rules_that_may_not_be_in_force_are_loaded_whole(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall = Firewall()
    await firewall.apply(rules(7001))

    def refuse(_: str) -> None:
        raise Permanent("nftables refused the rules")

    with monkeypatch.context() as refusing, pytest.raises(Permanent):
        refusing.setattr(nftables, "apply", refuse)
        await firewall.apply(rules(7001, uplink="eth1"))
    await firewall.apply(rules(7001))
    assert loaded[1] == rules(7001).frame + rules(7001).ports
    with monkeypatch.context() as refusing, pytest.raises(Permanent):
        refusing.setattr(nftables, "apply", refuse)
        await Firewall().apply(rules(7001, uplink="eth1"))
    await Firewall().apply(rules(7001))
    assert loaded[2] == loaded[1]
