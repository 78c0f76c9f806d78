"""A program that starts a Ray of one node and stays: `ray_node.py FOLDER JSON`, with Ray's `temp_dir` and more of its
`RayParams`.

Promise: prints the address once Ray answers; when it ends, so does Ray. Unlike `ray.init` it starts none of Ray's autoscaler, log monitor
and dashboard server, which a run has no use for; unlike `ray start` it leaves no address where another program's `ray.init` would find it.
"""

import json
import os
import signal
import sys
from typing import Any


def main(folder: str, arguments: str) -> None:
    answer = os.dup(1)
    # What Ray's processes print is no answer.
    os.dup2(2, 1)
    # Ray 2.60 has no public name for a node without these two.
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class BareNode(Node):
        def start_api_server(self, **_: Any) -> None:
            """Ray 2.60 starts it even without a dashboard, for its report of usage."""

    unused: dict[str, Any] = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    parameters = RayParams(temp_dir=folder, **json.loads(arguments), **unused)
    node = BareNode(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)
    os.write(answer, f"{node.gcs_address}\n".encode())
    os.close(answer)
    while True:
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
