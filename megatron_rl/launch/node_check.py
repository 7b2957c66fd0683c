"""What is found out about the nodes of a job before it trains. `srun` starts this once for each rank.

    python -m megatron_rl.launch.node_check --hosts n1 n2 --head n1:29500 --device gpu --ranks-per-node 8 \
        --folder FOLDER

Three stages: the node itself, the folder that all share, an all-reduce over all ranks. Every rank reports each stage to
a store at rank 0. Where the all-reduce fails, neighbours are tried in pairs, which tells whose fault it is. Rank 0 says
what was found in FOLDER/nodes.txt, lists the nodes to leave out in FOLDER/bad_nodes.txt, and ends with 1 if anything
is wrong.
"""

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Edge = tuple[int, int]
ELEMENTS = 2**22  # of the tensor that is reduced, 16 MiB
WELL = "well"
LAST_WORD_S = 5.0
REPORT, BAD = "nodes.txt", "bad_nodes.txt"


@dataclass(frozen=True, slots=True)
class Place:
    """Where Slurm has put this process."""

    rank: int
    ranks: int
    node: int
    local_rank: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Place":
        return cls(*(int(environment[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "NODEID", "LOCALID")))


class Check:
    """Stages that all ranks go through together."""

    def __init__(self, place: Place, head: str, timeout_s: float) -> None:
        host, _, port = head.rpartition(":")
        self.place, self.timeout = place, timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(
            host, int(port), is_master=place.rank == 0, timeout=self.timeout, wait_for_workers=False
        )

    def stage(self, name: str, look: Callable[[], str | None]) -> dict[int, str]:
        """What is wrong, by rank, for every rank to read; who reports nothing in time is wrong."""
        store, place = dist.PrefixStore(name, self.store), self.place
        try:
            fault = look()
        except (RuntimeError, OSError) as error:  # of CUDA, or of the filesystem
            fault = f"{type(error).__name__}: {error}"
        store.set(f"rank {place.rank}", fault or WELL)
        if place.rank == 0:
            faults = self._collect(store, name)
            store.set("faults", "\n".join(f"{rank} {fault}" for rank, fault in faults.items()))
        # Rank 0 waits as long for each stage as a rank has for it.
        store.wait(["faults"], 2 * self.timeout)
        lines = store.get("faults").decode().splitlines()
        return {int(rank): fault for rank, _, fault in (line.partition(" ") for line in lines)}

    def leave(self) -> None:
        """The store ends with rank 0, so the others go first; those that still can."""
        deadline = time.monotonic() + LAST_WORD_S
        left = self.store.add("left", 1)
        while self.place.rank == 0 and left < self.place.ranks and time.monotonic() < deadline:
            time.sleep(0.05)
            left = self.store.add("left", 0)

    def _collect(self, store: dist.Store, name: str) -> dict[int, str]:
        deadline, faults = time.monotonic() + self.timeout.total_seconds(), {}
        for rank in range(self.place.ranks):
            left = timedelta(seconds=max(deadline - time.monotonic(), 0.1))
            try:
                store.wait([f"rank {rank}"], left)
            except dist.DistStoreError:
                faults[rank] = f"did not report on {name} within {self.timeout.total_seconds():g} s"
                continue
            if (fault := store.get(f"rank {rank}").decode()) != WELL:
                faults[rank] = " ".join(fault.split())
        return faults


def look_at_node(place: Place, device: str, ranks_per_node: int, command: str, timeout_s: float) -> str | None:
    """As many GPUs as ranks, which compute; the site's own command."""
    if device == "gpu":
        if (count := torch.cuda.device_count()) != ranks_per_node:
            return f"{count} GPUs, and {ranks_per_node} ranks"
        torch.cuda.set_device(place.local_rank)
        ones = torch.ones(256, 256, device="cuda")
        if not bool((ones @ ones == 256).all()):
            return f"GPU {place.local_rank} computes wrongly"
    if command and place.local_rank == 0:
        try:
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            return f"{command!r} did not end within {timeout_s:g} s"
        if done.returncode:
            return f"{command!r} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}"
    return None


def read_canary(store: dist.Store, rank: int, folder: Path, timeout_s: float) -> str | None:
    """What rank 0 writes must be read by all, though a network filesystem may take its time."""
    canary = folder / "canary.txt"
    if rank == 0:
        word = secrets.token_hex(8)
        canary.write_text(word)
        store.set("word", word)
    word = store.get("word").decode()
    deadline = time.monotonic() + timeout_s
    while not (canary.exists() and canary.read_text() == word):
        if time.monotonic() > deadline:
            return f"cannot read in {folder} what the first node has written there: is it shared?"
        time.sleep(0.2)
    return None


def all_reduce(store: dist.Store, rank: int, size: int, device: str, timeout_s: float) -> str | None:
    """The sum over ranks 1 + 2 + ... + size, element by element."""
    try:
        dist.init_process_group(
            "nccl" if device == "gpu" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=0.4 * timeout_s),
        )
        total = torch.full((ELEMENTS,), rank + 1.0, device="cuda" if device == "gpu" else "cpu")
        dist.all_reduce(total)
        wrong = int((total != size * (size + 1) / 2).sum())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return f"{wrong} of {ELEMENTS} sums over {size} ranks are wrong" if wrong else None


def rounds(nodes: int) -> list[list[Edge]]:
    """The pairs of neighbours on a ring, in rounds in which no node is asked for twice."""
    edges = [(node, (node + 1) % nodes) for node in range(nodes if nodes > 2 else nodes - 1)]
    odd = [edges.pop()] if nodes > 2 and nodes % 2 else []
    return [pairs for pairs in (edges[::2], edges[1::2], odd) if pairs]


def culprits(well: Mapping[Edge, bool]) -> set[int]:
    """Nodes that fail with every neighbour, where such a neighbour does well with its other one.

    Of two nodes that only know each other nobody can tell.
    """
    good = {node for edge, fine in well.items() if fine for node in edge}
    return {node for edge in well for node, other in (edge, edge[::-1]) if node not in good and other in good}


def blamed(bad: set[int], nodes: int) -> set[int]:
    """Where all of several nodes have a fault, it is the job's or the site's and not theirs."""
    return bad if nodes == 1 or len(bad) < nodes else set()


def try_pairs(check: Check, device: str, ranks_per_node: int, timeout_s: float) -> set[int]:
    """The nodes to blame for an all-reduce that fails. All ranks take part."""
    place, well = check.place, {}
    for number, pairs in enumerate(rounds(place.ranks // ranks_per_node)):
        mine = next((pair for pair in pairs if place.node in pair), None)

        def look(pair: Edge | None = mine) -> str | None:
            if pair is None:
                return None
            store = dist.PrefixStore(f"pair {pair}", check.store)
            rank = pair.index(place.node) * ranks_per_node + place.local_rank
            return all_reduce(store, rank, 2 * ranks_per_node, device, timeout_s)

        failed = {rank // ranks_per_node for rank in check.stage(f"round {number}", look)}
        well.update({pair: not failed & {*pair} for pair in pairs})
    return culprits(well)


def examine(check: Check, options: argparse.Namespace) -> tuple[dict[int, str], set[int]]:
    """What is wrong, by rank, after the first stage with a fault; and the nodes that this says are bad."""
    place, timeout_s, per_node, device = check.place, options.timeout, options.ranks_per_node, options.device

    def own() -> str | None:
        return look_at_node(place, device, per_node, options.command, 0.8 * timeout_s)

    def shared() -> str | None:
        return read_canary(check.store, place.rank, options.folder, 0.8 * timeout_s)

    def reduced() -> str | None:
        return all_reduce(dist.PrefixStore("all", check.store), place.rank, place.ranks, device, timeout_s)

    for name, look in {"the node": own, "the shared folder": shared}.items():
        if faults := check.stage(name, look):
            return faults, blamed({rank // per_node for rank in faults}, place.ranks // per_node)
    faults = check.stage("the all-reduce", reduced)
    return faults, try_pairs(check, device, per_node, timeout_s) if faults else set()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", required=True, help="names of the nodes, the first one's first")
    parser.add_argument("--head", required=True, help="HOST:PORT of rank 0")
    parser.add_argument("--device", choices=("gpu", "cpu"), required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="shared by all nodes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that a stage may take")
    parser.add_argument("--command", default="", help="of the site; a node where it fails is bad")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective that takes too long raises
    started, place = time.monotonic(), Place.of(os.environ)
    check = Check(place, options.head, options.timeout)
    faults, bad = examine(check, options)
    check.leave()
    if place.rank != 0:
        return 0
    lines = [f"{options.hosts[rank // options.ranks_per_node]}: rank {rank}: {fault}" for rank, fault in faults.items()]
    if not faults:
        taken = time.monotonic() - started
        lines = [f"{len(options.hosts)} node(s), {place.ranks} rank(s): all well after {taken:.1f} s"]
    (options.folder / REPORT).write_text("".join(f"megatron-rl: preflight: {line}\n" for line in lines))
    (options.folder / BAD).write_text("".join(f"{options.hosts[node]}\n" for node in sorted(bad)))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
