"""Counting what could not be read."""

from collections import Counter

from fastclip.data.index import Fault


class FaultLog:
    """Counts faults by kind, each place once, and keeps the first few of a kind to show."""

    EXAMPLES = 3

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Fault]] = {}
        self._seen: set[tuple[str, str]] = set()

    def add(self, faults: list[Fault]) -> list[Fault]:
        """Count faults; returns those worth printing: the first few new ones of each kind."""
        fresh = []
        for fault in faults:
            if (fault.kind, fault.where) in self._seen:
                continue
            self._seen.add((fault.kind, fault.where))
            self.counts[fault.kind] += 1
            examples = self.examples.setdefault(fault.kind, [])
            if len(examples) < self.EXAMPLES:
                examples.append(fault)
                fresh.append(fault)
        return fresh

    def places(self) -> list[str]:
        """The first few faults of each kind, one text each."""
        return [str(fault) for examples in self.examples.values() for fault in examples]

    def report(self) -> str:
        """The summary, and the places below it."""
        return "\n".join([self.summary(), *self.places()])

    def summary(self) -> str:
        """One line, e.g. "3 corrupt image, 1 cut inside a header"; empty where all was well."""
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
