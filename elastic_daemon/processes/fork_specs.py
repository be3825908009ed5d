"""What a process of the daemon is told when it is forked."""

from __future__ import annotations

import socket
from typing import Any

from elastic_daemon import protocol as p
from elastic_daemon.config import Device, HostExpertCopies, Settings
from elastic_daemon.processes.frontend_link import frontend_settings
from elastic_daemon.processes.runtime_dir import RuntimeDir
from elastic_daemon.processes.store import RendezvousStore


def rank_spec(action: p.StartRank, settings: Settings, runtime: RuntimeDir, store: RendezvousStore) -> dict[str, Any]:
    copies = settings.host_expert_copies is HostExpertCopies.AUTO
    return {
        "log_level": settings.log_level,
        "members": action.members,
        "slots": action.slots,
        "gpu": action.gpu if settings.device is Device.CUDA else None,
        "scratch_dir": str(runtime.scratch),
        "fence_word": str(runtime.fence_word),
        "host_copies_dir": str(runtime.experts) if copies else None,
        "heartbeat_dir": str(runtime.path),
        "control": runtime.control_socket,
        "store_host": store.host,
        "store_port": store.port,
        "store_prefix": store.prefix,
        **runtime.zmq_addresses,
    }


def frontend_spec(settings: Settings, runtime: RuntimeDir, listener: socket.socket) -> dict[str, Any]:
    return {
        "control": runtime.control_socket,
        "http_socket": runtime.http_socket,
        "listen_fd": listener.fileno(),
        "settings": frontend_settings(settings),
        "tls": settings.tls.to_message() if settings.tls is not None else None,
        **runtime.zmq_addresses,
    }
