"""Every measure against a case worked by hand (binary fractions, so equality is exact)."""

import math

import numpy as np
import pytest

from lasem_fast import metrics

NAN = float("nan")
# Column 0: task 0 has 0.75 when learnt, 0.875 after task 1, 0.5 at the end.
MULTI_HEAD = [
    [0.75, NAN, NAN],
    [0.875, 1.0, NAN],
    [0.5, 0.75, 0.5],
]
SINGLE_HEAD = [
    [0.75, 0.5, 0.25],
    [0.875, 1.0, 0.625],
    [0.5, 0.75, 0.5],
]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert metrics.average_accuracy([[1.0, NAN], [0.5, 0.25]]) == 0.375


def test_backward_transfer():
    # (0.5 - 0.75 + 0.75 - 1.0) / 2
    assert metrics.backward_transfer(MULTI_HEAD) == -0.25


def test_forgetting_counts_from_the_best_row_not_from_the_diagonal():
    # (0.875 - 0.5 + 1.0 - 0.75) / 2
    assert metrics.forgetting(MULTI_HEAD) == 0.3125


def test_forgetting_is_negative_after_an_improvement():
    assert metrics.forgetting([[0.5, NAN], [0.75, 1.0]]) == -0.25


def test_forward_transfer():
    # (0.5 - 0.25 + 0.625 - 0.125) / 2; the first entry of the baseline plays no part
    assert metrics.forward_transfer(SINGLE_HEAD, [NAN, 0.25, 0.125]) == 0.375


def test_forward_transfer_of_a_multi_head_run_names_the_alternative():
    with pytest.raises(ValueError, match="use gain"):
        metrics.forward_transfer(MULTI_HEAD, [0.25, 0.25, 0.25])


def test_gain_over_training_alone():
    # (1.0 - 0.75 + 0.5 - 0.625) / 2
    assert metrics.gain(MULTI_HEAD, [0.75, 0.75, 0.625]) == 0.0625


def test_one_task_has_no_transfer_and_no_forgetting():
    R = [[0.5]]
    assert metrics.average_accuracy(R) == 0.5
    for value in (
        metrics.backward_transfer(R),
        metrics.forgetting(R),
        metrics.forward_transfer(R, [0.25]),
        metrics.gain(R, [0.25]),
    ):
        assert math.isnan(value)


def test_peak_is_the_test_accuracy_of_the_first_best_validation_epoch():
    valid = [0.25, 0.75, 0.5, 0.75]
    test = [0.125, 0.5, 1.0, 0.875]
    assert metrics.peak_epoch(valid) == 1
    assert metrics.peak_accuracy(valid, test) == 0.5


def test_learning_curve_area_is_the_mean_over_epochs():
    assert metrics.learning_curve_area([0.25, 0.75, 1.0, 1.0]) == 0.75


def test_forgetting_ratio_is_the_mean_of_ratios():
    final = [0.25, 0.75, 1.0]
    reference = [0.5, 1.0, 1.0]
    np.testing.assert_array_equal(metrics.retention(final, reference), [0.5, 0.75, 1.0])
    assert metrics.forgetting_ratio(final, reference) == 0.75  # and not 2.0 / 2.5


def test_share_frequency():
    configurations = [[True, False], [True, True], [False, False], [True, False]]
    np.testing.assert_array_equal(metrics.share_frequency(configurations), [0.75, 0.25])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.average_accuracy([0.5, 0.5]),
            r"R: expected a square matrix .* got shape \[2\]",
        ),
        (lambda: metrics.average_accuracy(np.empty((0, 0))), "square matrix"),
        (
            lambda: metrics.forgetting([[0.5, 0.0], [NAN, 0.5]]),
            "R: expected finite values on and below",
        ),
        (lambda: metrics.gain(MULTI_HEAD, [0.5]), r"alone: expected shape \[3\], got \[1\]"),
        (lambda: metrics.peak_epoch([]), "valid: expected a non-empty vector"),
        (lambda: metrics.learning_curve_area([[0.5]]), "test: expected a non-empty vector"),
        (lambda: metrics.peak_accuracy([0.5, 0.5], [0.5]), r"test: expected shape \[2\]"),
        (lambda: metrics.retention([0.5], [0.0]), "above 0"),
        (lambda: metrics.retention([0.5, 0.5], [0.5]), r"final: expected shape \[1\]"),
        (lambda: metrics.share_frequency([True]), r"\[tasks, stages\]"),
        (lambda: metrics.share_frequency([[2, 0]]), "configurations: expected bits"),
        (lambda: metrics.share_frequency([[1], [1, 0]]), "configurations: expected real numbers"),
        (lambda: metrics.average_accuracy("all"), "R: expected real numbers .* got str"),
        (lambda: metrics.average_accuracy(None), "R: expected real numbers .* got NoneType"),
        (lambda: metrics.average_accuracy([[1j]]), "R: expected real numbers .* got list"),
        (lambda: metrics.peak_epoch([0.5, NAN]), "valid: expected finite values, got NaN"),
        (lambda: metrics.retention([NAN], [0.5]), "final: expected finite values, got NaN"),
        (lambda: metrics.retention([], []), "reference: expected a non-empty vector"),
        (lambda: metrics.gain(MULTI_HEAD, [0.5, NAN, 0.5]), "alone: expected finite values"),
        (lambda: metrics.mean_interval([0.5], level="x"), "level: expected a probability .*'x'"),
        (lambda: metrics.mean_interval([0.5], level=None), "level: expected a probability .* None"),
        (lambda: metrics.paired_difference([0.5], [0.5], 2), "level: expected a probability"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
