"""Whether a node of a training is about to be taken away, asked between two steps.

Takes what Ray Train's watcher has heard of drained nodes (a spot machine's notice, `ray
drain-node`, SIGTERM to `ray start --block`), gives a yes once for each of them. All ranks ask the
same number of times and hear the same. What is done about it is loop.py's.
"""

import ray.train


class Notices:
    """The notices of a training, each told once."""

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()

    def has_new(self) -> bool:
        """Whether a node is drained of which no earlier call has told; the same on all ranks.

        All ranks meet here, through an actor: some 10 ms, on a machine with 2 busy cores.
        """
        info = ray.train.get_preemption_info()
        nodes = frozenset(info.preempted_node_ids) if info else frozenset[str]()
        is_new = bool(nodes - self._known)
        self._known |= nodes
        return is_new
