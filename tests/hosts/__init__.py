"""Hosts of a cluster on one machine, each in Linux namespaces of its own.

A host has its own network, processes, host name, IPC, /tmp, /dev/shm, /run, home and sshd, and can
be cut off, killed, powered off and booted. What it shares with the others are the processors, the
kernel, its clock and the folders that are named as shared. So these hosts show what happens when
hosts fail or differ; they show neither the speed of a network nor clocks that differ.
"""

from __future__ import annotations

from tests.hosts.cluster import Cluster, Job, unavailable

__all__ = ["Cluster", "Job", "unavailable"]
