"""The parts of tools/lab that need no cluster: who a recorded process is, what is derived from a go.mod, file texts."""

import base64
import json
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
import yaml
from lab import LabError, binaries, certificates, cluster, fakes, node, oci, processes
from lab.state import Facts, Lab, choose_ports


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setattr("lab.state.HOME", tmp_path)
    monkeypatch.delenv(cluster.GIVEN, raising=False)
    lab = Lab("unit")
    lab.run = tmp_path / "run"
    lab.folder.mkdir()
    return lab


# Processes


def test_record_is_running_only_while_the_process_lives(sleeper):
    record = processes.Record.of(sleeper.pid)
    assert record is not None
    assert record.is_running()
    sleeper.kill()
    sleeper.wait()
    assert not record.is_running()


def test_record_of_another_process_with_the_same_id_is_not_running(sleeper):
    record = processes.Record.of(sleeper.pid)
    assert record is not None
    earlier = processes.Record(record.pid, record.start_ticks - 1, record.boot)
    before_reboot = processes.Record(record.pid, record.start_ticks, "another boot")
    assert not earlier.is_running()
    assert not before_reboot.is_running()


def test_start_ticks_reads_past_a_name_with_spaces_and_parentheses(tmp_path):
    (tmp_path / "7").mkdir()
    fields = ["S", "1", *["0"] * 17, "4711", "0"]
    (tmp_path / "7" / "stat").write_text(f"7 (a) b (c)) {' '.join(fields)}\n")
    assert processes.start_ticks(7, tmp_path) == 4711


@pytest.mark.parametrize("state", ["Z", "X"])
def test_start_ticks_is_none_for_a_dead_process(tmp_path, state):
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(f"7 (gone) {state} {' '.join(['1'] * 30)}\n")
    assert processes.start_ticks(7, tmp_path) is None


def test_stop_spares_a_process_that_took_over_a_recorded_id(sleeper, tmp_path):
    found = processes.Record.of(sleeper.pid)
    assert found is not None
    path = tmp_path / "etcd.json"
    path.write_text(json.dumps({"pid": found.pid, "start_ticks": found.start_ticks + 1, "boot": found.boot}))
    processes.stop([path])
    assert sleeper.poll() is None
    assert not path.exists()


def test_start_then_stop_ends_the_process_and_keeps_its_log(tmp_path):
    record, log = tmp_path / "records" / "talker.json", tmp_path / "logs" / "talker.log"
    talk = "import sys, time; print(sys.argv[1], flush=True); time.sleep(600)"
    processes.start([sys.executable, "-c", talk, "hello"], record=record, log=log)
    processes.wait_until("it spoke", lambda: log.read_text() == "hello\n", deadline_s=30)
    assert processes.is_running(record)
    found = processes.read(record)
    processes.stop([record])
    assert found is not None
    assert not found.is_running()
    assert log.read_text() == "hello\n"


def test_record_cut_off_by_a_crash_counts_as_none(tmp_path):
    path = tmp_path / "etcd.json"
    path.write_text('{"pid": 1')
    assert processes.read(path) is None
    assert not processes.is_running(path)


def test_waiting_in_vain_shows_the_end_of_the_log(tmp_path):
    log = tmp_path / "etcd.log"
    log.write_text("first\nwhy it failed\n")
    with pytest.raises(LabError, match=r"etcd is ready: not within 0 s(?s:.*)why it failed"):
        processes.wait_until("etcd is ready", lambda: False, deadline_s=0, log=log)


# Binaries


def test_replacements_cover_the_staging_modules_and_nothing_else():
    go_mod = """\
module k8s.io/kubernetes

require (
\tgithub.com/onsi/gomega v0.0.0
\tk8s.io/api v0.0.0
\tk8s.io/klog/v2 v2.130.1
\tk8s.io/kube-openapi v0.0.0-20250710124328-f3f2b991d03b
\tk8s.io/mount-utils v0.0.0 // indirect
)

require k8s.io/client-go v0.0.0

replace (
\tk8s.io/api => ./staging/src/k8s.io/api
)
"""
    assert binaries.replacements(go_mod, "1.36.3") == [
        "k8s.io/api=k8s.io/api@v0.36.3",
        "k8s.io/client-go=k8s.io/client-go@v0.36.3",
        "k8s.io/mount-utils=k8s.io/mount-utils@v0.36.3",
    ]


def test_each_program_is_kept_under_its_version():
    assert binaries.path("kubelet").parts[-2:] == (f"kubernetes-{binaries.KUBERNETES}", "kubelet")
    folders = [binaries.path(program) for program in binaries.PROGRAMS]
    assert len(set(folders)) == len(folders)


# Files


def test_kubeconfig_is_whole_in_itself():
    text = certificates.kubeconfig("https://127.0.0.1:6443", authority=b"ca", certificate=b"cert", key=b"key")
    config = yaml.safe_load(text)
    assert config["current-context"] == config["contexts"][0]["name"]
    assert config["contexts"][0]["context"] == {
        "cluster": config["clusters"][0]["name"],
        "user": config["users"][0]["name"],
    }
    assert config["clusters"][0]["cluster"] == {
        "server": "https://127.0.0.1:6443",
        "certificate-authority-data": base64.b64encode(b"ca").decode(),
    }
    assert config["users"][0]["user"] == {
        "client-certificate-data": base64.b64encode(b"cert").decode(),
        "client-key-data": base64.b64encode(b"key").decode(),
    }


@pytest.mark.parametrize(
    ("docker", "containerd"),
    [
        ("redis", "docker.io/library/redis:latest"),
        ("redis:7", "docker.io/library/redis:7"),
        ("phoenix-ml/server:0.1.0", "docker.io/phoenix-ml/server:0.1.0"),
        ("localhost/server", "localhost/server:latest"),
        ("registry:5000/a/b", "registry:5000/a/b:latest"),
        ("ghcr.io/a/b:1", "ghcr.io/a/b:1"),
    ],
)
def test_image_names_are_spelled_out_as_containerd_does(docker, containerd):
    assert node.full_name(docker) == containerd


def test_image_archive_holds_what_its_manifest_names(tmp_path):
    import hashlib
    import tarfile

    out = tmp_path / "image.tar"
    oci.write_archive(out, "phoenix.lab/x:1", files={"x": b"program"}, entrypoint=["/x"], cpu="amd64")
    with tarfile.open(out) as tar:
        contents = {entry.name: tar.extractfile(entry).read() for entry in tar}
    index = json.loads(contents["index.json"])
    assert index["manifests"][0]["annotations"] == {"io.containerd.image.name": "phoenix.lab/x:1"}
    manifest = json.loads(contents["blobs/sha256/" + index["manifests"][0]["digest"].removeprefix("sha256:")])
    for blob in (index["manifests"][0], manifest["config"], *manifest["layers"]):
        digest = blob["digest"].removeprefix("sha256:")
        data = contents[f"blobs/sha256/{digest}"]
        assert hashlib.sha256(data).hexdigest() == digest
        assert len(data) == blob["size"]


# State


def test_facts_are_kept_until_the_next_boot(lab):
    facts = Facts(mode="full", kubernetes="1.36.3", host_ip="192.0.2.1", ports={"etcd": 1}, components=["etcd"])
    lab.write(facts)
    assert lab.facts() == facts
    facts.boot = "an earlier boot"
    lab.write(facts)
    assert lab.facts() is None


def test_ports_that_others_took_from_parts_that_ended_are_lost(lab, sleeper):
    with socket.create_server(("127.0.0.1", 0)) as somebody, socket.create_server(("127.0.0.1", 0)) as ours:
        ports = {"etcd": somebody.getsockname()[1], "apiserver": ours.getsockname()[1], "coredns": 1}
        facts = Facts(mode="full", kubernetes="v1", host_ip="192.0.2.1", ports=ports, components=list(ports))
        lab.records.mkdir()
        (lab.records / "apiserver.json").write_text(json.dumps(asdict(processes.Record.of(sleeper.pid))))
        assert cluster.lost_ports(lab, facts) == f"etcd {ports['etcd']}"


def test_lab_that_is_not_up_says_how_to_start_it(lab):
    with pytest.raises(LabError, match="python -m lab up --name unit"):
        lab.require()


@pytest.mark.parametrize("name", ["bin", "modules", "", "../x", "A", "-x"])
def test_lab_refuses_a_name_that_is_no_folder_of_its_own(name):
    with pytest.raises(LabError, match="cannot name a lab"):
        Lab(name)


def test_ports_of_two_labs_differ():
    import socket

    first = choose_ports()
    assert len(set(first.values())) == len(first)
    with socket.socket() as other:
        other.bind(("0.0.0.0", first["apiserver"]))
        other.listen()
        assert choose_ports()["apiserver"] != first["apiserver"]


def test_a_given_cluster_is_printed_and_never_changed(lab, tmp_path, monkeypatch, capsys):
    given = tmp_path / "given.conf"
    given.write_text("")
    monkeypatch.setenv(cluster.GIVEN, str(given))
    assert cluster.up(lab) == given
    for change in (
        lambda: cluster.stop_component(lab, "etcd"),
        lambda: cluster.set_gpus(lab, count=1, resource=fakes.GPU),
        lambda: cluster.set_nodes(lab, count=1, gpus=0, is_schedulable=False),
        lambda: cluster.load(lab, ["x"]),
    ):
        with pytest.raises(LabError, match="changes nothing about it"):
            change()


def test_a_given_cluster_whose_file_is_missing_is_an_error(lab, monkeypatch):
    monkeypatch.setenv(cluster.GIVEN, "/nowhere/config")
    with pytest.raises(LabError, match="PHOENIX_TEST_KUBECONFIG names /nowhere/config"):
        cluster.up(lab)


# Other ways and what is left


@pytest.fixture
def fake_kind(tmp_path, monkeypatch):
    """`kind` and `docker` as programs that note how they were called; the file with their calls."""
    calls = tmp_path / "calls"
    clusters = tmp_path / "clusters"
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("kind", "docker"):
        script = programs / name
        script.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {calls}\n'
            f'case "$*" in "get clusters") cat {clusters};; '
            f'"create cluster"*) echo phoenix-lab-unit > {clusters};; esac\n'
        )
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return calls


def test_kind_is_preferred_where_it_works_and_deleted_by_down(lab, fake_kind):
    assert cluster.up(lab) == lab.kubeconfig
    assert cluster.up(lab) == lab.kubeconfig
    cluster.load(lab, ["phoenix-ml/phoenix-server:0.1.0"])
    with pytest.raises(LabError, match="has no part 'etcd'"):
        cluster.stop_component(lab, "etcd")
    cluster.down(lab)
    kind_calls = [line for line in fake_kind.read_text().splitlines() if line.startswith("kind")]
    assert kind_calls == [
        f"kind create cluster --name phoenix-lab-unit --kubeconfig {lab.kubeconfig} --wait 3m",
        "kind get clusters",
        "kind load docker-image --name phoenix-lab-unit phoenix-ml/phoenix-server:0.1.0",
        f"kind delete cluster --name phoenix-lab-unit --kubeconfig {lab.kubeconfig}",
    ]
    assert lab.facts() is None


def test_host_port_rules_are_those_of_the_labs_network_only():
    listed = """\
-N CNI-HOSTPORT-DNAT
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"phoenix-lab\\" id: \\"1\\"" -j CNI-DN-1
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \\"podman\\" id: \\"2\\"" -j CNI-DN-2
"""
    comment = 'dnat name: "phoenix-lab" id: "1"'
    assert node.host_port_rules(listed) == [
        ["CNI-HOSTPORT-DNAT", "-p", "tcp", "-m", "comment", "--comment", comment, "-j", "CNI-DN-1"]
    ]
