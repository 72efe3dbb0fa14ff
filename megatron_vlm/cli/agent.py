"""`mvlm agent`: the process of each node that starts and watches the ranks there."""

from __future__ import annotations

import argparse

HELP = """The agent of one node of a supervised run; `mvlm supervise` starts it on every node.

It finds its supervisor in MVLM_SUPERVISOR (host:port) and proves itself with
MVLM_SUPERVISOR_SECRET. It ends when it is dismissed, or when nobody has answered for a while.

example:
  MVLM_SUPERVISOR=node1:40000 MVLM_SUPERVISOR_SECRET=... mvlm agent
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `[--patience SECONDS]`."""
    parser.add_argument(
        "--patience",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="without a supervisor, before it ends (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve.

    Raises:
        ConfigError: the environment names no supervisor.
    """
    import os

    from megatron_vlm.errors import ConfigError
    from megatron_vlm.resilience.agent import main
    from megatron_vlm.resilience.protocol import ADDRESS, SECRET

    for name in (ADDRESS, SECRET):
        if name not in os.environ:
            raise ConfigError(f"{name} is not set; agents are started by mvlm supervise")
    return main(args.patience)
