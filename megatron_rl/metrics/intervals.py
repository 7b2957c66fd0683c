"""Confidence intervals of 95%, for shares and means of few problems."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's interval (JASA 22, 1927) of a share p = successes / trials, with n trials:

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    It stays within [0, 1], and is not a point where all trials, or none, succeed.
    """
    share, extra = successes / trials, Z * Z / trials
    middle = share + extra / 2
    half = math.sqrt(share * (1 - share) * extra + extra * extra / 4)
    # The ends are exact where all or none succeed, and rounding must not move them.
    low = 0.0 if successes == 0 else (middle - half) / (1 + extra)
    high = 1.0 if successes == trials else (middle + half) / (1 + extra)
    return low, high


def normal(estimates: Sequence[float]) -> tuple[float, float]:
    """mean -+ z s / sqrt(n) of n estimates in [0, 1] whose unbiased deviation is s, cut to [0, 1].

    For the mean over problems of an unbiased estimate of each, as pass@k is: what varies is the choice of problems and
    the draws together. One estimate says nothing of its deviation: [0, 1].
    """
    if len(estimates) < 2:
        return 0.0, 1.0
    mean, half = fmean(estimates), Z * stdev(estimates) / math.sqrt(len(estimates))
    return max(0.0, mean - half), min(1.0, mean + half)
