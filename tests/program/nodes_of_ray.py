"""A Ray cluster of several nodes on this machine (`ray.cluster_utils.Cluster`), in a process of its own.

    python tests/program/nodes_of_ray.py FOLDER '{"num_cpus": 0}'     # the head's arguments

Every node but the head has an address of its own (127.0.0.2, .3, ...), so that Ray takes them for machines.
Answers in lines of JSON: first `{"address": ...}`, then one answer for each command on standard input:
`{"add": {"num_cpus": 2}}` gives `{"node": 1, "host": ...}`; `{"kill": 1}` kills all of its processes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ray.cluster_utils import Cluster

COMMON = {"object_store_memory": 80 << 20, "include_log_monitor": False}


def main() -> None:
    """Serve commands until the input ends."""
    folder, head = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **COMMON,
            "temp_dir": folder,
            "include_dashboard": True,  # Ray Train frees what a lost run held through it
            "dashboard_host": "127.0.0.1",
            "dashboard_port": 0,
            **head,
        },
    )
    nodes = [cluster.head_node]

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer({"address": cluster.address})
    for line in sys.stdin:
        command = json.loads(line)
        if "add" in command:
            address = f"127.0.0.{len(nodes) + 1}"
            nodes.append(cluster.add_node(**COMMON, node_ip_address=address, **command["add"]))
            answer({"node": len(nodes) - 1, "host": address})
        if "kill" in command:
            cluster.remove_node(nodes[command["kill"]], allow_graceful=False)
            answer({"killed": command["kill"]})
    cluster.shutdown()


if __name__ == "__main__":
    main()
