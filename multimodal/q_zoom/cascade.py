"""A small model before a large one: what the small one answers well enough, the large one never sees.

Source: the funnel of SpecEyes (arXiv 2603.23483), for any two functions of a batch. With a Q-Zoom model as `small` and
`separability.answer_separability` in `accept` it is theirs, without the agent.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Query = TypeVar("Query")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class CascadeStatistics:
    """What a cascade did; of several batches add them up.

    Attributes:
        queries: how many there were.
        screened: of these the small model was let try.
        accepted: of these its answers were taken.
        screen_seconds, small_seconds, large_seconds: how long each function ran, `accept` among the small model's.
    """

    queries: int = 0
    screened: int = 0
    accepted: int = 0
    screen_seconds: float = 0.0
    small_seconds: float = 0.0
    large_seconds: float = 0.0

    def __add__(self, other: "CascadeStatistics") -> "CascadeStatistics":
        names = self.__dataclass_fields__
        return CascadeStatistics(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def screened_share(self) -> float:
        """SpecEyes' beta: which share of all queries the small model was let try."""
        return self.screened / self.queries if self.queries else 0.0

    @property
    def accepted_share(self) -> float:
        """SpecEyes' alpha: which share of those the small model answered well enough."""
        return self.accepted / self.screened if self.screened else 0.0

    def predicted_speed_up(self, large_seconds_per_query: float | None = None) -> float | None:
        """How many times faster the cascade is than the large model alone.

        Args:
            large_seconds_per_query: of the large model alone; by default what it took for each query left to it. That
                takes its time to grow with the number of queries. Large batches are cheaper a query: measure it then.

        Returns:
            None where nothing is known of the large model, or nothing took any time.
        """
        left = self.queries - self.accepted
        if large_seconds_per_query is None and left:
            large_seconds_per_query = self.large_seconds / left
        if large_seconds_per_query is None:
            return None
        cascade = self.screen_seconds + self.small_seconds + left * large_seconds_per_query
        return self.queries * large_seconds_per_query / cascade if cascade else None


@dataclass(frozen=True)
class CascadeOutput(Generic[Answer]):
    """Answers in the order of the queries, whether the small model's were taken, and what it cost."""

    answers: list[Answer]
    from_small: list[bool]
    statistics: CascadeStatistics


class Cascade(Generic[Query, Answer]):
    """Asks the small model first. It keeps nothing between calls.

    Args:
        small, large: answers to a batch of queries, one each, in order.
        accept: of a query and the small model's answer: whether to take it.
        screen: which queries of a batch the small model may try; by default all. The others go to the large one.
        clock: seconds, ever increasing.
    """

    def __init__(
        self,
        small: Callable[[list[Query]], Sequence[Answer]],
        large: Callable[[list[Query]], Sequence[Answer]],
        accept: Callable[[Query, Answer], bool],
        *,
        screen: Callable[[list[Query]], Sequence[bool]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.small, self.large, self.accept, self.screen, self.clock = small, large, accept, screen, clock

    def __call__(self, queries: Sequence[Query]) -> CascadeOutput[Answer]:
        """The answers to a batch of queries. No function is called on an empty batch.

        Raises:
            ValueError: a function gave another number of answers than it was given queries.
        """
        queries = list(queries)
        started = self.clock()
        tried = [True] * len(queries)
        if self.screen is not None:
            tried = [bool(may) for may in _answered("screen", self.screen, queries)]
        screened = self.clock()
        answers: list = [None] * len(queries)
        from_small = [False] * len(queries)
        first = [index for index, may in enumerate(tried) if may]
        for index, answer in zip(first, _answered("small", self.small, [queries[i] for i in first]), strict=True):
            from_small[index] = bool(self.accept(queries[index], answer))
            answers[index] = answer
        tried_small = self.clock()
        rest = [index for index, taken in enumerate(from_small) if not taken]
        for index, answer in zip(rest, _answered("large", self.large, [queries[i] for i in rest]), strict=True):
            answers[index] = answer
        times = (screened - started, tried_small - screened, self.clock() - tried_small)
        return CascadeOutput(answers, from_small, CascadeStatistics(len(queries), len(first), sum(from_small), *times))


def _answered(name: str, function: Callable, queries: list) -> Sequence:
    answers = list(function(queries)) if queries else []
    if len(answers) != len(queries):
        raise ValueError(f"{name} gave {len(answers)} answers to {len(queries)} queries; it must give one each")
    return answers
