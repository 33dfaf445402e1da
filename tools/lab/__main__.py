"""The command line: `python -m lab …` with PYTHONPATH=tools. Answers go to stdout, progress to stderr."""

import argparse
import os
import sys

from . import LabError, binaries, cluster, fakes, prometheus
from .services import together
from .state import Lab, only_one


def _parser() -> argparse.ArgumentParser:
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", default=os.environ.get("LAB_NAME", "default"), help="which lab (or LAB_NAME)")
    parser = argparse.ArgumentParser(prog="python -m lab", description="A real Kubernetes on this machine, for tests.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[named])

    up = command("up", "start the lab; its kubeconfig's path is the last line on stdout")
    up.add_argument("--control-plane", action="store_true", help="only etcd and an API server: no node, no root")
    up.add_argument("--controllers", action="store_true", help="with --control-plane: the controller manager too")
    down = command("down", "stop the lab and remove what its pods left")
    down.add_argument("--purge", action="store_true", help="remove its images and logs too")
    command("status", "show what runs")
    command("kubeconfig", "print the path of the kubeconfig")
    command("audit-log", "print the path of the API server's audit log")
    load = command("load", "copy images from Docker, or from archives, into the node")
    load.add_argument("images", nargs="+", metavar="IMAGE")
    gpus = command("gpus", "advertise N devices on the real node; 0 removes them")
    gpus.add_argument("count", type=int, metavar="N")
    gpus.add_argument("--resource", default=fakes.GPU, help="as which resource (%(default)s)")
    nodes = command("nodes", "have N fake nodes; 0 removes them")
    nodes.add_argument("count", type=int, metavar="N")
    nodes.add_argument("--gpus", type=int, default=0, metavar="G", help=f"with G {fakes.GPU} each")
    nodes.add_argument("--schedulable", action="store_true", help="without the taint that keeps other pods away")
    for verb in ("start", "stop", "restart"):
        part = command(f"{verb}-component", f"{verb} one part of the lab")
        part.add_argument("part", choices=cluster.COMPONENTS)
    binary = command("binary", "print the path of a program, built first if need be")
    binary.add_argument("program", choices=binaries.PROGRAMS)
    services = command("services", "Redis, PostgreSQL and Kafka beside the lab; `up` prints a SERVICE_BINDING_ROOT")
    services.add_argument("what", choices=("up", "down", "status"))
    services.add_argument("--secure", action="store_true", help="behind TLS and logins")
    services.add_argument("--for-pods", action="store_true", help="on this machine's address; implies --secure")
    monitor = command("prometheus", "a Prometheus that scrapes the lab's pods; `up` prints its URL")
    monitor.add_argument("what", choices=("up", "down", "status"))
    monitor.add_argument("--for-pods", action="store_true", help="on this machine's address instead of loopback")
    monitor.add_argument("--interval", default="15s", help="of scrapes and rules, in whole seconds (%(default)s)")
    return parser


def _run(lab: Lab, arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "up" if arguments.control_plane:
            print(cluster.up_control_plane(lab, controllers=arguments.controllers))
        case "up":
            print(cluster.up(lab))
        case "down":
            if arguments.purge:  # the folder that says what runs goes too
                together.down(lab)
                prometheus.down(lab)
            cluster.down(lab, purge=arguments.purge)
        case "status":
            lines, is_well = cluster.status(lab)
            print("\n".join(lines))
            return 0 if is_well else 1
        case "kubeconfig":
            print(cluster.given_kubeconfig() or (lab.require() and lab.kubeconfig))
        case "audit-log":
            print(lab.require() and lab.audit_log)
        case "load":
            cluster.load(lab, arguments.images)
        case "gpus":
            cluster.set_gpus(lab, count=arguments.count, resource=arguments.resource)
        case "nodes":
            cluster.set_nodes(lab, count=arguments.count, gpus=arguments.gpus, is_schedulable=arguments.schedulable)
        case "stop-component":
            cluster.stop_component(lab, arguments.part)
        case "start-component":
            cluster.start_component(lab, arguments.part)
        case "restart-component":
            cluster.stop_component(lab, arguments.part)
            cluster.start_component(lab, arguments.part)
        case "services" if arguments.what == "up":
            is_secure = arguments.secure or arguments.for_pods
            print(together.up(lab, is_secure=is_secure, is_for_pods=arguments.for_pods))
        case "services" if arguments.what == "down":
            together.down(lab)
        case "services":
            lines, is_well = together.status(lab)
            print("\n".join(lines))
            return 0 if is_well else 1
        case "prometheus" if arguments.what == "up":
            print(prometheus.up(lab, is_for_pods=arguments.for_pods, interval=arguments.interval))
        case "prometheus" if arguments.what == "down":
            prometheus.down(lab)
        case "prometheus":
            lines, is_well = prometheus.status(lab)
            print("\n".join(lines))
            return 0 if is_well else 1
        case "binary":
            binaries.build([arguments.program])
            print(binaries.path(arguments.program))
    return 0


def main() -> int:
    """Run one command, alone for its lab."""
    arguments = _parser().parse_args()
    # iptables and conntrack are not on everybody's PATH
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    try:
        lab = Lab(arguments.name)
        if arguments.command in ("status", "kubeconfig", "audit-log", "binary"):
            return _run(lab, arguments)
        with only_one(lab.name):
            return _run(lab, arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
