"""Check that other hosts can reach the network interfaces that Gloo and NCCL would use."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from dengine.launch.env import Launch
from dengine.launch.network import address_towards, chosen_interface, interfaces
from dengine.tools.doctor.facts import Facts, InterfaceFacts
from dengine.tools.doctor.report import Finding, Verdict, ranks_text

__all__ = ["interface_facts", "judge_interfaces"]


def interface_facts(launch: Launch | None) -> InterfaceFacts:
    """The interfaces of this host.

    `gloo`: the address that Gloo would offer the others; `route`: the address from which this host reaches the master.
    """
    found = interfaces()
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    chosen = chosen_interface(os.environ, launch)
    return {
        "interfaces": found,
        "gloo_named": named,
        "nccl_named": os.environ.get("NCCL_SOCKET_IFNAME", ""),
        "gloo": _own_address() if chosen is None else found.get(chosen),
        "own_name": socket.gethostname(),
        "infiniband": sorted(path.name for path in Path("/sys/class/infiniband").glob("*")),
        "route": None if launch is None else address_towards(launch.master_addr) or None,
    }


def judge_interfaces(facts: Facts, hosts: dict[int, str]) -> Finding:
    reported = {rank: each["interfaces"] for rank, each in facts.items()}
    for rank, each in reported.items():
        problem = _unknown_name(rank, each, hosts) or (
            _local_address(rank, each, hosts) if len(set(hosts.values())) > 1 else None
        )
        if problem is not None:
            return problem
    first = reported[min(reported)]
    nccl = f"; NCCL_SOCKET_IFNAME={first['nccl_named']}" if first["nccl_named"] else ""
    fabric = f"; InfiniBand {', '.join(first['infiniband'])}" if first["infiniband"] else ""
    return Finding("interfaces", Verdict.OK, f"Gloo takes {_chosen(reported)}{nccl}{fabric}")


def _unknown_name(rank: int, each: InterfaceFacts, hosts: dict[int, str]) -> Finding | None:
    wanted = {"GLOO_SOCKET_IFNAME": each["gloo_named"], "NCCL_SOCKET_IFNAME": each["nccl_named"]}
    for variable, value in wanted.items():
        names = each["interfaces"]
        is_prefix = variable.startswith("NCCL") and not value.startswith("=")
        for name in [] if value.startswith("^") else [part for part in value.lstrip("=").split(",") if part]:
            if not any(other.startswith(name) if is_prefix else other == name for other in names):
                return Finding(
                    "interfaces",
                    Verdict.FAIL,
                    f"{variable}={value} on {ranks_text([rank], hosts)}, which has {', '.join(names) or 'none'}",
                    f"set {variable} to an interface that this host has, or unset it.",
                    (rank,),
                )
    return None


def _local_address(rank: int, each: InterfaceFacts, hosts: dict[int, str]) -> Finding | None:
    """The finding if there are several hosts and only this host can reach the address; else None."""
    if each["gloo"] and not each["gloo"].startswith("127."):
        return None
    route = next((name for name, address in each["interfaces"].items() if address == each["route"]), "")
    is_local = (each["route"] or "127.").startswith("127.")  # hosts that share a network, or a wrong master, too
    advice = "" if is_local else f"export GLOO_SOCKET_IFNAME={route or 'eth0'} (it reaches the master), or "
    return Finding(
        "interfaces",
        Verdict.WARN,  # whether it does harm depends on which rank connects to which: the check of the group shows it
        f"{each['own_name']} resolves to {each['gloo'] or 'nothing'} on {ranks_text([rank], hosts)}: Gloo would offer "
        "the other hosts an address that they cannot reach",
        f"{advice}give the host's own name its real address in /etc/hosts.",
        (rank,),
    )


def _chosen(reported: dict[int, InterfaceFacts]) -> str:
    """The interfaces that the ranks use, with their addresses: `eth0 (10.0.0.1, 10.0.0.2)`."""
    addresses: dict[str, dict[str, None]] = {}
    for each in reported.values():
        name = next((name for name, address in each["interfaces"].items() if address == each["gloo"]), None)
        local = "lo" if (each["gloo"] or "").startswith("127.") else "an interface"
        addresses.setdefault(name or local, {})[each["gloo"] or "unknown"] = None
    return ", ".join(f"{name} ({', '.join(list(of)[:3])}{', ...' * (len(of) > 3)})" for name, of in addresses.items())


def _own_address() -> str | None:
    """The address that Gloo takes: that of the host's own name, if it can listen there, else the loopback address."""
    with suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
        return address
    return "127.0.0.1"
