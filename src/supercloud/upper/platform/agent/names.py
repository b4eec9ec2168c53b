"""DNS and DHCP for EEs: one dnsmasq on the bridges, told by files."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import signal
from collections.abc import Callable, Collection, Iterable, Mapping

from supercloud.upper.platform.agent import paths
from supercloud.upper.platform.agent.networks import Network, check_nic
from supercloud.upper.platform.agent.state import read_json, write_json, write_private
from supercloud.wire.messages import EnvironmentSpec

RESTART_S = 1.0
DOMAIN = "supercloud.internal"
_CONF, _HOSTS, _LEASES = (f"{paths.RUN}/names/{name}" for name in ("conf", "hosts", "dhcp"))
_PID = f"{paths.RUN}/names/pid.json"
log = logging.getLogger("supercloud.agent.names")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def configuration(networks: Iterable[Network]) -> str:
    """The text of dnsmasq's configuration file."""
    lines = [
        "keep-in-foreground", "bind-dynamic", "except-interface=lo", "no-hosts", "no-ping",
        f"addn-hosts={_HOSTS}", f"dhcp-hostsfile={_LEASES}", f"resolv-file={paths.RESOLVERS}",
        "dhcp-leasefile=/dev/null", "dhcp-authoritative", "local-ttl=1", "cache-size=1000",
        "domain-needed", "bogus-priv", f"local=/{DOMAIN}/", "user=nobody", "group=nogroup",
        "localise-queries", "pid-file", "quiet-dhcp", "leasefile-ro", "port=53",
    ]  # fmt: skip
    for network in sorted(networks, key=lambda n: n.bridge):
        lines.append(f"interface={network.bridge}")
        for number, gateway in enumerate(network.gateways):
            net, tag = gateway.network, f"{network.bridge}-{number}"
            lines.append(f"dhcp-range=set:{tag},{net[0]},static,{net.netmask},infinite")
            lines.append(f"dhcp-option=tag:{tag},option:router,{gateway.ip}")
            lines.append(f"dhcp-option=tag:{tag},option:dns-server,{gateway.ip}")
    return "\n".join(lines) + "\n"


def hosts(untrusted_names: Mapping[str, Iterable[str]], ucloud: str) -> str:
    """Lines of a hosts file; what is no name or no address is left out."""
    lines = []
    for name, addresses in sorted(untrusted_names.items()):
        if _LABEL.fullmatch(name):
            for address in addresses:
                with contextlib.suppress(ValueError):
                    ip = ipaddress.IPv4Address(address.partition("/")[0])
                    lines.append(f"{ip} {name} {name}.{ucloud}.{DOMAIN}")
    return "\n".join(lines) + "\n"


def stores(networks: Iterable[Network], specs: Iterable[EnvironmentSpec]) -> str:
    """Lines of a hosts file: object stores are at the gateways; ``localise-queries`` says which."""
    names = sorted({spec.objects.server_name for spec in specs if spec.objects})
    found = [gateway.ip for network in networks for gateway in network.gateways]
    return "".join(f"{address} {name}\n" for name in names for address in sorted(found))


def leases(specs: Iterable[EnvironmentSpec]) -> str:
    """One fixed address per MAC of a VM."""
    lines = [
        f"{nic.mac},{check_nic(nic).ip},{spec.name},infinite"
        for spec in specs
        if spec.kind == "vm"
        for nic in spec.nics
    ]
    return "\n".join(sorted(lines)) + "\n"


class Names:
    """Runs dnsmasq while there is a network; starts it anew when its configuration changes."""

    def __init__(self, ucloud: str) -> None:
        self._ucloud = ucloud
        self.died: Callable[[], None] = lambda: None  # told when dnsmasq ends by itself
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._conf = self._files = ""
        os.makedirs(os.path.dirname(_CONF), mode=0o755, exist_ok=True)
        _end_previous()

    async def apply(
        self, networks: Collection[Network], specs: list[EnvironmentSpec],
        untrusted_names: Mapping[str, Iterable[str]],
    ) -> None:  # fmt: skip
        """Bring files and process in line."""
        conf, lease_lines = configuration(networks), leases(specs)
        host_lines = hosts(untrusted_names, self._ucloud) + stores(networks, specs)
        if host_lines + lease_lines != self._files:
            write_private(_HOSTS, host_lines, 0o644)
            write_private(_LEASES, lease_lines, 0o644)
        alive = self._process is not None and self._process.returncode is None
        if conf != self._conf or not alive:
            await self._restart(conf, wanted="\ninterface=" in conf)
        elif host_lines + lease_lines != self._files and self._process:
            self._process.send_signal(signal.SIGHUP)
        self._files, self._conf = host_lines + lease_lines, conf

    async def _restart(self, conf: str, *, wanted: bool) -> None:
        old, self._process = self._process, None
        if old is not None and old.returncode is None:
            old.terminate()
            await old.wait()
        if not wanted:
            return
        write_private(_CONF, conf, 0o644)
        if not os.path.exists(paths.RESOLVERS):
            write_private(paths.RESOLVERS, "", 0o644)
        self._process = await asyncio.create_subprocess_exec(
            "dnsmasq", f"--conf-file={_CONF}", stdin=asyncio.subprocess.DEVNULL
        )
        write_json(_PID, self._process.pid)
        self._watch = asyncio.ensure_future(self._watch_over(self._process))

    async def _watch_over(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        if process is self._process:
            log.warning("dnsmasq ended with %d", status)
            asyncio.get_running_loop().call_later(RESTART_S, self.died)


def _end_previous() -> None:
    """A dnsmasq that an earlier agent left: it is cheap, so it is ended rather than adopted."""
    pid = read_json(_PID, 0)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        with open(f"/proc/{pid}/comm") as file:
            ours = file.read().strip() == "dnsmasq"
        if pid and ours:
            os.kill(pid, signal.SIGKILL)
