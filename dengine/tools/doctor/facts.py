"""The measurements that ranks publish through the store as JSON: one dict for each check."""

from typing import Any, TypeAlias, TypedDict

__all__ = [
    "DeviceFacts",
    "Facts",
    "FolderFacts",
    "GroupFacts",
    "InterfaceFacts",
    "LaunchFacts",
    "LimitFacts",
    "MasterFacts",
    "RankFacts",
    "SignalFacts",
    "ThreadFacts",
]


class LaunchFacts(TypedDict):
    launcher: str
    reason: str
    conflict: tuple[str, str] | None  # message and advice
    node: str
    step_hosts: list[str]
    tuning: dict[str, str]  # variables of Gloo and NCCL


class MasterFacts(TypedDict, total=False):
    """The facts about the master; empty for one process without a master."""

    name: str
    address: str
    port: int
    lookup_s: float
    is_host: bool
    connect_s: float  # on the ranks that do not host the store


class DeviceFacts(TypedDict, total=False):
    device: str
    visible: str | None  # CUDA_VISIBLE_DEVICES
    name: str
    identity: str | None  # the same only for the same piece of hardware; None for the CPU
    num_visible: int
    has_unused_gpu: bool
    is_missing: bool


class ThreadFacts(TypedDict):
    cpus: list[int]
    num_threads: int


class InterfaceFacts(TypedDict):
    interfaces: dict[str, str]  # name -> address
    gloo_named: str
    nccl_named: str
    gloo: str | None  # the address that Gloo would offer the others
    own_name: str
    infiniband: list[str]
    route: str | None  # the address from which this host reaches the master


class LimitFacts(TypedDict):
    num_files: int
    num_files_hard: int
    address_space: int
    memory_locked: int
    has_infiniband: bool
    memory_free: int
    shm: dict[str, int] | None  # "total" and "free" bytes


class SignalFacts(TypedDict):
    unseen: list[str]
    slowest_s: float
    deadly_to_agent: list[str]


class RankFacts(TypedDict):
    """The facts that a rank measures by itself."""

    host: str
    launch: LaunchFacts
    master: MasterFacts
    versions: dict[str, str]
    code: dict[str, str]  # file -> digest
    device: DeviceFacts
    threads: ThreadFacts
    interfaces: InterfaceFacts
    limits: LimitFacts
    signals: SignalFacts


Facts: TypeAlias = dict[int, RankFacts]  # by rank


class FolderFacts(TypedDict, total=False):
    folder: str
    base: str  # the folder itself, or the nearest one above it that exists
    part: str  # the sub-folder that was tried
    free: int
    has_inodes: bool
    flush_s: list[float]
    is_whole: bool  # a renamed file had the content that was written
    error: str
    errno: int | None


class GroupFacts(TypedDict, total=False):
    """The results of the steps in a process group; a missing one was not reached."""

    join: dict[str, Any]  # "seconds", "backend"
    reduced: dict[str, list[dict[str, Any]]]  # backend -> for each size "bytes", "seconds", "is_right"
    pings: dict[int, float]  # rank -> seconds; JSON makes text of the ranks
    checkpoint: dict[str, Any]  # "save_s", "verify_s", "load_s", "is_equal"
    failed: dict[str, str]  # "step", "error"
