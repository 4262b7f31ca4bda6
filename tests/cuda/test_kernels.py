"""The kernels on the CPU: every branch, in both orders of fibers and blocks, against the specification in float64."""

from __future__ import annotations

from typing import Any

import branches
import checks
import fake
import numpy as np
import pytest

from swl.backends.cupy import structs
from swl.backends.cupy.backend import CupyBackend
from swl.backends.cupy.compilation import OPTIONS, source
from swl.backends.cupy.cross_entropy import _softcap
from swl.backends.cupy.plans import Limits, plan
from swl.backends.protocol import Target

pytestmark = pytest.mark.usefixtures("on_fake")


def make() -> CupyBackend:
    """Return a backend that knows the device as it is now, with kernels that were compiled before."""
    backend = CupyBackend(fake.cupy())
    backend._modules = MODULES
    return backend


MODULES: dict[tuple[str, ...], Any] = {}


@pytest.mark.parametrize("case", [*branches.cases(), *branches.single_options()], ids=str)
def test_every_branch_agrees_with_the_specification(case: branches.Case) -> None:
    checks.check_case(case, make)


def test_class_ids() -> None:
    checks.check_ids(make)


def test_bias_and_column_sums() -> None:
    checks.check_affine(make)


@pytest.mark.parametrize(
    "limits",
    [Limits(132, 227 * 1024, True), Limits(108, 163 * 1024), Limits(40, 64 * 1024), Limits(16, 99 * 1024, True)],
    ids=str,
)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_a_plan_covers_every_row_within_the_limits(itemsize: int, limits: Limits) -> None:
    for N in (1, 2, 7, 40, 1000, 10**6):
        for C in (1, 2, 10, 32, 33, 500, 1000, 4096, 32000, 50257, 128256, 10**6, 2 * 10**8):
            how = plan(N, C, itemsize, limits)
            packs = -(-(C + how.V - 1) // how.V)
            assert how.blocks < 2**31
            assert how.threads % 32 == 0
            assert how.shared + (how.stage if how.on_chip else 0) <= limits.shared
            if how.lanes:
                assert how.lanes * how.keep >= packs
                assert how.blocks * how.threads >= N * how.lanes
            elif how.variant == "split":
                assert how.splits * how.packs_each >= packs > (how.splits - 1) * how.packs_each
                assert N * how.splits >= min(limits.processors, N * (packs // 1024))
            elif how.variant == "cluster":
                assert limits.clusters
                assert how.on_chip
                assert how.blocks == N * how.splits
                assert how.splits * how.packs_each >= packs
                assert 16 * (how.packs_each - how.keep * how.threads) <= how.stage
            else:
                assert how.blocks == N


def test_offsets_are_64_bit() -> None:
    checks.check_offsets(make)


def test_a_shard_of_the_classes() -> None:
    checks.check_shard(make)


def test_what_cancels_in_the_formula_keeps_its_digits() -> None:
    checks.check_digits(make)


def test_a_nan_stays_in_its_row() -> None:
    z = np.random.default_rng(0).normal(size=(4, 3000)).astype(np.float32)
    backend = make()

    def sweep(z: Any) -> tuple[Any, Any]:
        ids, _, _ = backend.prepare_ids(backend.asarray(np.arange(4)), 3000, -100, None)
        out = backend.empty(z.shape, z.dtype)
        scale = backend.asarray(np.ones(1, np.float32))
        target = Target(ids=ids)
        rows = backend.cross_entropy_forward_backward(backend.asarray(z), target, scale, out, False)
        return rows.loss.get(), out.get()

    loss, grad = sweep(z)
    z[2, 1234] = np.nan
    loss_nan, grad_nan = sweep(z)
    others = [0, 1, 3]
    assert np.isnan(loss_nan[2])
    assert np.isnan(grad_nan[2]).all()
    assert loss_nan[others].tobytes() == loss[others].tobytes()
    assert grad_nan[others].tobytes() == grad[others].tobytes()


@pytest.mark.parametrize("struct", [structs.PROBLEM, structs.ROWS_OUT], ids=lambda s: s.name)
@pytest.mark.parametrize("change", ["two fields in each other's place", "another type", "a field more"])
def test_a_struct_that_host_and_kernels_do_not_share_does_not_compile(struct: structs.Struct, change: str) -> None:
    fields = list(struct.fields.items())
    if change == "two fields in each other's place":
        fields[0], fields[1] = fields[1], fields[0]
    elif change == "another type":
        fields[0] = fields[0][0], "const i64*"
    else:
        fields.append(("more", "i64"))
    wrong = structs.Struct(struct.name, dict(fields))
    kernel = "ce_combine<float, PLAIN>"
    module = fake.cupy().RawModule(
        code=source("cross_entropy") + wrong.check("float"), options=OPTIONS, name_expressions=(kernel,)
    )
    with pytest.raises(Exception, match=f"(static assertion failed: {struct.name}<float>|has no member named|'more')"):
        module.get_function(kernel)


def test_exponentials_of_differences_are_off_by_no_more_than_the_differences() -> None:
    """But for the card's 2ˣ itself, which has two units in the last place more."""
    xp = fake.cupy()
    kernel = """
extern "C" __global__ void exponentials(const float* u, const float* s, float* without, float* with) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  without[i] = exp_of_difference(u[i]);
  with[i] = exp_of_difference(u[i], s[i]);
}
"""
    exponentials = xp.RawModule(code=source("class_ids") + kernel, options=OPTIONS).get_function("exponentials")
    rng = np.random.default_rng(0)
    u, s = -rng.uniform(0, 70, 1 << 16).astype(np.float32), rng.uniform(0, 14, 1 << 16).astype(np.float32)
    u[:1000] = np.linspace(-1e-3, 0, 1000)
    without, both = xp.empty(u.shape, np.float32), xp.empty(u.shape, np.float32)
    exponentials((256,), (256,), (xp.asarray(u), xp.asarray(s), without, both))
    for got, x in ((without.get(), u.astype(np.float64)), (both.get(), u.astype(np.float64) - s)):
        error = np.abs(got / np.exp(x) - 1)
        assert np.all(error <= (2 * np.abs(x) + 4) * 2.0**-24)
    assert without.get()[u == 0].tolist() == [1.0] * np.count_nonzero(u == 0)


def test_softcap_and_its_slope_have_their_digits() -> None:
    """From 0 to infinity, and for softcaps whose inverse has more digits than float32."""
    xp = fake.cupy()
    kernel = """
extern "C" __global__ void capped(float softcap, float rate, float rate_rest, const float* r, float* z, float* slope) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  Problem<float> p{};
  p.softcap = softcap, p.softcap_rate = rate, p.softcap_rate_rest = rate_rest;
  z[i] = final_logit<true, SOFTCAP>(p, r[i], slope[i]);
}
"""
    capped = xp.RawModule(code=source("cross_entropy") + kernel, options=OPTIONS).get_function("capped")
    for softcap in (0.3, 1.0, 30.0, 50.1):
        _, rate, rest = _softcap(softcap, np.float32)
        r = np.float32(softcap) * np.linspace(-12, 12, 1 << 16, dtype=np.float32)
        r[-8:] = [0.0, -1e-30, 1e-30, 0.5501 * softcap, -0.5499 * softcap, np.inf, -np.inf, np.nan]
        z, slope = xp.empty(r.shape, np.float32), xp.empty(r.shape, np.float32)
        capped((256,), (256,), (np.float32(softcap), rate, rest, xp.asarray(r), z, slope))
        x = r.astype(np.float64) / softcap
        e = np.exp(-2 * np.abs(x))
        for got, want in ((z.get(), np.float32(softcap) * np.tanh(x)), (slope.get(), 4 * e / (1 + e) ** 2)):
            assert np.isnan(got[-1])
            units = np.abs(got - want)[:-1] / np.spacing(np.abs(want[:-1]).astype(np.float32))
            assert np.all(units <= 4), f"softcap {softcap}: {units.max()} units in the last place"
