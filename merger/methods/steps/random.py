"""Random bits to numbers: uniform, and normal by the inverse of the distribution's function.

Only additions, products, quotients and square roots of float64 are used, each rounded as IEEE 754 has it, so that every
machine makes the same numbers. Not here: the bits (`arithmetic.Rng`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Wichura, 1988, Algorithm AS 241 (PPND16): numerators and denominators for the middle, the sides and the far sides.
# fmt: off
_MIDDLE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)
_SIDES = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
     1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
)
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
     2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
)
# fmt: on
_LN2 = 0.6931471805599453
_TERMS = 12


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers between 0 and 1, neither of them among these, from 64 random bits each."""
    import numpy as np

    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers of the normal distribution with mean 0 and standard deviation 1, from 64 random bits each."""
    import numpy as np

    share = uniform(bits)
    centred = share - 0.5
    result = centred * _ratio(_MIDDLE, 0.180625 - centred * centred)
    outer = np.abs(centred) > 0.425
    least = np.minimum(share[outer], 1.0 - share[outer])
    distance = np.sqrt(-_logarithm(least))
    sides = np.where(distance <= 5.0, _ratio(_SIDES, distance - 1.6), _ratio(_FAR, distance - 5.0))
    result[outer] = np.where(centred[outer] < 0, -sides, sides)
    return result


def _ratio(of: tuple[Sequence[float], Sequence[float]], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return _polynomial(of[0], x) / _polynomial(of[1], x)


def _polynomial(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total


def _logarithm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """By its series, as libraries round the last bit of theirs in different ways: ln m = 2 artanh((m - 1)/(m + 1))."""
    import numpy as np

    mantissa, exponent = np.frexp(x)  # in [0.5, 1)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial([1.0 / (2 * term + 1) for term in range(_TERMS)], s * s)
    return 2.0 * s * series + (exponent - small) * _LN2
