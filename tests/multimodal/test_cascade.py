"""A small model before a large one: who answers what, and what the counts say."""

import pytest

from multimodal.q_zoom.cascade import Cascade, CascadeStatistics


class Models:
    """A small model that is right about even numbers, and a large one that is right; both take their time."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def small(self, queries):
        self.calls.append(("small", queries))
        self.now += 1.0 * len(queries)
        return [query if query % 2 == 0 else -1 for query in queries]

    def large(self, queries):
        self.calls.append(("large", queries))
        self.now += 10.0 * len(queries)
        return list(queries)

    def screen(self, queries):
        self.now += 0.5
        return [query < 8 for query in queries]

    def cascade(self, **options):
        return Cascade(self.small, self.large, lambda query, answer: answer >= 0, clock=self.clock, **options)


def test_each_query_is_answered_once_and_in_its_place():
    models = Models()
    output = models.cascade(screen=models.screen)([5, 8, 2, 9, 4, 0])
    assert output.answers == [5, 8, 2, 9, 4, 0]
    assert output.from_small == [False, False, True, False, True, True]
    assert models.calls == [("small", [5, 2, 4, 0]), ("large", [5, 8, 9])]
    statistics = output.statistics
    assert statistics == CascadeStatistics(6, 4, 3, 0.5, 4.0, 30.0)
    assert (statistics.screened_share, statistics.accepted_share) == (4 / 6, 3 / 4)
    assert statistics.predicted_speed_up() == pytest.approx(60 / 34.5)
    assert statistics.predicted_speed_up(20.0) == pytest.approx(120 / 64.5)


def test_without_a_screen_the_small_model_tries_all():
    models = Models()
    output = models.cascade()([2, 4])
    assert output.statistics.screened_share == 1
    assert models.calls == [("small", [2, 4])]
    assert output.statistics.predicted_speed_up() is None
    assert output.statistics.predicted_speed_up(10.0) == pytest.approx(10.0)


def test_a_cascade_can_be_slower():
    models = Models()
    assert models.cascade()([1, 3]).statistics.predicted_speed_up() == pytest.approx(20 / 22)


def test_an_empty_batch_calls_no_model():
    models = Models()
    output = models.cascade(screen=models.screen)([])
    assert (output.answers, models.calls) == ([], [])
    assert output.statistics == CascadeStatistics()
    assert output.statistics.predicted_speed_up() is None


def test_statistics_of_batches_add_up():
    models = Models()
    cascade = models.cascade()
    total = cascade([1, 2]).statistics + cascade([4, 6, 7]).statistics
    assert total == CascadeStatistics(5, 5, 3, 0.0, 5.0, 20.0)


@pytest.mark.parametrize("name", ["small", "large", "screen"])
def test_a_missing_answer_is_named(name):
    models = Models()
    functions = {"small": models.small, "large": models.large, "screen": lambda queries: [True] * len(queries)}
    functions[name] = lambda queries: []
    cascade = Cascade(functions["small"], functions["large"], lambda query, answer: False, screen=functions["screen"])
    with pytest.raises(ValueError, match=f"{name} gave 0 answers to 2 queries"):
        cascade([1, 2])
