"""The laws: test loss L as a function of size N and resource X, with analytic derivatives.

Every law is written as L = offset + scale_i * basis, where `scale_i` is a free factor of curve i (10^E(N) in the
paper's law) or absent. Given the other parameters the best scale has a closed form, so the search runs over the others
alone (variable projection, Golub and Pereyra 1973): two of them in the paper's law, however many sizes there are.

Logarithms are to base 10, as in the paper's code. Parameters that span decades are searched as logarithms.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

LN10 = float(np.log(10.0))


@dataclasses.dataclass(frozen=True)
class Points:
    """What a law is evaluated on: n points of m curves."""

    log_x: np.ndarray  # [n] log10 X
    curve: np.ndarray  # [n] int, which curve
    size: np.ndarray  # [m] N of each curve (or its reuse, or group size)

    @property
    def n_of(self) -> np.ndarray:  # [n]
        return self.size[self.curve]


@dataclasses.dataclass(frozen=True)
class Parts:
    """A law at some parameters. p counts the searched ones, in the order of `Form.names`."""

    offset: np.ndarray  # [n]
    d_offset: np.ndarray  # [p, n]
    basis: np.ndarray | None = None  # [n], None: no free scale
    d_basis: np.ndarray | None = None  # [p, n]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A searched parameter. Bounds and starts are of what is searched: the logarithm if `log`."""

    name: str
    bounds: Callable[[Points], tuple[float, float]]
    starts: Callable[[Points], Sequence[float]]
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Form:
    """A law. The searched parameters are `shared` ones, then each of `own` for all curves in turn."""

    formula: str
    shared: tuple[Parameter, ...]
    own: tuple[Parameter, ...]
    scale: str | None
    """Name of the free factor of each curve; "e" is reported as its logarithm."""
    evaluate: Callable[[np.ndarray, Points], Parts]
    min_curves: int = 1
    """Fewer sizes than this leave the law undetermined."""

    def count(self, num_curves: int) -> int:
        """Free parameters in all, scales included."""
        return len(self.shared) + (len(self.own) + (self.scale is not None)) * num_curves

    def own_count(self) -> int:
        """Free parameters that belong to one curve."""
        return len(self.own) + (self.scale is not None)


# ---------------------------------------------------------------------------------------------------------- parameters


def _fixed(low: float, high: float, *starts: float, log: bool = False) -> Callable[[str], Parameter]:
    return lambda name: Parameter(name, lambda _: (low, high), lambda _: starts, log)


def _size(name: str) -> Parameter:
    """A size at which something turns: two decades beyond what was measured on either side."""
    return Parameter(
        name,
        lambda p: (float(np.log10(p.size.min())) - 2, float(np.log10(p.size.max())) + 2),
        lambda p: (float(np.log10(np.median(p.size))), float(np.log10(p.size.max()))),
        log=True,
    )


def _resource(name: str, below: float, above: float, *places: float) -> Parameter:
    """An X: from `below` decades under the smallest measured to `above` over the largest; starts between them."""

    def span(p: Points) -> tuple[float, float]:
        return float(p.log_x.min()), float(p.log_x.max())

    return Parameter(
        name,
        lambda p: (span(p)[0] - below, span(p)[1] + above),
        lambda p: tuple(span(p)[0] + place * (span(p)[1] - span(p)[0]) for place in places),
        log=True,
    )


K_MAX = _fixed(0.0, 2.0, 0.05, 0.2)("k_max")
K_OWN = _fixed(0.0, 1.0, 0.05)("k")
FLOOR = _fixed(0.0, 1.0, 0.02, 0.2)


def _each(derivative: np.ndarray, points: Points) -> np.ndarray:
    """[n] derivative by a curve's own parameter -> [m, n], zero at the points of other curves."""
    return np.where(np.arange(len(points.size))[:, None] == points.curve, derivative, 0.0)


def _saturation(log_n0: float, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """s = N / (N + N0) and its derivative by log10 N0, [n] each."""
    s = 1.0 / (1.0 + 10.0**log_n0 / points.n_of)
    return s, -LN10 * s * (1.0 - s)


def _power(exponent: np.ndarray, d_exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """10^exponent [n] and its derivatives [p, n]."""
    value = 10.0**exponent
    return value, LN10 * value * d_exponent


# ---------------------------------------------------------------------------------------------------------------- laws


def _loglinear(theta: np.ndarray, points: Points) -> Parts:
    basis, d_basis = _power(-theta[points.curve] * points.log_x, _each(-points.log_x, points))
    return Parts(np.zeros_like(basis), np.zeros_like(d_basis), basis, d_basis)


def _kn(theta: np.ndarray, points: Points) -> tuple[np.ndarray, np.ndarray]:
    """k(N) log X of the saturating slope [n] and its derivatives by k_max and log10 N0 [2, n]."""
    s, ds = _saturation(theta[1], points)
    return theta[0] * s * points.log_x, np.stack([s, theta[0] * ds]) * points.log_x


def _loglinear_kn(theta: np.ndarray, points: Points) -> Parts:
    exponent, d_exponent = _kn(theta, points)
    basis, d_basis = _power(-exponent, -d_exponent)
    return Parts(np.zeros_like(basis), np.zeros_like(d_basis), basis, d_basis)


def _loglinear_kn_floor(theta: np.ndarray, points: Points) -> Parts:
    parts = _loglinear_kn(theta[:2], points)
    assert parts.basis is not None and parts.d_basis is not None
    nothing = np.zeros((1, len(parts.basis)))
    return Parts(
        np.full_like(parts.basis, theta[2]),
        np.concatenate([parts.d_offset, nothing + 1.0]),
        parts.basis,
        np.concatenate([parts.d_basis, nothing]),
    )


def _loglinear_kn_e0(theta: np.ndarray, points: Points) -> Parts:
    exponent, d_exponent = _kn(theta[:2], points)
    s, ds = _saturation(theta[3], points)
    return Parts(*_power(theta[2] * s - exponent, np.concatenate([-d_exponent, np.stack([s, theta[2] * ds])])))


def _invexp(theta: np.ndarray, points: Points) -> Parts:
    k, distance = theta[1:][points.curve], theta[0] - points.log_x
    return Parts(*_power(k * distance, np.concatenate([k[None], _each(distance, points)])))


def _powlaw(theta: np.ndarray, points: Points) -> Parts:
    floor, a, b, alpha, beta = theta
    size, resource = a - np.log10(points.n_of), b - points.log_x
    zero = np.zeros_like(size)
    of_n, d_of_n = _power(alpha * size, np.stack([zero, zero + alpha, zero, size, zero]))
    of_x, d_of_x = _power(beta * resource, np.stack([zero, zero, zero + beta, zero, resource]))
    constant = np.stack([zero + 1.0, zero, zero, zero, zero])
    return Parts(floor + of_n + of_x, constant + d_of_n + d_of_x)


def _powlawmul(theta: np.ndarray, points: Points) -> Parts:
    k_max, log_n0, c0, r = theta
    s, ds = _saturation(log_n0, points)
    log_n = np.log10(points.n_of)
    distance = c0 + r * log_n - points.log_x
    k = k_max * s
    return Parts(*_power(k * distance, np.stack([s * distance, k_max * ds * distance, k, k * log_n])))


def _postopenai(theta: np.ndarray, points: Points) -> Parts:
    (log_n0, beta, alpha), own = theta[:3], theta[3:]
    m = len(points.size)
    b0, c0 = own[:m][points.curve], own[m:][points.curve]
    size = log_n0 - np.log10(points.n_of)
    of_n, x, c = 10.0 ** (beta * size), 10.0**points.log_x, 10.0**c0
    of_x = 10.0**b0 / (x + c)
    inner = of_n + of_x
    value = inner**alpha
    d_inner = np.concatenate(
        [
            np.stack([beta * LN10 * of_n, size * LN10 * of_n]),
            _each(LN10 * of_x, points),
            _each(-LN10 * of_x * c / (x + c), points),
        ]
    )
    outer = alpha * value / inner * d_inner
    return Parts(value, np.concatenate([outer[:2], (value * np.log(inner))[None], outer[2:]]))


def _decomposition(theta: np.ndarray, points: Points) -> Parts:
    (floor, log_n0, alpha, beta), d0 = theta[:4], theta[4:][points.curve]
    size, distance = log_n0 - np.log10(points.n_of), points.log_x - d0
    of_n = 10.0 ** (alpha * size)
    basis = 1.0 / (1.0 + 10.0 ** (beta * distance))
    slope = -LN10 * basis * (1.0 - basis)  # by beta * distance
    zero = np.zeros_like(size)
    shared = np.stack([zero + 1.0, alpha * LN10 * of_n, size * LN10 * of_n, zero])
    own = _each(zero, points)
    return Parts(
        floor + of_n,
        np.concatenate([shared, own]),
        basis,
        np.concatenate([np.stack([zero, zero, zero, slope * distance]), _each(-beta * slope, points)]),
    )


def _sigmoid(theta: np.ndarray, points: Points) -> Parts:
    m = len(points.size)
    mid, steepness, floor = (theta[i * m : (i + 1) * m][points.curve] for i in range(3))
    distance = points.log_x - mid
    gone = 1.0 / (1.0 + 10.0 ** (-steepness * distance))  # share of the gain that is made
    slope = LN10 * gone * (1.0 - gone)  # by steepness * distance
    d_gone = np.concatenate(
        [_each(-steepness * slope, points), _each(distance * slope, points), _each(np.zeros_like(gone), points)]
    )
    d_floor = np.concatenate([np.zeros((2 * m, len(gone))), _each(gone, points)])
    return Parts(floor * gone, floor * d_gone + d_floor, 1.0 - gone, -d_gone)


_N0, _N1 = _size("n0"), _size("n1")
_ALPHA = _fixed(0.01, 5.0, 0.2, 1.0)("alpha")
_BETA = _fixed(0.01, 5.0, 0.1, 1.0)("beta")

FORMS: dict[str, Form] = {
    "loglinear": Form("L = 10^E_i X^-k_i", (), (K_OWN,), "e", _loglinear),
    "loglinear_kn": Form("L = 10^E(N) X^-k(N), k = k_max / (1 + N0/N)", (K_MAX, _N0), (), "e", _loglinear_kn, 2),
    "loglinear_kn_e0": Form(
        "as loglinear_kn, E = e_max / (1 + N1/N)",
        (K_MAX, _N0, _fixed(-10.0, 10.0, 0.5, 2.0)("e_max"), _N1),
        (),
        None,
        _loglinear_kn_e0,
        3,
    ),
    "loglinear_kn_floor": Form(
        "L = L_inf + 10^E(N) X^-k(N)", (K_MAX, _N0, FLOOR("l_inf")), (), "e", _loglinear_kn_floor, 2
    ),
    "invexp": Form(
        "L = (S/X)^k_i",
        (_resource("s", 30.0, 30.0, -1.0, -0.2, 0.5),),
        (_fixed(1e-6, 1.0, 0.05)("k"),),
        None,
        _invexp,
    ),
    "powlaw": Form(
        "L = E + (A/N)^alpha + (B/X)^beta",
        (FLOOR("l_inf"), _size("a"), _resource("b", 30.0, 2.0, -1.0, -3.0), _ALPHA, _BETA),
        (),
        None,
        _powlaw,
        3,
    ),
    "powlawmul": Form(
        "L = (C0 N^r / X)^k(N)",
        (K_MAX, _N0, _fixed(-30.0, 30.0, 5.0, 15.0, log=True)("c0"), _fixed(-5.0, 5.0, 0.0, 1.0)("r")),
        (),
        None,
        _powlawmul,
        3,
    ),
    "postopenai": Form(
        "L = ((N0/N)^beta + B_i/(X + C_i))^alpha",
        (_N0, _BETA, _fixed(0.01, 3.0, 0.2, 0.8)("alpha")),
        (_resource("b0", 12.0, 6.0, 0.3), _resource("c0", 6.0, 6.0, 0.3)),
        None,
        _postopenai,
        3,
    ),
    "decomposition": Form(
        "L = L_inf + (N0/N)^alpha + lambda_i / (1 + (X/D0_i)^beta)",
        (FLOOR("l_inf"), _N0, _ALPHA, _BETA),
        (_resource("d0", 3.0, 3.0, 0.5),),
        "lambda",
        _decomposition,
        3,
    ),
    "sigmoid": Form(
        "1 - L = R0 + (A - R0) / (1 + (X_mid/X)^B), floor = 1 - A",
        (),
        (
            _resource("x_mid", 3.0, 3.0, 0.5),
            _fixed(0.05, 10.0, 1.0)("b"),
            _fixed(0.0, 1.0, 0.3)("floor"),
        ),
        "l0",
        _sigmoid,
    ),
}
"""The first is a line per curve; `loglinear_kn` is arXiv 2509.25300's, `loglinear_kn_e0` to `postopenai` are in its
analysis code, `decomposition` in its appendix; `sigmoid` is ScaleRL's (arXiv 2510.13786), with R0 = 1 - l0 fitted."""
