"""Rates of a cluster's devices and links, and what moving bytes between ranks takes on them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one device reaches, not its peak. Links: each device's own, bytes/s in each direction.

    Ranks that follow each other fill nodes of `node` devices.
    """

    products: float  # FLOP/s of large matrix products
    attention: float  # FLOP/s of the attention kernel
    memory: float  # bytes/s, read and written
    link: float  # bytes/s to a device of the same node
    link_latency: float  # seconds of one hop
    network: float  # bytes/s to a device of another node
    network_latency: float
    node: int

    def send(self, size: float, span: int) -> float:
        """Seconds for `size` bytes to a rank `span` places further: latency + size / bandwidth."""
        bandwidth, latency = self._between(span)
        return latency + size / bandwidth

    def gather(self, size: float, ranks: int, span: int) -> float:
        """Of an all-gather or a reduce-scatter in a ring: (n - 1) (latency + size / n / bandwidth); of one rank 0.

        `size` is what all of the n ranks hold together, in bytes; they lie within `span` places.
        """
        return (ranks - 1) * self.send(size / ranks, span)

    def reduce(self, size: float, ranks: int, span: int) -> float:
        """Of an all-reduce in a ring: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size, ranks, span)

    def _between(self, span: int) -> tuple[float, float]:
        inside = span <= self.node
        return (self.link, self.link_latency) if inside else (self.network, self.network_latency)


# Of the peaks that the maker states (bfloat16 without sparsity, NVLink and one 400 Gbit/s adapter per device in one
# direction) a share that large operations reach: products 0.7, attention 0.45, memory 0.85, links 0.75.
H100 = Machine(
    products=0.7 * 989e12,
    attention=0.45 * 989e12,
    memory=0.85 * 3.35e12,
    link=0.75 * 450e9,
    link_latency=2e-6,
    network=0.75 * 50e9,
    network_latency=10e-6,
    node=8,
)
H200 = Machine(
    products=H100.products,
    attention=H100.attention,
    memory=0.85 * 4.8e12,
    link=H100.link,
    link_latency=H100.link_latency,
    network=H100.network,
    network_latency=H100.network_latency,
    node=8,
)
MACHINES = {"H100": H100, "H200": H200}
