"""Which engine core gets a request, if the server has several: vLLM's rule."""

from __future__ import annotations


class LoadBalancer:
    """Keeps count of the requests of each engine core.

    A core reports its counts with its outputs. Between two reports, requests that were sent to it count as waiting:
    otherwise, all requests that arrive in the meantime would go to the same core.
    """

    def __init__(self, num_cores: int) -> None:
        self.waiting, self.running = [0] * num_cores, [0] * num_cores
        self.first = 0  # where the search begins, so that ties go to each core in turn

    def choose(self) -> int:
        """The core with the lowest score, 4 · waiting + running. It counts as waiting there from now on."""
        num_cores = len(self.waiting)
        order = [(self.first + offset) % num_cores for offset in range(num_cores)]
        chosen = min(order, key=lambda core: 4 * self.waiting[core] + self.running[core])
        self.first = (chosen + 1) % num_cores
        self.waiting[chosen] += 1
        return chosen

    def report(self, core: int, num_waiting: int, num_running: int) -> None:
        """What a core has said about itself."""
        self.waiting[core], self.running[core] = num_waiting, num_running
